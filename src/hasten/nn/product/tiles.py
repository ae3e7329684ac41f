"""Many rows times a bfloat16 or int8 matrix on processors with matrix tiles (AMX), from the panels of a few rows.

Blocks of 32 rows and 32 outputs keep four tiles of sums (:mod:`tiles_blocks`). Inputs that fill no tile go through
:mod:`bfloat16`. Tiles add floats in another order than registers do, so with bfloat16 a row's last bits depend on how
many rows there are; whoever wants them not to uses :mod:`bfloat16` alone. Sums of bytes are exact (:mod:`tiles_bytes`).
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from numba import njit, prange

from hasten.nn.product.bfloat16 import stretch, write_sums
from hasten.nn.product.blocks import GROUP, LINE, PANEL
from hasten.nn.product.past_caches import finish, goes_past, write_past
from hasten.nn.product.tiles_blocks import AHEAD, FAR_AHEAD, lines_for, word_tiles
from hasten.nn.product.tiles_bytes import byte_panels, multiply_bytes, takes_bytes
from hasten.nn.product.tiles_setup import (
    FEWEST,
    STEP,
    TILE,
    arrange_row,
    arranged,
    ask,
    close_tiles,
    granted,
    open_narrow_tiles,
    open_tiles,
    room_for,
    run_assembly,
    sixteens_of,
    sums_for,
)

__all__ = [
    "FAR_AHEAD",
    "FEWEST",
    "TILE",
    "arrange_row",
    "ask",
    "byte_panels",
    "close_tiles",
    "granted",
    "multiply",
    "multiply_bytes",
    "open_narrow_tiles",
    "open_tiles",
    "panels",
    "room_for",
    "run_assembly",
    "serves_as_sums",
    "sixteens_of",
    "takes_bytes",
]

_SPAN = 512


@njit(cache=True)
def serves_as_sums(out: Any, count: int, pairs: int) -> Any:
    """Whether ``count`` rows of ``out`` can hold the sums themselves: whole tiles that are lines of memory."""
    whole = out.shape[1] == PANEL and out.itemsize == 4 and count % 16 == 0
    return whole and out.ctypes.data % LINE == 0 and pairs % STEP == 0


@njit(cache=True, error_model="numpy")
def panels(x: Any, tiles: Any, weights: Any, bias: Any, out: Any, first: int, last: int) -> None:
    """As :func:`hasten.nn.product.bfloat16.panels`, of the same rows in tiles as well (:func:`arrange_row`)."""
    rows, width = out.shape
    groups = (rows + GROUP - 1) // GROUP
    pairs = weights.shape[1]
    room = sums_for(rows).view(np.float32)
    past = goes_past(weights.size * weights.itemsize, bias, out)
    base, x_base, x_stride = weights.ctypes.data, x.ctypes.data, x.strides[0]
    tall = tiles.shape[1] * TILE
    open_tiles()
    for item in range(first, last):
        panel, start = item // groups, (item % groups) * GROUP
        count = min(GROUP, rows - start)
        sixteens = sixteens_of(count)
        ahead = AHEAD if sixteens == 1 else FAR_AHEAD
        in_place = len(bias) == 0 and serves_as_sums(out, count, pairs)
        sums = out.view(np.float32)[start : start + count] if in_place else room
        longest = pairs if sixteens == 1 else _SPAN
        for pair in range(0, pairs, longest):
            span = min(longest, pairs - pair)
            whole = span // STEP
            there = base + (panel * pairs + pair) * PANEL * 4
            if whole > 0:
                word_tiles(
                    tiles.ctypes.data + start // 16 * tall + pair // STEP * TILE, tall, there, whole,
                    sums.ctypes.data, pair == 0, sixteens, there + ahead, lines_for(sixteens) if start == 0 else 0,
                )  # fmt: skip
            elif pair == 0:
                sums[:] = 0
            if whole * STEP < span:
                done = whole * STEP
                stretch(
                    0, x_base + start * x_stride + (pair + done) * 4, x_stride, there + done * PANEL * 4, span - done,
                    sums.ctypes.data, count,
                )  # fmt: skip
        if past:
            write_past(sums, count, out, start, panel * PANEL)
        elif not in_place:
            write_sums(sums, count, bias, out, start, panel * PANEL, min(panel * PANEL + PANEL, width))
    if past:
        finish()
    close_tiles()


@njit(cache=True, parallel=True, error_model="numpy")
def _multiply(x: Any, tiles: Any, weights: Any, bias: Any, out: Any, parts: int) -> None:
    items = weights.shape[0] * ((out.shape[0] + GROUP - 1) // GROUP)
    for part in prange(parts):
        panels(x, tiles, weights, bias, out, items * part // parts, items * (part + 1) // parts)


def multiply(x: Any, weights: Any, bias: Any, out: Any) -> None:
    """``out = x @ W.T + bias``; see :func:`hasten.nn.product.bfloat16.multiply`."""
    _multiply(x, arranged(x), weights, bias, out, numba.get_num_threads())
