"""A few rows times a bfloat16 matrix, without another copy of it.

The matrix (out, in) lies in panels of 64 outputs; a panel holds, input pair by input pair, the pairs of its 64 outputs
side by side: one stream of memory, read once. An output is summed over the inputs in their order whatever the number of
rows and threads, so a row's bits never depend on its neighbours. Many rows are bound by arithmetic: where float32
products are quicker than those of pairs (:func:`hasten.nn.product.instructions.pairs_as_floats`), ``floats`` widens
rows beforehand and weights in registers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import njit, prange, types
from numba.core import cgutils
from numba.extending import intrinsic

from hasten.nn.bfloat import load, store
from hasten.nn.product import instructions as avx
from hasten.nn.product.blocks import GROUP, LINE, PANEL, TILES, adds_words, aligned, asks, in_blocks, over_steps, scaled

__all__ = [
    "adds_pairs",
    "bytes_of_pair",
    "float_rows",
    "address_of_rows",
    "multiply",
    "multiply_floats",
    "pack",
    "panels",
    "rows_times",
    "stretch",
    "unpack",
    "write_sums",
]


# A checker would count the context of a call; what is literal chooses the code.
_intrinsic: Callable[[Callable[..., Any]], Any] = intrinsic(prefer_literal=True)
_SPAN = 512
"""Input pairs of a stretch (128 KiB of weights)."""
_AHEAD = 192 * LINE
"""Bytes between a weight in use and the one asked for."""


def adds_pairs(builder: Any, lines: list[Any], totals: list[Any], floats: bool) -> Callable[[list[Any], Any], None]:
    """Code that adds a step: weights of one input pair in four registers, times pair number ``step`` of each line of
    bfloat16, or of float32 with ``floats``."""

    def products(tiles: list[Any], step: Any) -> None:
        at = scaled(builder, step, 8)
        upper = ir.Constant(avx.INTS, [-65536] * avx.LANES)
        sixteen = ir.Constant(avx.INTS, [16] * avx.LANES)
        # One half of all pairs first: weights of both and 24 sums would not fit into the registers.
        for half in range(2):
            own = [builder.and_(tile, upper) if half else builder.shl(tile, sixteen) for tile in tiles]
            own = [builder.bitcast(tile, avx.FLOATS) for tile in own]
            for r, line in enumerate(lines):
                number = avx.splat(builder, avx.load(builder, builder.add(line, at), 4 * half, ir.FloatType()))
                for t, tile in enumerate(own):
                    total = totals[r * TILES + t]
                    builder.store(avx.multiply_add(builder, tile, number, builder.load(total)), total)

    return products if floats else adds_words(builder, lines, totals, avx.dot_bfloat16)


def _emit(
    builder: Any, rows: int, x: Any, x_stride: Any, weights: Any, pairs: Any, sums: Any, ask: Callable[[Any], None],
    floats: bool,
) -> None:  # fmt: skip
    """sums[row, 0:64] += x[row, pairs] . panel[pairs, 64] for ``rows`` rows; ``ask`` of each pair."""
    lines = [builder.add(x, scaled(builder, x_stride, r)) for r in range(rows)]
    places = [(r, t, (r * TILES + t) * LINE) for r in range(rows) for t in range(TILES)]
    totals = [cgutils.alloca_once(builder, avx.FLOATS) for _ in places]
    for total, (_, _, offset) in zip(totals, places, strict=True):
        builder.store(avx.load(builder, sums, offset, avx.FLOATS), total)
    over_steps(builder, weights, pairs, ask, adds_pairs(builder, lines, totals, floats))
    for total, (_, _, offset) in zip(totals, places, strict=True):
        avx.store(builder, builder.load(total), sums, offset)


def rows_times(
    builder: Any, x: Any, x_stride: Any, weights: Any, pairs: Any, sums: Any, count: Any, ask: Any, floats: bool
) -> None:
    """Code for ``count`` rows at address ``x`` times one stretch of a panel, added to ``sums`` (count, 64) float32.
    With ``floats`` the rows are float32."""

    def emit(rows: int, row: Any) -> None:
        here = builder.add(x, builder.mul(row, x_stride))
        place = builder.add(sums, scaled(builder, row, PANEL * 4))
        _emit(builder, rows, here, x_stride, weights, pairs, place, ask, floats)

    in_blocks(builder, count, emit)


@_intrinsic
def stretch(typing: Any, floats: Any, x: Any, x_stride: Any, weights: Any, pairs: Any, sums: Any, count: Any) -> Any:
    """``count`` rows at address ``x`` times one stretch of a panel, added to ``sums`` (count, 64) float32; ``floats``
    is a literal, 0 or 1."""
    wide = bool(floats.literal_value)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _, *given = arguments
        rows_times(builder, *given, asks(builder, given[2], _AHEAD), wide)
        return context.get_dummy_value()

    return types.void(floats, *[types.intp] * 6), generate


@njit(cache=True, error_model="numpy")
def write_sums(sums: Any, count: int, bias: Any, out: Any, start: int, low: int, high: int) -> None:
    """Outputs ``low`` to ``high`` of rows ``start`` on: sums (count, 64) plus bias, in the type of ``out``."""
    # slices, since their indices are known not to be negative: else each element is gathered by its address
    here = bias[low:high] if len(bias) > 0 else bias
    for row in range(count):
        target, line = out[start + row, low:high], sums[row, : high - low]
        if len(bias) > 0:
            for i in range(len(line)):
                store(target, i, line[i] + here[i])
        else:
            for i in range(len(line)):
                store(target, i, line[i])


@njit(cache=True, error_model="numpy")
def bytes_of_pair(floats: bool) -> int:
    """Bytes of two inputs of a row as the kernels take them."""
    return 8 if floats else 4


@njit(cache=True, error_model="numpy")
def float_rows(rows: int, inputs: int, floats: bool) -> Any:
    """Room for rows as the kernels take them: (rows, inputs) float32, or nothing where they stay as they are."""
    return np.empty((min(rows, GROUP), inputs) if floats else (0, 0), np.float32)


@njit(cache=True, error_model="numpy")
def address_of_rows(x: Any, start: int, count: int, lines: Any) -> Any:
    """Address of ``count`` rows from ``start`` on as the kernels take them, and bytes from one to the next."""
    if len(lines) == 0:
        return x.ctypes.data + start * x.strides[0], x.strides[0]
    for row in range(count):
        line, target = x[start + row], lines[row]
        for i in range(len(line)):
            target[i] = load(line[i])
    return lines.ctypes.data, lines.strides[0]


@njit(cache=True, error_model="numpy")
def panels(x: Any, weights: Any, bias: Any, out: Any, first: int, last: int, floats: bool) -> None:
    """Items ``first`` to ``last`` of the product: an item is one group of rows times one panel.

    x (rows, in) bfloat16 as uint16, contiguous; weights (panels, in / 2, 64, 2) uint16; bias (out,) float32 or empty;
    out (rows, out) uint16 or float32. ``floats``: multiply as float32, whose sums have other bits.
    """
    rows, width = out.shape
    groups = (rows + GROUP - 1) // GROUP
    pairs, size = weights.shape[1], bytes_of_pair(floats)
    sums = np.empty((min(rows, GROUP), PANEL), np.float32)
    base, lines = weights.ctypes.data, float_rows(rows, x.shape[1], floats)
    rows_at, x_stride = address_of_rows(x, 0, min(GROUP, rows), lines)
    for item in range(first, last):
        panel, start = item // groups, (item % groups) * GROUP
        count = min(GROUP, rows - start)
        if groups > 1:
            rows_at, x_stride = address_of_rows(x, start, count, lines)
        sums[:count] = 0
        for pair in range(0, pairs, _SPAN):
            here, take = base + (panel * pairs + pair) * PANEL * 4, min(_SPAN, pairs - pair)
            if floats:
                stretch(1, rows_at + pair * size, x_stride, here, take, sums.ctypes.data, count)
            else:
                stretch(0, rows_at + pair * size, x_stride, here, take, sums.ctypes.data, count)
        write_sums(sums, count, bias, out, start, panel * PANEL, min(panel * PANEL + PANEL, width))
    if floats:
        lines[0, 0] = 0  # numba frees an array behind its last use, and its address is none


@njit(cache=True, parallel=True, error_model="numpy")
def _multiply(x: Any, weights: Any, bias: Any, out: Any, parts: int, floats: bool) -> None:
    items = weights.shape[0] * ((out.shape[0] + GROUP - 1) // GROUP)
    for part in prange(parts):
        panels(x, weights, bias, out, items * part // parts, items * (part + 1) // parts, floats)


def multiply(x: Any, weights: Any, bias: Any, out: Any) -> None:
    """``out = x @ W.T + bias`` with ``W`` as :func:`pack` laid it out; see :func:`panels` for the shapes."""
    _multiply(x, weights, bias, out, numba.get_num_threads(), False)


def multiply_floats(x: Any, weights: Any, bias: Any, out: Any) -> None:
    """The same through float32 products, for many rows."""
    _multiply(x, weights, bias, out, numba.get_num_threads(), True)


@njit(cache=True)
def _fill(weight: Any, packed: Any) -> None:
    for row in range(weight.shape[0]):
        for i in range(weight.shape[1]):
            packed[row // PANEL, i // 2, row % PANEL, i % 2] = weight[row, i]


def pack(weight: Any) -> Any:
    """weight (out, in) bfloat16 as uint16 -> (panels, in / 2, 64, 2); zeros fill the last panel. ``in`` is even."""
    out_features, in_features = weight.shape
    packed = aligned((-(-out_features // PANEL), in_features // 2, PANEL, 2), np.uint16)
    _fill(np.ascontiguousarray(weight), packed)
    return packed


def unpack(packed: Any, out_features: int, in_features: int) -> Any:
    """The weight (out, in) float32 that :func:`pack` laid out."""
    plain = packed.transpose(0, 2, 1, 3).reshape(-1, packed.shape[1] * 2)[:out_features, :in_features]
    return (plain.astype(np.uint32) << 16).view(np.float32)
