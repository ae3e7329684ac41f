"""Which lists a query reads: walk the heads, score exactly what was found, apply the pruning rule.

The two steps are apart (``find``, ``settle``), so that a batch can walk for its next queries while what the present
ones read is still on its way from memory. Each query has a slot of the scratch memory; a group of ``LANES`` queries
walks together, into the slots that the group before does not use.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

from hasten.retrieve.index.codes import PICKS
from hasten.retrieve.index.graph import four_distances
from hasten.retrieve.index.guide import code_query, query_lanes
from hasten.retrieve.index.kernel import hot
from hasten.retrieve.index.metric import lanes
from hasten.retrieve.index.offer import list_bytes
from hasten.retrieve.index.simd import address_of, prefetch
from hasten.retrieve.index.walk import CHECKED as WALKED
from hasten.retrieve.index.walk import FOUND, LANES, marks, places, walk_lanes

__all__ = ["fetch_heads", "find", "mapped_value", "plan", "runs", "scratch", "settle"]

PAGE = 4096
SIZE, KEPT, CHECKED, WHOLE = range(4)
"""what a slot notes: heads found, lists kept, distances computed, whether the coded query is the query itself"""


@hot
def mapped_value(metric, const, value):
    """A candidate's value as a squared distance of the mapped space."""
    return const + numba.float32(2.0) * value if metric == 2 else value


@hot
def _exact_heads(heads, extra, metric, query, const, pool_d, pool_i, size):
    """Put true distances in the place of coded ones and sort the pool again."""
    width = heads.shape[1]
    base, stride = address_of(heads), width * heads.itemsize
    none = numba.float32(0.0)
    last = size - 1
    for t in range(0, size, 4):
        a, b, c, d = pool_i[t], pool_i[min(t + 1, last)], pool_i[min(t + 2, last)], pool_i[min(t + 3, last)]
        four = four_distances(heads, extra, metric, query, const, none, base, stride, width, a, b, c, d, a, b, c, d)
        pool_d[t] = four[0]
        if t + 1 < size:
            pool_d[t + 1] = four[1]
        if t + 2 < size:
            pool_d[t + 2] = four[2]
        if t + 3 < size:
            pool_d[t + 3] = four[3]
    for t in range(1, size):
        value, item, place = pool_d[t], pool_i[t], t
        while place > 0 and pool_d[place - 1] > value:
            pool_d[place], pool_i[place] = pool_d[place - 1], pool_i[place - 1]
            place -= 1
        pool_d[place], pool_i[place] = value, item


@hot
def find(head_state, metric, queries, q, count, consts, knobs, scratch, slot):
    """Walk for ``count`` queries from ``q`` on: fills the pools from ``slot`` on, by coded distances where there is a
    guide.
    """
    heads, extra, graph, seeds, _, guide = head_state
    codes, code_seeds, low, inverse, own = guide
    beam, max_check = int(knobs[3]), int(knobs[4])
    state, pools_d, pools_i, _, coded, notes, nothing = scratch[:7]
    pool_d, pool_i = pools_d[slot:], pools_i[slot:]
    if codes.shape[0] == 0:
        step = queries.shape[1] * 4
        walk_lanes(
            heads,
            extra,
            graph,
            seeds,
            metric,
            address_of(queries) + q * step,
            step,
            consts[q:],
            nothing,
            count,
            beam,
            max_check,
            state,
            pool_d,
            pool_i,
        )
    else:
        for lane in range(count):
            same = code_query(queries[q + lane], low, inverse, coded[slot + lane])
            notes[slot + lane, WHOLE] = same and own != 0
        walk_lanes(
            codes,
            extra,
            graph,
            code_seeds,
            3,
            address_of(coded[slot]),
            coded.shape[1] * 2,
            nothing,
            nothing,
            count,
            beam,
            max_check,
            state,
            pool_d,
            pool_i,
        )
    for lane in range(count):
        notes[slot + lane, SIZE], notes[slot + lane, CHECKED] = state[3][lane, FOUND], state[3][lane, WALKED]
        if codes.shape[0] == 0:
            notes[slot + lane, WHOLE] = 0


@hot
def fetch_heads(head_state, scratch, slot):
    """Ask for the heads that the walk of a slot found, to score them exactly."""
    heads, guide, notes = head_state[0], head_state[5], scratch[5]
    if guide[0].shape[0] > 0 and notes[slot, WHOLE] == 0:
        base, stride = address_of(heads), heads.shape[1] * heads.itemsize
        pool_i = scratch[2][slot]
        for t in range(notes[slot, SIZE]):
            for line in range(0, stride, 64):
                prefetch(base + pool_i[t] * stride + line)


@hot
def settle(head_state, lists, metric, queries, q, const, knobs, scratch, slot):
    """Exact distances, and the lists to read: list ``j`` is kept iff d²(q, c_j) <= ratio * max(d²(q, c_1), floor).

    ``knobs`` is (lists, ratio, floor, beam, max_check, radius rule) with ``ratio`` = (1 + epsilon)².
    """
    counts = lists[1]
    limit, ratio, floor = knobs[0], knobs[1], knobs[2]
    pool_d, pool_i, order, notes = scratch[1][slot], scratch[2][slot], scratch[3][slot], scratch[5]
    found = notes[slot, SIZE]
    if head_state[5][0].shape[0] > 0 and notes[slot, WHOLE] == 0:
        _exact_heads(head_state[0], head_state[1], metric, address_of(queries[q]), const, pool_d, pool_i, found)
    kept = 0
    if found > 0:
        reach = numba.float32(ratio) * max(pool_d[0], numba.float32(floor))
        for t in range(found):
            if kept == limit or pool_d[t] > reach:
                break
            if counts[pool_i[t]] > 0:
                order[kept] = t
                kept += 1
    notes[slot, KEPT] = kept


@hot
def plan(head_state, lists, metric, queries, q, consts, knobs, scratch):
    """Both steps for one query, in slot 0."""
    find(head_state, metric, queries, q, 1, consts, knobs, scratch, 0)
    settle(head_state, lists, metric, queries, q, consts[q], knobs, scratch, 0)


@hot
def runs(lists, metric, row_bytes, pool_i, order, kept, work):
    """Pages of the kept lists, and reads once lists that lie within one page of each other are merged."""
    addresses, counts = lists[0], lists[1]
    pages = 0
    for t in range(kept):
        h = pool_i[order[t]]
        start, size = addresses[h], (list_bytes(counts[h], row_bytes, metric) + PAGE - 1) // PAGE
        pages += size
        place = t
        while place > 0 and work[place - 1, 0] > start:
            work[place, 0], work[place, 1] = work[place - 1, 0], work[place - 1, 1]
            place -= 1
        work[place, 0], work[place, 1] = start, start + size * PAGE
    runs = 1 if kept else 0
    for t in range(1, kept):
        if work[t, 0] - work[t - 1, 1] > PAGE:
            runs += 1
    return pages, runs


def scratch(num_heads: int, degree: int, beam: int, width: int) -> tuple[Any, ...]:
    """What one thread needs to search: the state of its walks; of each slot (twice the lanes) the pool, the order of
    the kept lists, the coded query, and notes; zeros, places of reads; what sifting takes.
    """
    beam, room, slots = max(beam, 1), places(beam), 2 * LANES
    kinds: list[tuple[tuple[int, ...], Any]] = [
        ((slots, room), np.float32),
        ((slots, room), np.int32),
        ((slots, beam), np.int64),
        ((slots, query_lanes(width)), np.int16),
        ((slots, 4), np.int64),
        ((LANES,), np.float32),
        ((beam, 2), np.int64),
        ((lanes(width),), np.float32),
        ((lanes(width) + 16,), np.int8),
        ((PICKS + 16, 3), np.int64),
    ]
    made: list[NDArray[Any]] = [_aligned(shape, kind) for shape, kind in kinds]
    return (marks(num_heads, degree), *made)


def _aligned(shape: tuple[int, ...], kind: Any) -> NDArray[Any]:
    """Zeros that begin at a cache line, so that no pool of sixteen crosses one."""
    size = int(np.prod(shape)) * np.dtype(kind).itemsize
    raw = np.zeros(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size].view(kind).reshape(shape)
