"""A few rows times a matrix of 4-bit weights, a scale for each 32 inputs of an output.

Weights are stored as ``w + 8``, two to a byte, in panels of 64 outputs: for each 32 inputs 1,024 bytes of weights and
128 bytes of float16 scales, one stream of memory (4.5 bits a weight, as in llama.cpp's q4_0). Activations become bytes
in the same groups of 32 inputs. Integer sums within a group are exact, groups are added in float32 in their order, so a
row's bits never depend on its neighbours.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import njit, prange, types
from numba.core import cgutils
from numba.extending import intrinsic

from hasten.nn.product import instructions as avx
from hasten.nn.product.activations import quantise_rows
from hasten.nn.product.bfloat16 import write_sums
from hasten.nn.product.blocks import GROUP, LINE, PANEL, TILES, aligned, in_blocks, scaled

__all__ = ["INPUTS", "ZERO", "multiply", "pack", "panels", "unpack"]

INPUTS = 32
"""Inputs that share a scale."""
ZERO = 8
"""What is added to a weight, for the instruction takes it unsigned."""
BYTES = PANEL * INPUTS // 2 + PANEL * 2
"""Bytes of a panel's group: weights, then scales."""
_SPAN = 96
"""Groups of a stretch (108 KiB of weights)."""
_AHEAD = 4 * BYTES
_HALVES = ir.VectorType(ir.HalfType(), avx.LANES)
_PARTS = INPUTS // 8  # registers of a tile's weights: each holds two quads of inputs, in its low and high halves


def _emit(
    builder: Any, rows: int, x: Any, x_stride: Any, side: Any, weights: Any, starts: Any, scales: Any, sums: Any
) -> None:
    """sums[row] += scale[row] * weight scale * (start[row] + x[row, 32 inputs] . panel) for one group of inputs."""
    lines = [builder.add(x, scaled(builder, x_stride, r)) for r in range(rows)]
    sides = [scaled(builder, side, r) for r in range(rows)]
    low_half = avx.splat(builder, ir.Constant(ir.IntType(32), 0x0F0F0F0F))
    four_bits = avx.splat(builder, ir.Constant(ir.IntType(32), 4))
    totals: list[Any] = []
    for r in range(rows):
        totals.extend([avx.broadcast(builder, starts, sides[r])] * TILES)
    for offset in range(0, BYTES, LINE):
        avx.prefetch(builder, weights, _AHEAD + offset)
    for part in range(_PARTS):
        halves = []
        for t in range(TILES):
            both = avx.load(builder, weights, (part * TILES + t) * LINE, avx.INTS, LINE)
            halves.append((builder.and_(both, low_half), builder.and_(builder.lshr(both, four_bits), low_half)))
        for r in range(rows):
            for half in range(2):
                four = avx.broadcast(builder, lines[r], (2 * part + half) * 4)
                for t in range(TILES):
                    place = r * TILES + t
                    totals[place] = avx.dot_bytes(builder, totals[place], halves[t][half], four)
    for t in range(TILES):
        at = PANEL * INPUTS // 2 + t * avx.LANES * 2
        own = builder.fpext(avx.load(builder, weights, at, _HALVES), avx.FLOATS)
        for r in range(rows):
            factor = builder.fmul(own, avx.splat(builder, avx.load(builder, scales, sides[r], ir.FloatType())))
            place = (r * TILES + t) * LINE
            value = builder.sitofp(totals[r * TILES + t], avx.FLOATS)
            before = avx.load(builder, sums, place, avx.FLOATS)
            avx.store(builder, avx.multiply_add(builder, value, factor, before), sums, place)


@intrinsic
def _stretch(
    typing: Any, x: Any, x_stride: Any, side: Any, weights: Any, groups: Any, starts: Any, scales: Any, sums: Any,
    count: Any,
) -> Any:  # fmt: skip
    """``count`` rows times ``groups`` groups of a panel, added to ``sums`` (count, 64) float32."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        x, x_stride, side, weights, groups, starts, scales, sums, count = arguments

        def emit(rows: int, row: Any) -> None:
            with cgutils.for_range(builder, groups) as loop:
                here = builder.add(builder.add(x, builder.mul(row, x_stride)), scaled(builder, loop.index, INPUTS))
                beside = builder.add(builder.mul(row, side), scaled(builder, loop.index, 4))
                _emit(
                    builder, rows, here, x_stride, side, builder.add(weights, scaled(builder, loop.index, BYTES)),
                    builder.add(starts, beside), builder.add(scales, beside),
                    builder.add(sums, scaled(builder, row, PANEL * 4)),
                )  # fmt: skip

        in_blocks(builder, count, emit)
        return context.get_dummy_value()

    return types.void(*[types.intp] * 9), generate


@njit(cache=True, error_model="numpy")
def panels(x: Any, starts: Any, scales: Any, weights: Any, bias: Any, out: Any, first: int, last: int) -> None:
    """Items ``first`` to ``last`` of the product: an item is one group of rows times one panel.

    x (rows, in) int8 with ``starts`` and ``scales`` (rows, in / 32) of :func:`quantise_rows`; weights (panels, in / 32,
    1152) uint8 of :func:`pack`; bias (out,) float32 or empty; out (rows, out) uint16 or float32.
    """
    rows, width = out.shape
    parts = (rows + GROUP - 1) // GROUP
    groups = weights.shape[1]
    sums = np.empty((min(rows, GROUP), PANEL), np.float32)
    base, x_base, x_stride, side = weights.ctypes.data, x.ctypes.data, x.strides[0], scales.strides[0]
    for item in range(first, last):
        panel, begin = item // parts, (item % parts) * GROUP
        count = min(GROUP, rows - begin)
        sums[:count] = 0
        for group in range(0, groups, _SPAN):
            beside, at = begin * side + group * 4, begin * x_stride + group * INPUTS
            _stretch(x_base + at, x_stride, side, base + (panel * groups + group) * BYTES,
                     min(_SPAN, groups - group), starts.ctypes.data + beside, scales.ctypes.data + beside,
                     sums.ctypes.data, count)  # fmt: skip
        low, high = panel * PANEL, min(panel * PANEL + PANEL, width)
        write_sums(sums, count, bias, out, begin, low, high)


@njit(cache=True, parallel=True, error_model="numpy")
def _multiply(x: Any, starts: Any, scales: Any, weights: Any, bias: Any, out: Any, parts: int) -> None:
    items = weights.shape[0] * ((out.shape[0] + GROUP - 1) // GROUP)
    for part in prange(parts):
        panels(x, starts, scales, weights, bias, out, items * part // parts, items * (part + 1) // parts)


def multiply(x: Any, weights: Any, bias: Any, out: Any) -> None:
    """``out = x @ W.T + bias``; x (rows, in) bfloat16 as uint16 or float32, ``weights`` of :func:`pack`."""
    q, starts, scales = quantise_rows(x, weights.shape[1] * INPUTS, INPUTS, ZERO)
    _multiply(q, starts, scales, weights, bias, out, numba.get_num_threads())


@njit(cache=True, error_model="numpy")
def _fill(weight: Any, packed: Any, scales: Any) -> None:
    for row in range(weight.shape[0]):
        panel, lane = row // PANEL, row % PANEL
        for group in range(packed.shape[1]):
            line = weight[row, group * INPUTS : (group + 1) * INPUTS]
            scale = scales[panel, group, lane]
            inverse = np.float32(1.0) / scale if scale != 0 else np.float32(0.0)
            target = packed[panel, group]
            for i in range(len(line)):
                code: Any = np.int32(np.rint(line[i] * inverse)) + ZERO
                value = np.uint8(min(max(code, 0), 15))
                quad = i // 4
                at = ((quad // 2) * PANEL + lane) * 4 + i % 4
                kept = target[at] & np.uint8(0xF0) if quad % 2 == 0 else target[at] & np.uint8(0x0F)
                target[at] = kept | (value if quad % 2 == 0 else value << 4)


def pack(weight: Any) -> Any:
    """weight (out, in) float32 -> (panels, in / 32, 1152) uint8: per group 4-bit weights, then float16 scales.

    Missing inputs and outputs are 0.
    """
    out_features, in_features = weight.shape
    packed = aligned((-(-out_features // PANEL), -(-in_features // INPUTS), BYTES), np.uint8)
    packed[:, :, : PANEL * INPUTS // 2] = ZERO | ZERO << 4
    scales = np.zeros((*packed.shape[:2], PANEL), np.float16)
    for row in range(out_features):
        scales[row // PANEL, :, row % PANEL] = _scales(weight[row], packed.shape[1])
    packed[:, :, PANEL * INPUTS // 2 :] = scales.view(np.uint8)
    _fill(weight, packed, scales.astype(np.float32))
    return packed


def _scales(line: Any, groups: int) -> Any:
    """As in q4_0 the entry of largest magnitude of a group becomes -8, so that all 16 values are used."""
    padded: Any = np.zeros(groups * INPUTS, np.float32)
    padded[: len(line)] = line
    padded = padded.reshape(groups, INPUTS)
    return np.take_along_axis(padded, np.abs(padded).argmax(1)[:, None], 1)[:, 0] / np.float32(-8)


def unpack(packed: Any, out_features: int, in_features: int) -> Any:
    """The weight (out, in) float32 that the products use."""
    panels, groups, _ = packed.shape
    both = packed[:, :, : PANEL * INPUTS // 2].reshape(panels, groups, _PARTS, 1, PANEL, 4)
    codes = np.concatenate([both & 0x0F, both >> 4], 3).astype(np.float32) - ZERO
    scales = packed[:, :, PANEL * INPUTS // 2 :].copy().view(np.float16).astype(np.float32)
    plain = codes * scales[:, :, None, None, :, None]
    return plain.transpose(0, 4, 1, 2, 3, 5).reshape(panels * PANEL, groups * INPUTS)[:out_features, :in_features]
