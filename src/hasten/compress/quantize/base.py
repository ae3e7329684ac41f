"""What every number format can do: find a scale, round to its grid, give codes, and count its bits.

A tensor ``x`` becomes codes ``q``; what they stand for is the format's business (``S (q - Z)``, a minifloat times
``S``, an entry of a codebook). Rounding is to nearest, ties to even. The scale is found by the observer from ``x``
itself unless one is handed in. Scales are kept to 16 significant bits (those of groups to 8 or 11, which half formats
store exactly), so that a code of up to 8 bits times its scale is exact in float32 and ``Q(Q(x)) == Q(x)`` bit for
bit.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor

from hasten.compress.quantize.granularity import Granularity, PerChannel, PerGroup, PerTensor, PerToken
from hasten.compress.quantize.observers import Observer, Watch, range_of
from hasten.errors import DataError

__all__ = ["Format", "Quantized", "at_least_float", "significant"]

_LEAST = 2.0**-110
"""A scale below it could not be divided by; such a tensor is zero for every purpose."""


def significant(scale: Tensor, bits: int) -> Tensor:
    """Positive float32 scales rounded to ``bits`` significant bits; nothing, or less than nothing, becomes 1.

    >>> significant(torch.tensor([1 / 3, 0.0]), 11)
    tensor([0.3333, 1.0000])
    """
    scale = scale.float()
    drop = 24 - bits
    rounded = (scale.view(torch.int32) + (1 << (drop - 1))) >> drop << drop
    return torch.where(scale > _LEAST, rounded.view(torch.float32), torch.ones_like(scale))


def at_least_float(x: Tensor) -> Tensor:
    """Half formats as float32, others unchanged."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


@dataclass(frozen=True)
class Quantized:
    """A tensor as codes and scales."""

    codes: Tensor
    """int8, uint8 or int16, one per element, in the shape of the tensor"""
    scales: Tensor
    """float32 in the compact shape of the granularity; a codebook's entries lie on one more axis behind it"""
    zeros: Tensor | None
    """zero points as float32 integers, where the format has them; NVFP4's scale of the whole tensor"""
    format: Format
    """what the codes mean"""
    dtype: torch.dtype = torch.float32
    """of the tensor"""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the tensor."""
        return tuple(self.codes.shape)

    def dequantize(self) -> Tensor:
        """What the codes stand for."""
        return self.format.decode(self.codes, self.scales, self.zeros).to(self.dtype)


class Format(ABC):
    """A number format with its granularity and the observer of its ranges; subclasses are frozen dataclasses."""

    granularity: Granularity
    observer: Observer

    @property
    @abstractmethod
    def bits(self) -> int:
        """Bits of a code."""

    @property
    @abstractmethod
    def label(self) -> str:
        """A short name, such as ``int4 g32``."""

    @property
    def scale_bits(self) -> int:
        """Stored bits of a scale (with its zero point)."""
        return 16 if isinstance(self.granularity, PerGroup) else 32

    @property
    def at_each_call(self) -> bool:
        """Whether ranges are found anew in each call and not once."""
        return isinstance(self.granularity, PerToken) or bool(getattr(self, "dynamic", False))

    @abstractmethod
    def parameters(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor | None]:
        """Scale and zero point whose grid covers low … high; elementwise, in their shape."""

    @abstractmethod
    def round_to(self, x: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
        """The nearest values of the grid; ``scale`` broadcasts against ``x``."""

    @abstractmethod
    def neighbours(self, x: Tensor, scale: Tensor, zero: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The grid values at or below and above ``x``; both the same at the ends of the grid."""

    @abstractmethod
    def encode(self, x: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
        """Codes of the nearest values; ``scale`` broadcasts against ``x``."""

    @abstractmethod
    def value(self, codes: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
        """What codes stand for; ``scale`` broadcasts against them."""

    def find(self, x: Tensor, importance: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Scale and zero point for ``x``, in the compact shape of the granularity.

        ``importance`` (same shape as ``x``) weighs errors where the format looks at them (codebooks). Raises
        :class:`~hasten.errors.DataError` for NaN and infinity.
        """
        x = at_least_float(x.detach())
        low, high = range_of(self.observer, x, self)
        if not bool(torch.isfinite(low).all() and torch.isfinite(high).all()):
            raise DataError("the tensor holds NaN or infinity; repair it before it is quantised")
        return self.parameters(low, high)

    def spread(self, scale: Tensor | None, shape: tuple[int, ...]) -> Any:
        """Compact scales as they broadcast against a tensor of ``shape``; None stays None."""
        return scale if scale is None or scale.numel() == 1 else self.granularity.spread(scale, shape)

    def fake(self, x: Tensor, scale: Tensor | None = None, zero: Tensor | None = None) -> Tensor:
        """Quantise and dequantise, in the dtype of ``x``; ``scale`` (compact) is found from ``x`` where not given."""
        wide = at_least_float(x)
        if scale is None:
            scale, zero = self.parameters(*range_of(self.observer, wide, self))
        shape = tuple(x.shape)
        return self.round_to(wide, self.spread(scale, shape), self.spread(zero, shape)).to(x.dtype)

    def quantize(self, x: Tensor, scale: Tensor | None = None, zero: Tensor | None = None) -> Quantized:
        """Codes and scales; ``scale`` and ``zero`` (compact) are found from ``x`` where not given."""
        if scale is None:
            scale, zero = self.find(x)
        wide, shape = at_least_float(x.detach()), tuple(x.shape)
        codes = self.encode(wide, self.spread(scale, shape), self.spread(zero, shape))
        return Quantized(codes, scale, zero, self, x.dtype)

    def decode(self, codes: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
        """What codes stand for; ``scale`` and ``zero`` are compact."""
        shape = tuple(codes.shape)
        return self.value(codes, self.spread(scale, shape), self.spread(zero, shape))

    def stored_bits(self, shape: tuple[int, ...]) -> float:
        """Bits of a tensor of ``shape`` on disk, scales included."""
        code = self.bits if self.bits <= 8 else 16
        return math.prod(shape) * code + math.prod(self.granularity.compact(shape)) * self.scale_bits

    def watch(self) -> Watch:
        """A streaming observer for static ranges."""
        return Watch(self.observer, self)

    def per_tensor(self) -> Self:
        """The same format with one scale."""
        return replace(self, granularity=PerTensor())  # type: ignore[type-var]

    def per_channel(self, axis: int = 0) -> Self:
        """The same format with one scale per output channel."""
        return replace(self, granularity=PerChannel(axis))  # type: ignore[type-var]

    def per_group(self, size: int = 32, axis: int = 1) -> Self:
        """The same format with one scale for ``size`` inputs."""
        return replace(self, granularity=PerGroup(axis, size))  # type: ignore[type-var]
