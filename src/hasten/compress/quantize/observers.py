"""The range of a tensor that a number format should cover, found from what passed by.

An observer looks at weighted points: the elements of a weight themselves, or the bins of a histogram that was filled
batch by batch in bounded memory. Bins double their width by merging neighbours when a batch exceeds them, so counts
stay exact. All rows of a granularity are treated together. Zero always lies in the range: ``low <= 0 <= high``.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from hasten.compress.quantize.granularity import Granularity
from hasten.compress.values import named_value
from hasten.errors import ConfigurationError, DataError

__all__ = [
    "Entropy",
    "LsqInit",
    "MinMax",
    "MovingAverage",
    "Mse",
    "Observer",
    "Percentile",
    "Points",
    "Watch",
    "range_of",
]

_BINS = 4096


class Grid(Protocol):
    """What an observer needs of a number format."""

    @property
    def granularity(self) -> Granularity:
        """Which elements share a scale."""
        ...

    def parameters(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor | None]:
        """Range -> scale and zero point."""
        ...

    def round_to(self, x: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
        """The nearest values of the grid."""
        ...


@dataclass(frozen=True)
class Points:
    """What was seen of each row: values (rows, n), how often each counts, and the exact extremes (rows,)."""

    values: Tensor
    """(rows, n)"""
    weights: Tensor | None
    """(rows, n); None: each counts once"""
    low: Tensor
    """least value, at most 0"""
    high: Tensor
    """largest value, at least 0"""

    @property
    def count(self) -> Tensor:
        """Elements of each row, (rows,)."""
        if self.weights is None:
            return torch.full_like(self.low, self.values.shape[1])
        return self.weights.sum(1)


class Observer(ABC):
    """Points -> range."""

    @abstractmethod
    def choose(self, points: Points, grid: Grid) -> tuple[Tensor, Tensor]:
        """Low and high of each row."""

    @property
    def needs_points(self) -> bool:
        """False where the extremes alone decide, so that no histogram is kept."""
        return True

    @property
    def values_needed(self) -> tuple[int, int]:
        """Values of each row below which the range means nothing, and below which it is loose."""
        return 1, 1


@named_value
@dataclass(frozen=True)
class MinMax(Observer):
    """Everything that was seen, without clipping."""

    def choose(self, points: Points, grid: Grid) -> tuple[Tensor, Tensor]:
        """The extremes."""
        return points.low, points.high

    @property
    def needs_points(self) -> bool:
        """The extremes decide."""
        return False


@named_value
@dataclass(frozen=True)
class MovingAverage(Observer):
    """An exponential average of the extremes of batches; the first batch starts it."""

    momentum: float = 0.01
    """weight of a new batch"""

    def __post_init__(self) -> None:
        if not 0 < self.momentum <= 1:
            raise ConfigurationError(f"a momentum of {self.momentum} does not average; give one above 0, at most 1")

    def choose(self, points: Points, grid: Grid) -> tuple[Tensor, Tensor]:
        """The averaged extremes; :class:`Watch` averages them."""
        return points.low, points.high

    @property
    def needs_points(self) -> bool:
        """The extremes decide."""
        return False


@named_value
@dataclass(frozen=True)
class Percentile(Observer):
    """The range without the outermost values: ``percent`` of the elements lie inside."""

    percent: float = 99.9
    """of the elements, half of the rest at each end"""

    def __post_init__(self) -> None:
        if not 50 < self.percent <= 100:
            raise ConfigurationError(f"{self.percent} percent is no range; give more than 50, at most 100")

    def choose(self, points: Points, grid: Grid) -> tuple[Tensor, Tensor]:
        """Weighted quantiles of each row, by sorting."""
        values, order = points.values.sort(dim=1)
        if points.weights is None:
            mass = torch.ones_like(values).cumsum(1)
        else:
            mass = points.weights.gather(1, order).cumsum(1)
        tail = (1 - self.percent / 100) / 2 * mass[:, -1:]
        last = values.shape[1] - 1
        below = torch.searchsorted(mass, tail).clamp(max=last)
        above = torch.searchsorted(mass, mass[:, -1:] - tail).clamp(max=last)
        return values.gather(1, below)[:, 0].clamp(max=0), values.gather(1, above)[:, 0].clamp(min=0)

    @property
    def values_needed(self) -> tuple[int, int]:
        """One value outside at each end."""
        return 1, 1 if self.percent == 100 else math.ceil(2 / (1 - self.percent / 100) - 1e-9)


@named_value
@dataclass(frozen=True)
class Mse(Observer):
    """The shrunken range with the least error: ``steps`` factors of the extremes are tried for every row at once."""

    steps: int = 80
    """factors 1/steps … 1"""
    norm: float = 2.0
    """power of the error; 2.4 weighs clipping more"""

    def __post_init__(self) -> None:
        if self.steps < 2 or self.norm <= 0:
            raise ConfigurationError(f"{self.steps} steps of norm {self.norm} search nothing; give 80 and 2")

    def choose(self, points: Points, grid: Grid) -> tuple[Tensor, Tensor]:
        """Search from the widest range inwards; ties keep the wider."""
        best = torch.full_like(points.low, torch.inf)
        low, high = points.low.clone(), points.high.clone()
        for step in range(self.steps, 0, -1):
            factor = step / self.steps
            scale, zero = grid.parameters(points.low[:, None] * factor, points.high[:, None] * factor)
            error = (grid.round_to(points.values, scale, zero) - points.values).abs_()
            error = error.square_() if self.norm == 2 else error.pow_(self.norm)
            total = error.sum(1) if points.weights is None else (error * points.weights).sum(1)
            better = total < best
            best = torch.where(better, total, best)
            low = torch.where(better, points.low * factor, low)
            high = torch.where(better, points.high * factor, high)
        return low, high


@named_value
@dataclass(frozen=True)
class Entropy(Observer):
    """The clipping threshold whose rounded histogram is nearest to the true one in Kullback-Leibler divergence.

    The histogram is of magnitudes. For each threshold the mass beyond it joins its last bin (P); Q spreads the mass of
    each rounded value evenly over the bins of that value that hold any.
    """

    bins: int = 2048
    """of the magnitudes"""

    def __post_init__(self) -> None:
        if self.bins < 128:
            raise ConfigurationError(f"{self.bins} bins are too few for a divergence; give 2048")

    def choose(self, points: Points, grid: Grid) -> tuple[Tensor, Tensor]:
        """Every sixteenth bin is a candidate, for all rows at once."""
        top = torch.maximum(-points.low, points.high)
        safe = torch.where(top > 0, top, torch.ones_like(top))
        index = (points.values.abs() / safe[:, None] * self.bins).long().clamp(max=self.bins - 1)
        weights = points.weights if points.weights is not None else torch.ones_like(points.values)
        counts = torch.zeros(len(top), self.bins, dtype=torch.float64, device=top.device).scatter_add_(
            1, index, weights.double()
        )
        counts[:, 0] -= torch.where(points.values == 0, weights, torch.zeros_like(weights)).double().sum(1)
        counts = counts.clamp_(min=0)
        # In units of a row's largest magnitude all rows have the same bins, hence the same rounding.
        centres = (torch.arange(self.bins, dtype=points.low.dtype, device=top.device) + 0.5) / self.bins
        best = torch.full((len(top),), torch.inf, dtype=torch.float64, device=top.device)
        chosen = torch.ones_like(top)
        for stop in range(max(16, self.bins // 16), self.bins + 1, 16):
            limit = torch.full((1, 1), stop / self.bins, dtype=centres.dtype, device=top.device)
            scale, zero = grid.parameters(-limit, limit)
            value = grid.round_to(centres[None, :stop], scale, zero)[0]
            _, code = torch.unique(value, return_inverse=True)
            inside = counts[:, :stop]
            true = inside.clone()
            true[:, -1] += counts[:, stop:].sum(1)
            holds = (inside > 0).double()
            levels = int(code.max()) + 1
            mass = torch.zeros(len(top), levels, dtype=torch.float64, device=top.device).index_add_(1, code, inside)
            number = torch.zeros(len(top), levels, dtype=torch.float64, device=top.device).index_add_(1, code, holds)
            spread = (mass / number.clamp(min=1))[:, code] * holds
            p = true / true.sum(1, keepdim=True).clamp(min=1e-30)
            q = spread / spread.sum(1, keepdim=True).clamp(min=1e-30)
            # A bin that only P holds (clipped mass in an empty last bin) counts with a small Q, not with infinity.
            divergence = torch.where(p > 0, p * (p / q.clamp(min=1e-9)).log(), torch.zeros_like(p)).sum(1)
            better = divergence < best
            best = torch.where(better, divergence, best)
            chosen = torch.where(better, torch.full_like(chosen, stop / self.bins), chosen)
        threshold = chosen * top
        return torch.maximum(points.low, -threshold), torch.minimum(points.high, threshold)

    @property
    def values_needed(self) -> tuple[int, int]:
        """A value for each bin; below a sixteenth of that bins are mostly empty, and empty ones agree with any range
        (a single value: with a range of nothing)."""
        return self.bins // 16, self.bins


@named_value
@dataclass(frozen=True)
class LsqInit(Observer):
    """The first step of learned step sizes, ``S = 2 E|r| / sqrt(qmax)``, as a range."""

    def choose(self, points: Points, grid: Grid) -> tuple[Tensor, Tensor]:
        """The range that the format maps onto its largest value."""
        weights = points.weights if points.weights is not None else torch.ones_like(points.values)
        mean = (points.values.abs() * weights).sum(1) / points.count.clamp(min=1)
        one = torch.ones(1, 1, dtype=mean.dtype, device=mean.device)
        largest = (one / grid.parameters(-one, one)[0].reshape(-1)[0]).reshape(())  # values per step of the grid
        reach = 2 * mean * largest.sqrt()
        negative = points.low < 0
        return torch.where(negative, -reach, torch.zeros_like(reach)), reach


def range_of(observer: Observer, x: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Low and high of ``x`` in the compact shape of the grid's granularity, from its own elements."""
    granularity = grid.granularity
    rows = granularity.rows(x)
    low, high = rows.amin(1).clamp(max=0), rows.amax(1).clamp(min=0)
    if observer.needs_points:
        weights = None
        if rows.numel() != x.numel():  # a short group was filled up with zeros that do not count
            weights = granularity.rows(torch.ones_like(x))
        low, high = observer.choose(Points(rows, weights, low, high), grid)
    shape = granularity.compact(tuple(x.shape))
    return low.reshape(shape), high.reshape(shape)


class Watch:
    """What one observer has seen, batch by batch; the memory does not grow with the batches.

    Not shared between threads. ``update`` raises :class:`~hasten.errors.DataError` for NaN and infinity.

    >>> from hasten.compress.quantize import Int
    >>> watch = Watch(Percentile(99.0), Int(8))
    >>> watch.update(torch.linspace(-1, 1, 1001))
    >>> low, high = watch.range()
    >>> round(float(high), 2)
    0.99
    """

    def __init__(self, observer: Observer, grid: Grid) -> None:
        self.observer = observer
        self.grid = grid
        self.batches = 0
        self._shape: tuple[int, ...] = ()
        self._low = self._high = torch.empty(0)
        self._counts = torch.empty(0)
        self._reach = torch.empty(0)

    def update(self, x: Tensor) -> None:
        """Take one batch."""
        x = x.detach().float()
        granularity = self.grid.granularity
        rows = granularity.rows(x, fill=0.0)
        low, high = rows.amin(1).clamp(max=0), rows.amax(1).clamp(min=0)
        if not bool(torch.isfinite(low).all() and torch.isfinite(high).all()):
            raise DataError("the calibration data hold NaN or infinity; remove those inputs")
        shape = granularity.compact(tuple(x.shape))
        if self.batches == 0:
            self._shape, self._low, self._high = shape, low, high
        elif len(low) != len(self._low):
            raise DataError(
                f"a batch of shape {tuple(x.shape)} has {len(low)} scales, earlier ones had {len(self._low)}; "
                "use PerTensor, or dynamic=True"
            )
        elif isinstance(self.observer, MovingAverage):
            self._low = self._low + self.observer.momentum * (low - self._low)
            self._high = self._high + self.observer.momentum * (high - self._high)
        else:
            self._low, self._high = torch.minimum(self._low, low), torch.maximum(self._high, high)
        if self.observer.needs_points:
            self._count(rows, granularity.rows(torch.ones_like(x)))
        self.batches += 1

    def _count(self, rows: Tensor, weights: Tensor) -> None:
        """Add to the histogram of each row; its reach is a power of two, doubled where a value exceeds it."""
        top = torch.maximum(self._high, -self._low).double()
        needed = torch.exp2(torch.ceil(torch.log2(top.clamp(min=1e-30)))).clamp(min=2.0**-100)
        if self.batches == 0:
            self._reach = needed
            self._counts = torch.zeros(len(rows), _BINS, dtype=torch.float64, device=rows.device)
        while bool((self._reach < needed).any()):
            grow = self._reach < needed
            quarter = _BINS // 4
            merged = self._counts[grow].unflatten(1, (-1, 2)).sum(2)
            wider = torch.zeros(len(merged), _BINS, dtype=torch.float64, device=merged.device)
            wider[:, quarter : 3 * quarter] = merged
            self._counts[grow] = wider
            self._reach = torch.where(grow, self._reach * 2, self._reach)
        place = (rows.double() / self._reach[:, None] + 1) * (_BINS / 2)
        self._counts.scatter_add_(1, place.long().clamp(0, _BINS - 1), weights.double())

    @property
    def fewest(self) -> int:
        """Values that the row with the fewest has seen; a histogram alone counts them."""
        return int(self._counts.sum(1).min()) if self._counts.numel() else 0

    def points(self) -> Points:
        """The bins as points; a bin stands for its centre, the outermost for the extremes."""
        if self.batches == 0:
            raise DataError("nothing was observed; run the calibration inputs first")
        if not self.observer.needs_points:
            return Points(torch.empty(len(self._low), 0), None, self._low, self._high)
        centres = (torch.arange(_BINS, dtype=torch.float64, device=self._low.device) + 0.5) / (_BINS / 2) - 1
        values = (self._reach[:, None] * centres).float()
        values = torch.minimum(torch.maximum(values, self._low[:, None]), self._high[:, None])
        return Points(values, self._counts.float(), self._low, self._high)

    def range(self) -> tuple[Tensor, Tensor]:
        """Low and high in the compact shape of the granularity."""
        low, high = self.observer.choose(self.points(), self.grid)
        return low.reshape(self._shape), high.reshape(self._shape)

    def parameters(self) -> tuple[Tensor, Tensor | None]:
        """Scale and zero point for that range."""
        return self.grid.parameters(*self.range())
