"""The best-first walk over the heads, for several queries in turns.

A walk keeps the ``beam`` nearest heads seen, sorted, and expands the nearest one that was not expanded. It begins at
the seeds: two levels of the balanced tree. What an expansion needs lies anywhere in memory, so ``LANES`` queries walk
in turns: while the neighbours of one are on their way, those of the others are looked at.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

from hasten.retrieve.index.graph import CODED, four_distances, head_distance
from hasten.retrieve.index.kernel import hot, njit
from hasten.retrieve.index.simd import address_of, prefetch
from hasten.retrieve.index.simd_pool import WIDE, insert

__all__ = ["LANES", "marks", "places", "walk_lanes", "walk_many"]

LANES = 4
"""queries that walk in turns"""
BLOCK = 32
"""seeds that are looked at before the pool's worst is read again"""
EXPANDED = -2147483648
"""the sign bit of a pool's item: it was expanded"""
AT, FOUND, CHECKED, FRESH = range(4)
"""what a lane notes: place of the pool that is looked at, heads in it, distances computed, neighbours on their way
(-1: the walk is over)"""


def marks(heads: int, degree: int) -> tuple[Any, ...]:
    """What the walks of one thread need: visited marks of each lane and their epoch, neighbours, notes; distances of
    what is looked at and those that are near enough.
    """
    room = max(degree, BLOCK) + 4
    return (
        np.zeros((LANES, heads), np.uint8),
        np.zeros(LANES, np.int64),
        np.zeros((LANES, room), np.int32),
        np.zeros((LANES, 4), np.int64),
        np.zeros((2, room), np.float32),
        np.zeros(room, np.int32),
    )


def places(beam: int) -> int:
    """Places of a pool that keeps ``beam`` heads."""
    return -(-max(beam, 1) // WIDE) * WIDE


@hot
def _near(values, items, count, worst, near_d, near_i):
    """Those of ``count`` that are nearer than the worst, without a branch; returns how many."""
    size = 0
    for e in range(count):
        near_d[size], near_i[size] = values[e], items[e]
        size += 1 if values[e] < worst else 0
    return size


@hot
def _measure(rows, extra, metric, query, const, aug, which, heads_of, count, values):
    """Distances to the rows ``which`` (whole groups of four), whose extras are those of ``heads_of``."""
    width = rows.shape[1]
    base, stride = address_of(rows), width * rows.itemsize
    for e in range(0, count, 4):
        a, b, c, d = which[e], which[e + 1], which[e + 2], which[e + 3]
        ha, hb, hc, hd = heads_of[e], heads_of[e + 1], heads_of[e + 2], heads_of[e + 3]
        values[e], values[e + 1], values[e + 2], values[e + 3] = four_distances(
            rows, extra, metric, query, const, aug, base, stride, width, a, b, c, d, ha, hb, hc, hd
        )


@hot
def _measure_row(rows, heads_of, begin, count, extra, metric, query, const, aug, values):
    """Distances to ``count`` rows that follow each other from ``begin`` on."""
    width = rows.shape[1]
    base, stride = address_of(rows), width * rows.itemsize
    last = begin + count - 1
    for e in range(0, count, 4):
        a = begin + e
        b, c, d = min(a + 1, last), min(a + 2, last), min(a + 3, last)
        values[e], values[e + 1], values[e + 2], values[e + 3] = four_distances(
            rows,
            extra,
            metric,
            query,
            const,
            aug,
            base,
            stride,
            width,
            a,
            b,
            c,
            d,
            heads_of[a],
            heads_of[b],
            heads_of[c],
            heads_of[d],
        )


@hot
def _begin(heads, extra, seeds, metric, query, const, aug, beam, stamps, mark, pool_d, pool_i, work):
    """Fill the pool from the seeds of the nearest groups; returns how many distances were computed."""
    group_rows, group_heads, seed_rows, seed_heads, seed_begin = seeds
    values, near_d, near_i = work[0][0], work[0][1], work[1]
    chunks = pool_d.shape[0] // WIDE
    at_d, at_i = address_of(pool_d), address_of(pool_i)
    pool_d[:] = np.inf
    pool_i[:] = -1  # as if expanded
    if seed_heads.shape[0] == 0:
        stamps[0] = mark
        insert(at_d, at_i, chunks, head_distance(heads, extra, metric, query, const, aug, 0), numba.int32(0))
        return 0
    groups = 4 if metric == CODED else 2  # a coded distance costs little
    checks = group_heads.shape[0]
    for begin in range(0, checks, BLOCK):
        count = min(BLOCK, checks - begin)
        _measure_row(group_rows, group_heads, begin, count, extra, metric, query, const, aug, values)
        size = 0
        for e in range(count):
            near_d[size], near_i[size] = values[e], begin + e
            size += 1 if values[e] < pool_d[groups - 1] else 0
        for t in range(size):
            insert(at_d, at_i, chunks, near_d[t], near_i[t])
    a, b, c, d = pool_i[0], pool_i[1], pool_i[2], pool_i[3]
    pool_d[:] = np.inf
    pool_i[:] = -1
    for turn in range(groups):
        g = a if turn == 0 else b if turn == 1 else c if turn == 2 else d
        if g < 0:
            continue
        first, last = seed_begin[g], seed_begin[g + 1]
        for begin in range(first, last, BLOCK):
            count = min(BLOCK, last - begin)
            _measure_row(seed_rows, seed_heads, begin, count, extra, metric, query, const, aug, values)
            size = _near(values, seed_heads[begin:], count, pool_d[beam - 1], near_d, near_i)
            for t in range(size):
                stamps[near_i[t]] = mark
                insert(at_d, at_i, chunks, near_d[t], near_i[t])
        checks += last - first
    return checks


@hot
def _fresh(graph, head, stamps, mark, base, stride, fresh):
    """Neighbours of a head that this walk has not met, into ``fresh``; asks for their vectors. Returns how many."""
    count = 0
    lines = (stride + 63) >> 6
    for e in range(graph.shape[1]):
        other = graph[head, e]
        if other < 0:
            break
        fresh[count] = other  # no branch: which were met is not to be foreseen
        count += 1 if stamps[other] != mark else 0
        stamps[other] = mark
        place = base + other * stride
        for line in range(lines):
            prefetch(place + (line << 6))
    for t in range(count, count + 3):  # groups of four are whole
        fresh[t] = fresh[max(count - 1, 0)]
    return count


@hot
def _advance(heads, graph, beam, max_check, stamps, mark, fresh, pool_i, note):
    """Expand the nearest head that was not expanded; its new neighbours are asked for and not looked at yet."""
    at = note[AT]
    while at < beam and pool_i[at] < 0:  # expanded before, or nothing
        at += 1
    note[AT] = at
    if at >= beam or note[CHECKED] >= max_check:
        note[FRESH] = -1
        return
    head = pool_i[at]
    pool_i[at] = head | numba.int32(EXPANDED)
    note[FRESH] = _fresh(graph, head, stamps, mark, address_of(heads), heads.shape[1] * heads.itemsize, fresh)


@hot
def _look(heads, extra, graph, metric, query, const, aug, beam, fresh, pool_d, pool_i, note, work):
    """Offer the neighbours that have arrived to the pool."""
    values, near_d, near_i = work[0][0], work[0][1], work[1]
    count, lowest = note[FRESH], note[AT] + 1
    at_d, at_i, chunks = address_of(pool_d), address_of(pool_i), pool_d.shape[0] // WIDE
    _measure(heads, extra, metric, query, const, aug, fresh, fresh, count, values)
    size = _near(values, fresh, count, pool_d[beam - 1], near_d, near_i)
    links, row = address_of(graph), graph.shape[1] * 4
    for t in range(size):
        place = insert(at_d, at_i, chunks, near_d[t], near_i[t])
        lowest = min(lowest, place)
    note[AT] = lowest
    note[CHECKED] += count
    for t in range(lowest, min(lowest + 2, beam)):  # the next to expand: their edges come meanwhile
        line = links + (pool_i[t] & 2147483647) * row
        prefetch(line)
        prefetch(line + 64)


@hot
def walk_lanes(
    heads, extra, graph, seeds, metric, queries, step, consts, augs, count, beam, max_check, state, pool_d, pool_i
):
    """Best-first search for ``count`` (at most ``LANES``) queries, which lie ``step`` bytes apart from the address
    ``queries`` on: fills ``pool_d`` and ``pool_i`` (LANES, places) ascending, and in the notes of ``state`` (see
    :func:`marks`) how many heads were found and how many distances were computed.

    ``consts`` and ``augs`` have one number for each. ``seeds`` is (group vectors, group heads, seed vectors, seed
    heads, seed begins). ``graph`` (heads, degree) int32 is padded with -1.
    """
    stamps, epoch, fresh, notes = state[:4]
    work = state[4:]
    if heads.shape[0] == 0:
        notes[:count, FOUND] = 0
        notes[:count, CHECKED] = 0
        return
    active = count
    for lane in range(count):
        epoch[lane] += 1
        if epoch[lane] == 255:
            stamps[lane, :] = 0
            epoch[lane] = 1
        query, mark = queries + lane * step, numba.uint8(epoch[lane])
        checks = _begin(
            heads,
            extra,
            seeds,
            metric,
            query,
            consts[lane],
            augs[lane],
            beam,
            stamps[lane],
            mark,
            pool_d[lane],
            pool_i[lane],
            work,
        )
        notes[lane, AT], notes[lane, CHECKED] = 0, checks
        for t in range(min(beam, 2)):  # the first edges that are wanted
            place = address_of(graph) + (pool_i[lane, t] & 2147483647) * graph.shape[1] * 4
            prefetch(place)
            prefetch(place + 64)
    for lane in range(count):
        mark = numba.uint8(epoch[lane])
        _advance(heads, graph, beam, max_check, stamps[lane], mark, fresh[lane], pool_i[lane], notes[lane])
        active -= notes[lane, FRESH] < 0
    while active > 0:
        for lane in range(count):
            if notes[lane, FRESH] < 0:
                continue
            query, mark = queries + lane * step, numba.uint8(epoch[lane])
            _look(
                heads,
                extra,
                graph,
                metric,
                query,
                consts[lane],
                augs[lane],
                beam,
                fresh[lane],
                pool_d[lane],
                pool_i[lane],
                notes[lane],
                work,
            )
            _advance(heads, graph, beam, max_check, stamps[lane], mark, fresh[lane], pool_i[lane], notes[lane])
            active -= notes[lane, FRESH] < 0
    for lane in range(count):
        size = 0
        for t in range(beam):
            size += 1 if pool_d[lane, t] < np.inf else 0
            pool_i[lane, t] &= 2147483647
        notes[lane, FOUND] = size


@njit
def walk_many(
    queries, consts, augs, heads, extra, graph, seeds, metric, beam, max_check, state, out_d, out_i, sizes, checks
):
    """Walk for each query (count, lanes): the nearest heads into ``out_d`` and ``out_i`` (count, beam), how many into
    ``sizes``.

    Only reads the graph, so several threads may work on parts of one batch with a ``state`` each.
    """
    step = queries.shape[1] * 4
    room = (beam + WIDE - 1) // WIDE * WIDE
    pool_d, pool_i = np.empty((LANES, room), np.float32), np.empty((LANES, room), np.int32)
    for i in range(0, queries.shape[0], LANES):
        count = min(LANES, queries.shape[0] - i)
        walk_lanes(
            heads,
            extra,
            graph,
            seeds,
            metric,
            address_of(queries) + i * step,
            step,
            consts[i:],
            augs[i:],
            count,
            beam,
            max_check,
            state,
            pool_d,
            pool_i,
        )
        for lane in range(count):
            out_d[i + lane, :beam], out_i[i + lane, :beam] = pool_d[lane, :beam], pool_i[lane, :beam]
            sizes[i + lane], checks[i + lane] = state[3][lane, FOUND], state[3][lane, CHECKED]
