"""How much of an image is left after t steps of noise: ``x_t = sqrt(ᾱ_t) x_0 + sqrt(1 - ᾱ_t) ε``.

"Denoising Diffusion Probabilistic Models", Ho et al. 2020, arXiv:2006.11239 (linear); "Improved Denoising Diffusion
Probabilistic Models", Nichol and Dhariwal 2021, arXiv:2102.09672 (cosine).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from hasten.errors import ConfigurationError

__all__ = ["Schedule"]


@dataclass(frozen=True)
class Schedule:
    """A noise schedule.

    >>> schedule = Schedule(steps=100)
    >>> schedule.timesteps(4)
    [99, 66, 33, 0]
    >>> bool((schedule.signal[1:] < schedule.signal[:-1]).all())
    True
    """

    kind: Literal["cosine", "linear"] = "cosine"
    """how the noise grows"""
    steps: int = 1000
    """steps of training; t runs from 0 to ``steps - 1``"""

    def __post_init__(self) -> None:
        if self.kind not in ("cosine", "linear"):
            raise ConfigurationError(f"a schedule of kind {self.kind!r} is not known; give cosine or linear")
        if self.steps < 2:
            raise ConfigurationError(f"a schedule of {self.steps} steps adds no noise; give at least 2")

    @cached_property
    def signal(self) -> Tensor:
        """ᾱ of every step, (steps,) float32, falling."""
        if self.kind == "linear":
            # The published range belongs to a thousand steps.
            scale = 1000 / self.steps
            beta = torch.linspace(1e-4 * scale, 0.02 * scale, self.steps, dtype=torch.float64).clamp(max=0.999)
            return torch.cumprod(1 - beta, 0).float()
        t = torch.arange(self.steps + 1, dtype=torch.float64) / self.steps
        f = torch.cos((t + 0.008) / 1.008 * math.pi / 2).square()
        beta = (1 - f[1:] / f[:-1]).clamp(max=0.999)
        return torch.cumprod(1 - beta, 0).float()

    def timesteps(self, count: int) -> list[int]:
        """``count`` steps for a sampler, evenly spaced from the last to the first."""
        if not 1 <= count <= self.steps:
            raise ConfigurationError(
                f"{count} sampling steps do not fit a schedule of {self.steps}; give 1 to that many"
            )
        if count == 1:
            return [self.steps - 1]
        return [round((self.steps - 1) * (1 - i / (count - 1))) for i in range(count)]

    def add_noise(self, x: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """``x_t``: x and noise (batch, …), t (batch,)."""
        left = self.signal.to(x.device)[t].view(-1, *[1] * (x.dim() - 1)).to(x.dtype)
        return left.sqrt() * x + (1 - left).sqrt() * noise
