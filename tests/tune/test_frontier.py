from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from hasten.budget import Budget
from hasten.tune import Axis, Candidate, Frontier

AXES = (Axis("latency@p99"), Axis("quality", maximise=True, kind="ratio"))
number = st.one_of(st.sampled_from([0.1, 0.5, 1.0]), st.floats(0.01, 2.0), st.just(math.nan))
points = st.lists(st.tuples(number, number), max_size=20)


def _frontier(values: list[tuple[float, float]]) -> Frontier:
    return Frontier(
        tuple(Candidate(str(i), {}, {"latency@p99": x, "quality": y}) for i, (x, y) in enumerate(values)), AXES
    )


def _dominates(a: tuple[float, float], b: tuple[float, float]) -> bool:
    """The slow twin, from the definition."""
    ax, ay, bx, by = (math.inf if math.isnan(v) else v for v in (a[0], -a[1], b[0], -b[1]))
    return ax <= bx and ay <= by and (ax < bx or ay < by)


@given(points)
def test_front_is_what_nothing_dominates(values: list[tuple[float, float]]) -> None:
    frontier = _frontier(values)
    expected = {str(i) for i, v in enumerate(values) if not any(_dominates(o, v) for o in values)}
    assert {c.name for c in frontier.front} == expected


@given(points, st.floats(0.05, 2.0))
def test_the_best_is_feasible_and_keeps_most_quality(values: list[tuple[float, float]], limit: float) -> None:
    frontier = _frontier(values)
    budget = Budget.parse(f"p99<{limit!r}s")
    best = frontier.best(budget)
    feasible = [v for v in values if v[0] <= limit]
    assert (best is None) == (not feasible)
    qualities = [q for _, q in feasible if not math.isnan(q)]
    if best is not None and qualities:
        assert best.values["quality"] >= max(qualities) - 1.001e-3


def test_a_budget_on_quality_alone_asks_for_speed() -> None:
    frontier = _frontier([(0.1, 0.95), (0.2, 0.9995), (0.3, 1.0)])
    best = frontier.best(Budget.parse("quality>90%"))
    assert best is not None
    assert best.name == "0"
    best = frontier.best(Budget.parse("p99<1s"))
    assert best is not None
    assert best.name == "1"  # 0.9995 and 1.0 are a tie, and it is faster


def test_what_was_not_measured_is_never_best_nor_on_the_front() -> None:
    predicted = Candidate("p", {}, {}, {"latency@p99": 0.0, "quality": 1.0})
    broken = Candidate("b", {}, {"latency@p99": 1.0, "quality": 1.0}, violations=("too slow",))
    frontier = Frontier((predicted, broken), AXES)
    assert frontier.front == (broken,)
    assert frontier.best() is None
    assert frontier.closest() == broken


def test_closest_is_what_misses_the_budget_by_least() -> None:
    frontier = _frontier([(0.1, 0.78), (0.2, 0.974), (0.3, 0.9)])
    budget = Budget.parse("quality>98%")
    broken = tuple(replace(c, violations=tuple(budget.violations(c.values))) for c in frontier.candidates)
    closest = Frontier(broken, AXES).closest(budget)
    assert closest is not None
    assert closest.name == "1"


def test_json_and_report(tmp_path: Path) -> None:
    frontier = _frontier([(0.1, 0.9), (math.nan, 1.0), (0.2, 1.0)])
    document = json.loads(json.dumps(frontier.to_json(), allow_nan=False))
    assert document["candidates"][1]["values"]["latency@p99"] is None
    frontier.report(tmp_path / "f.html", best=frontier.candidates[0])
    assert "<svg" in (tmp_path / "f.html").read_text()
