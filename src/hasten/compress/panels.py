"""The kernels of :mod:`hasten.nn.product` as entries of the table of linear kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hasten.compress.packed import LinearKernel, Packed
from hasten.nn.product import FORMATS, supported, tiles
from hasten.nn.product.instructions import pairs_as_floats

__all__ = ["codes_product", "panel_kernels", "panel_product", "panels_of_codes", "short_product", "takes"]

_ERRORS = {"bf16": 6e-3, "int8": 2e-2, "int4": 0.13}
_NONE = np.empty(0, np.float32)


def panel_kernels() -> list[LinearKernel]:
    """One kernel for each format whose instructions this processor has."""
    return [_kernel(precision) for precision in FORMATS if supported(precision)]


def _words(x: Tensor) -> Any:
    return x.view(torch.uint16).numpy() if x.dtype is torch.bfloat16 else x.numpy()


def _module(precision: str) -> Any:
    from hasten.nn.product import bfloat16, int4, int8, twelve_bits_panels

    return {"bf16": bfloat16, "bf12": twelve_bits_panels, "int8": int8, "int4": int4}[precision]


def _pack(weight: Tensor, precision: str) -> tuple[Any, ...]:
    kind = torch.bfloat16 if precision == "bf16" else torch.float32
    packed = _module(precision).pack(_words(weight.detach().to(kind).contiguous()))
    return packed if isinstance(packed, tuple) else (packed,)


def _multiply(x: Tensor, precision: str, arrays: tuple[Any, ...], bias: Any, width: int, fixed: bool = False) -> Tensor:
    """x (rows, in) bfloat16, contiguous -> (rows, width) bfloat16; see :func:`panel_product` for ``fixed``."""
    out = torch.empty((x.shape[0], width), dtype=torch.bfloat16)
    multiply = _module(precision).multiply
    many = x.shape[0] >= tiles.FEWEST
    if many and precision in ("bf16", "bf12") and not fixed:
        if tiles.granted():
            multiply = tiles.multiply if precision == "bf16" else _module(precision).multiply_tiles
        elif pairs_as_floats():
            multiply = _module(precision).multiply_floats
    elif many and precision == "int8" and tiles.granted() and tiles.takes_bytes(arrays[0].shape[1] * 4):
        multiply = tiles.multiply_bytes
    multiply(_words(x), arrays if len(arrays) > 1 else arrays[0], bias, _words(out))
    return out


def _kernel(precision: str) -> LinearKernel:
    module = _module(precision)

    def pack(weight: Tensor) -> Packed:
        tensors = tuple(torch.from_numpy(a) for a in _pack(weight, precision))
        group = module.INPUTS if precision == "int4" else 0
        return Packed(tensors, (weight.shape[0], weight.shape[1]), group)

    def run(x: Tensor, packed: Packed) -> Tensor:
        arrays = tuple(t.numpy() for t in packed.tensors)
        rows = x.to(torch.bfloat16).contiguous()
        return _multiply(rows, precision, arrays, _NONE, packed.shape[0]).to(x.dtype)

    return LinearKernel(
        f"{precision}-panels",
        precision,
        pack,
        run,
        lambda p: torch.from_numpy(module.unpack(*(t.numpy() for t in p.tensors), *p.shape)),
        _ERRORS[precision],
        lambda out, inner: takes(precision, out, inner),
    )


def takes(precision: str, out: int, inner: int) -> bool:
    """Whether our kernel for ``precision`` runs here and takes a weight (out, in).

    The quantised ones would store a small odd matrix in more bytes than bfloat16 does.
    """
    return supported(precision) and (inner % 2 == 0 if precision == "bf16" else out % 16 == 0 and inner % 32 == 0)


def panel_product(
    weight: Tensor, precision: str, bias: Tensor | None, *, fixed: bool = False
) -> tuple[Callable[[Tensor], Tensor], tuple[Any, Any], int]:
    """``x (rows, in) bfloat16 -> x Wᵀ + bias (rows, out) bfloat16``, the packed weight and bias, and their bytes.

    ``fixed``: a row's bits do not depend on the number of rows, which costs speed on processors with matrix tiles.
    """
    return _product(_pack(weight, precision), precision, bias, weight.shape[0], fixed)


def short_product(
    weight: Tensor, bias: Tensor | None, *, fixed: bool = False
) -> tuple[Callable[[Tensor], Tensor], tuple[Any, Any], int] | None:
    """:func:`panel_product` of bfloat16 in 12 bits, the same bits from fewer bytes; None where that is not of use: the
    matrix is small, not of whole blocks, or too many of its weights have no code."""
    from hasten.nn.product import twelve_bits

    if not (supported("bf16") and twelve_bits.takes(*weight.shape)):
        return None
    packed = twelve_bits.pack(_words(weight.detach().to(torch.bfloat16).contiguous()))
    return None if packed is None else _product((packed,), "bf12", bias, weight.shape[0], fixed)


def _product(
    arrays: tuple[Any, ...], precision: str, bias: Tensor | None, width: int, fixed: bool = False
) -> tuple[Callable[[Tensor], Tensor], tuple[Any, Any], int]:
    offset = None if bias is None else bias.detach().float().numpy().copy()
    added = _NONE if offset is None else offset
    packed = arrays if len(arrays) > 1 else arrays[0]
    size = sum(a.nbytes for a in arrays)
    return lambda x: _multiply(x, precision, arrays, added, width, fixed), (packed, offset), size


def panels_of_codes(codes: Tensor, scales: Tensor, precision: str) -> tuple[Any, ...]:
    """Given codes as a kernel lays them out, without rounding: what packing the weight that they stand for would lose.

    codes (out, in), -128 … 127 for int8 and -8 … 7 for int4; scales (out,) float32 for int8, (out, in / 32) for int4,
    where float16 must hold them.
    """
    from hasten.nn.product.blocks import PANEL, aligned

    module = _module(precision)
    out, inner = codes.shape
    panels = -(-out // PANEL)
    if precision == "int8":
        quads = -(-inner // 4)
        padded = np.full((panels * PANEL, quads * 4), module.ZERO, np.uint8)
        padded[:out, :inner] = (codes.to(torch.int16) + module.ZERO).to(torch.uint8).numpy()
        packed = aligned((panels, quads, PANEL, 4), np.uint8)
        packed[:] = padded.reshape(panels, PANEL, quads, 4).transpose(0, 2, 1, 3)
        return packed, scales.reshape(-1).float().numpy().copy()
    groups = -(-inner // module.INPUTS)
    padded = np.full((panels * PANEL, groups * module.INPUTS), module.ZERO, np.uint8)
    padded[:out, :inner] = (codes.to(torch.int16) + module.ZERO).to(torch.uint8).numpy()
    halves = padded.reshape(panels, PANEL, groups, -1, 2, 4).transpose(0, 2, 3, 4, 1, 5)
    packed, split = aligned((panels, groups, module.BYTES), np.uint8), PANEL * module.INPUTS // 2
    packed[:, :, :split] = (halves[:, :, :, 0] | halves[:, :, :, 1] << 4).reshape(panels, groups, -1)
    held = np.zeros((panels * PANEL, groups), np.float16)
    held[:out] = scales.numpy()
    packed[:, :, split:] = np.ascontiguousarray(held.reshape(panels, PANEL, groups).transpose(0, 2, 1)).view(np.uint8)
    return (packed,)


def codes_product(
    codes: Tensor, scales: Tensor, bits: int, bias: Tensor | None
) -> tuple[str, Callable[[Tensor], Tensor], tuple[Any, Any], int] | None:
    """The product of a stored matrix, or None where no kernel runs these codes as they are.

    codes (out, in), scales (out, groups) float32: one group for int8; for int4 groups of a multiple of 32, which are
    repeated. Returns the precision and what :func:`panel_product` returns.
    """
    out, inner = codes.shape
    groups = scales.shape[1]
    precision = {8: "int8", 4: "int4"}.get(bits)
    if precision is None or not takes(precision, out, inner):
        return None
    if precision == "int8":
        if groups != 1:
            return None
    else:
        size = inner // groups
        if inner % groups or size % 32 or not torch.equal(scales.half().float(), scales):
            return None
        scales = scales.repeat_interleave(size // 32, 1)
    return precision, *_product(panels_of_codes(codes, scales, precision), precision, bias, out)
