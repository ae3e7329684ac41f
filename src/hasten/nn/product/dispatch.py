"""A part of a product whose precision is a number known at run time, for kernels that run many matrices in one call.

numba compiles for types; a stack of layers with a precision each would be a type of its own. Here a matrix is a row of
whole numbers: precision, shape and addresses.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
from llvmlite import ir
from numba import cfunc, njit, types
from numba.extending import intrinsic
from numba.np.numpy_support import carray

from hasten.nn.product import bfloat16, int4, int8, tiles
from hasten.nn.product.activations import quantise_row
from hasten.nn.product.blocks import PANEL

__all__ = ["BF16", "FIELDS", "INT4", "INT8", "array_at", "describe", "group_of", "part", "prepare_row", "width_of"]

BF16, INT8, INT4 = 0, 1, 2
FIELDS = 7
"""Numbers that describe a matrix: precision, outputs, inputs, addresses of weights, scales, bias and code."""


@intrinsic
def _pointer(typing: Any, address: Any) -> Any:
    """The address as a pointer."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], ir.IntType(8).as_pointer())

    return types.voidptr(types.intp), generate


@njit(cache=True)
def array_at(address: Any, count: Any) -> Any:
    """``count`` float32 at ``address``; none where the address is 0."""
    return carray(_pointer(address), (count if address != 0 else 0,), np.float32)


def describe(precision: str, packed: Any, bias: Any, out_features: int, in_features: int) -> Any:
    """The numbers of a matrix: (FIELDS,) int64. The arrays must outlive them."""
    kind = {"bf16": BF16, "bf16-tiles": BF16, "int8": INT8, "int8-tiles": INT8, "int4": INT4}[precision]
    weights, scales = packed if kind == INT8 else (packed, None)
    at = [0 if a is None else a.ctypes.data for a in (weights, scales, bias)]
    return np.array([kind, out_features, in_features, *at, _leaf(precision).address], np.int64)


@njit(cache=True)
def width_of(matrix: Any) -> Any:
    """Bytes of a row of activations for the byte kernels: the inputs, filled up to whole quads or groups."""
    if matrix[0] == INT8:
        return (matrix[2] + 3) // 4 * 4
    if matrix[0] == INT4:
        return (matrix[2] + int4.INPUTS - 1) // int4.INPUTS * int4.INPUTS
    return np.int64(0)


@njit(cache=True)
def group_of(matrix: Any) -> Any:
    """Inputs that share a scale of the activations."""
    return int8.INPUTS if matrix[0] == INT8 else int4.INPUTS


@njit(cache=True, error_model="numpy")
def prepare_row(matrix: Any, line: Any, q: Any, start: Any, scale: Any) -> None:
    """Bring one row of activations into the form of the matrix's kernel; nothing to do for bfloat16."""
    if matrix[0] != BF16:
        width, group = width_of(matrix), group_of(matrix)
        groups = (width + group - 1) // group
        zero = int8.ZERO if matrix[0] == INT8 else int4.ZERO
        quantise_row(line, group, zero, q[:width], start[:groups], scale[:groups])


_LEAF = types.void(*[types.intp] * 10)


def _bf16_leaf(
    outs: Any, ins: Any, weights: Any, scale: Any, bias: Any, inputs: Any, rows: Any, out: Any, first: Any, last: Any
) -> None:
    where = carray(_pointer(inputs), (5,), np.int64)
    x = carray(_pointer(where[0]), (rows, ins), np.uint16)
    panels = carray(_pointer(weights), ((outs + PANEL - 1) // PANEL, ins // 2, PANEL, 2), np.uint16)
    bfloat16.panels(x, panels, array_at(bias, outs), carray(_pointer(out), (rows, outs), np.float32), first, last)


def _bf16_tiles_leaf(
    outs: Any, ins: Any, weights: Any, scale: Any, bias: Any, inputs: Any, rows: Any, out: Any, first: Any, last: Any
) -> None:
    where = carray(_pointer(inputs), (5,), np.int64)
    x = carray(_pointer(where[0]), (rows, ins), np.uint16)
    panels = carray(_pointer(weights), ((outs + PANEL - 1) // PANEL, ins // 2, PANEL, 2), np.uint16)
    tiles.panels(x, panels, array_at(bias, outs), carray(_pointer(out), (rows, outs), np.float32), first, last)


def _int8_leaf(
    outs: Any, ins: Any, weights: Any, scale: Any, bias: Any, inputs: Any, rows: Any, out: Any, first: Any, last: Any
) -> None:
    where = carray(_pointer(inputs), (5,), np.int64)
    widest, quads = where[4], (ins + 3) // 4
    groups = (widest + int4.INPUTS - 1) // int4.INPUTS
    x = carray(_pointer(where[1]), (rows, widest), np.int8)
    starts = carray(_pointer(where[2]), (rows, groups), np.int32)
    scales = carray(_pointer(where[3]), (rows, groups), np.float32)
    panels = carray(_pointer(weights), ((outs + PANEL - 1) // PANEL, quads, PANEL, 4), np.uint8)
    target = carray(_pointer(out), (rows, outs), np.float32)
    int8.panels(x, starts, scales, panels, array_at(scale, outs), array_at(bias, outs), target, first, last)


def _int8_tiles_leaf(
    outs: Any, ins: Any, weights: Any, scale: Any, bias: Any, inputs: Any, rows: Any, out: Any, first: Any, last: Any
) -> None:
    where = carray(_pointer(inputs), (5,), np.int64)
    widest, quads = where[4], (ins + 3) // 4
    groups = (widest + int4.INPUTS - 1) // int4.INPUTS
    x = carray(_pointer(where[1]), (rows, widest), np.int8)
    starts = carray(_pointer(where[2]), (rows, groups), np.int32)
    scales = carray(_pointer(where[3]), (rows, groups), np.float32)
    panels = carray(_pointer(weights), ((outs + PANEL - 1) // PANEL, quads, PANEL, 4), np.uint8)
    target = carray(_pointer(out), (rows, outs), np.float32)
    tiles.byte_panels(x, starts, scales, panels, array_at(scale, outs), array_at(bias, outs), target, first, last)


def _int4_leaf(
    outs: Any, ins: Any, weights: Any, scale: Any, bias: Any, inputs: Any, rows: Any, out: Any, first: Any, last: Any
) -> None:
    where = carray(_pointer(inputs), (5,), np.int64)
    widest = where[4]
    groups = (widest + int4.INPUTS - 1) // int4.INPUTS
    x = carray(_pointer(where[1]), (rows, widest), np.int8)
    starts = carray(_pointer(where[2]), (rows, groups), np.int32)
    scales = carray(_pointer(where[3]), (rows, groups), np.float32)
    own = (ins + int4.INPUTS - 1) // int4.INPUTS
    panels = carray(_pointer(weights), ((outs + PANEL - 1) // PANEL, own, int4.BYTES), np.uint8)
    target = carray(_pointer(out), (rows, outs), np.float32)
    int4.panels(x, starts, scales, panels, array_at(bias, outs), target, first, last)


@lru_cache(maxsize=5)
def _leaf(precision: str) -> Any:
    """The compiled part of one precision. It is called through its address: code that contains a call of it is then
    compiled without it, and a precision that nobody uses is not compiled at all."""
    leaves = {
        "bf16": _bf16_leaf,
        "bf16-tiles": _bf16_tiles_leaf,
        "int8": _int8_leaf,
        "int8-tiles": _int8_tiles_leaf,
        "int4": _int4_leaf,
    }
    return cfunc(_LEAF, cache=True, error_model="numpy")(leaves[precision])


@intrinsic
def _call(typing: Any, address: Any, arguments: Any) -> Any:
    """Call the leaf at ``address`` with ten whole numbers."""

    def generate(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        word = ir.IntType(64)
        kind = ir.FunctionType(ir.VoidType(), [word] * 10)
        function = builder.inttoptr(given[0], kind.as_pointer())
        builder.call(function, [builder.extract_value(given[1], i) for i in range(10)])
        return context.get_dummy_value()

    return types.void(types.intp, types.UniTuple(types.intp, 10)), generate


@njit(cache=True, error_model="numpy")
def part(matrix: Any, inputs: Any, out: Any, first: Any, last: Any) -> None:
    """Items ``first`` to ``last`` of ``out = x @ W.T + bias`` (see :func:`hasten.nn.product.bfloat16.panels`).

    ``inputs`` (5,) int64: addresses of x (rows, in) uint16 and of q (rows, widest) int8, starts and scales (rows,
    widest / 32) of :func:`prepare_row`, and ``widest``; out (rows, out) float32. Contiguous, all of them.
    """
    _call(
        matrix[6],
        (matrix[1], matrix[2], matrix[3], matrix[4], matrix[5], inputs.ctypes.data, out.shape[0], out.ctypes.data,
         first, last),
    )  # fmt: skip
