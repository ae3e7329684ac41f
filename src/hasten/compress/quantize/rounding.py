"""Steps that choose or correct rounded weights of one layer: GPTQ, learned rounding, bias correction.

Learned rounding moves each weight between the two grid values around it: ``w̃ = down + h(V) (up - down)`` with
``h(V) = clip(1.2 σ(V) - 0.1, 0, 1)``; the layer's squared error (exact, from ``H = 2 Σ x xᵀ``) plus
``λ Σ (1 - |2h - 1|^β)``, β falling. Up - down is the local step, so floats work as integers do.

"Up or Down? Adaptive Rounding for Post-Training Quantization" https://arxiv.org/abs/2004.10568 Differs from the paper
in: the error is the whole calibration's, not that of a batch; the activation behind is not seen; in the end single
weights flip while that helps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import Tensor, nn

from hasten.compress.quantize.gptq import gptq
from hasten.compress.quantize.passes import output_mean
from hasten.compress.quantize.steps import Layer, Step
from hasten.compress.values import named_value
from hasten.errors import ConfigurationError

__all__ = ["BiasCorrection", "Gptq", "LearnedRounding", "learn_rounding", "soft"]


@named_value
@dataclass(frozen=True)
class Gptq(Step):
    """Later columns make up for the rounding of earlier ones; see :mod:`hasten.compress.quantize.gptq`.

    >>> Gptq(damp=0.05).damp
    0.05
    """

    damp: float = 0.01
    """added to the diagonal, in units of its mean"""
    block: int = 128
    """columns that are updated at once"""
    order: bool = True
    """columns in falling order of the diagonal"""

    def __post_init__(self) -> None:
        if not 0 <= self.damp < math.inf or self.block < 1:
            raise ConfigurationError(f"damp {self.damp} and block {self.block} must be positive")

    def round(self, layer: Layer) -> Tensor | None:
        """Values on the grid."""
        return gptq(
            layer.matrix, layer.hessian(), layer.format, self.damp, self.block, self.order, layer.scale, layer.zero
        )


@named_value
@dataclass(frozen=True)
class LearnedRounding(Step):
    """AdaRound for any grid.

    >>> LearnedRounding(iterations=500).iterations
    500
    """

    iterations: int = 1000
    """steps of Adam"""
    rate: float = 1e-2
    """its rate"""
    strength: float = 0.01
    """λ, in units of the layer's mean error before"""
    warm_up: float = 0.2
    """share of the run without the second term"""
    high: float = 20.0
    """β at first"""
    low: float = 2.0
    """β at last"""

    def __post_init__(self) -> None:
        if self.iterations < 1 or self.rate <= 0:
            raise ConfigurationError(
                f"{self.iterations} iterations at rate {self.rate} learn nothing; give 1000 and 0.01"
            )

    def round(self, layer: Layer) -> Tensor | None:
        """Values on the grid, never worse than the nearest on the calibration data."""
        return learn_rounding(
            layer.matrix, layer.hessian(), layer.format, self, layer.scale, layer.zero, start=layer.values
        )


def soft(v: Tensor) -> Tensor:
    """``clip(1.2 σ(v) - 0.1, 0, 1)``."""
    return (1.2 * torch.sigmoid(v) - 0.1).clamp(0, 1)


def inverse_soft(share: Tensor) -> Tensor:
    """The ``v`` at which :func:`soft` is ``share``."""
    p = (share.clamp(0.01, 0.99) + 0.1) / 1.2
    return torch.log(p / (1 - p))


def beta(share: float, settings: LearnedRounding) -> float:
    """β falls along a cosine from ``high`` to ``low`` over the part behind the warm-up."""
    at = max(0.0, (share - settings.warm_up) / (1 - settings.warm_up))
    return settings.low + (settings.high - settings.low) * (1 + math.cos(math.pi * at)) / 2


def learn_rounding(
    weight: Tensor, hessian: Tensor, fmt: object, settings: LearnedRounding, scale: Tensor, zero: Tensor | None,
    start: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Grid values for ``weight`` (out, in) and ``hessian`` (in, in) or (groups, in, in).

    The result is compared with ``start`` (rounding to nearest where not given) and the better of both is returned.
    """
    from hasten.compress.quantize.base import Format

    assert isinstance(fmt, Format)
    shape = tuple(weight.shape)
    spread, offset = fmt.spread(scale, shape), fmt.spread(zero, shape)
    down, up = fmt.neighbours(weight, spread, offset)
    step = up - down
    nearest = fmt.round_to(weight, spread, offset)
    h = hessian if hessian.dim() == 3 else hessian[None]
    groups = len(h)

    def error(values: Tensor) -> Tensor:
        """Rows' squared error, in the Hessian's units."""
        lost = (values - weight).reshape(groups, -1, shape[1])
        return ((lost @ h) * lost).sum((1, 2)).sum()

    baseline = error(nearest)
    unit = (baseline / weight.numel()).clamp(min=1e-30)
    share = torch.where(step > 0, (weight - down) / step.clamp(min=1e-30), torch.full_like(step, 0.5))
    v = inverse_soft(share).requires_grad_()
    optimiser = torch.optim.Adam([v], lr=settings.rate)
    with torch.enable_grad():
        for iteration in range(settings.iterations):
            along = iteration / settings.iterations
            h_v = soft(v)
            loss = error(down + h_v * step) / unit
            if along >= settings.warm_up:
                pull = 1 - (2 * h_v - 1).abs().pow(beta(along, settings))
                loss = loss + settings.strength * _PULL * pull.sum()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    learned = torch.where(v.detach() >= 0, up, down)
    found = [learned, nearest] if start is None else [learned, nearest, start]
    candidates = [_polish(v, down, up, weight, h) for v in found]
    return min(candidates, key=lambda values: float(error(values))).to(weight.dtype)


def _polish(values: Tensor, down: Tensor, up: Tensor, weight: Tensor, hessian: Tensor, passes: int = 4) -> Tensor:
    """Single weights flipped to their other neighbour while that lowers the error: column by column, all rows at once.

    A flip by δ changes a row's error by ``2 δ (e H)_c + δ² H_cc``. Values beyond the neighbours (GPTQ's) come back to
    them where that helps. ``hessian`` (groups, in, in).
    """
    groups, inner = len(hessian), weight.shape[1]
    # Inputs first, so that a column is contiguous: (groups, in, rows).
    v, w, low, high = (t.reshape(groups, -1, inner).transpose(1, 2).clone() for t in (values, weight, down, up))
    diagonal = hessian.diagonal(dim1=-2, dim2=-1)
    for _ in range(passes):
        slope = hessian @ (v - w)  # afresh in each pass: sums of many updates drift
        flips = 0
        for column in range(inner):
            current = v[:, column]
            below, above = low[:, column], high[:, column]
            other = torch.where((current - below).abs() < (current - above).abs(), above, below)
            delta = other - current
            gain = delta * (2 * slope[:, column] + delta * diagonal[:, column, None])
            delta = torch.where(gain < 0, delta, torch.zeros_like(delta))
            flips += int((delta != 0).sum())
            v[:, column] += delta
            slope += hessian[:, :, column, None] * delta[:, None]
        if not flips:
            break
    # The sums above may have left the grid by a rounding; the neighbours themselves are on it.
    near = torch.where((v - low).abs() < (v - high).abs(), low, high)
    exact = torch.where((v - near).abs() <= 1e-4 * (high - low).abs(), near, v)
    return exact.transpose(1, 2).reshape(values.shape)


_PULL = 200.0
"""Weight of a rounding that is still open against the mean error of a weight, before ``strength``."""


@named_value
@dataclass(frozen=True)
class BiasCorrection(Step):
    """The mean output of each channel made what it was: ``b ← b + E[W x] - E[Ŵ x̂]`` on the calibration data.

    >>> BiasCorrection()
    BiasCorrection()
    """

    over_examples: ClassVar[str] = "BiasCorrection takes means of outputs"

    def correct(self, layer: Layer, rounded: nn.Module) -> None:
        """Add the difference to the bias; a layer without one is given one."""
        if layer.path not in layer.survey.means:
            raise ConfigurationError(f"layer {layer.path!r} was not reached by the calibration; add it to skip=")
        shift = layer.survey.means[layer.path] - output_mean(rounded, layer.inputs())
        bias = cast("Tensor | None", rounded.bias)
        rounded.bias = shift if bias is None else bias + shift.to(bias.dtype)
