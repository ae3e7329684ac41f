"""A quantised tensor in as few bytes as its format promises, and back, exactly.

Codes lie bit by bit in bytes. Scales are half or bfloat16 where they fit exactly (those of groups do), one byte for
block formats (an exponent, or E4M3 under the scale of the tensor), float32 otherwise.
"""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor

from hasten.compress.quantize.base import Format, Quantized
from hasten.compress.quantize.bits import pack_bits, unpack_bits
from hasten.compress.quantize.blocks import BlockFloat
from hasten.compress.quantize.integer import Int
from hasten.compress.quantize.minifloat import binade, power_of_two

__all__ = ["expand", "shrink"]


def lowest(fmt: Format) -> int:
    """What code 0 of the packed form stands for."""
    return fmt.lowest if isinstance(fmt, Int) else 0


def shrink(quantized: Quantized) -> dict[str, Tensor]:
    """``codes``, ``scales`` and, where there are any, ``zeros``.

    >>> parts = shrink(Int(4).per_group(32).quantize(torch.randn(8, 64)))
    >>> {name: (tuple(t.shape), t.dtype) for name, t in parts.items()}
    {'codes': ((256,), torch.uint8), 'scales': ((8, 2), torch.bfloat16)}
    """
    fmt = quantized.format
    codes = quantized.codes.to(torch.int32) - lowest(fmt)
    parts = {"codes": quantized.codes.clone() if fmt.bits > 8 else pack_bits(codes, fmt.bits)}
    scales, zeros = quantized.scales.float(), quantized.zeros
    if isinstance(fmt, BlockFloat):
        if fmt.scale == "e8m0":
            parts["scales"] = (binade(scales) + 127).to(torch.uint8)
        else:
            outer = cast(Tensor, zeros).float()
            parts["scales"] = (scales / outer).to(torch.float8_e4m3fn)
            parts["zeros"] = outer
        return parts
    parts["scales"] = _short(scales)
    if zeros is not None:
        parts["zeros"] = zeros.to(torch.int8 if fmt.bits <= 8 else torch.int16)
    return parts


def expand(parts: dict[str, Tensor], fmt: Format, shape: tuple[int, ...]) -> Quantized:
    """The inverse of :func:`shrink` for a tensor of ``shape``."""
    if fmt.bits > 8:
        codes = parts["codes"]
    else:
        codes = unpack_bits(parts["codes"], fmt.bits, math.prod(shape)).view(shape)
        if isinstance(fmt, Int):
            codes = (codes.to(torch.int16) + lowest(fmt)).to(torch.int8)
    zeros = parts.get("zeros")
    scales = parts["scales"]
    if isinstance(fmt, BlockFloat):
        if fmt.scale == "e8m0":
            exponent = scales.to(torch.int32) - 127
            return Quantized(codes, power_of_two(exponent, torch.empty(0)), None, fmt)
        outer = cast(Tensor, zeros)
        return Quantized(codes, scales.float() * outer, outer, fmt)
    return Quantized(codes, scales.float(), None if zeros is None else zeros.float(), fmt)


def _short(scales: Tensor) -> Tensor:
    for kind in (torch.bfloat16, torch.float16):
        if torch.equal(scales.to(kind).float(), scales):
            return scales.to(kind)
    return scales.clone()
