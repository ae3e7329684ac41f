"""The kernels of :mod:`hasten.nn.product` as entries of the table of linear kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hasten.compress.packed import LinearKernel, Packed
from hasten.nn.product import FORMATS, supported

__all__ = ["panel_kernels", "panel_product", "takes"]

_ERRORS = {"bf16": 6e-3, "int8": 2e-2, "int4": 0.13}
_NONE = np.empty(0, np.float32)


def panel_kernels() -> list[LinearKernel]:
    """One kernel for each format whose instructions this processor has."""
    return [_kernel(precision) for precision in FORMATS if supported(precision)]


def _words(x: Tensor) -> Any:
    return x.view(torch.uint16).numpy() if x.dtype is torch.bfloat16 else x.numpy()


def _module(precision: str) -> Any:
    from hasten.nn.product import bfloat16, int4, int8

    return {"bf16": bfloat16, "int8": int8, "int4": int4}[precision]


def _pack(weight: Tensor, precision: str) -> tuple[Any, ...]:
    kind = torch.bfloat16 if precision == "bf16" else torch.float32
    packed = _module(precision).pack(_words(weight.detach().to(kind).contiguous()))
    return packed if isinstance(packed, tuple) else (packed,)


def _multiply(x: Tensor, precision: str, arrays: tuple[Any, ...], bias: Any, width: int) -> Tensor:
    """x (rows, in) bfloat16, contiguous -> (rows, width) bfloat16."""
    out = torch.empty((x.shape[0], width), dtype=torch.bfloat16)
    _module(precision).multiply(_words(x), arrays if len(arrays) > 1 else arrays[0], bias, _words(out))
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
    weight: Tensor, precision: str, bias: Tensor | None
) -> tuple[Callable[[Tensor], Tensor], tuple[Any, Any], int]:
    """``x (rows, in) bfloat16 -> x Wᵀ + bias (rows, out) bfloat16``, the packed weight and bias, and their bytes."""
    arrays = _pack(weight, precision)
    offset = None if bias is None else bias.detach().float().numpy().copy()
    added, width = _NONE if offset is None else offset, weight.shape[0]
    packed = arrays if len(arrays) > 1 else arrays[0]
    size = sum(a.nbytes for a in arrays)
    return lambda x: _multiply(x, precision, arrays, added, width), (packed, offset), size
