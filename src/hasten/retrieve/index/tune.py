"""The cheapest knobs that meet a recall, or the best recall within a latency: measured, not guessed.

Half of the queries choose, the other half judge, so that the recall that is reported was not chosen on. The cheapest of
many points is one that was lucky, so a point must meet the recall by one standard error. Lists and beam are tried on a
ladder; the pruning share and the radius rule are then tried around the cheapest points and kept only where they pay.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from hasten.budget import format_quantity, parse_quantity
from hasten.errors import ConfigurationError
from hasten.retrieve.index.hit import SearchOptions

if TYPE_CHECKING:
    from hasten.retrieve.index.spann import Spann

__all__ = ["Point", "Tuned", "measure_point", "recall_of", "tune_search"]

LISTS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32, 48, 64, 96, 128, 192, 256)
BEAMS = (8, 12, 16, 20, 24, 32, 48, 64, 96, 128, 192, 256)
EPSILONS = (0.1, 0.2, 0.3, 0.4, 0.6, 1.0)


def recall_of(found: NDArray[np.int64], truth: NDArray[np.int64], k: int | None = None) -> float:
    """Mean share of the true ``k`` nearest that were found.

    >>> recall_of(np.array([[1, 2], [3, 9]]), np.array([[2, 1], [3, 4]]))
    0.75
    """
    k = k or min(found.shape[1], truth.shape[1])
    hits = (found[:, :k, None] == truth[:, None, :k]).any(1).sum()
    return float(hits) / (len(found) * k)


@dataclass(frozen=True)
class Point:
    """One set of knobs, measured on one thread."""

    options: SearchOptions
    """the knobs"""
    recall: float
    """at k"""
    seconds: float
    """per query, in a batch on one thread"""
    lists: float
    """read, mean"""
    reads: float
    """contiguous reads, mean"""
    bytes: float
    """of the pages read, mean"""
    distances: float
    """computed, mean"""
    error: float = 0.0
    """standard error of the recall"""

    def to_json(self) -> dict[str, Any]:
        """By name."""
        return asdict(self)


@dataclass(frozen=True)
class Tuned:
    """What tuning chose."""

    options: SearchOptions
    """use them: ``index.search(q, options=tuned.options)`` or ``index.save_options(tuned.options)``"""
    goal: str
    """what was asked for"""
    met: bool
    """whether the queries that did not choose confirm it"""
    recall: float
    """on the queries that did not choose"""
    p50: float
    """seconds of a single query"""
    p99: float
    """seconds of a single query"""
    curve: tuple[Point, ...]
    """every point tried, cheapest first"""

    def to_json(self) -> dict[str, Any]:
        """By name."""
        return {**asdict(self), "curve": [p.to_json() for p in self.curve]}

    def __str__(self) -> str:
        word = "met" if self.met else "NOT met"
        return (
            f"{self.goal} {word}: recall {self.recall:.4f}, p50 {format_quantity(self.p50, 'time')}, "
            f"p99 {format_quantity(self.p99, 'time')} with {self.options}"
        )


def measure_point(
    index: Spann, queries: NDArray[Any], truth: NDArray[np.int64], k: int, options: SearchOptions, rounds: int = 3
) -> Point:
    """Recall and cost of one set of knobs; the time is the least of ``rounds`` batches on one thread."""
    clock = index._clock
    hit = index.search(queries, k, options=options, threads=1)
    best = np.inf
    for _ in range(rounds):
        begin = clock.now()
        index.search(queries, k, options=options, threads=1, detail=False)
        best = min(best, clock.now() - begin)
    told = hit.stats.mean()
    each = (hit.ids[:, :k, None] == truth[:, None, :k]).any(1).mean(1)
    return Point(
        options,
        recall_of(hit.ids, truth, k),
        best / len(queries),
        told["lists"],
        told["reads"],
        told["bytes"],
        told["distances"],
        float(each.std() / np.sqrt(len(each))),
    )


def single_latencies(index: Spann, queries: NDArray[Any], k: int, options: SearchOptions) -> NDArray[np.float64]:
    """Seconds of each query on its own."""
    clock = index._clock
    out = np.empty(len(queries))
    for i, query in enumerate(queries):
        begin = clock.now()
        index.search(query[None], k, options=options, detail=False)
        out[i] = clock.now() - begin
    return out


def tune_search(
    index: Spann,
    queries: Any,
    truth: Any = None,
    *,
    recall: float | None = None,
    p99: float | str | None = None,
    k: int = 10,
    rounds: int = 3,
) -> Tuned:
    """Choose search knobs for ``recall`` (0 to 1) at least cost, or for the best recall with ``p99`` (seconds or
    ``"5ms"``) of single queries.

    ``queries`` (Q, d), at least 20; ``truth`` (Q, k) true ids, computed by reading everything where it is None.
    Raises ConfigurationError unless exactly one goal is given.
    """
    if (recall is None) == (p99 is None):
        raise ConfigurationError("give one goal: recall=0.95, or p99='5ms'")
    if recall is not None and not 0 < recall <= 1:
        raise ConfigurationError(f"recall is {recall}; it is a share within (0, 1]")
    array = np.asarray(queries)
    if array.ndim != 2 or len(array) < 20:
        raise ConfigurationError(f"queries have the shape {array.shape}; tuning takes at least 20 of them")
    limit = parse_quantity(p99, "time") if isinstance(p99, str) else p99
    k = min(k, len(index))
    known = np.asarray(truth)[:, :k] if truth is not None else index.exact(array, k).ids
    half = len(array) // 2
    choose, judge = (array[:half], known[:half]), (array[half:], known[half:])
    heads = len(index._view.generation.counts)
    points: list[Point] = []
    for beam in (b for b in BEAMS if b <= max(heads, 8)):
        for lists in (m for m in LISTS if m <= beam):
            point = measure_point(index, *choose, k, SearchOptions(lists=lists, beam=beam, epsilon=1e15 - 1), rounds)
            points.append(point)
            if (recall is not None and point.recall - point.error >= recall) or (
                limit is not None and point.seconds > limit
            ):
                break
    good = _candidates(points, recall, limit)
    for base in good[:3]:
        lists = base.options.lists or 1
        for epsilon in EPSILONS:
            for more in (lists, min(base.options.walk_beam, lists + (lists + 1) // 2)):
                options = base.options.with_(lists=more, epsilon=epsilon, beam=max(base.options.walk_beam, more))
                points.append(measure_point(index, *choose, k, options, rounds))
        points.append(measure_point(index, *choose, k, base.options.with_(radius_rule=True), rounds))
    chosen = None
    for point in _candidates(points, recall, limit)[:5]:
        times = single_latencies(index, judge[0], k, point.options)
        if limit is None or float(np.percentile(times, 99)) <= limit:
            chosen = (point, times)
            break
    if chosen is None:
        point = max(points, key=lambda p: p.recall) if recall is not None else min(points, key=lambda p: p.seconds)
        chosen = (point, single_latencies(index, judge[0], k, point.options))
    point, times = chosen
    held = recall_of(index.search(judge[0], k, options=point.options, detail=False).ids, judge[1], k)
    slow = float(np.percentile(times, 99))
    met = held >= recall - 0.005 if recall is not None else slow <= (limit or 0.0)
    goal = f"recall ≥ {recall:g}" if recall is not None else f"p99 ≤ {format_quantity(limit or 0.0, 'time')}"
    return Tuned(
        point.options,
        goal,
        bool(met),
        held,
        float(np.median(times)),
        slow,
        tuple(sorted(points, key=lambda p: p.seconds)),
    )


def _candidates(points: list[Point], recall: float | None, limit: float | None) -> list[Point]:
    """Points that meet the goal, best first."""
    if recall is not None:
        safe = [p for p in points if p.recall - p.error >= recall]
        return sorted(safe or (p for p in points if p.recall >= recall), key=lambda p: p.seconds)
    return sorted((p for p in points if p.seconds <= (limit or 0.0)), key=lambda p: -p.recall)
