import pytest

from hasten.studies import spann as subject
from hasten.studies._spann_bench import recall_at
from hasten.studies._spann_text import text_vectors
from hasten.studies.study import Scale
from hasten.testing import StudyKit

QUICK = Scale(quick=True)


@pytest.mark.slow
class TestStudy(StudyKit):
    name = "spann"


def test_reading_everything_is_exact(tmp_path):
    (check,) = subject.exactness(QUICK, tmp_path)
    assert check.holds


def test_wrong_answers_are_caught(tmp_path, monkeypatch):
    real = subject.Spann.search

    def worse(self, queries, k, **knobs):
        return real(self, queries, k, lists=1, beam=1)

    monkeypatch.setattr(subject.Spann, "search", worse)
    (check,) = subject.exactness(QUICK, tmp_path)
    assert check.holds is False


def test_nothing_acknowledged_is_lost(tmp_path):
    checks = list(subject.crash(QUICK, tmp_path))
    assert [c.holds for c in checks] == [True, True]


def test_a_log_that_is_not_synced_first_is_caught(tmp_path, monkeypatch):
    from hasten.retrieve.index.wal import Log

    monkeypatch.setattr(Log, "append", lambda self, record: None)
    checks = list(subject.crash(QUICK, tmp_path))
    assert False in [c.holds for c in checks]


def test_curves_are_read_between_their_points():
    curve = [(1.0, 100.0, 0.0, 0.5), (4.0, 400.0, 0.0, 0.9)]
    assert recall_at(curve, 0, 2.0) == pytest.approx(0.7)
    assert recall_at(curve, 1, 400) == pytest.approx(0.9)


def test_without_the_texts_pruning_on_them_is_not_judged():
    assert text_vectors(QUICK) == (None, None)
