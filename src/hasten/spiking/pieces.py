"""Products of spikes with a float32 matrix on matrix tiles (AMX), to the precision of float32.

A float32 number is the exact sum of three bfloat16 numbers, since 24 = 8 + 8 + 8 bits, and a spike is one itself:

    s W = s W₁ + s W₂ + s W₃

is three products of bfloat16 whose sums are float32, and nothing is rounded but these sums. The pieces lie one behind
the other along the summed dimension, so that one pass of :mod:`hasten.nn.product.tiles` adds them up, small ones first.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from hasten.nn.product import tiles
from hasten.nn.product.blocks import GROUP, PANEL, aligned

__all__ = ["PIECES", "available", "fill_row", "lines_in", "pack", "padded", "room_for", "rows_times"]

PIECES = 3
"""bfloat16 numbers that make a float32 number"""
_TILE = 32  # inputs of a tile
_ONE = np.uint16(0x3F80)  # 1 as bfloat16

_panels, _room = tiles.panels, tiles.room_for


def available() -> bool:
    """Whether this process may use matrix tiles."""
    return tiles.granted()


@njit(cache=True)
def padded(inputs: int) -> int:
    """Inputs filled up to whole tiles."""
    return (inputs + _TILE - 1) // _TILE * _TILE


@njit(cache=True, inline="always")
def _top(value: Any) -> Any:
    """The bits of ``value`` (float32) cut to those of a bfloat16."""
    return np.uint32(np.float32(value).view(np.uint32) & np.uint32(0xFFFF0000))


@njit(cache=True, error_model="numpy")
def _interleave(g: Any, begin: int, here: int, half: int, panels: Any) -> None:
    """panels (panels, 3 half, 64) uint32: the pieces of ``here`` rows of g from ``begin``, two rows side by side.

    The words behind the last row are left alone.
    """
    width = g.shape[1]
    for pair in range((here + 1) // 2):
        alone = 2 * pair + 1 == here
        a, b = g[begin + 2 * pair], g[begin + 2 * pair + (0 if alone else 1)]
        second = np.float32(0.0 if alone else 1.0)
        for panel in range(panels.shape[0]):
            low = panel * PANEL
            large, middle = panels[panel, pair + 2 * half], panels[panel, pair + half]
            small = panels[panel, pair]
            for o in range(min(PANEL, width - low)):
                u, v = a[low + o], second * b[low + o]
                p, q = _top(u), _top(v)
                large[o] = (p >> np.uint32(16)) | q
                u, v = u - p.view(np.float32), v - q.view(np.float32)
                p, q = _top(u), _top(v)
                middle[o] = (p >> np.uint32(16)) | q
                u, v = u - p.view(np.float32), v - q.view(np.float32)
                small[o] = (_top(u) >> np.uint32(16)) | _top(v)


def pack(weight: Any) -> Any:
    """weight (in, out) float32 -> its pieces (panels, 3 in / 2, 64, 2) uint16, inputs filled up to tiles."""
    inputs, outputs = weight.shape
    half = padded(inputs) // 2
    packed = aligned((-(-outputs // PANEL), PIECES * half, PANEL, 2), np.uint16)
    packed[:] = 0
    _interleave(weight, 0, inputs, half, packed.view(np.uint32)[..., 0])
    return packed


@njit(cache=True)
def room_for(inputs: int) -> Any:
    """Tiles (sixteens, steps, 16 rows, 32) of bfloat16 for ``GROUP`` rows of so many inputs, pieces behind one another:
    what :func:`fill_row` fills."""
    return lines_in(_room(GROUP * PIECES * padded(inputs) * 2).view(np.uint16), inputs)


@njit(cache=True)
def lines_in(room: Any, inputs: int) -> Any:
    """The first numbers of ``room`` as such tiles."""
    steps = PIECES * padded(inputs) // _TILE
    return room.reshape(-1)[: GROUP * steps * _TILE].reshape((GROUP // 16, steps, 16, _TILE))


@njit(cache=True, error_model="numpy")
def fill_row(source: Any, lines: Any, place: int) -> None:
    """Row number ``place`` of ``lines``: ``source`` (inputs,) != 0 as bfloat16, three times."""
    part, row = lines[place // 16], place % 16
    steps = lines.shape[1] // PIECES
    for step in range(steps):
        line, given = part[step, row], source[step * _TILE : (step + 1) * _TILE]
        for i in range(len(given)):
            line[i] = _ONE if given[i] != 0 else np.uint16(0)
        line[len(given) :] = 0
        for piece in range(1, PIECES):
            part[piece * steps + step, row] = line


@njit(cache=True, error_model="numpy")
def rows_times(lines: Any, count: int, packed: Any, first: int, last: int, sums: Any) -> None:
    """sums (≥ count, 64 (last - first)) = ``count`` rows of ``lines`` times the panels ``first`` to ``last``.

    Rows are taken sixteen at a time, so that a row's bits do not depend on how many there are; ``sums`` has room for
    the rest of the sixteen.
    """
    if count > 0 and last > first:
        tall = (count + 15) // 16 * 16
        items = (last - first) * ((tall + GROUP - 1) // GROUP)
        rows = lines.reshape((-1, lines.shape[1] * _TILE))[:tall]  # all inputs fill tiles: it is not looked at
        _panels(rows, lines, packed[first:last], np.empty(0, np.float32), sums[:tall], 0, items)
