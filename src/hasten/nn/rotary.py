"""Rotary position embedding (RoFormer, Su et al. 2021) and the ways in which checkpoints stretch it.

Pair ``(x[i], x[i + half])`` of a head turns by ``position * frequency[i]``; the layout is that of Hugging Face
checkpoints (halves, not neighbours). A stretched embedding changes only the frequencies and one factor on the result.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["RotaryScaling", "rotary_frequencies", "rotate"]


@dataclass(frozen=True)
class RotaryScaling:
    """How the frequencies are stretched beyond the trained context."""

    kind: str = "default"
    """default, linear, llama3, yarn or longrope"""
    factor: float = 1.0
    """stretch of the context"""
    low_freq_factor: float = 1.0
    """llama3: wavelengths above original_context / low_freq_factor are stretched in full"""
    high_freq_factor: float = 4.0
    """llama3: wavelengths below original_context / high_freq_factor stay as they are"""
    original_context: int = 0
    """tokens of context before stretching"""
    beta_fast: float = 32.0
    """yarn: rotations above which a frequency stays"""
    beta_slow: float = 1.0
    """yarn: rotations below which a frequency is stretched in full"""
    attention_factor: float | None = None
    """yarn and longrope: factor on the cosines and sines; None derives it from ``factor``"""
    short_factor: tuple[float, ...] = ()
    """longrope: divisor of each frequency up to the original context"""
    long_factor: tuple[float, ...] = ()
    """longrope: divisor of each frequency beyond it"""


def rotary_frequencies(
    width: int, theta: float, scaling: RotaryScaling, context: int | None = None
) -> tuple[Tensor, float]:
    """Radians per position of each pair, and the factor on cosines and sines.

    ``width`` is the rotated part of a head (even), ``context`` the tokens that will be seen (longrope picks its
    factors by it). Returns ((width / 2,) float32, factor).
    """
    base = 1.0 / (theta ** (torch.arange(0, width, 2, dtype=torch.float32) / width))
    if scaling.kind == "linear":
        return base / scaling.factor, 1.0
    if scaling.kind == "llama3":
        wavelength = 2 * math.pi / base
        low = scaling.original_context / scaling.low_freq_factor
        high = scaling.original_context / scaling.high_freq_factor
        smooth = (scaling.original_context / wavelength - scaling.low_freq_factor) / (
            scaling.high_freq_factor - scaling.low_freq_factor
        )
        blended = (1 - smooth) * base / scaling.factor + smooth * base
        stretched = torch.where(wavelength > low, base / scaling.factor, base)
        return torch.where((wavelength <= low) & (wavelength >= high), blended, stretched), 1.0
    if scaling.kind == "yarn":
        # Peng et al. 2023, "YaRN", section 3.2: keep the fast pairs, stretch the slow ones, a ramp between.
        def pair_of(rotations: float) -> float:
            return (width * math.log(scaling.original_context / (rotations * 2 * math.pi))) / (2 * math.log(theta))

        low = max(math.floor(pair_of(scaling.beta_fast)), 0)
        high = min(math.ceil(pair_of(scaling.beta_slow)), width - 1)
        ramp = ((torch.arange(width // 2, dtype=torch.float32) - low) / max(high - low, 1e-3)).clamp(0, 1)
        factor = scaling.attention_factor
        if factor is None:
            factor = 0.1 * math.log(scaling.factor) + 1.0 if scaling.factor > 1 else 1.0
        return base / scaling.factor * ramp + base * (1 - ramp), factor
    if scaling.kind == "longrope":
        long = context is not None and context > scaling.original_context
        divisors = scaling.long_factor if long else scaling.short_factor
        factor = scaling.attention_factor
        if factor is None:
            factor = 1.0
            if scaling.factor > 1:
                factor = math.sqrt(1 + math.log(scaling.factor) / math.log(scaling.original_context))
        return base / torch.tensor(divisors, dtype=torch.float32), factor
    return base, 1.0


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the first ``2 * cos.shape[-1]`` entries of each head; the rest pass.

    x (..., time, width); cos and sin (time, pairs), broadcast over the leading axes.
    """
    pairs = cos.shape[-1]
    first, second, rest = x[..., :pairs], x[..., pairs : 2 * pairs], x[..., 2 * pairs :]
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    turned = (first * cos - second * sin, second * cos + first * sin)
    return torch.cat((*turned, rest), -1) if rest.shape[-1] else torch.cat(turned, -1)
