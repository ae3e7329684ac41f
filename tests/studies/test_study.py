from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hasten.clock import ManualClock
from hasten.errors import ConfigurationError, DataError
from hasten.studies import Check, Scale, Study, execute, find_data, load, names, verdict_of


@given(st.lists(st.sampled_from([True, False, None])))
def test_verdict_counts_only_what_was_judged(marks: list[bool | None]) -> None:
    checks = [Check(str(i), 1.0, holds=m, note="n") for i, m in enumerate(marks)]
    judged = [m for m in marks if m is not None]
    expected = (
        "not run"
        if not judged
        else "holds"
        if False not in judged
        else "in part"
        if True in judged
        else "does not hold"
    )
    assert verdict_of(checks) == expected


@given(st.floats(allow_nan=True), st.floats(allow_nan=False))
def test_conditions_are_what_they_say(value: float, bound: float) -> None:
    assert Check.at_least("x", value, bound).holds is (value >= bound)
    assert Check.at_most("x", value, bound).holds is (value <= bound)
    assert Check.within("x", value, bound, bound).holds is (value == bound)
    json.loads(json.dumps(Check.at_most("x", value, bound).to_json(), allow_nan=False))


def test_numpy_values_become_plain() -> None:
    check = Check("x", np.float32(2.0), holds=np.bool_(True))  # type: ignore[arg-type]
    assert check.holds is True
    assert isinstance(check.value, float)


def test_a_check_without_verdict_needs_a_reason() -> None:
    with pytest.raises(ConfigurationError, match="give a note"):
        Check("x", None)
    assert Check.unavailable("x", "no GPU").to_json()["holds"] is None


def test_execute_takes_the_time_from_the_clock_and_reports_each_check() -> None:
    clock = ManualClock()
    seen = []

    def run(scale: Scale):  # type: ignore[no-untyped-def]
        scale.progress("half", 0.5)
        clock.advance(2.5)
        yield Check.at_least("a", 2.0, 1.0, "×")
        yield Check.at_most("b", math.nan, 1.0, "s")

    stages: list[tuple[str, float]] = []
    scale = Scale(progress=lambda s, x: stages.append((s, x)))
    result = execute(Study("s", "c", {"ratio": 2.0}, run), scale, clock=clock, on_check=seen.append)
    assert result.seconds == 2.5
    assert result.verdict == "in part"
    assert stages == [("half", 0.5)]
    assert [c.name for c in seen] == ["a", "b"]
    document = json.loads(json.dumps(result.to_json(), allow_nan=False))
    assert list(document) == ["system", "claim", "published", "verdict", "checks", "machine", "seconds"]
    assert list(document["checks"][0]) == ["name", "value", "unit", "threshold", "holds", "note"]
    assert document["machine"]["hash"]


def test_a_study_that_yields_nonsense_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="yields Check"):
        execute(Study("s", "c", "p", lambda scale: [1]), Scale())  # type: ignore[list-item,arg-type,return-value]
    twice = [Check.at_least("a", 1, 1), Check.at_least("a", 1, 1)]
    with pytest.raises(ConfigurationError, match="unique"):
        execute(Study("s", "c", "p", lambda scale: twice), Scale())


def test_registry_reads_file_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "some_studies"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "_helper.py").write_text("raise RuntimeError('never imported')")
    body = "from hasten.studies import Study\nstudy = Study({!r}, 'c', 'p', lambda scale: [])\n"
    (package / "fast_net.py").write_text(body.format("fast-net"))
    (package / "misnamed.py").write_text(body.format("other"))
    (package / "empty.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert names("some_studies") == ["empty", "fast-net", "misnamed"]
    assert load("fast-net", "some_studies").system == "fast-net"
    with pytest.raises(ConfigurationError, match="did you mean 'fast-net'"):
        load("fastnet", "some_studies")
    with pytest.raises(ConfigurationError, match="name it 'misnamed'"):
        load("misnamed", "some_studies")
    with pytest.raises(ConfigurationError, match="exposes no 'study'"):
        load("empty", "some_studies")


def test_every_study_loads_under_its_name() -> None:
    for name in names():
        study = load(name)
        assert study.claim
        assert study.published


def test_data_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inner = tmp_path / "here"
    inner.mkdir()
    monkeypatch.chdir(inner)
    monkeypatch.delenv("HASTEN_DATA", raising=False)
    assert find_data(None) is None
    (tmp_path / "shared" / "data").mkdir(parents=True)
    assert find_data(None) == Path("../shared/data")
    monkeypatch.setenv("HASTEN_DATA", str(inner))
    assert find_data(None) == inner
    with pytest.raises(DataError, match="--data DIR"):
        find_data(tmp_path / "absent")
    (inner / "a.txt").write_text("")
    assert Scale(data=inner).find("a.txt") == inner / "a.txt"
    assert Scale(data=inner).find("b.txt") is None
