"""The navigating graph over the heads: best-first walk.

A walk keeps the ``beam`` nearest heads seen, sorted, and expands the nearest one that was not expanded. It begins at
the seeds: two levels of the balanced tree. Distances are squared and of the mapped space (see ``metric``): metric 0 is
L2, 1 cosine, 2 inner product, 3 L2 between byte codes and a query of int16 (see ``guide``).
"""

from __future__ import annotations

import numba
import numpy as np

from hasten.retrieve.index.kernel import hot, njit
from hasten.retrieve.index.simd import address_of, dot1, dot4, prefetch, squared1, squared4, widen
from hasten.retrieve.index.simd_bytes import bytes1, bytes4

__all__ = ["CODED", "four_distances", "head_distance", "map_head", "walk", "walk_many"]

CODED = 3
"""the metric of byte codes"""
EXPANDED = -2147483648
"""the sign bit of a pool's item: it was expanded"""


@hot
def head_distance(heads, extra, metric, query, const, aug, head):
    """Squared mapped distance between the query at address ``query`` and one head."""
    width = heads.shape[1]
    row = address_of(heads) + head * width * heads.itemsize
    if metric == 3:
        return bytes1(query, row, width)
    if metric == 0:
        return squared1(heads, query, row, width)
    dot = dot1(heads, query, row, width)
    if metric == 1:
        return const - numba.float32(2.0) * dot * extra[head]
    return const - numba.float32(2.0) * (dot + aug * extra[head])


@hot
def four_distances(rows, extra, metric, query, const, aug, base, stride, width, a, b, c, d, ha, hb, hc, hd):
    """Distances to rows a, b, c, d of ``rows``; ``ha`` … are the heads whose extras belong to them."""
    two = numba.float32(2.0)
    pa, pb, pc, pd = base + a * stride, base + b * stride, base + c * stride, base + d * stride
    if metric == 3:
        return bytes4(query, pa, pb, pc, pd, width)
    if metric == 0:
        return squared4(rows, query, pa, pb, pc, pd, width)
    da, db, dc, dd = dot4(rows, query, pa, pb, pc, pd, width)
    if metric == 1:
        return (
            const - two * da * extra[ha],
            const - two * db * extra[hb],
            const - two * dc * extra[hc],
            const - two * dd * extra[hd],
        )
    return (
        const - two * (da + aug * extra[ha]),
        const - two * (db + aug * extra[hb]),
        const - two * (dc + aug * extra[hc]),
        const - two * (dd + aug * extra[hd]),
    )


@hot
def _push(pool_d, pool_i, size, limit, value, item):
    """Put an item into the sorted pool; returns its place (``limit`` where it did not fit) and the new size.

    The sign bit of an item marks it as expanded; a new one is not.
    """
    if size == limit:
        if value >= pool_d[size - 1]:
            return limit, size
        place = size - 1
    else:
        place = size
        size += 1
    while place > 0 and pool_d[place - 1] > value:
        pool_d[place] = pool_d[place - 1]
        pool_i[place] = pool_i[place - 1]
        place -= 1
    pool_d[place] = value
    pool_i[place] = item
    return place, size


@hot
def _scan_seeds(
    rows, heads_of, begin, end, extra, metric, query, const, aug, stamps, mark, pool_d, pool_i, size, limit
):
    """Offer the seeds ``begin:end`` (contiguous vectors) to the pool."""
    base, stride, width = address_of(rows), rows.shape[1] * rows.itemsize, rows.shape[1]
    last = end - 1
    for s in range(begin, end, 4):
        s1, s2, s3 = min(s + 1, last), min(s + 2, last), min(s + 3, last)
        h0, h1, h2, h3 = heads_of[s], heads_of[s1], heads_of[s2], heads_of[s3]
        four = four_distances(
            rows, extra, metric, query, const, aug, base, stride, width, s, s1, s2, s3, h0, h1, h2, h3
        )
        worst = pool_d[size - 1] if size == limit else numba.float32(np.inf)
        if min(min(four[0], four[1]), min(four[2], four[3])) >= worst:
            continue
        for t in range(4):
            value = four[0] if t == 0 else four[1] if t == 1 else four[2] if t == 2 else four[3]
            head = h0 if t == 0 else h1 if t == 1 else h2 if t == 2 else h3
            if stamps[head] != mark and (size < limit or value < pool_d[size - 1]):
                stamps[head] = mark
                _, size = _push(pool_d, pool_i, size, limit, value, head)
    return size


@hot
def _near_groups(rows, heads_of, extra, metric, query, const, aug):
    """The four nearest groups of seeds, nearest first; -1 where there is none."""
    base, stride, width = address_of(rows), rows.shape[1] * rows.itemsize, rows.shape[1]
    groups = heads_of.shape[0]
    last = groups - 1
    a, b, c, d = -1, -1, -1, -1
    far = numba.float32(np.inf)
    la, lb, lc, ld = far, far, far, far
    for g in range(0, groups, 4):
        g1, g2, g3 = min(g + 1, last), min(g + 2, last), min(g + 3, last)
        h0, h1, h2, h3 = heads_of[g], heads_of[g1], heads_of[g2], heads_of[g3]
        four = four_distances(
            rows, extra, metric, query, const, aug, base, stride, width, g, g1, g2, g3, h0, h1, h2, h3
        )
        for t in range(min(4, groups - g)):
            value = four[0] if t == 0 else four[1] if t == 1 else four[2] if t == 2 else four[3]
            if value < la:
                a, b, c, d, la, lb, lc, ld = g + t, a, b, c, value, la, lb, lc
            elif value < lb:
                b, c, d, lb, lc, ld = g + t, b, c, value, lb, lc
            elif value < lc:
                c, d, lc, ld = g + t, c, value, lc
            elif value < ld:
                d, ld = g + t, value
    return a, b, c, d


@hot
def _begin(heads, extra, seeds, metric, query, const, aug, beam, stamps, mark, pool_d, pool_i):
    """Fill the pool from the seeds; returns (heads in it, distances computed)."""
    group_rows, group_heads, seed_rows, seed_heads, seed_begin = seeds
    if seed_heads.shape[0] == 0:
        stamps[0] = mark
        pool_d[0] = head_distance(heads, extra, metric, query, const, aug, 0)
        pool_i[0] = 0
        return 1, 0
    near = _near_groups(group_rows, group_heads, extra, metric, query, const, aug)
    checks = group_heads.shape[0]
    size = 0
    for turn in range(4 if metric == CODED else 2):  # a coded distance costs little
        g = near[0] if turn == 0 else near[1] if turn == 1 else near[2] if turn == 2 else near[3]
        if g < 0:
            continue
        first, last = seed_begin[g], seed_begin[g + 1]
        size = _scan_seeds(
            seed_rows,
            seed_heads,
            first,
            last,
            extra,
            metric,
            query,
            const,
            aug,
            stamps,
            mark,
            pool_d,
            pool_i,
            size,
            beam,
        )
        checks += last - first
    return size, checks


@hot
def _fresh(graph, head, stamps, mark, base, stride, fresh):
    """Neighbours of a head that this walk has not met, into ``fresh``; asks for their vectors. Returns how many."""
    count = 0
    lines = (stride + 63) >> 6
    for e in range(graph.shape[1]):
        other = graph[head, e]
        if other < 0:
            break
        if stamps[other] != mark:
            stamps[other] = mark
            fresh[count] = other
            count += 1
            place = base + other * stride
            for line in range(lines):
                prefetch(place + (line << 6))
    for t in range(count, count + 3):  # groups of four are whole
        fresh[t] = fresh[max(count - 1, 0)]
    return count


@hot
def walk(heads, extra, graph, seeds, metric, query, const, aug, beam, max_check, stamps, epoch, fresh, pool_d, pool_i):
    """Best-first search: fills ``pool_d`` and ``pool_i`` (beam,) ascending; returns (found, distances computed).

    ``seeds`` is (group vectors, group heads, seed vectors, seed heads, seed begins). ``stamps`` (heads,) uint16 and
    ``epoch`` (1,) mark the visited ones of this walk, ``fresh`` (degree + 4,) int32 is scratch. ``graph`` (heads,
    degree) int32 is padded with -1.
    """
    epoch[0] += 1
    if epoch[0] == 65535:
        stamps[:] = 0
        epoch[0] = 1
    mark = numba.uint16(epoch[0])
    if heads.shape[0] == 0:
        return 0, 0
    width = heads.shape[1]
    stride = width * heads.itemsize
    base = address_of(heads)
    links, row = address_of(graph), graph.shape[1] * 4
    size, checks = _begin(heads, extra, seeds, metric, query, const, aug, beam, stamps, mark, pool_d, pool_i)
    at = 0
    while at < size:
        head = pool_i[at]
        if head < 0:  # expanded before
            at += 1
            continue
        pool_i[at] = head | numba.int32(EXPANDED)
        count = _fresh(graph, head, stamps, mark, base, stride, fresh)
        lowest = at + 1
        for e in range(0, count, 4):
            a, b, c, d = fresh[e], fresh[e + 1], fresh[e + 2], fresh[e + 3]
            four = four_distances(heads, extra, metric, query, const, aug, base, stride, width, a, b, c, d, a, b, c, d)
            worst = pool_d[size - 1] if size == beam else numba.float32(np.inf)
            if min(min(four[0], four[1]), min(four[2], four[3])) >= worst:
                continue
            for t in range(min(4, count - e)):
                value = four[0] if t == 0 else four[1] if t == 1 else four[2] if t == 2 else four[3]
                if value < worst:
                    place, size = _push(pool_d, pool_i, size, beam, value, fresh[e + t])
                    lowest = min(lowest, place)
                    if place < at + 3:  # one of the next to expand: its edges come meanwhile
                        prefetch(links + fresh[e + t] * row)
                        prefetch(links + fresh[e + t] * row + 64)
                    worst = pool_d[size - 1] if size == beam else numba.float32(np.inf)
        checks += count
        at = lowest
        if checks >= max_check:
            break
    for t in range(size):
        pool_i[t] &= 2147483647
    return size, checks


@hot
def map_head(heads, extra, metric, head, out):
    """Write a head in the mapped space to ``out`` (lanes,) float32; returns the width of the mapped space."""
    width = heads.shape[1]
    widen(heads, address_of(heads) + head * width * heads.itemsize, address_of(out), width)
    if metric == 1:
        for i in range(width):
            out[i] *= extra[head]
        return width
    if metric == 2:
        out[width] = extra[head]
        return width + 1
    return width


@njit
def walk_many(
    queries,
    consts,
    augs,
    heads,
    extra,
    graph,
    seeds,
    metric,
    beam,
    max_check,
    stamps,
    epoch,
    out_d,
    out_i,
    sizes,
    checks,
):
    """Walk for each query (count, lanes): the nearest heads into ``out_d`` and ``out_i`` (count, beam), how many into
    ``sizes``.

    Only reads the graph, so several threads may work on parts of one batch with a ``stamps`` and ``epoch`` each.
    """
    fresh = np.empty(graph.shape[1] + 4, np.int32)
    for i in range(queries.shape[0]):
        sizes[i], checks[i] = walk(
            heads,
            extra,
            graph,
            seeds,
            metric,
            address_of(queries[i]),
            consts[i],
            augs[i],
            beam,
            max_check,
            stamps,
            epoch,
            fresh,
            out_d[i],
            out_i[i],
        )
