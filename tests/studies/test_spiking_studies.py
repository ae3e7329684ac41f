"""The studies of the spiking systems, quick and without data."""

from __future__ import annotations

import pytest
import torch

from hasten.studies import Scale, astrosnn, dcls_delays
from hasten.studies import _spiking as part
from hasten.testing import StudyKit


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path_factory, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setenv("HASTEN_CACHE", str(tmp_path_factory.mktemp("cache")))


pytestmark = pytest.mark.usefixtures("one_thread")


class TestDelays(StudyKit):
    name = "dcls-delays"

    def test_the_generated_checks_hold(self) -> None:
        result, _ = self.result()
        judged = {c.name: c for c in result.checks if c.holds is not None}
        assert judged["numbers that differ between convolution, delay line and stream"].holds
        assert judged["relative error of the delay's gradient"].holds
        assert judged["timing task, learned delays"].holds


class TestAstro(StudyKit):
    name = "astrosnn"

    def test_both_forms_agree(self) -> None:
        result, _ = self.result()
        judged = {c.name: c for c in result.checks if c.holds is not None}
        assert judged["difference of the forms, float64"].holds
        assert judged["bytes of state behind 4096 tokens"].holds


@pytest.mark.slow
class TestIir(StudyKit):
    name = "iir-snn"


@pytest.mark.slow
class TestConfidence(StudyKit):
    name = "dynamic-confidence"


def test_the_nearest_mean_and_the_recovery_can_fail() -> None:
    known, labels = torch.eye(6).repeat(4, 1), torch.arange(6).repeat(4)
    assert dcls_delays._nearest(known, labels, known, labels) == 1.0
    assert dcls_delays._nearest(known, labels, known, (labels + 1) % 6) == 0.0
    times = torch.randint(0, 12, (6, 12))
    assert dcls_delays._recovered(12 - times, times) == 1.0
    assert dcls_delays._recovered(times, times) < 0.9


def test_the_bits_of_a_uniform_guess_are_eight() -> None:
    model = torch.nn.Embedding(256, 256)
    torch.nn.init.zeros_(model.weight)
    assert astrosnn.bits(model, torch.zeros(1100, dtype=torch.uint8), 2) == pytest.approx(8.0)


def test_intervals_of_seeds() -> None:
    assert part.points([0.5]) == "50.00 (one seed)"
    assert part.points([0.5, 0.5, 0.5]) == "50.00 ± 0.00"
    assert part.points([0.4, 0.5, 0.6]) == "50.00 ± 24.84"


def test_data_that_are_not_there_are_none() -> None:
    for find in (part.fashion, part.spoken_digits, part.events, part.shakespeare):
        assert find(Scale()) is None
