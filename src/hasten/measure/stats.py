"""How sure a number is: percentiles and ratios with confidence intervals.

A percentile's interval comes from order statistics and needs no assumption about the distribution: the number of
samples below the true p-quantile is Binomial(n, p), so ``[x_(l), x_(u)]`` covers it with probability ``P(l <= B <
u)``. With few samples the upper end of a high percentile is unknown, and said to be infinite instead of the largest
value seen. A ratio of two interleaved measurements is resampled by pairs (paired bootstrap), so drift that hits both
cancels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hasten.errors import ConfigurationError

__all__ = ["Estimate", "Summary", "bootstrap", "paired_ratio", "percentile", "summarise"]

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A value with its confidence interval.

    >>> Estimate(2.0, 1.8, 2.3, 0.95).excludes(1.0)
    True
    """

    value: float
    """the estimate"""
    low: float
    """lower end of the interval; minus infinity where the sample is too small to tell"""
    high: float
    """upper end of the interval; infinity where the sample is too small to tell"""
    confidence: float
    """probability with which such an interval covers the truth, 0 to 1"""

    def excludes(self, value: float) -> bool:
        """Whether ``value`` lies outside the interval."""
        return not self.low <= value <= self.high

    def to_json(self) -> dict[str, float | None]:
        """Ends that are not known become null."""
        return {
            "value": _finite(self.value),
            "low": _finite(self.low),
            "high": _finite(self.high),
            "confidence": self.confidence,
        }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _sample(values: ArrayLike, what: str) -> Floats:
    array = np.asarray(values, dtype=np.float64).ravel()
    if array.size == 0:
        raise ConfigurationError(f"{what} of no samples is not defined; measure at least once")
    return array


def _binomial_cdf(n: int, p: float) -> Floats:
    """P(B <= k) for k = 0 … n, B ~ Binomial(n, p); through logarithms, exact to rounding."""
    k = np.arange(n + 1)
    log_factorial = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, n + 1)))])
    log_pmf = log_factorial[n] - log_factorial[k] - log_factorial[n - k] + k * math.log(p) + (n - k) * math.log1p(-p)
    cumulated: Floats = np.minimum(np.cumsum(np.exp(log_pmf)), 1.0)
    return cumulated


def percentile(values: ArrayLike, q: float, confidence: float = 0.95) -> Estimate:
    """The ``q``-th percentile (0 to 100, linear between order statistics) and its distribution-free interval.

    Raises :class:`~hasten.errors.ConfigurationError` without samples or for ``q`` outside [0, 100].

    >>> percentile(range(1, 1001), 50).value
    500.5
    """
    array = np.sort(_sample(values, "a percentile"))
    if not 0 <= q <= 100:
        raise ConfigurationError(f"percentile {q} is not within [0, 100]")
    value = float(np.percentile(array, q))
    n, p = array.size, q / 100
    if p in (0.0, 1.0):
        low, high = (-math.inf, float(array[0])) if p == 0.0 else (float(array[-1]), math.inf)
        return Estimate(value, low, high, confidence)
    below = _binomial_cdf(n, p)
    tail = (1 - confidence) / 2
    # x_(i) (1-based) lies above the quantile with probability P(B < i) = below[i - 1].
    lower = int(np.searchsorted(below, tail, side="right"))  # largest i with below[i - 1] <= tail
    upper = int(np.searchsorted(below, 1 - tail, side="left")) + 1  # smallest i with below[i - 1] >= 1 - tail
    low = float(array[lower - 1]) if lower >= 1 else -math.inf
    high = float(array[upper - 1]) if upper <= n else math.inf
    return Estimate(value, low, high, confidence)


def bootstrap(
    values: ArrayLike,
    statistic: Callable[[Floats], Floats],
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Estimate:
    """Percentile bootstrap of ``statistic``, which reduces the last axis: (…, n) -> (…)."""
    array = _sample(values, "a statistic")
    rng = np.random.default_rng(seed)
    draws = statistic(array[rng.integers(0, array.size, (resamples, array.size))])
    tail = (1 - confidence) / 2 * 100
    low, high = np.percentile(draws, [tail, 100 - tail])
    return Estimate(float(statistic(array)), float(low), float(high), confidence)


def paired_ratio(
    numerator: ArrayLike,
    denominator: ArrayLike,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Estimate:
    """Ratio of two medians whose samples were taken in pairs, with a paired bootstrap interval.

    ``numerator[i]`` and ``denominator[i]`` were measured next to each other. Raises
    :class:`~hasten.errors.ConfigurationError` when the lengths differ or a denominator is not positive.

    >>> paired_ratio([2.0, 4.0, 6.0], [1.0, 2.0, 3.0]).value
    2.0
    """
    top, bottom = _sample(numerator, "a ratio"), _sample(denominator, "a ratio")
    if top.size != bottom.size:
        raise ConfigurationError(f"a paired ratio needs equal counts, got {top.size} and {bottom.size}")
    if not (bottom > 0).all():
        raise ConfigurationError("a ratio of times needs positive times; the clock did not move")
    rng = np.random.default_rng(seed)
    rows = rng.integers(0, top.size, (resamples, top.size))
    draws = np.median(top[rows], axis=1) / np.median(bottom[rows], axis=1)
    tail = (1 - confidence) / 2 * 100
    low, high = np.percentile(draws, [tail, 100 - tail])
    return Estimate(float(np.median(top) / np.median(bottom)), float(low), float(high), confidence)


@dataclass(frozen=True)
class Summary:
    """A distribution in a few numbers, each in the unit of the samples."""

    count: int
    """samples"""
    mean: float
    """arithmetic mean"""
    deviation: float
    """standard deviation of the sample; zero for a single sample"""
    minimum: float
    """smallest sample"""
    maximum: float
    """largest sample; outliers are kept"""
    percentiles: dict[float, Estimate]
    """by percentile, 0 to 100"""

    def at(self, q: float) -> float:
        """The value of a percentile that was asked for."""
        return self.percentiles[q].value

    def to_json(self) -> dict[str, object]:
        """Plain numbers; percentiles as p50, p99, …"""
        return {
            "count": self.count,
            "mean": self.mean,
            "deviation": self.deviation,
            "minimum": self.minimum,
            "maximum": self.maximum,
            **{f"p{q:g}": e.to_json() for q, e in self.percentiles.items()},
        }


def summarise(values: ArrayLike, percentiles: Sequence[float] = (50, 90, 99), confidence: float = 0.95) -> Summary:
    """Describe a sample; raises :class:`~hasten.errors.ConfigurationError` when it is empty."""
    array = _sample(values, "a summary")
    deviation = float(array.std(ddof=1)) if array.size > 1 else 0.0
    estimates = {float(q): percentile(array, q, confidence) for q in percentiles}
    return Summary(array.size, float(array.mean()), deviation, float(array.min()), float(array.max()), estimates)
