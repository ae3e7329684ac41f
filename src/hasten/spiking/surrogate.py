"""Surrogate gradients: a spike is a step function; its derivative is replaced by a bump of finite width.

Forward ``s = 1 if u > threshold else 0``; backward ``ds/du = bump(u - threshold)``. One registry holds the bumps; the
fused kernels and the plain steps use the same codes. Sources: arctan (Fang et al., ICCV 2021), fast sigmoid (Zenke and
Ganguli, Neural Computation 2018), triangle (Bellec et al., NeurIPS 2018), boxcar (straight-through window), sigmoid,
gaussian.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hasten.errors import ConfigurationError

__all__ = ["SURROGATES", "Surrogate", "spike"]

Bump = Callable[[Tensor, "Tensor | float", float], Tensor]


def _arctan(x: Tensor, threshold: Tensor | float, width: float) -> Tensor:
    return 0.5 * width / (1 + (0.5 * math.pi * width * x).square())


def _fast_sigmoid(x: Tensor, threshold: Tensor | float, width: float) -> Tensor:
    return 1 / (1 + width * x.abs()).square()


def _triangle(x: Tensor, threshold: Tensor | float, width: float) -> Tensor:
    return width * (1 - x.abs() / threshold).clamp_min(0) / threshold


def _boxcar(x: Tensor, threshold: Tensor | float, width: float) -> Tensor:
    return width * (x.abs() * width < 0.5).to(x.dtype)


def _sigmoid(x: Tensor, threshold: Tensor | float, width: float) -> Tensor:
    s = torch.sigmoid(width * x)
    return width * s * (1 - s)


def _gaussian(x: Tensor, threshold: Tensor | float, width: float) -> Tensor:
    return width / math.sqrt(math.pi) * torch.exp(-(width * x).square())


SURROGATES: dict[str, tuple[int, float, Bump]] = {
    "arctan": (0, 2.0, _arctan),
    "fast-sigmoid": (1, 25.0, _fast_sigmoid),
    "triangle": (2, 0.3, _triangle),
    "boxcar": (3, 1.0, _boxcar),
    "sigmoid": (4, 4.0, _sigmoid),
    "gaussian": (5, 2.0, _gaussian),
}
"""Name -> (code of the kernels, default width, derivative as a function of ``u - threshold``)."""


@dataclass(frozen=True)
class Surrogate:
    """A bump and its width.

    >>> Surrogate("arctan").derivative(torch.tensor([0.0]), 1.0)
    tensor([1.])
    """

    name: str = "arctan"
    """arctan, fast-sigmoid, triangle, boxcar, sigmoid or gaussian"""
    width: float = 0.0
    """steepness (arctan, fast-sigmoid, boxcar, sigmoid, gaussian), height (triangle: its base is two thresholds);
    0 takes the default of the registry"""

    def __post_init__(self) -> None:
        if self.name not in SURROGATES:
            raise ConfigurationError(f"surrogate {self.name!r} is not known; give one of {', '.join(SURROGATES)}")
        if not self.width:
            object.__setattr__(self, "width", SURROGATES[self.name][1])
        elif not (self.width > 0 and math.isfinite(self.width)):
            raise ConfigurationError(f"a surrogate of width {self.width} has no gradient; give a positive number")

    @property
    def code(self) -> int:
        """What the kernels call it."""
        return SURROGATES[self.name][0]

    def derivative(self, x: Tensor, threshold: Tensor | float) -> Tensor:
        """ds/du at ``x = u - threshold``, any shape; only the triangle looks at the threshold itself."""
        return SURROGATES[self.name][2](x, threshold, self.width)


class _Spike(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, potential: Tensor, threshold: Tensor, surrogate: Surrogate) -> Tensor:
        ctx.save_for_backward(potential, threshold)
        ctx.surrogate = surrogate
        return (potential > threshold).to(potential.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        potential, threshold = ctx.saved_tensors
        slope = gradients[0] * ctx.surrogate.derivative(potential - threshold, threshold)
        return slope, (-slope).sum_to_size(threshold.shape) if ctx.needs_input_grad[1] else None, None


def spike(potential: Tensor, threshold: Tensor | float, surrogate: Surrogate) -> Tensor:
    """``1`` where ``potential > threshold``, else ``0``, in the dtype of the potential; the backward pass is the
    bump."""
    bound = torch.as_tensor(threshold, dtype=potential.dtype, device=potential.device)
    if torch.compiler.is_compiling() or torch.compiler.is_exporting():
        return (potential > bound).to(potential.dtype)
    result: Tensor = _Spike.apply(potential, bound, surrogate)  # type: ignore[no-untyped-call]
    return result
