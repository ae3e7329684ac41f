"""What an index of n rows takes: memory, disk, and the time of a query, with the error of the fit beside it.

memory = heads (d b + 4 degree + 28), disk = rows in lists (d b + 8) + half a page per list, latency = head distances
* t_head + ceil(lists / queue depth) t_read + bytes / bandwidth + rows scored * t_row. How many head distances, lists
and copies a recall takes grows with log n, or falls, by a power of n or between two plateaus, and then stays at what
the largest run took; that is fitted to runs at several n and judged by leaving each run out. One run cannot be
extrapolated and is refused.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from hasten.budget import format_quantity
from hasten.clock import Clock, MonotonicClock
from hasten.errors import ConfigurationError
from hasten.retrieve.index.build import BuildOptions
from hasten.retrieve.index.hit import SearchOptions
from hasten.retrieve.index.tune import Point, measure_point, recall_of

if TYPE_CHECKING:
    from hasten.retrieve.index.spann import Spann

__all__ = ["Cost", "Disk", "Fall", "Fit", "Law", "Run", "cost", "cost_of_index", "fit_runs", "measure_runs"]


@dataclass(frozen=True)
class Run:
    """One measured index."""

    n: int
    """rows"""
    heads: int
    """heads"""
    copies: float
    """mean lists of a row that is not a head"""
    checks: float
    """head distances per query at the recall"""
    lists: float
    """lists per query at the recall"""
    scored: float
    """rows scored per query at the recall"""
    recall: float
    """that the knobs reach"""
    seconds: float
    """per query, one thread, warm page cache"""
    walk_seconds: float
    """per query of the walk alone"""


@dataclass(frozen=True)
class Disk:
    """A disk. The defaults are a common NVMe drive's data sheet; measure yours."""

    read: float = 1e-4
    """seconds of one small random read"""
    bandwidth: float = 2e9
    """bytes per second"""
    queue_depth: int = 32
    """reads under way at a time"""


@dataclass(frozen=True)
class Law:
    """How a quantity goes with n: ``a + b ln n`` where it grows, ``exp(a + b ln n)`` where it falls; where that is not
    how it falls, the geometric mean of it and of a fall between plateaus, since a few runs do not tell which it is.
    """

    a: float
    b: float
    falls: bool
    """beyond the largest run it stays: more rows never take less work than were measured to"""
    largest: float
    """n of the largest run"""
    fall: Fall | None = None
    """where a power of n alone does not describe the fall"""

    def at(self, n: float) -> float:
        """The quantity at n."""
        if not self.falls:
            return max(1.0, self.a + self.b * float(np.log(n)))
        n = min(n, self.largest)
        power = float(np.exp(self.a + self.b * np.log(n)))
        return max(1.0, power if self.fall is None else float(np.sqrt(power * self.fall.at(n))))


@dataclass(frozen=True)
class Fall:
    """``ln y = low + (high - low) / (1 + (n / middle)^steepness)``.

    Neighbours in a collection of few rows lie far and in many directions, in one of many rows near and in few lists;
    between the two, what a recall takes falls with n, and on either side it hardly changes.
    """

    high: float
    """logarithm of the plateau of few rows"""
    low: float
    """logarithm of the plateau of many rows"""
    middle: float
    """n half way down"""
    steepness: float

    def at(self, n: float) -> float:
        """The quantity at n."""
        return float(np.exp(self.low + (self.high - self.low) / (1 + (n / self.middle) ** self.steepness)))

    @classmethod
    def of(cls, n: NDArray[np.float64], y: NDArray[np.float64]) -> Fall:
        """Least squares of the logarithms on a grid; a plateau is at most 30 % beyond what was measured."""
        high = np.log(y.max() * np.linspace(1.0, 1.3, 4))[:, None, None, None, None]
        low = np.log(y.min() * np.linspace(0.7, 1.0, 4))[:, None, None, None]
        steepness = np.array([1.0, 1.5, 2.0, 3.0, 4.0])[:, None, None]
        middle = np.geomspace(n.min() / 2, n.max() * 2, 40)[:, None]
        told = low + (high - low) / (1 + (n / middle) ** steepness)
        i, j, k, m = np.unravel_index(np.argmin(((told - np.log(y)) ** 2).sum(-1)), told.shape[:-1])
        return cls(float(high[i].item()), float(low[j].item()), float(middle[m].item()), float(steepness[k].item()))


@dataclass(frozen=True)
class Fit:
    """A law for each quantity, and how far off it is on a run that it has not seen."""

    runs: tuple[Run, ...]
    """what it was fitted to"""
    laws: dict[str, Law]
    """by quantity"""
    errors: dict[str, float]
    """quantity -> largest relative error when one run is left out"""
    t_head: float
    """seconds of one head distance"""
    t_row: float
    """seconds of one row scored"""

    def at(self, name: str, n: float) -> float:
        """The quantity at n."""
        return self.laws[name].at(n)

    @property
    def error(self) -> float:
        """The largest of all errors."""
        return max(self.errors.values())


@dataclass(frozen=True)
class Cost:
    """The prediction for one n."""

    n: int
    """rows"""
    memory: float
    """bytes: heads, graph, directory"""
    disk: float
    """bytes: lists"""
    lists: float
    """read per query"""
    bytes: float
    """read per query"""
    warm: float
    """seconds per query on one thread while the lists are in the page cache"""
    cold: float
    """seconds per query when every list comes from the disk"""
    error: float
    """largest relative error of the fit on a run left out; nan where nothing was fitted"""
    error_latency: float
    """relative error of the predicted warm time on the largest run, fitted without it; nan where nothing was fitted"""
    low: float
    """smallest n of the fit"""
    high: float
    """largest n of the fit; beyond it the prediction is an extrapolation"""

    def to_json(self) -> dict[str, Any]:
        """By name."""
        return asdict(self)

    def __str__(self) -> str:
        far = ""
        if not np.isnan(self.error):
            far = f"; runs at {self.low:,.0f} to {self.high:,.0f} rows, {self.n / self.high:,.0f} times fewer"
        share = "no fit" if np.isnan(self.error) else f"fit error {self.error:.0%}, latency {self.error_latency:.0%}"
        return (
            f"{self.n:,} rows: {format_quantity(self.memory, 'bytes')} in memory, "
            f"{format_quantity(self.disk, 'bytes')} on disk, "
            f"{self.lists:.0f} lists per query, warm {format_quantity(self.warm, 'time')}, cold "
            f"{format_quantity(self.cold, 'time')} ({share}{far})"
        )


_FITTED = ("checks", "lists", "copies", "scored")
POWER = 0.05
"""a fall is a power of n where that is off by no more than this share (root mean square)"""


def _law(runs: Sequence[Run], name: str, largest: float) -> Law:
    x = np.log([r.n for r in runs])
    y = np.array([getattr(r, name) for r in runs], float)
    b, a = np.polyfit(x, y, 1)
    falls = bool(b < 0 and (y > 0).all())  # a falling line would pass zero
    fall = None
    if falls:
        b, a = np.polyfit(x, np.log(y), 1)
        if float(np.sqrt(np.mean((a + b * x - np.log(y)) ** 2))) > POWER:
            fall = Fall.of(np.exp(x), y)
    return Law(float(a), float(b), falls, largest, fall)


def fit_runs(runs: Sequence[Run]) -> Fit:
    """Fit at least three runs of different n."""
    if len({r.n for r in runs}) < 3:
        raise ConfigurationError(
            f"{len(runs)} runs at {len({r.n for r in runs})} sizes cannot be extrapolated; measure at least 3 sizes"
        )
    errors = {}
    for name in _FITTED:
        worst = 0.0
        for i, run in enumerate(runs):
            law = _law([r for j, r in enumerate(runs) if j != i], name, run.n)
            actual = getattr(run, name)
            worst = max(worst, abs(law.at(run.n) - actual) / actual)
        errors[name] = float(worst)
    head = float(np.median([r.walk_seconds / r.checks for r in runs]))
    row = float(np.median([max(r.seconds - r.walk_seconds, 1e-9) / max(r.scored, 1.0) for r in runs]))
    high = max(r.n for r in runs)
    return Fit(tuple(runs), {n: _law(runs, n, high) for n in _FITTED}, errors, head, row)


def cost(
    n: int,
    d: int,
    b: int,
    ratio: float = 0.16,
    *,
    copies: float = 5.0,
    lists: float = 32.0,
    degree: int = 32,
    fit: Fit | None = None,
    disk: Disk | None = None,
) -> Cost:
    """The model for ``n`` rows of ``d`` elements of ``b`` bytes, with a share ``ratio`` of heads.

    Without a ``fit``, ``copies`` and ``lists`` are taken as given and no error is known (it is nan).

    >>> told = cost(10**9, 128, 1, 0.12)
    >>> round(told.memory / 1e9), round(told.disk / 1e12, 1)
    (36, 0.8)
    """
    if n < 1 or d < 1 or b not in (1, 2, 4):
        raise ConfigurationError(f"n={n}, d={d}, b={b} is no collection; b is 1, 2 or 4 bytes per element")
    disk = disk or Disk()
    heads = ratio * n
    if fit is not None:
        copies, lists = fit.at("copies", n), fit.at("lists", n)
        checks, scored = fit.at("checks", n), fit.at("scored", n)
    else:
        checks, scored = 1024.0, lists * copies * (1 - ratio) / ratio
    memory = heads * (d * b + 4.0 * degree + 24 + 20)
    stored = (n - heads) * copies * (d * b + 8) + heads * 2048
    size = scored * (d * b + 8) + lists * 2048
    t_head, t_row = (fit.t_head, fit.t_row) if fit is not None else (2e-8, 1e-8)
    warm = checks * t_head + scored * t_row
    cold = warm + float(np.ceil(lists / disk.queue_depth)) * disk.read + size / disk.bandwidth
    error = latency = float("nan")
    low = high = float(n)
    if fit is not None:
        error = fit.error
        low, high = float(min(r.n for r in fit.runs)), float(max(r.n for r in fit.runs))
        largest = max(fit.runs, key=lambda r: r.n)
        others = [r for r in fit.runs if r is not largest]
        if len({r.n for r in others}) >= 2:
            head = float(np.median([r.walk_seconds / r.checks for r in others]))
            row = float(np.median([max(r.seconds - r.walk_seconds, 1e-9) / max(r.scored, 1.0) for r in others]))
            terms = {name: _law(others, name, largest.n).at(largest.n) for name in ("checks", "scored")}
            predicted = terms["checks"] * head + terms["scored"] * row
            latency = abs(predicted - largest.seconds) / largest.seconds
    return Cost(n, memory, stored, lists, size, warm, cold, error, latency, low, high)


def measure_runs(
    vectors: Any,
    queries: Any,
    sizes: Sequence[int],
    *,
    recall: float = 0.95,
    k: int = 10,
    options: BuildOptions | None = None,
    folder: str | os.PathLike[str] | None = None,
    clock: Clock | None = None,
    progress: Any = None,
) -> list[Run]:
    """Build the first n rows for each size, and measure the cheapest knobs of a ladder that reach ``recall``."""
    from hasten.retrieve.index.spann import Spann

    runs = []
    options = options or BuildOptions()
    with tempfile.TemporaryDirectory(dir=folder) as place:
        for i, n in enumerate(sizes):
            index = Spann.build(np.asarray(vectors[:n]), Path(place) / f"{n}.spann", **options.to_json())
            index._clock = clock or MonotonicClock()
            try:
                runs.append(measure_run(index, np.asarray(queries), recall, k))
            finally:
                index.close()
            if progress is not None:
                progress(f"run at {n} rows", (i + 1) / len(sizes))
    return runs


LADDER = (*range(1, 17), *range(18, 33, 2), *range(36, 65, 4), *range(72, 257, 8))
"""lists that are tried until the recall is reached"""


def measure_run(index: Spann, queries: Any, recall: float = 0.95, k: int = 10) -> Run:
    """What ``recall`` takes: between the two steps of a ladder (beam = 2.5 lists) around it, linear in the recall.

    A step is coarse beside the recall that it adds, and whichever is the first to reach it overshoots by chance; so
    every quantity is taken where the recall is met exactly.
    """
    truth = index.exact(queries, k).ids
    steps: list[tuple[Point, Point]] = []  # the last two: whole searches and their walks
    for lists in LADDER:
        options = SearchOptions(lists=lists, beam=max(16, lists * 5 // 2), epsilon=1e15 - 1)
        found = index.search(queries, k, options=options, detail=False).ids
        reached = recall_of(found, truth, k)
        point = measure_point(index, queries, truth, k, options, 3 if reached >= recall else 1)
        walk = measure_point(index, queries, truth, k, options.with_(lists=0), 3 if reached >= recall else 1)
        steps = [*steps[-1:], (point, walk)]
        if reached >= recall:
            break
    (low, low_walk), (high, high_walk) = steps[0], steps[-1]
    gain = high.recall - low.recall
    share = min(1.0, max(0.0, (recall - low.recall) / gain)) if gain > 0 else 1.0

    def between(a: float, b: float) -> float:
        return a + share * (b - a)

    built = index._view.generation.manifest.parameters["built"]
    seconds = between(low.seconds, high.seconds)
    checks = between(low_walk.distances, high_walk.distances)
    return Run(
        built["rows"],
        built["heads"],
        max(built["replicas"], 1e-9),
        checks,
        max(between(low.lists, high.lists), 1.0),
        between(low.distances, high.distances) - checks,
        between(low.recall, high.recall),
        seconds,
        min(between(low_walk.seconds, high_walk.seconds), seconds),
    )


def cost_of_index(
    index: Spann,
    n: int,
    *,
    queries: Any = None,
    recall: float = 0.95,
    sizes: Sequence[int] | None = None,
    disk: Disk | None = None,
) -> Cost:
    """Fit the model to parts of this index (a quarter, a half … of its rows, at most 200 000) and predict ``n`` rows
    of the kind.
    """
    view = index._view
    m = view.generation.manifest
    live = np.flatnonzero(np.asarray(view.generation.location) >= 0)
    if len(live) < 4000:
        raise ConfigurationError(
            f"the index has {len(live)} rows; a fit needs at least 4000, so use hasten.retrieve.cost(n, d, b)"
        )
    rng = np.random.default_rng(0)
    rows = rng.permutation(live)
    held = min(200, len(rows) // 20)
    if queries is None:  # rows that the parts do not hold
        queries = index._take(rows[:held])
    largest = min(len(rows) - held, 200_000)
    sizes = sizes or [largest // 16, largest // 8, largest // 4, largest // 2, largest]
    stored = BuildOptions(**m.parameters["options"])
    runs = measure_runs(
        index._take(rows[held : held + max(sizes)]), queries, sizes, recall=recall, options=stored, clock=index._clock
    )
    return cost(
        n, m.width, index.dtype.itemsize, stored.head_ratio, degree=stored.degree, fit=fit_runs(runs), disk=disk
    )
