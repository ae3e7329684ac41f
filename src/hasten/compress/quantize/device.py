"""Stored matrices as the kernels of a GPU read them, without rounding: which formats there are kernels for.

Integers of up to 8 bits and FP8 (E4M3), with scales of rows, of groups of 16 inputs or a multiple (4 bits: 32), or one
for all; integers with zero points too.
"""

from __future__ import annotations

import torch

from hasten.compress.device_codes import CHUNK, lay_out
from hasten.compress.packed import Packed
from hasten.compress.quantize.base import Format, Quantized
from hasten.compress.quantize.granularity import PerChannel, PerGroup, PerTensor
from hasten.compress.quantize.integer import Int
from hasten.compress.quantize.minifloat import FP8_E4M3, MiniFloat

__all__ = ["kind_of", "packed_of", "readable"]


def _is_float8(fmt: object) -> bool:
    """Whether a code is the byte of torch's float8_e4m3fn."""
    wanted = (FP8_E4M3.e, FP8_E4M3.m, FP8_E4M3.bias, FP8_E4M3.signed, FP8_E4M3.special)
    return isinstance(fmt, MiniFloat) and (fmt.e, fmt.m, fmt.bias, fmt.signed, fmt.special) == wanted


def packed_of(weight: Quantized) -> tuple[str, Packed] | None:
    """A stored matrix (out, in) in the layout, on its own device and without rounding: precision and codes.

    Integers of up to 4 bits become ``int4``, of up to 8 bits ``int8``, FP8 (E4M3) ``fp8``; None where no kernel reads
    the format (codebooks, other floats) or its groups.
    """
    out, inner = weight.shape
    found = kind_of(weight.format, inner)
    if found is None:
        return None
    precision, group = found
    groups = -(-inner // group) if group else 1
    scales = weight.scales.reshape(-1, groups).expand(out, groups)
    if precision == "fp8":
        return precision, lay_out(weight.codes.contiguous().view(torch.float8_e4m3fn), scales, group=group)
    zeros = None if weight.zeros is None else weight.zeros.reshape(-1, groups).expand(out, groups)
    codes = weight.codes.to(torch.int8)
    return precision, lay_out(codes, scales, zeros, group=group, four=precision == "int4")


def readable(weight: Quantized) -> bool:
    """Whether :func:`packed_of` takes it."""
    return kind_of(weight.format, weight.shape[1]) is not None


def kind_of(fmt: Format, inner: int) -> tuple[str, int] | None:
    """Precision and inputs of a scale (0 for a row) of a weight with ``inner`` inputs, or None."""
    granularity, group = fmt.granularity, 0
    if isinstance(granularity, PerGroup):
        if granularity.axis not in (1, -1):
            return None
        group = 0 if granularity.size >= inner else granularity.size
    elif isinstance(granularity, PerChannel):
        if granularity.axis not in (0, -2):
            return None
    elif not isinstance(granularity, PerTensor):
        return None
    if group % CHUNK:
        return None
    if _is_float8(fmt):
        return "fp8", group
    if not isinstance(fmt, Int) or fmt.bits > 8:
        return None
    return ("int4" if fmt.bits <= 4 and group % (2 * CHUNK) == 0 else "int8"), group
