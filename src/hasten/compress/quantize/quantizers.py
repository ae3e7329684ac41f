"""Rounding that can be trained through: straight-through gradients, learned step sizes, learned clips, random rounding.

Forward rounds; backward passes the gradient on inside the range and stops it outside. The step of LSQ has the
gradient ``∂r̂/∂S = (r̂ - r)/S`` inside and ``r̂/S`` at a clipped value (for integers: ``round(r/S) - r/S``, ``qmin``
or ``qmax``), times ``1/sqrt(numel · qmax)``, numel counting the elements of a scale. PACT learns the upper clip:
gradient 1 above it.

"Learned Step Size Quantization" https://arxiv.org/abs/1902.08153
"PACT: Parameterized Clipping Activation for Quantized Neural Networks" https://arxiv.org/abs/1805.06085
Differs from the papers in: any grid with a scale (minifloats), any granularity.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from hasten.compress.quantize.base import Format

__all__ = ["largest", "learned_step", "pact", "stochastic", "straight_through"]


def largest(fmt: Format) -> float:
    """The largest value of the grid in steps: ``qmax`` of an integer, ``max`` of a float."""
    one = torch.ones(1, 1)
    return 1.0 / float(fmt.parameters(-one, one)[0].reshape(-1)[0])


class _Rounded(torch.autograd.Function):
    """x, scale (broadcast), zero -> rounded; gradients for x and the scale."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, zero: Tensor | None, fmt: Format, factor: float) -> Tensor:
        result = fmt.round_to(x, scale, zero)
        # Clipped: the grid has no value further out, and x lies more than half a step beyond.
        high = fmt.round_to(torch.full_like(x, 1e30), scale, zero)
        low = fmt.round_to(torch.full_like(x, -1e30), scale, zero)
        inside = (x >= low) & (x <= high)
        ctx.save_for_backward(x, result, inside, scale)
        ctx.factor = factor
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        gradient = gradients[0]
        x, result, inside, scale = ctx.saved_tensors
        step = None
        if ctx.needs_input_grad[1]:
            local = torch.where(inside, result - x, result) / scale
            step = _reduce(gradient * local, tuple(scale.shape)) * ctx.factor
        return torch.where(inside, gradient, torch.zeros_like(gradient)), step, None, None, None


def _reduce(gradient: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Sum over what was broadcast."""
    for axis, size in enumerate(shape):
        if size == 1 and gradient.shape[axis] != 1:
            gradient = gradient.sum(axis, keepdim=True)
    return gradient


def straight_through(x: Tensor, fmt: Format, scale: Tensor, zero: Tensor | None = None) -> Tensor:
    """``fmt.round_to`` with the gradient of a clip; ``scale`` broadcasts against ``x`` and gets no gradient.

    >>> from hasten.compress.quantize import Int
    >>> x = torch.tensor([0.4, 9.0], requires_grad=True)
    >>> straight_through(x, Int(4), torch.ones(1)).sum().backward()
    >>> x.grad
    tensor([1., 0.])
    """
    result: Tensor = _Rounded.apply(x, scale.detach(), zero, fmt, 1.0)  # type: ignore[no-untyped-call]
    return result


def learned_step(x: Tensor, fmt: Format, scale: Tensor, zero: Tensor | None = None) -> Tensor:
    """As :func:`straight_through`, with the gradient of LSQ for a compact ``scale``.

    >>> from hasten.compress.quantize import Int
    >>> step = torch.ones(1, requires_grad=True)
    >>> learned_step(torch.tensor([0.25, 9.0]), Int(4), step).sum().backward()
    >>> round(float(step.grad) * (2 * 7) ** 0.5, 2)      # (0 - 0.25) + 7
    6.75
    """
    shape = tuple(x.shape)
    per = x.numel() / max(scale.numel(), 1)
    factor = 1.0 / math.sqrt(max(per * largest(fmt), 1e-12))
    spread = fmt.spread(scale.clamp(min=1e-12), shape)
    result: Tensor = _Rounded.apply(x, spread, fmt.spread(zero, shape), fmt, factor)  # type: ignore[no-untyped-call]
    return result


def pact(x: Tensor, clip: Tensor, bits: int) -> Tensor:
    """Inputs of one sign, 0 … ``clip`` in 2^bits levels; the clip is learned.

    >>> clip = torch.tensor(2.0, requires_grad=True)
    >>> pact(torch.tensor([1.0, 5.0]), clip, 2).sum().backward()
    >>> float(clip.grad)
    1.0
    """
    top = clip.clamp(min=1e-6)
    clipped = torch.minimum(torch.relu(x), top)
    step = (top / (2**bits - 1)).detach()
    return clipped + (torch.round(clipped / step) * step - clipped).detach()  # type: ignore[no-any-return]


def stochastic(
    x: Tensor, fmt: Format, scale: Tensor, zero: Tensor | None = None, *, generator: torch.Generator
) -> Tensor:
    """One of the two neighbours on the grid, the upper with the probability that keeps the mean; compact ``scale``.

    >>> from hasten.compress.quantize import Int
    >>> generator = torch.Generator().manual_seed(0)
    >>> draws = stochastic(torch.full((100000,), 0.25), Int(4), torch.ones(1), generator=generator)
    >>> sorted(draws.unique().tolist()), round(float(draws.mean()), 2)
    ([0.0, 1.0], 0.25)
    """
    shape = tuple(x.shape)
    down, up = fmt.neighbours(x, fmt.spread(scale, shape), fmt.spread(zero, shape))
    share = torch.where(up > down, (x - down) / (up - down).clamp(min=1e-30), torch.zeros_like(x))
    return torch.where(torch.rand(shape, generator=generator) < share, up, down)
