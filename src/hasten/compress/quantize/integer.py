"""Integers with a scale and, where asked, a zero point.

``q = clip(round(x / S) + Z, qmin, qmax)``, ``x̂ = S (q - Z)``. Symmetric: ``Z = 0`` and codes -qmax … qmax (restricted
range, ``S = max|x| / (2^(b-1) - 1)``) or the full range ``S = max|x| / (2^(b-1) - 1/2)``. Affine: ``S = (high - low) /
(2^b - 1)``, ``Z = round(-low / S) + qmin``; zero is always a value of the grid.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hasten.compress.quantize.base import Format, significant
from hasten.compress.quantize.granularity import Granularity, PerChannel, PerGroup, PerTensor, PerToken
from hasten.compress.quantize.observers import MinMax, Observer
from hasten.compress.values import named_value
from hasten.errors import ConfigurationError

__all__ = ["Int"]


@named_value
@dataclass(frozen=True)
class Int(Format):
    """``bits``-bit integers.

    >>> Int(4).fake(torch.tensor([-1.0, 0.1, 0.5, 1.0]))
    tensor([-1.0000,  0.1429,  0.5714,  1.0000])
    >>> Int(4, PerGroup(1, 32)).stored_bits((1024, 1024)) / 1024**2
    4.5
    """

    bits: int = 8
    """2 … 16"""
    granularity: Granularity = PerTensor()
    """which elements share a scale"""
    symmetric: bool = True
    """False: with a zero point, for activations that are mostly of one sign"""
    observer: Observer = MinMax()
    """how the range is found"""
    dynamic: bool = False
    """find the range in each call; activations only"""
    full_range: bool = False
    """symmetric only: use the code -2^(b-1) too"""

    def __post_init__(self) -> None:
        if not isinstance(self.bits, int) or not 2 <= self.bits <= 16:
            raise ConfigurationError(f"an integer of {self.bits} bits is not known; give 2 … 16, or Binary for one bit")
        if isinstance(self.granularity, PerToken) and not self.dynamic:
            raise ConfigurationError("PerToken ranges differ in each call; write Int(bits, PerToken(), dynamic=True)")

    @property
    def label(self) -> str:
        """``int4 g32``, ``uint8`` where affine."""
        return f"{'int' if self.symmetric else 'uint'}{self.bits}{granule(self.granularity)}"

    @property
    def lowest(self) -> int:
        """The least code."""
        restricted = self.symmetric and not self.full_range
        return int(-(2 ** (self.bits - 1))) + int(restricted)

    @property
    def highest(self) -> int:
        """The largest code."""
        return int(2 ** (self.bits - 1) - 1)

    @property
    def scale_bits(self) -> int:
        """Half precision for groups, single otherwise, and a byte for a zero point."""
        return super().scale_bits + (0 if self.symmetric else 8 if self.bits <= 8 else 16)

    def parameters(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor | None]:
        """See the module."""
        kept = 8 if isinstance(self.granularity, PerGroup) else 16  # groups: what bfloat16 holds, as kernels read it
        low, high = low.clamp(max=0), high.clamp(min=0)
        if self.symmetric:
            top = torch.maximum(-low, high)
            return significant(top / (self.highest + 0.5 if self.full_range else self.highest), kept), None
        scale = significant((high - low) / (2**self.bits - 1), kept)
        zero = (torch.round(-low.float() / scale) + self.lowest).clamp(self.lowest, self.highest)
        return scale, zero

    def round_to(self, x: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
        """``S (clip(round(x / S) + Z) - Z)``."""
        steps = torch.round(x / scale)
        if zero is None:
            return steps.clamp(self.lowest, self.highest) * scale
        return torch.clamp(steps, self.lowest - zero, self.highest - zero) * scale

    def neighbours(self, x: Tensor, scale: Tensor, zero: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """One step apart."""
        offset = torch.zeros_like(scale) if zero is None else zero
        least, most = self.lowest - offset, self.highest - offset
        below = torch.floor(x / scale)
        return torch.clamp(below, least, most) * scale, torch.clamp(below + 1, least, most) * scale

    def encode(self, x: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
        """int8, or int16 above 8 bits."""
        steps = torch.round(x / scale)
        codes = (steps if zero is None else steps + zero).clamp(self.lowest, self.highest)
        return codes.to(torch.int8 if self.bits <= 8 else torch.int16)

    def value(self, codes: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
        """``S (q - Z)``."""
        steps = codes.to(scale.dtype)
        return (steps if zero is None else steps - zero) * scale


def granule(granularity: Granularity) -> str:
    """A suffix for labels."""
    if isinstance(granularity, PerGroup):
        return f" g{granularity.size}"
    if isinstance(granularity, PerChannel):
        return " channel"
    return " token" if isinstance(granularity, PerToken) else ""
