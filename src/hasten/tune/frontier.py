"""The Pareto frontier of what was measured, and the best of it under a budget.

A candidate is on the frontier when no other measured one is at least as good on every axis and better on one. The
best is chosen feasible-first: among the candidates inside the budget, the one that keeps most quality when the
budget bounds what may be spent, else the fastest. Qualities that differ by less than ``tie`` count as equal; then
the faster one wins.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from hasten.budget import Budget

__all__ = ["Axis", "Candidate", "Frontier"]


@dataclass(frozen=True)
class Axis:
    """One direction of the frontier."""

    key: str
    """name of a value, such as ``latency@p99``"""
    maximise: bool = False
    """whether more is better"""
    kind: str = "time"
    """kind of quantity, for labels"""

    def cost(self, values: Mapping[str, float]) -> float:
        """Less is better; a value that is missing or not a number is worst."""
        value = values.get(self.key, math.nan)
        return math.inf if math.isnan(value) else (-value if self.maximise else value)


@dataclass(frozen=True)
class Candidate:
    """One point that was predicted or measured."""

    name: str
    """short, for tables"""
    knobs: Mapping[str, Any]
    """the point of the space"""
    values: Mapping[str, float] = field(default_factory=dict)
    """what was measured; empty where it was not"""
    predicted: Mapping[str, float] = field(default_factory=dict)
    """what was expected before measuring"""
    violations: tuple[str, ...] = ()
    """bounds of the budget that it breaks, one line each; from the prediction where it was not measured"""
    detail: Mapping[str, Any] = field(default_factory=dict)
    """what else was noted: speed-up with its interval, the plan, an error"""

    @property
    def measured(self) -> bool:
        """Whether it was run, not only predicted."""
        return bool(self.values)

    @property
    def feasible(self) -> bool:
        """Measured, and inside the budget."""
        return self.measured and not self.violations

    def to_json(self) -> dict[str, Any]:
        """Plain values; what is not finite becomes null."""
        return {
            "name": self.name,
            "knobs": dict(self.knobs),
            "values": _finite(self.values),
            "predicted": _finite(self.predicted),
            "violations": list(self.violations),
            "feasible": self.feasible,
            "detail": dict(self.detail),
        }

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Candidate:
        """The inverse of :meth:`to_json`; what was null is not a number.

        >>> one = Candidate("a", {"bits": 8}, {"quality": 0.9}, violations=("too slow",))
        >>> Candidate.from_json(one.to_json()) == one
        True
        """

        def numbers(values: Mapping[str, Any]) -> dict[str, float]:
            return {k: math.nan if v is None else float(v) for k, v in values.items()}

        return cls(
            record["name"], record["knobs"], numbers(record["values"]), numbers(record["predicted"]),
            tuple(record["violations"]), record["detail"],
        )  # fmt: skip


def _finite(values: Mapping[str, float]) -> dict[str, float | None]:
    return {k: v if math.isfinite(v) else None for k, v in values.items()}


@dataclass(frozen=True)
class Frontier:
    """Measured candidates and which of them nothing else beats.

    >>> axes = (Axis("latency@p99"), Axis("quality", maximise=True, kind="ratio"))
    >>> a = Candidate("a", {}, {"latency@p99": 1.0, "quality": 0.9})
    >>> b = Candidate("b", {}, {"latency@p99": 2.0, "quality": 1.0})
    >>> c = Candidate("c", {}, {"latency@p99": 2.0, "quality": 0.8})
    >>> frontier = Frontier((a, b, c), axes)
    >>> [x.name for x in frontier.front], frontier.best(Budget.parse("p99<3s")).name
    (['a', 'b'], 'b')
    """

    candidates: tuple[Candidate, ...]
    """everything that was considered"""
    axes: tuple[Axis, ...]
    """the first is the one to spend less of, the second what is to be kept"""
    tie: float = 1e-3
    """qualities closer than this are equal"""

    @property
    def front(self) -> tuple[Candidate, ...]:
        """Measured candidates that no other one dominates, by the first axis."""
        measured = [c for c in self.candidates if c.measured]
        costs = [tuple(a.cost(c.values) for a in self.axes) for c in measured]
        kept = [
            c
            for c, mine in zip(measured, costs, strict=True)
            if not any(other != mine and all(o <= m for o, m in zip(other, mine, strict=True)) for other in costs)
        ]
        return tuple(sorted(kept, key=lambda c: self.axes[0].cost(c.values)))

    def best(self, budget: Budget | None = None) -> Candidate | None:
        """The best measured candidate inside ``budget``, or None where there is none.

        Without a budget, the candidates' own ``violations`` decide what is feasible.
        """
        if budget is None:
            feasible = [c for c in self.candidates if c.feasible]
        else:
            feasible = [c for c in self.candidates if c.measured and not budget.violations(c.values)]
        if not feasible:
            return None
        spends = budget is None or any(not b.at_least or b.metric == "throughput" for b in budget.bounds)
        costs = {id(c): tuple(a.cost(c.values) for a in self.axes) for c in feasible}
        if spends and len(self.axes) > 1:
            least = min(cost[1] for cost in costs.values())
            feasible = [c for c in feasible if costs[id(c)][1] <= least + self.tie]
        return min(feasible, key=lambda c: costs[id(c)])

    def closest(self, budget: Budget | None = None) -> Candidate | None:
        """Where nothing is feasible: the candidate with the fewest broken bounds, of those the one that misses
        ``budget`` by the smallest share, of those the least on axis one; as measured, or as predicted where the
        prediction was enough to reject it."""
        known = [c for c in self.candidates if c.values or (c.predicted and c.violations)]
        first = self.axes[0]

        def order(c: Candidate) -> tuple[int, float, float]:
            values = c.values or c.predicted
            return len(c.violations), 0.0 if budget is None else budget.excess(values), first.cost(values)

        return min(known, key=order, default=None)

    def to_json(self) -> dict[str, Any]:
        """Axes, names on the frontier, and every candidate."""
        return {
            "axes": [{"key": a.key, "maximise": a.maximise} for a in self.axes],
            "front": [c.name for c in self.front],
            "candidates": [c.to_json() for c in self.candidates],
        }

    def points(self) -> list[tuple[str, float, float]]:
        """(name, first axis, second axis) of what was measured, for a plot."""
        x, y = self.axes[0].key, self.axes[1].key
        return [(c.name, c.values[x], c.values[y]) for c in self.candidates if x in c.values and y in c.values]

    def report(self, path: str | os.PathLike[str], title: str = "Frontier", best: Candidate | None = None) -> None:
        """Write one self-contained HTML file."""
        from hasten.tune.report import of_frontier

        of_frontier(self, title, best).write(path)
