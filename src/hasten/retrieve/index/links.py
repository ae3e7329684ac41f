"""Linking heads into the graph: the RNG rule, edges both ways, insertion in batches.

Going through candidates in ascending order, ``c`` becomes a neighbour of a head if it is nearer to it than (``alpha``
times) to every neighbour already taken: |h - c| < alpha |c - a| for each a. An over-full head drops edges, so that some
heads end with hardly an edge that leads to them, and walks do not find them: such heads take the place of others that
many edges lead to (see ``open_ways``).
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numba
import numpy as np

from hasten.retrieve.index.graph import head_distance, map_head
from hasten.retrieve.index.kernel import hot, njit
from hasten.retrieve.index.simd import address_of, squared1, widen
from hasten.retrieve.index.walk import marks, walk_many

__all__ = ["link_batch", "link_heads", "open_ways", "prune"]


@hot
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


@hot
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


@hot
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


@hot
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


@njit
def open_ways(graph, least, many):
    """See that at least ``least`` edges lead to each head, as far as its own neighbours can give them; returns how many
    were set.

    ``graph`` (heads, degree) int32, padded with -1, is changed in place. Heads with the fewest ways in come first; each
    asks its neighbours, nearest first. One with room takes it as its last edge; a full one drops its edge to the head
    that most ways lead to, if those are at least ``many``.
    """
    heads, degree = graph.shape
    ways = np.zeros(heads, np.int64)
    for h in range(heads):
        for e in range(degree):
            if graph[h, e] < 0:
                break
            ways[graph[h, e]] += 1
    changed = 0
    for h in np.argsort(ways, kind="mergesort"):
        for e in range(degree):
            near = graph[h, e]
            if ways[h] >= least or near < 0:
                break
            size, busiest, most = 0, -1, many
            known = False
            while size < degree and graph[near, size] >= 0 and not known:
                other = graph[near, size]
                known = other == h
                if ways[other] >= most:
                    busiest, most = size, ways[other]
                size += 1
            if known or (size == degree and busiest < 0):
                continue
            if size == degree:
                ways[graph[near, busiest]] -= 1
                for t in range(busiest, degree - 1):
                    graph[near, t] = graph[near, t + 1]
                size = degree - 1
            graph[near, size] = h
            ways[h] += 1
            changed += 1
    return changed


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
    Whenever the graph has doubled, and at the end, heads that few edges lead to get more.
    """
    degree = graph.shape[1]
    fill = (graph >= 0).sum(1).astype(np.int32)
    linked = int(np.count_nonzero(fill)) + 1
    scratches = [marks(len(heads), degree) for _ in range(threads)]
    done, opened = 0, max(linked, 1024)
    with ThreadPoolExecutor(threads) as pool:
        while done < len(nodes):
            if linked >= 2 * opened:
                open_ways(graph, degree // 2, degree + degree // 4)
                fill, opened = (graph >= 0).sum(1).astype(np.int32), linked
            size = min(len(nodes) - done, max(1, linked // 20), 1 << 14)
            batch = np.ascontiguousarray(nodes[done : done + size], np.int64)
            edges, count = np.full((size, degree), -1, np.int32), np.zeros(size, np.int32)
            parts = np.array_split(np.arange(size), threads if size >= 8 * threads else 1)

            def search(job: tuple[int, Any], batch: Any = batch, edges: Any = edges, count: Any = count) -> None:
                turn, part = job
                cut = slice(part[0], part[-1] + 1)
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
                    scratches[turn],
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
    open_ways(graph, degree // 2, degree + degree // 4)
