"""A few rows times a matrix of signed bytes, one scale for each output.

Weights are stored as ``w + 128`` (the instruction takes unsigned by signed), in panels of 64 outputs with four inputs
of each output side by side. Activations become bytes too, in groups of 512 inputs (:mod:`activations`); integer sums
within a group are exact, groups are added in float32 in their order, so a row's bits never depend on its neighbours.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from numba import njit, prange, types
from numba.core import cgutils
from numba.extending import intrinsic

from hasten.nn.bfloat import store
from hasten.nn.product import instructions as avx
from hasten.nn.product.activations import quantise_rows
from hasten.nn.product.blocks import GROUP, LINE, PANEL, TILES, accumulate, aligned, asks, in_blocks, scaled

__all__ = ["INPUTS", "ZERO", "multiply", "pack", "panels", "stretch", "unpack", "write_scaled"]

INPUTS = 512
"""Inputs that share a scale of the activations."""
ZERO = 128
"""What is added to a weight, for the instruction takes it unsigned."""
_SPAN = 4
"""Groups of a stretch (128 KiB of weights)."""
_AHEAD = 192 * LINE
_QUADS = INPUTS // 4


def _emit(
    builder: Any, rows: int, x: Any, x_stride: Any, side: Any, weights: Any, quads: Any, starts: Any, scales: Any,
    sums: Any,
) -> None:  # fmt: skip
    """sums[row] += scale[row] * (start[row] + x[row, quads] . panel[quads]) for one group of inputs."""
    lines = [builder.add(x, scaled(builder, x_stride, r)) for r in range(rows)]
    sides = [scaled(builder, side, r) for r in range(rows)]
    totals = [cgutils.alloca_once(builder, avx.INTS) for _ in range(rows * TILES)]
    for r in range(rows):
        start = avx.broadcast(builder, starts, sides[r])
        for t in range(TILES):
            builder.store(start, totals[r * TILES + t])
    accumulate(builder, lines, weights, quads, totals, asks(builder, weights, _AHEAD), avx.dot_bytes)
    avx.add_scaled(builder, rows, TILES, totals, scales, sides, sums)


@intrinsic
def stretch(
    typing: Any, x: Any, x_stride: Any, side: Any, weights: Any, groups: Any, quads: Any, starts: Any, scales: Any,
    sums: Any, count: Any,
) -> Any:  # fmt: skip
    """``count`` rows times ``groups`` groups of a panel (``quads`` input quads in all), added to ``sums``."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        x, x_stride, side, weights, groups, quads, starts, scales, sums, count = arguments

        def emit(rows: int, row: Any) -> None:
            with cgutils.for_range(builder, groups) as loop:
                at = scaled(builder, loop.index, _QUADS)
                left = builder.sub(quads, at)
                full = quads.type(_QUADS)
                take = builder.select(builder.icmp_signed("<", left, full), left, full)
                here = builder.add(builder.add(x, builder.mul(row, x_stride)), scaled(builder, at, 4))
                beside = builder.add(builder.mul(row, side), scaled(builder, loop.index, 4))
                _emit(
                    builder, rows, here, x_stride, side, builder.add(weights, scaled(builder, at, PANEL * 4)), take,
                    builder.add(starts, beside), builder.add(scales, beside),
                    builder.add(sums, scaled(builder, row, PANEL * 4)),
                )  # fmt: skip

        in_blocks(builder, count, emit)
        return context.get_dummy_value()

    return types.void(*[types.intp] * 10), generate


@njit(cache=True, error_model="numpy")
def write_scaled(
    sums: Any, count: int, weight_scales: Any, bias: Any, out: Any, begin: int, low: int, high: int
) -> None:
    """Outputs ``low`` to ``high`` of rows ``begin`` on: sums (count, 64) times the weights' scales, plus bias."""
    factors, here = weight_scales[low:high], bias[low:high] if len(bias) > 0 else bias
    for row in range(count):  # slices, see :func:`hasten.nn.product.bfloat16.write_sums`
        target, line = out[begin + row, low:high], sums[row, : high - low]
        if len(bias) > 0:
            for i in range(len(line)):
                store(target, i, line[i] * factors[i] + here[i])
        else:
            for i in range(len(line)):
                store(target, i, line[i] * factors[i])


@njit(cache=True, error_model="numpy")
def panels(
    x: Any, starts: Any, scales: Any, weights: Any, weight_scales: Any, bias: Any, out: Any, first: int, last: int
) -> None:
    """Items ``first`` to ``last`` of the product: an item is one group of rows times one panel.

    x (rows, in) int8 with ``starts`` and ``scales`` (rows, in / 512) of :func:`quantise_rows`; weights (panels, in / 4,
    64, 4) uint8 and weight_scales (out,) float32 of :func:`pack`; bias (out,) float32 or empty; out (rows, out) uint16
    or float32.
    """
    rows, width = out.shape
    parts = (rows + GROUP - 1) // GROUP
    quads = weights.shape[1]
    groups = (quads + _QUADS - 1) // _QUADS
    sums = np.empty((min(rows, GROUP), PANEL), np.float32)
    base, x_base, x_stride, side = weights.ctypes.data, x.ctypes.data, x.strides[0], scales.strides[0]
    for item in range(first, last):
        panel, begin = item // parts, (item % parts) * GROUP
        count = min(GROUP, rows - begin)
        sums[:count] = 0
        for group in range(0, groups, _SPAN):
            quad = group * _QUADS
            beside = begin * side + group * 4
            stretch(x_base + begin * x_stride + quad * 4, x_stride, side, base + (panel * quads + quad) * PANEL * 4,
                     min(_SPAN, groups - group), min(_SPAN * _QUADS, quads - quad), starts.ctypes.data + beside,
                     scales.ctypes.data + beside, sums.ctypes.data, count)  # fmt: skip
        low, high = panel * PANEL, min(panel * PANEL + PANEL, width)
        write_scaled(sums, count, weight_scales, bias, out, begin, low, high)


@njit(cache=True, parallel=True, error_model="numpy")
def _multiply(
    x: Any, starts: Any, scales: Any, weights: Any, weight_scales: Any, bias: Any, out: Any, parts: int
) -> None:
    items = weights.shape[0] * ((out.shape[0] + GROUP - 1) // GROUP)
    for part in prange(parts):
        panels(x, starts, scales, weights, weight_scales, bias, out, items * part // parts, items * (part + 1) // parts)


def multiply(x: Any, weights: tuple[Any, Any], bias: Any, out: Any) -> None:
    """``out = x @ W.T + bias``; x (rows, in) bfloat16 as uint16 or float32, ``weights`` of :func:`pack`."""
    packed, weight_scales = weights
    q, starts, scales = quantise_rows(x, packed.shape[1] * 4, INPUTS, ZERO)
    _multiply(q, starts, scales, packed, weight_scales, bias, out, numba.get_num_threads())


@njit(cache=True, error_model="numpy")
def _fill(weight: Any, packed: Any, scales: Any) -> None:
    for row in range(weight.shape[0]):
        line = weight[row]
        top = np.float32(0.0)
        for i in range(len(line)):
            top = max(top, abs(line[i]))
        scales[row] = top / np.float32(127.0)
        inverse = np.float32(127.0) / top if top > 0 else np.float32(0.0)
        for i in range(len(line)):
            packed[row // PANEL, i // 4, row % PANEL, i % 4] = np.int32(np.rint(line[i] * inverse)) + ZERO


def pack(weight: Any) -> tuple[Any, Any]:
    """weight (out, in) float32 -> panels (panels, in / 4, 64, 4) uint8 and scales (out,) float32.

    ``in`` need not be a multiple of four, the missing inputs are 0.
    """
    out_features, in_features = weight.shape
    packed = aligned((-(-out_features // PANEL), -(-in_features // 4), PANEL, 4), np.uint8)
    packed[:] = ZERO
    scales = np.empty(out_features, np.float32)
    _fill(weight, packed, scales)
    return packed, scales


def unpack(packed: Any, scales: Any, out_features: int, in_features: int) -> Any:
    """The weight (out, in) float32 that the products use."""
    plain = packed.transpose(0, 2, 1, 3).reshape(-1, packed.shape[1] * 4)[:out_features, :in_features]
    return (plain.astype(np.float32) - ZERO) * scales[:, None]
