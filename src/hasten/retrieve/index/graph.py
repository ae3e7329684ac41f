"""The navigating graph over the heads: best-first walk, RNG pruning, insertion.

A head's out-edges point to near heads in different directions: going through candidates in ascending order, ``c``
becomes a neighbour if it is nearer to the head than (``alpha`` times) to every neighbour already taken. A walk keeps
the ``beam`` nearest heads seen, sorted, and expands the nearest one that was not expanded. It begins at the seeds:
two levels of the balanced tree. Distances are squared and of the mapped space (see ``metric``): metric 0 is L2, 1
cosine, 2 inner product.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numba
import numpy as np

from hasten.retrieve.index.simd import address_of, dot1, dot4, prefetch, squared1, squared4, widen

__all__ = ["head_distance", "link_batch", "link_heads", "map_head", "prune", "walk", "walk_many"]

njit = numba.njit(nogil=True, cache=True)
_inline = njit


@njit
def head_distance(heads, extra, metric, query, const, aug, head):
    """Squared mapped distance between the query at address ``query`` and one head."""
    width = heads.shape[1]
    row = address_of(heads) + head * width * heads.itemsize
    if metric == 0:
        return squared1(heads, query, row, width)
    dot = dot1(heads, query, row, width)
    if metric == 1:
        return const - numba.float32(2.0) * dot * extra[head]
    return const - numba.float32(2.0) * (dot + aug * extra[head])


@_inline
def _four(rows, extra, metric, query, const, aug, base, stride, width, a, b, c, d, ha, hb, hc, hd):
    """Distances to rows a, b, c, d of ``rows``; ``ha`` … are the heads whose extras belong to them."""
    two = numba.float32(2.0)
    pa, pb, pc, pd = base + a * stride, base + b * stride, base + c * stride, base + d * stride
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


@_inline
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


@njit
def _scan_seeds(
    rows, heads_of, begin, end, extra, metric, query, const, aug, stamps, mark, pool_d, pool_i, size, limit
):
    """Offer the seeds ``begin:end`` (contiguous vectors) to the pool."""
    base, stride, width = address_of(rows), rows.shape[1] * rows.itemsize, rows.shape[1]
    last = end - 1
    for s in range(begin, end, 4):
        s1, s2, s3 = min(s + 1, last), min(s + 2, last), min(s + 3, last)
        h0, h1, h2, h3 = heads_of[s], heads_of[s1], heads_of[s2], heads_of[s3]
        four = _four(rows, extra, metric, query, const, aug, base, stride, width, s, s1, s2, s3, h0, h1, h2, h3)
        if stamps[h0] != mark:
            stamps[h0] = mark
            _, size = _push(pool_d, pool_i, size, limit, four[0], h0)
        if stamps[h1] != mark:
            stamps[h1] = mark
            _, size = _push(pool_d, pool_i, size, limit, four[1], h1)
        if stamps[h2] != mark:
            stamps[h2] = mark
            _, size = _push(pool_d, pool_i, size, limit, four[2], h2)
        if stamps[h3] != mark:
            stamps[h3] = mark
            _, size = _push(pool_d, pool_i, size, limit, four[3], h3)
    return size


@njit
def walk(heads, extra, graph, seeds, metric, query, const, aug, beam, max_check, stamps, epoch, pool_d, pool_i):
    """Best-first search: fills ``pool_d`` and ``pool_i`` (beam,) ascending; returns (found, distances computed).

    ``seeds`` is (group vectors, group heads, seed vectors, seed heads, seed begins). ``stamps`` (heads,) uint16 and
    ``epoch`` (1,) mark the visited ones of this walk. ``graph`` (heads, degree) int32 is padded with -1.
    """
    group_rows, group_heads, seed_rows, seed_heads, seed_begin = seeds
    epoch[0] += 1
    if epoch[0] == 65535:
        stamps[:] = 0
        epoch[0] = 1
    mark = numba.uint16(epoch[0])
    width = heads.shape[1]
    stride = width * heads.itemsize
    base = address_of(heads)
    groups = group_heads.shape[0]
    checks = 0
    size = 0
    if seed_heads.shape[0] == 0:
        if heads.shape[0] == 0:
            return 0, 0
        stamps[0] = mark
        pool_d[0] = head_distance(heads, extra, metric, query, const, aug, 0)
        pool_i[0] = 0
        size = 1
    else:
        best, second = -1, -1
        low, low2 = numba.float32(np.inf), numba.float32(np.inf)
        gbase, last = address_of(group_rows), groups - 1
        for g in range(0, groups, 4):
            g1, g2, g3 = min(g + 1, last), min(g + 2, last), min(g + 3, last)
            four = _four(
                group_rows,
                extra,
                metric,
                query,
                const,
                aug,
                gbase,
                stride,
                width,
                g,
                g1,
                g2,
                g3,
                group_heads[g],
                group_heads[g1],
                group_heads[g2],
                group_heads[g3],
            )
            for t in range(4):
                where = min(g + t, last)
                value = four[0] if t == 0 else four[1] if t == 1 else four[2] if t == 2 else four[3]
                if where in (best, second):
                    continue
                if value < low:
                    second, low2 = best, low
                    best, low = where, value
                elif value < low2:
                    second, low2 = where, value
        checks += groups
        for turn in range(2):
            g = best if turn == 0 else second
            if g < 0:
                continue
            size = _scan_seeds(
                seed_rows,
                seed_heads,
                seed_begin[g],
                seed_begin[g + 1],
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
            checks += seed_begin[g + 1] - seed_begin[g]
    degree = graph.shape[1]
    fresh = np.empty(degree + 4, np.int32)
    expanded = numba.int32(-2147483648)
    at = 0
    lines = (stride + 63) >> 6
    while at < size:
        head = pool_i[at]
        if head < 0:  # expanded before
            at += 1
            continue
        pool_i[at] = head | expanded
        count = 0
        for e in range(degree):
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
        if count:
            for t in range(count, count + 3):
                fresh[t] = fresh[count - 1]
        lowest = at + 1
        for e in range(0, count, 4):
            a, b, c, d = fresh[e], fresh[e + 1], fresh[e + 2], fresh[e + 3]
            four = _four(heads, extra, metric, query, const, aug, base, stride, width, a, b, c, d, a, b, c, d)
            worst = pool_d[size - 1] if size == beam else numba.float32(np.inf)
            if four[0] < worst:
                place, size = _push(pool_d, pool_i, size, beam, four[0], a)
                lowest = min(lowest, place)
            if e + 1 < count and four[1] < worst:
                place, size = _push(pool_d, pool_i, size, beam, four[1], b)
                lowest = min(lowest, place)
            if e + 2 < count and four[2] < worst:
                place, size = _push(pool_d, pool_i, size, beam, four[2], c)
                lowest = min(lowest, place)
            if e + 3 < count and four[3] < worst:
                place, size = _push(pool_d, pool_i, size, beam, four[3], d)
                lowest = min(lowest, place)
        checks += count
        at = lowest
        if checks >= max_check:
            break
    for t in range(size):
        pool_i[t] &= 2147483647
    return size, checks


@njit
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
def prune(heads, extra, metric, candidates, distances, count, degree, alpha, kept, mapped, skip):
    """RNG rule over ``count`` candidates in ascending order of ``distances`` (squared); returns how many were kept.

    ``kept`` (degree,) int32 receives them; ``mapped`` (degree + 1, lanes) float32 is scratch; ``skip`` is never kept.
    """
    size = 0
    stretch = numba.float32(alpha * alpha)
    for t in range(count):
        c = candidates[t]
        if c == skip:
            continue
        width = map_head(heads, extra, metric, c, mapped[size])
        own = address_of(mapped[size])
        good = True
        for a in range(size):
            if kept[a] == c or stretch * squared1(mapped, own, address_of(mapped[a]), width) < distances[t]:
                good = False
                break
        if good:
            kept[size] = c
            size += 1
            if size == degree:
                break
    return size


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
            out_d[i],
            out_i[i],
        )


@njit
def queries_of(heads, extra, metric, largest, nodes, queries, consts, augs):
    """Heads as queries of :func:`walk_many`."""
    for i in range(nodes.shape[0]):
        consts[i], augs[i] = _as_query(heads, extra, metric, largest, nodes[i], queries[i])


@njit
def prune_many(heads, extra, metric, nodes, pool_d, pool_i, sizes, alpha, edges, edge_count):
    """The RNG rule over what the walks of ``nodes`` found, into ``edges`` (nodes, degree)."""
    degree = edges.shape[1]
    mapped = np.zeros((degree + 1, ((heads.shape[1] + 16) // 16) * 16), np.float32)
    for i in range(nodes.shape[0]):
        edge_count[i] = prune(
            heads, extra, metric, pool_i[i], pool_d[i], sizes[i], degree, alpha, edges[i], mapped, nodes[i]
        )


@njit
def _as_query(heads, extra, metric, largest, head, query):
    """Write a head to ``query`` in the form that distances take; returns its constant and extra coordinate."""
    width = heads.shape[1]
    widen(heads, address_of(heads) + head * width * heads.itemsize, address_of(query), width)
    if metric == 1:
        for i in range(width):
            query[i] *= extra[head]
        return numba.float32(2.0), numba.float32(0.0)
    if metric == 2:
        return numba.float32(2.0 * largest * largest), extra[head]
    return numba.float32(0.0), numba.float32(0.0)


@njit
def _add_edge(
    heads, extra, graph, fill, metric, largest, head, other, alpha, query, candidates, distances, kept, mapped
):
    """An edge from ``head`` to ``other``; an over-full head is pruned again."""
    degree = graph.shape[1]
    if head == other:
        return
    for e in range(fill[head]):
        if graph[head, e] == other:
            return
    if fill[head] < degree:
        graph[head, fill[head]] = other
        fill[head] += 1
        return
    const, aug = _as_query(heads, extra, metric, largest, head, query)
    for e in range(degree + 1):
        c = graph[head, e] if e < degree else other
        value = head_distance(heads, extra, metric, address_of(query), const, aug, c)
        place = e
        while place > 0 and distances[place - 1] > value:
            distances[place] = distances[place - 1]
            candidates[place] = candidates[place - 1]
            place -= 1
        distances[place] = value
        candidates[place] = c
    size = prune(heads, extra, metric, candidates, distances, degree + 1, degree, alpha, kept, mapped, head)
    for e in range(degree):
        graph[head, e] = kept[e] if e < size else -1
    fill[head] = size


@njit
def link_batch(heads, extra, graph, fill, metric, largest, nodes, edges, edge_count, alpha):
    """Write the edges of ``nodes`` and their reverse edges."""
    degree = graph.shape[1]
    lanes = ((heads.shape[1] + 16) // 16) * 16
    mapped = np.zeros((degree + 1, lanes), np.float32)
    query = np.zeros(lanes, np.float32)
    candidates = np.empty(degree + 1, np.int32)
    distances = np.empty(degree + 1, np.float32)
    kept = np.empty(degree, np.int32)
    for i in range(nodes.shape[0]):
        for t in range(edge_count[i]):
            h, other = nodes[i], edges[i, t]
            _add_edge(
                heads, extra, graph, fill, metric, largest, h, other, alpha, query, candidates, distances, kept, mapped
            )
            _add_edge(
                heads, extra, graph, fill, metric, largest, other, h, alpha, query, candidates, distances, kept, mapped
            )


def link_heads(
    heads: Any,
    extra: Any,
    graph: Any,
    seeds: Any,
    metric: int,
    largest: float,
    nodes: Any,
    *,
    beam: int = 64,
    alpha: float = 1.1,
    threads: int = 1,
    progress: Callable[[float], None] | None = None,
) -> None:
    """Insert the heads ``nodes`` into ``graph`` in place, in batches that several threads search.

    A batch is at most a twentieth of what is linked already, so the result does not depend on the number of threads.
    """
    degree = graph.shape[1]
    fill = (graph >= 0).sum(1).astype(np.int32)
    linked = int(np.count_nonzero(fill)) + 1
    scratches = [(np.zeros(len(heads), np.uint16), np.zeros(1, np.int64)) for _ in range(threads)]
    done = 0
    with ThreadPoolExecutor(threads) as pool:
        while done < len(nodes):
            size = min(len(nodes) - done, max(1, linked // 20), 1 << 14)
            batch = np.ascontiguousarray(nodes[done : done + size], np.int64)
            edges, count = np.full((size, degree), -1, np.int32), np.zeros(size, np.int32)
            parts = np.array_split(np.arange(size), threads if size >= 8 * threads else 1)

            def search(job: tuple[int, Any], batch: Any = batch, edges: Any = edges, count: Any = count) -> None:
                turn, part = job
                cut = slice(part[0], part[-1] + 1)
                stamps, epoch = scratches[turn]
                own = batch[cut]
                queries = np.zeros((len(own), (heads.shape[1] + 16) // 16 * 16), np.float32)
                consts, augs = np.zeros(len(own), np.float32), np.zeros(len(own), np.float32)
                pool_d, pool_i = np.empty((len(own), beam), np.float32), np.empty((len(own), beam), np.int32)
                sizes = np.zeros(len(own), np.int64)
                queries_of(heads, extra, metric, largest, own, queries, consts, augs)
                walk_many(
                    queries,
                    consts,
                    augs,
                    heads,
                    extra,
                    graph,
                    seeds,
                    metric,
                    beam,
                    1 << 30,
                    stamps,
                    epoch,
                    pool_d,
                    pool_i,
                    sizes,
                    np.zeros(len(own), np.int64),
                )
                prune_many(heads, extra, metric, own, pool_d, pool_i, sizes, alpha, edges[cut], count[cut])

            list(pool.map(search, enumerate(parts)))
            link_batch(heads, extra, graph, fill, metric, largest, batch, edges, count, alpha)
            done += size
            linked += size
            if progress is not None:
                progress(done / len(nodes))
