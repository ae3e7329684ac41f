"""When to stop: one threshold on a score, chosen on held-back data so that quality is kept and time is saved.

Something gives a score at each of T stages of every input (an exit of a network, a timestep, a model of a cascade),
and is right or wrong there. Stopping at the first stage whose score exceeds θ gives, for each θ, a mean stage and an
accuracy. Arrays in, arrays out: nothing here knows what made the scores.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hasten.errors import ConfigurationError

__all__ = ["Operating", "ThresholdFrontier", "best_stage", "calibrate", "interval", "stops"]

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]


def _checked(score: Any, correct: Any) -> tuple[Floats, Bools]:
    scores, right = np.asarray(score, np.float64), np.asarray(correct, bool)
    if scores.ndim != 2 or scores.shape != right.shape or not scores.size:
        raise ConfigurationError(
            f"scores of shape {scores.shape} and outcomes of {right.shape} were given; both are (stages, samples)"
        )
    if np.isnan(scores).any():
        stage = int(np.isnan(scores).any(1).argmax())
        raise ConfigurationError(f"a score at stage {stage + 1} is not a number; look at the model's outputs there")
    return scores, right


def stops(score: Any, threshold: float) -> NDArray[np.int64]:
    """Stage (0-based) at which each sample stops: the first whose score exceeds ``threshold``, else the last.

    score (stages, samples) -> (samples,).

    >>> stops([[0.2, 0.9], [0.8, 0.1], [0.9, 0.1]], 0.5).tolist()
    [1, 0]
    """
    exceeded = np.asarray(score) > threshold
    exceeded[-1] = True
    at: NDArray[np.int64] = exceeded.argmax(0)
    return at


def best_stage(correct: Any) -> NDArray[np.int64]:
    """The first stage that is right, the last where none is: what an oracle would choose. correct (stages, samples).

    >>> best_stage([[False, False], [True, False]]).tolist()
    [1, 1]
    """
    right = np.array(correct, bool)
    right[-1] = True
    at: NDArray[np.int64] = right.argmax(0)
    return at


@dataclass(frozen=True)
class Operating:
    """One threshold and what it gave on the calibration data."""

    threshold: float
    """a stage stops where its score is larger"""
    mean_stages: float
    """stages that a sample runs, on average (1 to T)"""
    accuracy: float
    """share of right answers"""


@dataclass(frozen=True)
class ThresholdFrontier:
    """All thresholds that were tried, and the ones worth having."""

    points: tuple[Operating, ...]
    """by rising threshold; the last never stops early"""
    samples: int
    """how many samples judged them"""

    @property
    def full(self) -> Operating:
        """Never stopping early."""
        return self.points[-1]

    def frontier(self) -> tuple[Operating, ...]:
        """Points that no other beats in both, fastest first."""
        best: list[Operating] = []
        for p in sorted(self.points, key=lambda p: (p.mean_stages, -p.accuracy)):
            if not best or p.accuracy > best[-1].accuracy:
                best.append(p)
        return tuple(best)

    def best(self, tolerance: float = 0.0) -> Operating:
        """The fastest point whose accuracy is at least that of the whole run minus ``tolerance``."""
        allowed = [p for p in self.points if p.accuracy >= self.full.accuracy - tolerance - 1e-12]
        return min(allowed, key=lambda p: (p.mean_stages, -p.accuracy))

    def flat(self, tolerance: float = 0.005) -> tuple[float, float]:
        """Lowest and highest threshold of the widest run of thresholds within ``tolerance`` of the best accuracy."""
        best = max(p.accuracy for p in self.points)
        runs: list[list[float]] = [[]]
        for p in self.points:
            if p.accuracy >= best - tolerance - 1e-12:
                runs[-1].append(min(1.0, p.threshold))
            elif runs[-1]:
                runs.append([])
        widest = max((r for r in runs if r), key=lambda r: r[-1] - r[0])
        return widest[0], widest[-1]

    def interval(self) -> tuple[float, float]:
        """95 % interval of the whole run's accuracy (Wilson): how well the data can tell points apart."""
        return interval(self.full.accuracy, self.samples)

    def table(self) -> str:
        """The frontier as text."""
        rows = [f"{'threshold':>9}  {'stages':>7}  {'accuracy':>8}"]
        rows += [f"{p.threshold:9.4f}  {p.mean_stages:7.3f}  {p.accuracy:8.4f}" for p in self.frontier()]
        return "\n".join(rows)


def interval(share: float, samples: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's interval of a share that ``samples`` draws gave.

    >>> low, high = interval(0.5, 100)
    >>> round(low, 3), round(high, 3)
    (0.404, 0.596)
    """
    if samples < 1:
        raise ConfigurationError("a share of no samples has no interval; give at least one")
    centre = (share + z * z / (2 * samples)) / (1 + z * z / samples)
    half = z / (1 + z * z / samples) * math.sqrt(share * (1 - share) / samples + z * z / (4 * samples**2))
    return max(0.0, centre - half), min(1.0, centre + half)


def calibrate(score: Any, correct: Any, grid: Any = None) -> ThresholdFrontier:
    """Try thresholds on recorded scores and outcomes, both (stages, samples).

    ``grid``: thresholds; by default 0 to 1 in steps of 0.005. "Never" (infinity) is always among them. Samples must be
    held back from training and from the final test.

    >>> frontier = calibrate([[0.9, 0.4], [0.9, 0.9]], [[True, False], [True, True]])
    >>> frontier.best().mean_stages, frontier.full.mean_stages
    (1.5, 2.0)
    """
    scores, right = _checked(score, correct)
    thresholds = np.linspace(0.0, 1.0, 201) if grid is None else np.unique(np.asarray(grid, np.float64))
    samples = np.arange(scores.shape[1])
    points = []
    for threshold in [*thresholds, math.inf]:
        at = stops(scores, threshold)
        points.append(Operating(float(threshold), float(at.mean() + 1), float(right[at, samples].mean())))
    return ThresholdFrontier(tuple(points), scores.shape[1])
