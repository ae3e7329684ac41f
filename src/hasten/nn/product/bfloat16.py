"""A few rows times a bfloat16 matrix, without another copy of it.

The matrix (out, in) lies in panels of 64 outputs; a panel holds, input pair by input pair, the pairs of its 64 outputs
side by side: one stream of memory, read once. An output is summed over the inputs in their order whatever the number of
rows and threads, so a row's bits never depend on its neighbours.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from numba import njit, prange, types
from numba.core import cgutils
from numba.extending import intrinsic

from hasten.nn.bfloat import store
from hasten.nn.product import instructions as avx
from hasten.nn.product.blocks import GROUP, LINE, PANEL, TILES, accumulate, aligned, asks, in_blocks, scaled

__all__ = ["multiply", "pack", "panels", "rows_times", "stretch", "unpack", "write_sums"]

_SPAN = 512
"""Input pairs of a stretch (128 KiB of weights)."""
_AHEAD = 192 * LINE
"""Bytes between a weight in use and the one asked for."""


def _emit(
    builder: Any, rows: int, x: Any, x_stride: Any, weights: Any, pairs: Any, sums: Any, ask: Callable[[Any], None]
) -> None:
    """sums[row, 0:64] += x[row, pairs] . panel[pairs, 64] for ``rows`` rows; ``ask`` of each pair."""
    lines = [builder.add(x, scaled(builder, x_stride, r)) for r in range(rows)]
    places = [(r, t, (r * TILES + t) * LINE) for r in range(rows) for t in range(TILES)]
    totals = [cgutils.alloca_once(builder, avx.FLOATS) for _ in places]
    for total, (_, _, offset) in zip(totals, places, strict=True):
        builder.store(avx.load(builder, sums, offset, avx.FLOATS), total)
    accumulate(builder, lines, weights, pairs, totals, ask, avx.dot_bfloat16)
    for total, (_, _, offset) in zip(totals, places, strict=True):
        avx.store(builder, builder.load(total), sums, offset)


def rows_times(builder: Any, x: Any, x_stride: Any, weights: Any, pairs: Any, sums: Any, count: Any, ask: Any) -> None:
    """Code for ``count`` rows at address ``x`` times one stretch of a panel, added to ``sums`` (count, 64) float32."""

    def emit(rows: int, row: Any) -> None:
        here = builder.add(x, builder.mul(row, x_stride))
        _emit(builder, rows, here, x_stride, weights, pairs, builder.add(sums, scaled(builder, row, PANEL * 4)), ask)

    in_blocks(builder, count, emit)


@intrinsic
def stretch(typing: Any, x: Any, x_stride: Any, weights: Any, pairs: Any, sums: Any, count: Any) -> Any:
    """``count`` rows at address ``x`` times one stretch of a panel, added to ``sums`` (count, 64) float32."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        rows_times(builder, *arguments, asks(builder, arguments[2], _AHEAD))
        return context.get_dummy_value()

    return types.void(*[types.intp] * 6), generate


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
def panels(x: Any, weights: Any, bias: Any, out: Any, first: int, last: int) -> None:
    """Items ``first`` to ``last`` of the product: an item is one group of rows times one panel.

    x (rows, in) bfloat16 as uint16, contiguous; weights (panels, in / 2, 64, 2) uint16; bias (out,) float32 or empty;
    out (rows, out) uint16 or float32.
    """
    rows, width = out.shape
    groups = (rows + GROUP - 1) // GROUP
    pairs = weights.shape[1]
    sums = np.empty((min(rows, GROUP), PANEL), np.float32)
    base, x_base, x_stride = weights.ctypes.data, x.ctypes.data, x.strides[0]
    for item in range(first, last):
        panel, start = item // groups, (item % groups) * GROUP
        count = min(GROUP, rows - start)
        sums[:count] = 0
        for pair in range(0, pairs, _SPAN):
            stretch(x_base + start * x_stride + pair * 4, x_stride, base + (panel * pairs + pair) * PANEL * 4,
                     min(_SPAN, pairs - pair), sums.ctypes.data, count)  # fmt: skip
        write_sums(sums, count, bias, out, start, panel * PANEL, min(panel * PANEL + PANEL, width))


@njit(cache=True, parallel=True, error_model="numpy")
def _multiply(x: Any, weights: Any, bias: Any, out: Any, parts: int) -> None:
    items = weights.shape[0] * ((out.shape[0] + GROUP - 1) // GROUP)
    for part in prange(parts):
        panels(x, weights, bias, out, items * part // parts, items * (part + 1) // parts)


def multiply(x: Any, weights: Any, bias: Any, out: Any) -> None:
    """``out = x @ W.T + bias`` with ``W`` as :func:`pack` laid it out; see :func:`panels` for the shapes."""
    _multiply(x, weights, bias, out, numba.get_num_threads())


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
