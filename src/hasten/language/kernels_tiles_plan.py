"""Which queries meet which keys in attention through matrix tiles, shared out among threads.

An item is a chunk's rows (up to 128 queries), a key head and a segment of the keys; queries that see more than one
segment have a state for each, which are merged in order. So a query's result does not depend on who computed what.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from hasten.language.kernels_paged import PAGE

__all__ = ["FAR", "KEYS", "SEGMENTS", "begin_of", "plan", "segment_of", "split"]

KEYS = 128
"""Keys that go through the softmax together."""
SEGMENTS = (512, 8, 2048)
"""Keys of a state of its own: 512 in each of the first eight, then 2048."""
FAR = 1024
"""Slot from which a row is worth tiles whatever its chunk holds: below, three queries leave most of a tile empty."""
_QUERIES = 128
"""Queries of an item at most."""


@njit(cache=True, error_model="numpy")
def segment_of(key: Any) -> Any:
    """The state that a key belongs to."""
    small, count, large = SEGMENTS
    return key // small if key < small * count else count + (key - small * count) // large


@njit(cache=True, error_model="numpy")
def begin_of(segment: Any) -> Any:
    """The first key of a state."""
    small, count, large = SEGMENTS
    return segment * small if segment <= count else small * count + (segment - count) * large


@njit(cache=True, error_model="numpy")
def _count(starts: Any, begins: Any, places: Any, kv_heads: int, rows: int) -> Any:
    items = states = 0
    for chunk in range(len(starts) - 1):
        for first in range(begins[chunk], starts[chunk + 1], rows):
            last = min(first + rows, starts[chunk + 1]) - 1
            pieces = segment_of(places[last]) + 1
            items += pieces * kv_heads
            if pieces > 1:
                states += (last - first + 1) * kv_heads
    return items, states


@njit(cache=True, error_model="numpy")
def plan(starts: Any, begins: Any, places: Any, kv_heads: int, group: int, threads: int) -> Any:
    """Items (n, 6) of chunk, first row, rows, key head, segment and state (-1: it is the whole answer), merges (m, 5)
    of row, its first lane, key head, segments and first state, cuts of the items in ``threads`` parts, states, and
    tiles.

    ``begins`` (chunks,): the first row of each chunk that is of concern here. ``places`` (rows,): the last slot that
    each row sees; they do not fall within a chunk.
    """
    rows = max(1, _QUERIES // group)
    count, joins = _count(starts, begins, places, kv_heads, rows)
    items, merges = np.empty((count, 6), np.int64), np.empty((joins, 5), np.int64)
    cost = np.empty(count, np.int64)
    at = joined = state = 0
    most = 1
    for chunk in range(len(starts) - 1):
        for first in range(begins[chunk], starts[chunk + 1], rows):
            held = min(rows, starts[chunk + 1] - first)
            tiles = (held * group + PAGE - 1) // PAGE
            most = max(most, tiles)
            end = places[first + held - 1] + 1
            pieces = segment_of(end - 1) + 1
            for head in range(kv_heads):
                if pieces > 1:
                    for row in range(held):
                        merges[joined] = (first + row, row * group, head, pieces, state)
                        joined += 1
                for piece in range(pieces):
                    items[at] = (chunk, first, held, head, piece, state if pieces > 1 else -1)
                    cost[at] = (min(end, begin_of(piece + 1)) - begin_of(piece) + KEYS - 1) // KEYS * (1 + tiles)
                    at += 1
                    if pieces > 1:
                        state += 1
    cuts = np.zeros(threads + 1, np.int64)
    total, done, part = cost.sum(), 0, 1
    for item in range(count):
        while part < threads and 2 * done + cost[item] > 2 * total * part // threads:
            cuts[part] = item
            part += 1
        done += cost[item]
    cuts[part:] = count
    return items, merges, cuts, state, most


@njit(cache=True, error_model="numpy")
def split(starts: Any, places: Any, most: int) -> Any:
    """First row of each chunk for the tiles, and ``places`` of the rows that are left to the other kernel (-1: of the
    others). Rows from ``FAR`` on go to the tiles, and all rows of chunks of more than ``most``."""
    begins = np.empty(len(starts) - 1, np.int64)
    near = np.full(len(places), -1, np.int32)
    for chunk in range(len(begins)):
        row, end = np.int64(starts[chunk]), starts[chunk + 1]
        if end - row <= most:
            while row < end and places[row] < FAR:
                near[row] = places[row]
                row += 1
        begins[chunk] = row
    return begins, near
