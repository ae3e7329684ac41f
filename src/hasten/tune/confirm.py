"""The last word of a search: its leaders are built once more and measured in turns, in one run, for longer.

During the search each candidate is timed beside the unchanged model in a run of its own, so two that are nearly as
fast are told apart by the mood of their runs. Those within a few per cent of the best are therefore measured again
together; the figures of that run decide, and replace the earlier ones. What breaks the budget now is dropped, and the
next in line takes its place.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import nn

from hasten.budget import Budget
from hasten.compress import Recipe
from hasten.measure.latency import Comparison, Protocol
from hasten.tune.frontier import Axis, Candidate, Frontier

__all__ = ["LEADERS", "Confirmed", "confirm", "thorough"]

LEADERS = 4
"""Candidates that are measured together, at most; each is held in memory at that time."""
_NEAR = 0.15
"""Of the best one's first axis: who is further away does not lead by another run."""
_LONGER = 4
"""Times as many samples and seconds as during the search."""


@dataclass(frozen=True)
class Confirmed:
    """What the last run left."""

    best: Candidate | None
    """None where nothing meets the budget"""
    pool: tuple[Candidate, ...]
    """all candidates, the leaders with their new figures"""
    recipe: Recipe = Recipe()
    """of the best, with its plan"""
    model: nn.Module | None = None
    """the best; None for the unchanged model"""
    comparison: Comparison | None = None
    """of the leaders with the unchanged model"""


def thorough(protocol: Protocol) -> Protocol:
    """The rules of the last run: longer, within the same time limit.

    >>> thorough(Protocol(min_samples=60, min_time=0.4)).min_samples
    240
    """
    samples = _LONGER * protocol.min_samples
    return replace(
        protocol,
        min_samples=samples,
        max_samples=max(samples, protocol.max_samples),
        min_time=_LONGER * protocol.min_time,
    )


def confirm(
    pool: Sequence[Candidate],
    axes: tuple[Axis, ...],
    budget: Budget,
    build: Callable[[Candidate], tuple[nn.Module, Recipe]],
    compare: Callable[[Mapping[str, nn.Module]], Comparison],
    values: Callable[[nn.Module, Comparison, str], Mapping[str, float]],
    most: int = LEADERS,
) -> Confirmed:
    """Measure the leaders of ``pool`` until the best one is one that was measured here.

    ``build`` makes a candidate's model; ``compare`` measures models by name in turns with the unchanged one, which is
    called ``unchanged``; ``values`` are all figures of one of them.
    """
    pool = list(pool)
    built: dict[str, tuple[nn.Module, Recipe]] = {}
    runs: dict[str, Comparison] = {}
    while True:
        best = Frontier(tuple(pool), axes).best(budget)
        if best is None or best.knobs["format"] == "unchanged":
            return Confirmed(best, tuple(pool))
        if best.name in runs:
            return Confirmed(best, tuple(pool), built[best.name][1], built[best.name][0], runs[best.name])
        leaders = _leaders(pool, axes, budget, best, runs, most)
        built |= {c.name: build(c) for c in leaders if c.name not in built}
        comparison = compare({c.name: built[c.name][0] for c in leaders})
        for old in leaders:
            new = dict(values(built[old.name][0], comparison, old.name))
            broken = tuple(budget.violations(new))
            detail = {**old.detail, "confirmed": not broken, "speedup": comparison.speedup(old.name).to_json()}
            pool[pool.index(old)] = replace(old, values=new, violations=broken, detail=detail)
            runs[old.name] = comparison


def _leaders(
    pool: Sequence[Candidate], axes: tuple[Axis, ...], budget: Budget, best: Candidate, seen: Container[str], most: int
) -> list[Candidate]:
    """The best, and who would be it if the first axis had come out a little better: first those that an earlier run
    measured, so that all who lead are of one run, then the nearest."""
    key, cost = axes[0].key, axes[0].cost
    limit = cost(best.values) * (1 + _NEAR)
    others = []
    for c in pool:
        if c.name == best.name or c.knobs["format"] == "unchanged" or not c.feasible or cost(c.values) > limit:
            continue
        at_once = replace(c, values={**c.values, key: 0.0})  # less quality may lose whatever the clock says
        if Frontier((best, at_once), axes).best(budget) is at_once:
            others.append(c)
    others.sort(key=lambda c: (c.name not in seen, cost(c.values)))
    return [best, *others[: most - 1]]
