"""The last run of a search decides among those that are nearly as fast."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from hasten.budget import Budget
from hasten.clock import ManualClock
from hasten.compress import Recipe
from hasten.measure.latency import Comparison, Protocol, compare
from hasten.tune.confirm import LEADERS, confirm, thorough
from hasten.tune.frontier import Axis, Candidate

AXES = (Axis("latency@p50"), Axis("quality", maximise=True, kind="ratio"))
TRUE = {"unchanged": 9.0, "a": 1.01, "b": 1.0, "c": 1.02, "d": 1.03, "e": 1.04, "far": 2.0}


def _candidate(name: str, seconds: float, quality: float = 0.99) -> Candidate:
    return Candidate(name, {"format": name}, {"latency@p50": seconds, "quality": quality})


class _Bench:
    """Models that take the time of the table; counts what is built."""

    def __init__(self, budget: str) -> None:
        self.budget, self.built, self.runs = Budget.parse(budget), [], []

    def build(self, candidate: Candidate) -> tuple[nn.Module, Recipe]:
        self.built.append(candidate.name)
        return nn.Identity(), Recipe()

    def compare(self, others: Mapping[str, nn.Module]) -> Comparison:
        self.runs.append(list(others))
        clock = ManualClock()
        calls = {n: (lambda n=n: clock.advance(TRUE[n])) for n in ("unchanged", *others)}
        return compare(calls, Protocol(min_samples=3, min_time=0), clock=clock)

    def values(self, model: nn.Module, comparison: Comparison, name: str) -> dict[str, float]:
        return {"latency@p50": comparison.samples[name].median, "quality": 0.99}

    def run(self, *pool: Candidate, **more: Any) -> Any:
        return confirm(pool, AXES, self.budget, self.build, self.compare, self.values, **more)


def test_the_leaders_are_measured_together_and_the_last_run_decides() -> None:
    bench = _Bench("quality>98%")
    pool = [_candidate(n, s) for n, s in (("unchanged", 9.0), ("a", 0.97), ("b", 1.0), ("c", 1.05), ("far", 2.0))]
    found = bench.run(*pool)
    assert bench.runs == [["a", "b", "c"]]
    assert found.best.name == "b"
    assert found.best.detail["confirmed"] is True
    now = {c.name: round(c.values["latency@p50"], 6) for c in found.pool}
    assert now == {**{n: TRUE[n] for n in "abc"}, "unchanged": 9.0, "far": 2.0}


def test_those_that_may_not_win_are_not_measured_again() -> None:
    tight = _candidate("a", 1.0, 0.999)
    worse = _candidate("b", 1.0, 0.9)
    bench = _Bench("p50<3s")  # keeps quality: b loses to a whatever the clock says
    bench.run(tight, worse, _candidate("c", 1.1, 0.9985))
    assert bench.runs == [["a", "c"]]
    bench = _Bench("quality>98%")  # b is outside
    bench.run(tight, replace(worse, violations=("quality",)))
    assert bench.runs == [["a"]]


def test_a_slower_truth_lets_the_next_ones_in() -> None:
    bench = _Bench("quality>98%")
    pool = [_candidate("far", 0.5), _candidate("a", 1.0), _candidate("b", 1.001)]
    found = bench.run(*pool)
    assert bench.runs == [["far"], ["a", "b"]]
    assert found.best.name == "b"
    assert found.comparison is not None
    assert set(found.comparison.samples) == {"unchanged", "a", "b"}


def test_a_bounded_number_is_built() -> None:
    bench = _Bench("quality>98%")
    found = bench.run(*(_candidate(n, 1.0 + i / 100) for i, n in enumerate("abcde")))
    assert len(bench.runs[0]) == LEADERS
    assert found.best.name == "b"


def test_nothing_feasible_and_the_unchanged_model() -> None:
    bench = _Bench("p50<1ms")
    assert bench.run(_candidate("a", 1.0)).best is None
    bench = _Bench("quality>98%")
    found = bench.run(_candidate("unchanged", 0.5), _candidate("a", 1.0))
    assert found.best.name == "unchanged"
    assert found.model is None
    assert bench.runs == []


def test_the_last_run_is_longer_within_the_same_limit() -> None:
    rules = Protocol(min_samples=60, min_time=0.4, max_time=20.0, max_samples=100)
    assert thorough(rules) == replace(rules, min_samples=240, max_samples=240, min_time=1.6)
