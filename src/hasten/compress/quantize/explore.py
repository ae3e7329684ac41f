"""All number formats of some widths on one model, each with its quality and what its multiply-accumulate costs.

Integers and every split of a float are tried under the same steps, with the same granularity and observers, so that
only the grid differs. The result is a table, a Pareto front over cost, and the factor on the floats' own hardware at
which integers lose their majority on that front.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import nn

from hasten.compress.quantize.base import Format
from hasten.compress.quantize.granularity import PerChannel
from hasten.compress.quantize.integer import Int
from hasten.compress.quantize.minifloat import MiniFloat
from hasten.compress.quantize.observers import MinMax, Observer
from hasten.compress.quantize.passes import Calibration
from hasten.compress.quantize.steps import Step
from hasten.compress.quantize.targets import matrix, targets
from hasten.compress.quantize.technique import Quantize
from hasten.errors import ConfigurationError
from hasten.measure.counting import cost as count
from hasten.measure.fpga import Fpga, Operand

_PLAIN = MinMax()

__all__ = ["Candidate", "FormatFront", "formats", "splits"]


def splits(bits: int) -> list[Format]:
    """The integer of that width, then the floats from two exponent bits to no mantissa (one exponent bit is an
    integer).

    >>> [f.label for f in splits(4)]
    ['int4', 'e2m1', 'e3m0']
    """
    return [Int(bits), *(MiniFloat(e, bits - 1 - e) for e in range(2, bits))]


@dataclass(frozen=True)
class Candidate:
    """One choice of formats and steps, and what came out."""

    weight: Format
    """of weights"""
    activation: Format
    """of inputs"""
    steps: tuple[Step, ...]
    """of the recipe"""
    score: float
    """the user's metric, larger is better"""
    luts: float
    """of a multiply-accumulate, mean over the model's products"""
    bits: float
    """of a weight, scales included, mean over the quantised layers"""

    @property
    def integer(self) -> bool:
        """Whether both sides are integers."""
        return isinstance(self.weight, Int) and isinstance(self.activation, Int)

    @property
    def label(self) -> str:
        """``e2m1 channel x e2m1 + Gptq``."""
        return " + ".join([f"{self.weight.label} x {self.activation.label}", *(type(s).__name__ for s in self.steps)])


@dataclass(frozen=True)
class FormatFront:
    """What :func:`formats` tried."""

    candidates: tuple[Candidate, ...]
    """in the order in which they were tried"""
    layers: tuple[tuple[str, int, int], ...]
    """(layer, inputs of an output, multiply-adds of one pass over the first calibration input)"""
    device: Fpga
    """whose LUTs are counted"""

    def luts(self, candidate: Candidate, device: Fpga) -> float:
        """LUTs of a multiply-accumulate, mean over the model's products."""
        return _luts(candidate.weight, candidate.activation, self.layers, device)

    def front(self, device: Fpga | None = None, worst: float = float("-inf")) -> list[Candidate]:
        """Candidates that no other beats in both score and LUTs, cheapest first, none below ``worst``."""
        used = device or self.device
        ranked = sorted(self.candidates, key=lambda c: (self.luts(c, used), -c.score))
        best, kept = float("-inf"), []
        for candidate in ranked:
            if candidate.score > best:
                best = candidate.score
                if best >= worst:
                    kept.append(candidate)
        return kept

    def integer_share(self, device: Fpga | None = None, worst: float = float("-inf")) -> float:
        """Share of integers on the front."""
        front = self.front(device, worst)
        return sum(c.integer for c in front) / max(len(front), 1)

    def break_even(self, worst: float = float("-inf"), steps: int = 60) -> float | None:
        """Largest factor on exponents, alignment and sign at which integers are no majority; None where they always
        are.

        1 is the device as it is; a factor of 0.3 says that floats would need 70 % less of their own hardware.
        """
        for index in range(steps, -1, -1):
            factor = 1.5 * index / steps
            if self.integer_share(self.device.floats_times(factor), worst) <= 0.5:
                return factor
        return None

    def table(self) -> str:
        """Rows of formats, score, LUTs and bits; a star is on the front."""
        front = {id(c) for c in self.front()}
        rows = [("", "formats", "score", "LUTs", "bits")]
        for c in sorted(self.candidates, key=lambda c: c.luts):
            rows.append(("*" if id(c) in front else "", c.label, f"{c.score:.4f}", f"{c.luts:.1f}", f"{c.bits:.2f}"))
        widths = [max(len(r[i]) for r in rows) for i in range(5)]
        return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(r, widths, strict=True)).rstrip() for r in rows)

    def plot(self, path: str) -> None:
        """Scores over LUTs, integers and floats apart, the front as a line; an image file."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(7, 4.5))
        axes = figure.subplots()
        for integer, name in ((True, "integers"), (False, "minifloats")):
            chosen = [c for c in self.candidates if c.integer is integer]
            axes.scatter([c.luts for c in chosen], [c.score for c in chosen], s=18, label=name)
        front = self.front()
        axes.step([c.luts for c in front], [c.score for c in front], where="post", linewidth=1, label="front")
        axes.set_xlabel("LUTs of a multiply-accumulate")
        axes.set_ylabel("score")
        axes.legend()
        figure.savefig(path, dpi=140, bbox_inches="tight")


def formats(
    model: nn.Module,
    calibration: Sequence[Any],
    metric: Callable[[nn.Module], float],
    *,
    bits: Iterable[int] = range(3, 9),
    cost: Fpga | None = None,
    steps: Sequence[Sequence[Step]] = ((),),
    mixed: bool = False,
    ends_at_8: bool = False,
    observer: Observer = _PLAIN,
    skip: tuple[str, ...] = (),
    progress: Callable[[str, float], None] | None = None,
) -> FormatFront:
    """Try every format of every width in ``bits`` for weights (per channel) and inputs (per tensor, static).

    ``metric(model)`` is a score, larger is better. ``steps`` are the sets of steps to try with each; ``mixed`` tries
    every pair of formats instead of equal ones; ``ends_at_8`` keeps the first and the last layer at 8 bits.
    """
    widths = sorted(set(bits))
    if not widths or widths[0] < 2 or widths[-1] > 8:
        raise ConfigurationError(f"widths {widths} cannot be explored; give some of 2 … 8")
    device = cost or Fpga.load()
    data = Calibration(calibration)
    found = targets(model, ("*",), skip)
    order = data.survey(model, found.layers).order
    layers = _layers(model, order, data.inputs[0])
    every = [f for b in widths for f in splits(b)]
    pairs = [(w, a) for w in every for a in every] if mixed else [(f, f) for f in every]
    ends: tuple[tuple[str, Format], ...] = ()
    if ends_at_8 and order:
        ends = tuple((path, cast(Format, Int(8, PerChannel(0)))) for path in (order[0], order[-1]))
    tried: list[Candidate] = []
    total = len(pairs) * len(steps)
    for chosen in steps:
        for weight, activation in pairs:
            if progress is not None:
                progress(f"{weight.label} x {activation.label}", len(tried) / total)
            w = cast(Format, replace(cast(Any, weight), granularity=PerChannel(0), observer=observer))
            a = cast(Format, replace(cast(Any, activation), observer=observer))
            small = Quantize(w, a, tuple(chosen), skip=skip, overrides=ends, real="never")(model, data.inputs)
            with torch.no_grad():
                score = float(metric(small))
            stored = sum(w.stored_bits(tuple(matrix(model.get_submodule(p)).shape)) for p in order)
            weights = sum(matrix(model.get_submodule(p)).numel() for p in order)
            tried.append(Candidate(w, a, tuple(chosen), score, _luts(w, a, layers, device), stored / weights))
    return FormatFront(tuple(tried), layers, device)


def _luts(weight: Format, activation: Format, layers: Sequence[tuple[str, int, int]], device: Fpga) -> float:
    w, a = Operand.of(weight), Operand.of(activation)
    whole = sum(macs for _, _, macs in layers)
    return sum(device.mac(w, a, inner).luts * macs for _, inner, macs in layers) / whole


def _layers(model: nn.Module, order: Sequence[str], example: Any) -> tuple[tuple[str, int, int], ...]:
    counted = {m.name: m.macs for m in count(model.eval() if not model.training else model, example).modules}
    return tuple((path, matrix(model.get_submodule(path)).shape[1], max(counted.get(path, 0), 1)) for path in order)
