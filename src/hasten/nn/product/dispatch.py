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

from hasten.nn.gating import gated
from hasten.nn.product import bfloat16, int4, int8, tiles, twelve_bits_panels
from hasten.nn.product.activations import quantise_row
from hasten.nn.product.blocks import GROUP, PANEL

__all__ = [
    "BF16",
    "FIELDS",
    "INT4",
    "INT8",
    "array_at",
    "describe",
    "forms_for",
    "gated_part",
    "gates_in_place",
    "group_of",
    "inputs_for",
    "items_of",
    "part",
    "pointer",
    "prepare_row",
    "takes_forms",
    "width_of",
]

BF16, INT8, INT4 = 0, 1, 2
FIELDS = 8
"""Numbers that describe a matrix: precision, outputs, inputs, addresses of weights, scales, bias and code, and whether
many rows go through matrix tiles. bfloat16 in 12 bits has no scales: their place holds the bytes of a panel."""


@intrinsic
def pointer(typing: Any, address: Any) -> Any:
    """The address as a pointer."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], ir.IntType(8).as_pointer())

    return types.voidptr(types.intp), generate


@njit(cache=True)
def array_at(address: Any, count: Any) -> Any:
    """``count`` float32 at ``address``; none where the address is 0."""
    return carray(pointer(address), (count if address != 0 else 0,), np.float32)


def describe(precision: str, packed: Any, bias: Any, out_features: int, in_features: int) -> Any:
    """The numbers of a matrix: (FIELDS,) int64. The arrays must outlive them."""
    kind = {"bf16": BF16, "bf12": BF16, "int8": INT8, "int4": INT4}[precision.partition("-")[0]]
    weights, scales = packed if kind == INT8 else (packed, None)
    at = [0 if a is None else a.ctypes.data for a in (weights, scales, bias)]
    if precision.startswith("bf12"):
        at[1] = packed.shape[1]
    tiled = precision.endswith("-tiles")
    return np.array([kind, out_features, in_features, *at, _leaf(precision).address, tiled], np.int64)


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


@njit(cache=True)
def forms_for(rows: int, widest: int) -> Any:
    """Room for ``rows`` rows of up to ``widest`` activations in the forms of the kernels: bytes (rows, widest), their
    starts and scales (rows, groups), and tiles of either kind."""
    groups = (widest + int4.INPUTS - 1) // int4.INPUTS
    bytes_ = np.empty((rows, widest), np.int8)
    starts, scales = np.empty((rows, groups), np.int32), np.empty((rows, groups), np.float32)
    return bytes_, starts, scales, tiles.room_for(tiles.sixteens_of(rows) * 16 * widest * 2)


@njit(cache=True)
def inputs_for(x: Any, forms: Any) -> Any:
    """What :func:`part` takes of ``x`` (rows, in) uint16 and its ``forms``."""
    q, starts, scales, room = forms
    return np.array(
        [x.ctypes.data, q.ctypes.data, starts.ctypes.data, scales.ctypes.data, room.ctypes.data, q.shape[1], 0],
        np.int64,
    )


@njit(cache=True)
def _word_tiles(room: Any, rows: int, ins: int) -> Any:
    return carray(pointer(room), (tiles.sixteens_of(rows), ins // 32, 16, 32), np.uint16)


@njit(cache=True)
def _byte_tiles(room: Any, rows: int, ins: int) -> Any:
    return carray(pointer(room), (tiles.sixteens_of(rows), ins // 64, 16, 64), np.int8)


@njit(cache=True, error_model="numpy")
def prepare_row(matrix: Any, line: Any, row: Any, rows: Any, forms: Any) -> None:
    """Bring row number ``row`` of ``rows`` into the form that the matrix's kernel takes for so many; ``forms`` of
    :func:`forms_for`."""
    q, starts, scales, room = forms
    tiled = matrix[7] != 0 and rows >= tiles.FEWEST
    if matrix[0] == BF16:
        if tiled:
            tiles.arrange_row(line, _word_tiles(room.ctypes.data, rows, matrix[2]), row)
        return
    width, group = width_of(matrix), group_of(matrix)
    groups = (width + group - 1) // group
    zero = int8.ZERO if matrix[0] == INT8 else int4.ZERO
    quantise_row(line, group, zero, q[row, :width], starts[row, :groups], scales[row, :groups])
    if tiled:
        tiles.arrange_row(q[row, :width], _byte_tiles(room.ctypes.data, rows, width), row)


@njit(cache=True)
def takes_forms(matrix: Any, rows: Any) -> Any:
    """Whether the matrix's kernel takes so many rows in a form of its own, not as they are."""
    return matrix[0] != BF16 or (matrix[7] != 0 and rows >= tiles.FEWEST)


@njit(cache=True)
def _words(inputs: Any, rows: Any, ins: Any) -> Any:
    """The rows that :func:`inputs_for` describes, as bfloat16."""
    return carray(pointer(carray(pointer(inputs), (1,), np.int64)[0]), (rows, ins), np.uint16)


@njit(cache=True)
def _bytes(inputs: Any, rows: Any) -> Any:
    """The same rows as bytes, and where their sums start and their scales: (rows, groups)."""
    where = carray(pointer(inputs), (6,), np.int64)
    groups = (where[5] + int4.INPUTS - 1) // int4.INPUTS
    return (
        carray(pointer(where[1]), (rows, where[5]), np.int8),
        carray(pointer(where[2]), (rows, groups), np.int32),
        carray(pointer(where[3]), (rows, groups), np.float32),
    )


@njit(cache=True)
def _room_of(inputs: Any, number: int) -> Any:
    """Address of the rows in tiles (4), or of room for an opened panel (6)."""
    return carray(pointer(inputs), (7,), np.int64)[number]


@njit(cache=True)
def _panels_at(weights: Any, outs: Any, steps: Any) -> Any:
    """Panels of bfloat16 pairs: (panels, steps, 64, 2)."""
    return carray(pointer(weights), ((outs + PANEL - 1) // PANEL, steps, PANEL, 2), np.uint16)


@njit(cache=True)
def _byte_panels_at(weights: Any, outs: Any, ins: Any) -> Any:
    """Panels of byte quads: (panels, quads, 64, 4)."""
    return carray(pointer(weights), ((outs + PANEL - 1) // PANEL, (ins + 3) // 4, PANEL, 4), np.uint8)


@njit(cache=True)
def _records_at(weights: Any, outs: Any, stride: Any) -> Any:
    """Panels of 12 bits: (panels, bytes of one)."""
    return carray(pointer(weights), ((outs + PANEL - 1) // PANEL, stride), np.uint8)


@njit(cache=True)
def _result(out: Any, rows: Any, outs: Any) -> Any:
    return carray(pointer(out), (rows, outs), np.float32)


_LEAF = types.void(*[types.intp] * 10)


def _bf16_leaf(
    outs: Any, ins: Any, weights: Any, scale: Any, bias: Any, inputs: Any, rows: Any, out: Any, first: Any, last: Any
) -> None:
    x, packed, target = _words(inputs, rows, ins), _panels_at(weights, outs, ins // 2), _result(out, rows, outs)
    bfloat16.panels(x, packed, array_at(bias, outs), target, first, last, False)


def _bf16_floats_leaf(
    outs: Any, ins: Any, weights: Any, scale: Any, bias: Any, inputs: Any, rows: Any, out: Any, first: Any, last: Any
) -> None:
    x, packed, target = _words(inputs, rows, ins), _panels_at(weights, outs, ins // 2), _result(out, rows, outs)
    bfloat16.panels(x, packed, array_at(bias, outs), target, first, last, rows >= tiles.FEWEST)


def _bf16_tiles_leaf(
    outs: Any, ins: Any, weights: Any, scale: Any, bias: Any, inputs: Any, rows: Any, out: Any, first: Any, last: Any
) -> None:
    x, packed, target = _words(inputs, rows, ins), _panels_at(weights, outs, ins // 2), _result(out, rows, outs)
    if rows >= tiles.FEWEST:
        lines = _word_tiles(_room_of(inputs, 4), rows, ins)
        tiles.panels(x, lines, packed, array_at(bias, outs), target, first, last)
    else:
        bfloat16.panels(x, packed, array_at(bias, outs), target, first, last, False)


def _bf12_leaf(
    outs: Any, ins: Any, weights: Any, stride: Any, bias: Any, inputs: Any, rows: Any, out: Any, first: Any, last: Any
) -> None:
    x, packed, target = _words(inputs, rows, ins), _records_at(weights, outs, stride), _result(out, rows, outs)
    twelve_bits_panels.panels(x, packed, array_at(bias, outs), target, first, last, False)


def _bf12_floats_leaf(
    outs: Any, ins: Any, weights: Any, stride: Any, bias: Any, inputs: Any, rows: Any, out: Any, first: Any, last: Any
) -> None:
    x, packed, target = _words(inputs, rows, ins), _records_at(weights, outs, stride), _result(out, rows, outs)
    twelve_bits_panels.panels(x, packed, array_at(bias, outs), target, first, last, rows >= tiles.FEWEST)


def _bf12_tiles_leaf(
    outs: Any, ins: Any, weights: Any, stride: Any, bias: Any, inputs: Any, rows: Any, out: Any, first: Any, last: Any
) -> None:
    packed, target = _records_at(weights, outs, stride), _result(out, rows, outs)
    if rows >= tiles.FEWEST:
        lines = _word_tiles(_room_of(inputs, 4), rows, ins)
        room = _room_of(inputs, 6)
        twelve_bits_panels.tile_panels(lines, packed, array_at(bias, outs), target, first, last, room)
    else:
        x = _words(inputs, rows, ins)
        twelve_bits_panels.panels(x, packed, array_at(bias, outs), target, first, last, False)


def _int8_leaf(
    outs: Any, ins: Any, weights: Any, scale: Any, bias: Any, inputs: Any, rows: Any, out: Any, first: Any, last: Any
) -> None:
    x, starts, scales = _bytes(inputs, rows)
    packed, target = _byte_panels_at(weights, outs, ins), _result(out, rows, outs)
    int8.panels(x, starts, scales, packed, array_at(scale, outs), array_at(bias, outs), target, first, last)


def _int8_tiles_leaf(
    outs: Any, ins: Any, weights: Any, scale: Any, bias: Any, inputs: Any, rows: Any, out: Any, first: Any, last: Any
) -> None:
    x, starts, scales = _bytes(inputs, rows)
    packed, target = _byte_panels_at(weights, outs, ins), _result(out, rows, outs)
    factors, here = array_at(scale, outs), array_at(bias, outs)
    if rows >= tiles.FEWEST:
        lines = _byte_tiles(_room_of(inputs, 4), rows, ins)
        tiles.byte_panels(lines, starts, scales, packed, factors, here, target, first, last)
    else:
        int8.panels(x, starts, scales, packed, factors, here, target, first, last)


def _int4_leaf(
    outs: Any, ins: Any, weights: Any, scale: Any, bias: Any, inputs: Any, rows: Any, out: Any, first: Any, last: Any
) -> None:
    x, starts, scales = _bytes(inputs, rows)
    groups = (ins + int4.INPUTS - 1) // int4.INPUTS
    packed = carray(pointer(weights), ((outs + PANEL - 1) // PANEL, groups, int4.BYTES), np.uint8)
    int4.panels(x, starts, scales, packed, array_at(bias, outs), _result(out, rows, outs), first, last)


@lru_cache(maxsize=9)
def _leaf(precision: str) -> Any:
    """The compiled part of one precision. It is called through its address: code that contains a call of it is then
    compiled without it, and a precision that nobody uses is not compiled at all."""
    leaves = {
        "bf16": _bf16_leaf,
        "bf16-floats": _bf16_floats_leaf,
        "bf16-tiles": _bf16_tiles_leaf,
        "bf12": _bf12_leaf,
        "bf12-floats": _bf12_floats_leaf,
        "bf12-tiles": _bf12_tiles_leaf,
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


@njit(cache=True)
def _panel_bytes(matrix: Any) -> Any:
    """Bytes of 64 outputs."""
    if matrix[0] == BF16:
        return matrix[4] if matrix[4] != 0 else matrix[2] * PANEL * 2
    if matrix[0] == INT8:
        return width_of(matrix) * PANEL
    return width_of(matrix) // int4.INPUTS * int4.BYTES


@njit(cache=True, error_model="numpy")
def _begin(matrix: Any, inputs: Any, rows: Any, panel: Any) -> None:
    """Ask for a thread's first weights and for all rows in tiles, many of which another thread has just written."""
    if matrix[7] != 0 and rows > tiles.FEWEST:
        tiles.ask(matrix[3] + panel * _panel_bytes(matrix), min(tiles.FAR_AHEAD, _panel_bytes(matrix)))
        width = matrix[2] * 2 if matrix[0] == BF16 else width_of(matrix)
        tiles.ask(inputs[4], tiles.sixteens_of(min(rows, GROUP)) * 16 * width)


@njit(cache=True, error_model="numpy")
def _space_for(matrix: Any, rows: Any) -> Any:
    """Room for an opened panel, which many rows share; made once, for fresh memory of this size costs page faults."""
    return tiles.room_for(matrix[2] * PANEL * 2 if matrix[0] == BF16 and matrix[4] != 0 and rows > GROUP else 64)


@njit(cache=True, error_model="numpy")
def items_of(matrix: Any, rows: Any) -> Any:
    """Items of a product: panels times groups of rows."""
    return (matrix[1] + PANEL - 1) // PANEL * ((rows + GROUP - 1) // GROUP)


@njit(cache=True, error_model="numpy")
def part(matrix: Any, inputs: Any, out: Any, first: Any, last: Any) -> None:
    """Items ``first`` to ``last`` of ``out = x @ W.T + bias`` (see :func:`hasten.nn.product.bfloat16.panels`).

    ``inputs``: of :func:`inputs_for`; out (rows, out) float32, contiguous.
    """
    rows = out.shape[0]
    space = _space_for(matrix, rows)
    inputs[6] = space.ctypes.data
    _begin(matrix, inputs, rows, first // ((rows + GROUP - 1) // GROUP))
    _call(
        matrix[6],
        (matrix[1], matrix[2], matrix[3], matrix[4], matrix[5], inputs.ctypes.data, out.shape[0], out.ctypes.data,
         first, last),
    )  # fmt: skip
    space[0] = 0  # numba frees an array behind its last use


_WIDE = 4
"""Panels of gates, and as many of ups, that a call of the byte kernel takes: each call has a beginning and an end."""


@njit(cache=True)
def gates_in_place(matrix: Any, rows: Any) -> Any:
    """Whether :func:`gated_part` is for this matrix of gates and ups, and of use with so many rows."""
    return rows > tiles.FEWEST and matrix[5] == 0 and matrix[1] % (2 * PANEL) == 0


@njit(cache=True, error_model="numpy")
def gated_part(matrix: Any, inputs: Any, gelu: bool, out: Any, first: Any, last: Any) -> None:
    """Items ``first`` to ``last`` of ``out = act(gate) * up``, where ``matrix`` holds the gates' outputs and then the
    ups': an item is one group of rows times one panel of either. out (rows, inner) uint16 or float32.

    So gates and ups, twice as wide as the result and in float32, never leave the cache of the thread.
    """
    rows = len(out)
    groups = (rows + GROUP - 1) // GROUP
    half = matrix[1] // (2 * PANEL)
    size = _panel_bytes(matrix)
    most = _WIDE if matrix[0] == INT8 and groups == 1 else 1
    pair = tiles.room_for(2 * rows * most * PANEL * 4).view(np.float32).reshape((2, rows * most * PANEL))
    space = _space_for(matrix, rows)
    inputs[6] = space.ctypes.data
    _begin(matrix, inputs, rows, first // groups)
    item = first
    while item < last:
        panel, begin = item // groups, item % groups
        end = min(groups, begin + last - item) if most == 1 else min(most, last - item)
        item += end - begin
        wide = (end if most > 1 else 1) * PANEL
        for side in range(2):
            here = panel + side * half
            scale = matrix[4] + here * PANEL * 4 if matrix[0] == INT8 else matrix[4]
            _call(
                matrix[6],
                (wide, matrix[2], matrix[3] + here * size, scale, 0, inputs.ctypes.data, rows, pair[side].ctypes.data,
                 begin, end),
            )  # fmt: skip
        for row in range(begin * GROUP, min(rows, end * GROUP)):
            at = slice(row * wide, row * wide + wide)
            gated(pair[0, at], pair[1, at], gelu, out[row, panel * PANEL : panel * PANEL + wide])
    space[0] = 0
