"""The fewest bits that keep a quality floor, found with a logarithmic number of evaluations.

Units are sorted by their score, least sensitive first. For each width in turn (8, then 4) bisection finds a number k of
units that can have it while ``metric ≥ floor × metric of the float model``; the next width is searched among the units
accepted so far. Quality need not fall monotonically with k, so up to three larger k are tried afterwards. Every
evaluation is counted and kept: together they are the frontier.

"Augmenting Hessians with Inter-Layer Dependencies for Mixed-Precision Post-Training Quantization", Schaefer et al.
2023, arXiv:2306.04879. Differs from the paper in the steps beyond k and in leaving out units that gain no time.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from hasten.compress.quantize.allocate import BitPlan, Latency
from hasten.compress.quantize.augmented import UnitScores
from hasten.compress.quantize.base import Format
from hasten.compress.quantize.simulate import Simulated
from hasten.errors import ConfigurationError, DataError
from hasten.files import write_text

__all__ = ["BisectPrecision", "Frontier", "Searched", "Tried"]

Metric = Callable[[nn.Module, Any], float]
"""``metric(model, data)``: higher is better, positive"""


@dataclass(frozen=True)
class Tried:
    """One configuration that was evaluated."""

    widths: tuple[int, ...]
    """per unit; 0 for float"""
    metric: float
    """on the search split"""
    bytes: float
    """of the units' weights, float counted as 16 bits"""
    latency: float | None
    """predicted seconds of the units' layers"""
    admissible: bool
    """whether it keeps the floor"""


@dataclass(frozen=True)
class Frontier:
    """Every configuration that was evaluated, in order."""

    tried: tuple[Tried, ...]
    """the float model first"""

    @property
    def best(self) -> tuple[Tried, ...]:
        """Those that no other beats in both cost (seconds, else bytes) and metric, by falling cost."""
        found: list[Tried] = []
        for one in sorted(self.tried, key=lambda t: (_cost(t), -t.metric)):
            if not found or one.metric > found[-1].metric:
                found.append(one)
        return tuple(reversed(found))

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Write a page that shows metric against cost."""
        from hasten.measure.plots import lines

        timed = self.tried[0].latency is not None
        series = {
            "evaluated": [(_cost(t), t.metric) for t in self.tried],
            "best": [(_cost(t), t.metric) for t in self.best],
        }
        drawing = lines(
            series, label_x="predicted time" if timed else "bytes", label_y="metric",
            kind_x="time" if timed else "bytes", kind_y="number",
            markers=lambda name: "o" if name == "evaluated" else "-",
        )  # fmt: skip
        title = "Precision against quality"
        write_text(path, f"<!doctype html><meta charset=utf-8><title>{title}</title><h1>{title}</h1>{drawing}\n")


def _cost(tried: Tried) -> float:
    return tried.bytes if tried.latency is None else tried.latency


@dataclass(frozen=True)
class Searched:
    """What the search gave."""

    model: nn.Module = field(repr=False)
    """a new module with a report; the given one where no unit may be quantised"""
    plan: BitPlan
    """weight -> format"""
    inputs: tuple[tuple[str, Format], ...]
    """layer -> format of its input"""
    widths: dict[str, int]
    """layer -> bits, 16 for float"""
    metric: float
    """of the plan on the search split"""
    baseline: float
    """of the float model on the search split"""
    evaluations: int
    """passes of the metric, without that of the float model"""
    frontier: Frontier
    """every configuration on the way"""
    notes: tuple[str, ...]
    """plain sentences"""


@dataclass(frozen=True)
class BisectPrecision:
    """Search the plan with the fewest bits above a quality floor."""

    scores: UnitScores
    """of :class:`~hasten.compress.quantize.augmented.AugmentedHessian`, measured on this model"""
    metric: Metric
    """higher is better"""
    floor: float = 0.999
    """share of the float model's metric that must be kept, 0 to 1"""
    bits: tuple[int, ...] = (8, 4)
    """widths in the order in which they are tried, high to low"""
    order: str = "augmented"
    """how units are sorted: augmented, hessian, reversed or random"""
    latency: Latency | None = None
    """predicted seconds of a layer at a width"""
    skip_if_gain_below: float = 1.02
    """a unit that is predicted to become less than so many times faster stays; needs ``latency``"""
    pinned: tuple[str, ...] = ()
    """layers that stay float"""
    beyond: int = 3
    """larger k that are tried after the bisection"""
    seed: int = 0
    """of the random order"""

    def __post_init__(self) -> None:
        if not 0 < self.floor <= 1:
            raise ConfigurationError(f"floor {self.floor} is not a share of the metric; give above 0 and at most 1")
        missing = [b for b in self.bits if b not in self.scores.bits]
        if missing or not self.bits or list(self.bits) != sorted(set(self.bits), reverse=True):
            raise ConfigurationError(
                f"bits {self.bits} must fall and be among the measured {self.scores.bits}; measure the others too"
            )
        known = {p for unit in self.scores.units for p in unit}
        unknown = [p for p in self.pinned if p not in known]
        if unknown:
            raise ConfigurationError(f"pinned names {', '.join(unknown)}, which is not among the units' layers")

    def __call__(
        self,
        model: nn.Module,
        validation: Any,
        *,
        progress: Callable[[str, float], None] | None = None,
    ) -> Searched:
        """The search on ``validation``, which the metric understands; report the result on other data."""
        if validation is None or (hasattr(validation, "__len__") and not len(validation)):
            raise DataError("the validation split is empty; give samples that calibration did not see")
        simulated = self.scores.simulated
        if simulated is None:
            raise ConfigurationError("these scores carry no simulation; keep the object that AugmentedHessian returned")
        search = _Search(self, simulated, validation, progress or (lambda stage, share: None))
        widths = search.run()
        return self._result(model, simulated, widths, search)

    def _result(self, model: nn.Module, simulated: Simulated, widths: Sequence[int], search: _Search) -> Searched:
        layers = {p: w for unit, w in zip(self.scores.units, widths, strict=True) for p in unit}
        formats = tuple((f"{p}.weight", simulated.weight_format(w)) for p, w in layers.items() if w)
        inputs = tuple((p, form) for p, w in layers.items() if w and (form := simulated.input_format(p, w)) is not None)
        tried = search.tried[tuple(widths)]
        whole = [(f"{p}.weight", simulated.weight_format(w) if w else None) for p, w in layers.items()]
        before = sum(simulated.bytes(p, 0) * 2 for p in simulated.layers)
        predicted = self.scores.predict(widths) if any(widths) else 0.0
        plan = BitPlan(tuple(whole), tried.bytes, before, predicted, tried.latency)
        notes = list(search.notes)
        if any(widths):
            result = simulated.freeze(model, formats, layers)
        else:
            result = model
            notes.append(f"no unit may be quantised at a floor of {self.floor}; the model is as it was")
        frontier = Frontier(tuple(search.tried.values()))
        named = {p: w or 16 for p, w in layers.items()}
        return Searched(
            result, plan, inputs, named, tried.metric, search.baseline, search.evaluations, frontier, tuple(notes)
        )


class _Search:
    """Evaluations of one search, counted and remembered."""

    def __init__(
        self, rule: BisectPrecision, simulated: Simulated, validation: Any, told: Callable[[str, float], None]
    ) -> None:
        self.rule, self.simulated, self.validation, self.told = rule, simulated, validation, told
        self.units = rule.scores.units
        self.tried: dict[tuple[int, ...], Tried] = {}
        self.notes: list[str] = []
        self.evaluations = -1  # the float model does not count
        self.baseline = math.nan
        self.expected = len(rule.bits) * (math.ceil(math.log2(len(self.units) + 1)) + rule.beyond)

    def evaluate(self, widths: Sequence[int]) -> Tried:
        """Metric of a configuration, from memory where it was evaluated before."""
        key = tuple(widths)
        if key in self.tried:
            return self.tried[key]
        layers = {p: w for unit, w in zip(self.units, key, strict=True) for p in unit}
        value = self.rule.metric(self.simulated.use(layers), self.validation)
        if not isinstance(value, int | float) or not math.isfinite(value):
            raise ConfigurationError(f"the metric returned {value!r}; return a finite number, higher is better")
        if not self.tried:
            self.baseline = float(value)
            if value <= 0:
                raise ConfigurationError(f"the float model's metric is {value}; a floor needs one that is positive")
        self.evaluations += 1
        size = sum(self.simulated.bytes(p, w) for p, w in layers.items())
        timed = self.rule.latency
        seconds = sum(timed(p, w or 16) for p, w in layers.items()) if timed is not None else None
        passed = value >= self.rule.floor * self.baseline
        self.tried[key] = Tried(key, float(value), size, seconds, passed)
        self.told("searching", min(1.0, self.evaluations / self.expected))
        return self.tried[key]

    def run(self) -> tuple[int, ...]:
        """Widths of the units: the last admissible configuration of the last width that had one."""
        widths = [0] * len(self.units)
        self.evaluate(widths)
        accepted = [i for i, unit in enumerate(self.units) if not set(unit) & set(self.rule.pinned)]
        for bits in self.rule.bits:
            candidates = [i for i in self.rule.scores.order(bits, self.rule.order, self.rule.seed) if i in accepted]
            candidates = [i for i in candidates if self._gains(i, widths[i], bits)]
            taken = self._bisect(widths, candidates, bits)
            for i in candidates[:taken]:
                widths[i] = bits
            accepted = candidates[:taken]
            if not accepted:
                break
        return tuple(widths)

    def _gains(self, unit: int, now: int, bits: int) -> bool:
        timed = self.rule.latency
        if timed is None:
            return True
        before = sum(timed(p, now or 16) for p in self.units[unit])
        after = sum(timed(p, bits) for p in self.units[unit])
        gain = before / after if after > 0 else 1.0
        if gain < self.rule.skip_if_gain_below:
            self.notes.append(f"{', '.join(self.units[unit])} stays above {bits} bits: {gain:.2f}× as fast there")
            return False
        return True

    def _bisect(self, widths: Sequence[int], candidates: Sequence[int], bits: int) -> int:
        def passes(k: int) -> bool:
            tried = list(widths)
            for i in candidates[:k]:
                tried[i] = bits
            return self.evaluate(tried).admissible

        low, high = 0, len(candidates) + 1  # low passes, high does not (nothing is beyond all)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if passes(middle) else (low, middle)
        best = low
        for k in range(high + 1, min(len(candidates), high + self.rule.beyond) + 1):
            if passes(k):  # not monotonic after all
                best = k
        return best
