"""Verdicts, and contenders that take turns."""

import json

import pytest


@pytest.mark.parametrize(
    ("score", "limit", "verdict"),
    [(0.9, False, "MISSED"), (2.0, False, "reached"), (3.0, False, "aim reached"), (0.2, True, "aim reached")]
    + [(0.5, True, "reached"), (2.5, True, "MISSED")],
)
def test_verdict_follows_the_bars(score, limit, verdict):
    from harness import Row

    low, high = (1.0, 0.3) if limit else (2.0, 3.0)
    assert Row("x", score=score, at_least=low, aim=high, limit=limit).verdict == verdict


def test_a_row_without_a_figure_says_why():
    from harness import Field, Row

    field = Field()
    field.absent["peer"] = "not installed"
    row = field.compare("x", {"ours": [1.0]}, "ours", "peer", 1, "tokens/s", 2.0)
    assert row.score is None
    assert row.verdict == "not installed"
    assert Row("x", score=1.0).verdict == "for information"


def test_ratio_is_above_one_when_ours_takes_less_time():
    from harness import Field

    row = Field().compare("x", {"ours": [1.0, 1.1, 0.9], "peer": [2.0, 2.2, 1.8]}, "ours", "peer", 64, "tokens/s", 2.5)
    assert row.score == pytest.approx(2.0)
    assert (row.ours, row.theirs) == (64.0, 32.0)
    assert row.verdict == "MISSED"


def test_report_writes_rows_with_their_verdicts(tmp_path):
    from harness import Row, report

    path = tmp_path / "out.json"
    report("name", [Row("x", "peer", 3.0, 1.0, "tokens/s", 3.0, 2.9, 3.1, 2.0, 5.0)], path, extra=1)
    document = json.loads(path.read_text())
    assert document["rows"][0]["verdict"] == "reached"
    assert document["extra"] == 1
    assert document["machine"]["hash"]


def test_a_contender_that_cannot_load_is_absent_with_one_line(tmp_path):
    from harness import Field

    field = Field()
    field.add("ours", "hasten", model=str(tmp_path / "nothing"), precision="bf16", threads=1)
    assert "ModelLoadError" in field.absent["ours"]


@pytest.mark.slow
def test_turns_and_failures_of_a_worker(tmp_path):
    from harness import Field
    from random_model import tiny, write_folder

    from hasten.language.config import PRESETS

    write_folder(tiny(PRESETS["random-245m"]), tmp_path / "m")
    field = Field()
    try:
        for name in ("a", "b"):
            field.add(name, "hasten", model=str(tmp_path / "m"), precision="fp32", threads=1)
        times = field.in_turns(["a", "b", "nobody"], "decode", 2, sequences=2, context=8, tokens=2)
        assert {name: len(t) for name, t in times.items()} == {"a": 2, "b": 2}
        assert all(t > 0 for row in times.values() for t in row)
        a, b = (field.present[n].ask("logits", tokens=[20, 30, 40]) for n in ("a", "b"))
        assert a == b
        # more sequences than there is room for
        assert field.in_turns(["a"], "decode", 1, sequences=99, context=8, tokens=1) == {}
        assert "decode failed" in field.absent["a"]
        assert list(field.present) == ["b"]
    finally:
        field.close()
