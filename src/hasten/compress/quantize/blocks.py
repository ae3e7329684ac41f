"""Block formats: a small float for each element and a scale in few bits for each block.

MXFP4: blocks of 32 share a power of two, ``2^(floor(log2 max|x|) - 2)`` (OCP Microscaling Formats 1.0). NVFP4: blocks
of 16 share an E4M3 scale ``max|x| / 6 / g``, and the tensor one float ``g = max|x| / (6 · 448)``. Elements are E2M1
and saturate.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from hasten.compress.quantize.base import Format, significant
from hasten.compress.quantize.granularity import Granularity, PerGroup
from hasten.compress.quantize.minifloat import FP8_E4M3, MiniFloat, binade, power_of_two
from hasten.compress.quantize.observers import MinMax, Observer
from hasten.compress.values import named_value
from hasten.errors import ConfigurationError

__all__ = ["MXFP4", "NVFP4", "BlockFloat"]


@named_value
@dataclass(frozen=True)
class BlockFloat(Format):
    """Elements in ``element``, one scale in ``scale`` for each group.

    >>> MXFP4.stored_bits((64, 64)) / 64**2, MXFP4.bits
    (4.25, 4)
    >>> MXFP4.fake(torch.tensor([[0.1, 3.0, -8.0]]))
    tensor([[ 0.,  3., -8.]])
    """

    element: MiniFloat = MiniFloat(2, 1)
    """format of an element; its own granularity is not used"""
    scale: str = "e8m0"
    """"e8m0": a power of two; "e4m3": eight bits under a scale of the whole tensor"""
    granularity: Granularity = PerGroup(1, 32)
    """the blocks"""
    observer: Observer = MinMax()
    """how the range is found"""
    dynamic: bool = False
    """find the range in each call; activations only"""

    def __post_init__(self) -> None:
        if self.scale not in ("e8m0", "e4m3"):
            raise ConfigurationError(f"a block scale in {self.scale!r} is not known; give e8m0 or e4m3")
        if not isinstance(self.granularity, PerGroup):
            raise ConfigurationError(f"a block format needs PerGroup, got {type(self.granularity).__name__}")

    @property
    def bits(self) -> int:
        """Of an element."""
        return self.element.bits

    @property
    def label(self) -> str:
        """``e2m1/e8m0 g32``."""
        size = self.granularity.size if isinstance(self.granularity, PerGroup) else 0
        return f"e{self.element.e}m{self.element.m}/{self.scale} g{size}"

    @property
    def scale_bits(self) -> int:
        """One byte."""
        return 8

    def stored_bits(self, shape: tuple[int, ...]) -> float:
        """With the float of the whole tensor, where there is one."""
        return super().stored_bits(shape) + (32 if self.scale == "e4m3" else 0)

    def parameters(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor | None]:
        """The effective scale of each block; in place of a zero point the scale of the tensor, where there is one."""
        top = torch.maximum(-low, high).float()
        if self.scale == "e8m0":
            exponent = binade(top.clamp(min=2.0**-100)) - math.floor(math.log2(self.element.max))
            return torch.where(top > 0, power_of_two(exponent, top), torch.ones_like(top)), None
        outer = self.outer(top)
        inner = FP8_E4M3.round_to(top / self.element.max / outer, torch.ones(()))
        # A block of zeros, or one too small beside the largest, has the least scale; it is not divided by zero.
        return inner.clamp(min=2.0**-9) * outer, outer.reshape((1,) * top.dim())

    def outer(self, top: Tensor) -> Tensor:
        """The scale of the whole tensor from the largest magnitudes of its blocks."""
        return significant(top.amax() / (self.element.max * FP8_E4M3.max), 16)

    def round_to(self, x: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
        """Elements."""
        return self.element.round_to(x, scale)

    def neighbours(self, x: Tensor, scale: Tensor, zero: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Elements."""
        return self.element.neighbours(x, scale)

    def encode(self, x: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
        """Elements."""
        return self.element.encode(x, scale)

    def value(self, codes: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
        """Elements."""
        return self.element.value(codes, scale)


MXFP4 = BlockFloat()
"""blocks of 32, power-of-two scales"""
NVFP4 = BlockFloat(scale="e4m3", granularity=PerGroup(1, 16))
"""blocks of 16, E4M3 scales, one float for the tensor"""
