"""Many rows times an int8 matrix on processors with matrix tiles (AMX), a column of 16 outputs at a time, for which see
:mod:`tiles_columns`: the bits of :mod:`int8`.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from numba import njit, prange

from hasten.nn.product import int8
from hasten.nn.product.activations import quantise_rows
from hasten.nn.product.blocks import GROUP, LINE, PANEL
from hasten.nn.product.tiles_blocks import FAR_AHEAD
from hasten.nn.product.tiles_columns import (
    BEFORE,
    BEFORE_APART,
    FACTORS,
    FIELDS,
    LEFT,
    MOST,
    RESULT,
    RESULT_APART,
    ROW_APART,
    SCALES,
    STARTS,
    SUMS,
    add_column,
    scale_column,
)
from hasten.nn.product.tiles_setup import (
    FEWEST,
    STEP,
    TILE,
    arranged,
    ask,
    close_tiles,
    open_tiles,
    room_for,
    sixteens_of,
)

__all__ = ["byte_panels", "multiply_bytes", "takes_bytes"]

_SPAN = int8.INPUTS // 4
"""Quads that share a scale of the activations."""


def takes_bytes(inputs: int) -> bool:
    """Whether the inputs of a matrix of int8 fill whole tiles."""
    return inputs % LINE == 0


@njit(cache=True, error_model="numpy")
def byte_panels(
    tiles: Any, starts: Any, scales: Any, weights: Any, weight_scales: Any, bias: Any, out: Any, first: int, last: int
) -> None:
    """As :func:`hasten.nn.product.int8.panels`, of rows in tiles (:func:`hasten.nn.product.tiles.arrange_row`)."""
    rows, width = out.shape
    parts = (rows + GROUP - 1) // GROUP
    quads = weights.shape[1]
    groups = (quads + _SPAN - 1) // _SPAN
    size = sixteens_of(min(rows, GROUP)) * 16 * PANEL * 4
    room = room_for(size + 2 * MOST * TILE + 2 * LINE)
    sums = room[:size].view(np.float32).reshape((size // (PANEL * 4), PANEL))
    totals = room.ctypes.data + size
    nothing, same = totals + 2 * MOST * TILE, totals + 2 * MOST * TILE + LINE
    room[len(room) - 2 * LINE :].view(np.float32)[:] = 0
    room[len(room) - LINE :].view(np.float32)[:] = 1
    column = np.zeros(FIELDS, np.int64)
    column[FACTORS], column[ROW_APART] = same, scales.strides[0]
    base, tall = weights.ctypes.data, tiles.shape[1] * TILE
    ahead = base + first // parts * quads * PANEL * 4 + FAR_AHEAD
    asked = done = 0
    if rows <= FEWEST:  # others are asked for by who calls, with the rows
        ask(ahead - FAR_AHEAD, min(FAR_AHEAD, quads * PANEL * 4))
    open_tiles()
    for item in range(first, last):
        panel, begin = item // parts, (item % parts) * GROUP
        count = min(GROUP, rows - begin)
        low = panel * PANEL
        in_place = len(bias) == 0 and out.itemsize == 4 and low + PANEL <= width
        for group in range(groups):
            there = base + (panel * quads + group * _SPAN) * PANEL * 4
            steps = min(_SPAN, quads - group * _SPAN) // STEP
            own = tiles.ctypes.data + begin // 16 * tall + group * (_SPAN // STEP) * TILE
            for number in range(PANEL // 16):
                here = totals + done % 2 * MOST * TILE
                # Who comes again to weights finds them in the caches, and asks for these.
                add_column(
                    own, tall, there + number * LINE, steps, sixteens_of(count), here,
                    ahead if begin == 0 else there, asked if begin == 0 else 0, column.ctypes.data,
                )  # fmt: skip
                done += 1
                asked += steps if begin == 0 else 0
                beside = begin * scales.strides[0] + group * 4
                column[SUMS], column[LEFT] = here, count
                column[STARTS], column[SCALES] = starts.ctypes.data + beside, scales.ctypes.data + beside
                sums_at = sums.ctypes.data + number * LINE
                column[BEFORE], column[BEFORE_APART] = (nothing, 0) if group == 0 else (sums_at, PANEL * 4)
                if in_place and group == groups - 1:
                    column[RESULT] = out.ctypes.data + begin * out.strides[0] + low * 4 + number * LINE
                    column[RESULT_APART] = out.strides[0]
                    column[FACTORS] = weight_scales.ctypes.data + low * 4 + number * LINE
                else:
                    column[RESULT], column[RESULT_APART], column[FACTORS] = sums_at, PANEL * 4, same
        if not in_place:
            scale_column(column.ctypes.data)
            column[LEFT] = 0
            int8.write_scaled(sums, count, weight_scales, bias, out, begin, low, min(low + PANEL, width))
    scale_column(column.ctypes.data)
    close_tiles()
    column[LEFT] = room[0] = 0  # addresses do not keep arrays: both live until here


@njit(cache=True, parallel=True, error_model="numpy")
def _multiply_bytes(
    tiles: Any, starts: Any, scales: Any, weights: Any, weight_scales: Any, bias: Any, out: Any, parts: int
) -> None:
    items = weights.shape[0] * ((out.shape[0] + GROUP - 1) // GROUP)
    for part in prange(parts):
        byte_panels(
            tiles, starts, scales, weights, weight_scales, bias, out, items * part // parts, items * (part + 1) // parts
        )


def multiply_bytes(x: Any, weights: tuple[Any, Any], bias: Any, out: Any) -> None:
    """As :func:`hasten.nn.product.int8.multiply`, for whole tiles of inputs: the same bits."""
    packed, weight_scales = weights
    q, starts, scales = quantise_rows(x, packed.shape[1] * 4, int8.INPUTS, int8.ZERO)
    _multiply_bytes(arranged(q), starts, scales, packed, weight_scales, bias, out, numba.get_num_threads())
