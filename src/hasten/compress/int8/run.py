"""The loop that runs a byte network: one call for some images, without Python's lock.

Every value lies in one arena of bytes, with its border; operations are rows of two tables (:mod:`program` writes them).
The sums are int32 and exact; the scaling behind them is float32 in the order ``sum * scale + bias + shortcut``, without
contraction, so that :mod:`simulate` gives the same bytes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from hasten.nn.product.convolution import finish_bytes, sums_16, sums_32, sums_64

__all__ = ["CONVOLUTION", "DEPTHWISE", "FIELDS", "JOINED", "MEAN", "NUMBERS", "POOL", "run_images"]

CONVOLUTION, DEPTHWISE, POOL, MEAN, JOINED = range(5)

FIELDS = (
    "kind", "source", "source_line", "source_channels", "height", "width", "outputs", "rows", "quads", "stride",
    "weights", "params", "result", "result_line", "result_channels", "shortcut", "shortcut_line", "shortcut_channels",
    "shortcut_stride", "shortcut_offset", "shortcut_held", "floats", "window", "padded",
)  # fmt: skip
"""Columns of the table of integers. ``source`` is the byte where the first output's first input lies."""
NUMBERS = ("inverse", "zero", "low", "high", "shortcut_scale", "shortcut_zero", "source_scale", "source_zero")
"""Columns of the table of float32: 1 / scale and zero of the result, its least and largest byte, …"""

(
    _KIND, _SOURCE, _SOURCE_LINE, _SOURCE_CHANNELS, _HEIGHT, _WIDTH, _OUTPUTS, _ROWS, _QUADS, _STRIDE, _WEIGHTS,
    _PARAMS, _RESULT, _RESULT_LINE, _RESULT_CHANNELS, _SHORTCUT, _SHORTCUT_LINE, _SHORTCUT_CHANNELS, _SHORTCUT_STRIDE,
    _SHORTCUT_OFFSET, _SHORTCUT_HELD, _FLOATS, _WINDOW, _PADDED,
) = range(len(FIELDS))  # fmt: skip
_INVERSE, _ZERO, _LOW, _HIGH, _SHORTCUT_SCALE, _SHORTCUT_ZERO, _SOURCE_SCALE, _SOURCE_ZERO = range(len(NUMBERS))


@njit(cache=True, error_model="numpy")
def _finish(line: Any, count: int, out: Any, inverse: Any, zero: Any, low: Any, high: Any) -> None:
    """Real numbers -> bytes."""
    for i in range(count):
        byte = np.rint(line[i] * inverse) + zero
        out[i] = np.uint8(np.int32(min(max(byte, low), high)))


@njit(cache=True, error_model="numpy")
def _add_shortcut(line: Any, first: int, count: int, op: Any, numbers: Any, arena: Any, y: int, x: int) -> None:
    """line += what the shortcut holds at this place for outputs ``first`` on."""
    offset, held = op[_SHORTCUT_OFFSET], op[_SHORTCUT_HELD]
    begin = max(first, offset)
    end = min(first + count, offset + held)
    stride = op[_SHORTCUT_STRIDE]
    at = op[_SHORTCUT] + y * stride * op[_SHORTCUT_LINE] + x * stride * op[_SHORTCUT_CHANNELS] - offset
    scale, zero = numbers[_SHORTCUT_SCALE], numbers[_SHORTCUT_ZERO]
    there = arena[at + begin : at + end]
    here = line[begin - first : end - first]
    for i in range(len(there)):
        here[i] += (np.float32(there[i]) - zero) * scale


@njit(cache=True, error_model="numpy")
def _convolve(
    op: Any, numbers: Any, arena: Any, weights: Any, params: Any, out: Any, sums: Any, line: Any, first: int, last: int
) -> None:
    """Rows ``first`` to ``last`` of the result."""
    width, outputs, quads, rows = op[_WIDTH], op[_OUTPUTS], op[_QUADS], op[_ROWS]
    base, step = arena.ctypes.data + op[_SOURCE], op[_STRIDE] * op[_SOURCE_CHANNELS]
    down, sums_at = op[_STRIDE] * op[_SOURCE_LINE], sums.ctypes.data
    inverse, zero, low, high = numbers[_INVERSE], numbers[_ZERO], numbers[_LOW], numbers[_HIGH]
    padded = op[_PADDED]
    panel_at, begin = weights.ctypes.data + op[_WEIGHTS], 0
    while begin < padded:
        rest = padded - begin
        size = 64 if rest >= 64 else 32 if rest >= 32 else 16
        valid = min(size, outputs - begin)
        # Whole registers: all outputs of the panel exist, leave as bytes, and a shortcut covers them one to one.
        fast = valid == size and op[_FLOATS] < 0
        if op[_SHORTCUT] >= 0:
            fast = fast and op[_SHORTCUT_OFFSET] == 0 and op[_SHORTCUT_HELD] == outputs
        scale = params[op[_PARAMS] + begin : op[_PARAMS] + begin + valid]
        bias = params[op[_PARAMS] + outputs + begin : op[_PARAMS] + outputs + begin + valid]
        for y in range(first, last):
            source = base + y * down
            if size == 64:
                sums_64(source, step, op[_SOURCE_LINE], rows, quads, panel_at, sums_at, width)
            elif size == 32:
                sums_32(source, step, op[_SOURCE_LINE], rows, quads, panel_at, sums_at, width)
            else:
                sums_16(source, step, op[_SOURCE_LINE], rows, quads, panel_at, sums_at, width)
            if fast:
                other = 0
                if op[_SHORTCUT] >= 0:
                    other = arena.ctypes.data + op[_SHORTCUT] + y * op[_SHORTCUT_STRIDE] * op[_SHORTCUT_LINE] + begin
                finish_bytes(
                    sums_at, size // 16, width, scale.ctypes.data, bias.ctypes.data,
                    arena.ctypes.data + op[_RESULT] + y * op[_RESULT_LINE] + begin, op[_RESULT_CHANNELS], inverse, zero,
                    low, high, other, op[_SHORTCUT_STRIDE] * op[_SHORTCUT_CHANNELS], numbers[_SHORTCUT_SCALE],
                    numbers[_SHORTCUT_ZERO],
                )  # fmt: skip
                continue
            for x in range(width):
                some = sums[x * size : x * size + valid]
                for i in range(valid):
                    line[i] = np.float32(some[i]) * scale[i] + bias[i]
                if op[_SHORTCUT] >= 0:
                    _add_shortcut(line, begin, valid, op, numbers, arena, y, x)
                if op[_FLOATS] >= 0:
                    at = op[_FLOATS] + (y * width + x) * outputs + begin
                    target = out[at : at + valid]
                    for i in range(valid):
                        target[i] = min(max(line[i], low), high)
                else:
                    at = op[_RESULT] + y * op[_RESULT_LINE] + x * op[_RESULT_CHANNELS] + begin
                    _finish(line, valid, arena[at : at + valid], inverse, zero, low, high)
        panel_at += rows * quads * 4 * size
        begin += size


@njit(cache=True, error_model="numpy")
def _depthwise(
    op: Any, numbers: Any, arena: Any, weights: Any, params: Any, sums: Any, line: Any, first: int, last: int
) -> None:
    width, channels, window = op[_WIDTH], op[_OUTPUTS], op[_WINDOW]
    held, stride = op[_SOURCE_CHANNELS], op[_STRIDE]
    scale = params[op[_PARAMS] : op[_PARAMS] + channels]
    bias = params[op[_PARAMS] + channels : op[_PARAMS] + 2 * channels]
    total = sums[:channels]
    inverse, zero, low, high = numbers[_INVERSE], numbers[_ZERO], numbers[_LOW], numbers[_HIGH]
    for y in range(first, last):
        for x in range(width):
            total[:] = 0
            for ky in range(op[_ROWS]):
                for kx in range(window):
                    at = op[_SOURCE] + (y * stride + ky) * op[_SOURCE_LINE] + (x * stride + kx) * held
                    tap = op[_WEIGHTS] + (ky * window + kx) * channels
                    some, factor = arena[at : at + channels], weights[tap : tap + channels]
                    for i in range(channels):
                        total[i] += np.int32(some[i]) * np.int32(factor[i])
            for begin in range(0, channels, 64):
                count = min(64, channels - begin)
                for i in range(count):
                    line[i] = np.float32(total[begin + i]) * scale[begin + i] + bias[begin + i]
                if op[_SHORTCUT] >= 0:
                    _add_shortcut(line, begin, count, op, numbers, arena, y, x)
                at = op[_RESULT] + y * op[_RESULT_LINE] + x * op[_RESULT_CHANNELS] + begin
                _finish(line, count, arena[at : at + count], inverse, zero, low, high)


@njit(cache=True, error_model="numpy")
def _pool(op: Any, arena: Any, first: int, last: int) -> None:
    """Bytes of a border are the value's zero, so only what lies inside may win: borders hold the least byte here."""
    channels, held, stride = op[_OUTPUTS], op[_SOURCE_CHANNELS], op[_STRIDE]
    for y in range(first, last):
        for x in range(op[_WIDTH]):
            at = op[_RESULT] + y * op[_RESULT_LINE] + x * op[_RESULT_CHANNELS]
            best = arena[at : at + channels]
            best[:] = 0
            for ky in range(op[_ROWS]):
                for kx in range(op[_WINDOW]):
                    place = op[_SOURCE] + (y * stride + ky) * op[_SOURCE_LINE] + (x * stride + kx) * held
                    some = arena[place : place + channels]
                    for i in range(channels):
                        best[i] = max(best[i], some[i])


@njit(cache=True, error_model="numpy")
def _mean(op: Any, numbers: Any, arena: Any, sums: Any) -> None:
    channels = op[_OUTPUTS]
    total = sums[:channels]
    total[:] = 0
    for y in range(op[_ROWS]):
        for x in range(op[_WINDOW]):
            at = op[_SOURCE] + y * op[_SOURCE_LINE] + x * op[_SOURCE_CHANNELS]
            some = arena[at : at + channels]
            for i in range(channels):
                total[i] += some[i]
    share = np.float32(op[_ROWS] * op[_WINDOW])
    for i in range(channels):
        arena[op[_RESULT] + i] = np.uint8(np.int32(np.rint(np.float32(total[i]) / share)))


@njit(cache=True, error_model="numpy")
def _join(op: Any, numbers: Any, arena: Any, line: Any, first: int, last: int) -> None:
    scale, offset = numbers[_SOURCE_SCALE], numbers[_SOURCE_ZERO]
    inverse, zero, low, high = numbers[_INVERSE], numbers[_ZERO], numbers[_LOW], numbers[_HIGH]
    for y in range(first, last):
        for x in range(op[_WIDTH]):
            for begin in range(0, op[_OUTPUTS], 64):
                count = min(64, op[_OUTPUTS] - begin)
                at = op[_SOURCE] + y * op[_SOURCE_LINE] + x * op[_SOURCE_CHANNELS] + begin
                some = arena[at : at + count]
                for i in range(count):
                    line[i] = (np.float32(some[i]) - offset) * scale
                _add_shortcut(line, begin, count, op, numbers, arena, y, x)
                at = op[_RESULT] + y * op[_RESULT_LINE] + x * op[_RESULT_CHANNELS] + begin
                _finish(line, count, arena[at : at + count], inverse, zero, low, high)


@njit(cache=True, error_model="numpy")
def _take(image: Any, entry: Any, inverse: Any, zero: Any, arena: Any) -> None:
    """image (channels, height, width) float32 -> bytes at the entry: (byte, line, channels of the arena)."""
    channels, height, width = image.shape
    start, line, held = entry[0], entry[1], entry[2]
    for y in range(height):
        for c in range(channels):
            row = image[c, y]
            at = start + y * line + c
            for x in range(width):
                byte = np.rint(row[x] * inverse) + zero
                arena[at + x * held] = np.uint8(np.int32(min(max(byte, np.float32(0)), np.float32(255))))


@njit(cache=True, nogil=True, error_model="numpy")
def run_images(
    images: Any, entry: Any, inverse: Any, zero: Any, table: Any, numbers: Any, arena: Any, weights: Any, params: Any,
    outs: Any, sums: Any,
) -> None:  # fmt: skip
    """All operations on each of images (batch, channels, height, width), by the calling thread."""
    line = np.empty(64, np.float32)
    for number in range(len(images)):
        out = outs[number]
        _take(images[number], entry, inverse, zero, arena)
        for index in range(len(table)):
            op, some = table[index], numbers[index]
            kind, height = op[_KIND], op[_HEIGHT]
            if kind == CONVOLUTION:
                _convolve(op, some, arena, weights, params, out, sums, line, 0, height)
            elif kind == DEPTHWISE:
                _depthwise(op, some, arena, weights, params, sums, line, 0, height)
            elif kind == POOL:
                _pool(op, arena, 0, height)
            elif kind == MEAN:
                _mean(op, some, arena, sums)
            else:
                _join(op, some, arena, line, 0, height)
