"""Hierarchical balanced clustering: n rows into a tree of small, even clusters, at O(n d k log_k n).

A node of more than ``leaf`` rows is split in ``k`` by k-means whose assignment pays for crowded clusters: row ``x``
goes to argmin_j |x - c_j|² + penalty * (members of j in the pass before), on a fresh sample per pass. Then one pass
without it over all rows, every centre snaps to its nearest member (a centre is a real row), and one more pass.
Differs from the reference code of SPANN in: equal rows are cut into equal chunks, the depth is bounded, sums are
float64.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hasten.retrieve.index.cluster import SAMPLE, assign_all, cluster, workspace
from hasten.retrieve.index.kernel import njit

__all__ = ["Tree", "grow", "split_rows"]

MAX_DEPTH = 64
FACTORS = (1.0, 3.0, 10.0, 30.0, 100.0, 300.0)
LOSS = 1.05


@njit
def grow(rows, order, k, leaf, factor, balanced, seed, depth):
    """The tree over ``rows`` (all in memory), ``order`` being permuted so that every node is a range of it.

    Returns (begin, end, centre, parent) of the nodes, parents first; centres are places in ``rows``.
    """
    n = order.shape[0]
    width = rows.shape[1]
    state = np.array([seed * 2862933555777941757 + 3037000493], np.uint64)
    if state[0] == 0:
        state[0] = 88172645463325252
    capacity = 4 * (n // max(leaf // 2, 1)) + 64
    begins, ends = np.empty(capacity, np.int64), np.empty(capacity, np.int64)
    centre, parent, level = np.empty(capacity, np.int64), np.empty(capacity, np.int64), np.empty(capacity, np.int32)
    work = workspace(k, width, n)
    labels = np.empty(n, np.int32)
    spare = np.empty(n, order.dtype)
    centres = np.empty((k, width), np.float32)
    begins[0], ends[0], centre[0], parent[0], level[0] = 0, n, order[0], -1, depth
    nodes = 1
    at = 0
    starts = np.empty(k + 1, np.int64)
    while at < nodes:
        begin, end = begins[at], ends[at]
        size = end - begin
        if size > leaf and level[at] < MAX_DEPTH:
            parts = min(k, size)
            cluster(rows, order, begin, end, parts, factor, balanced, state, centres, work)
            which = assign_all(rows, order, begin, end, centres, parts, labels)
            live = 0
            for j in range(parts):  # snap: a centre is a real row
                if which[j] >= 0:
                    centres[live] = rows[which[j]]
                    which[live] = which[j]
                    live += 1
            which2 = assign_all(rows, order, begin, end, centres, live, labels)
            starts[:] = 0
            for i in range(size):
                starts[labels[i] + 1] += 1
            filled = 0
            for j in range(live):
                filled += 1 if starts[j + 1] > 0 else 0
            if filled < 2:  # all rows are equal: equal chunks
                live = parts
                for j in range(live):
                    which[j] = order[begin + (j * size + live - 1) // live]  # where chunk j begins
                starts[:] = 0
                for i in range(size):
                    labels[i] = i * live // size
                    starts[labels[i] + 1] += 1
                which2 = which
            for j in range(live):
                starts[j + 1] += starts[j]
            for j in range(live):
                if starts[j + 1] > starts[j]:
                    if nodes == capacity:
                        capacity *= 2
                        begins, ends = _longer(begins), _longer(ends)
                        centre, parent = _longer(centre), _longer(parent)
                        level = _longer(level)
                    begins[nodes], ends[nodes] = begin + starts[j], begin + starts[j + 1]
                    centre[nodes] = which2[j]
                    parent[nodes], level[nodes] = at, level[at] + 1
                    nodes += 1
            place = starts.copy()
            for i in range(size):
                j = labels[i]
                spare[place[j]] = order[begin + i]
                place[j] += 1
            order[begin:end] = spare[:size]
        at += 1
    return begins[:nodes], ends[:nodes], centre[:nodes], parent[:nodes]


@njit
def _longer(array):
    out = np.empty(2 * array.shape[0], array.dtype)
    out[: array.shape[0]] = array
    return out


@dataclass(frozen=True)
class Tree:
    """Nodes, parents before children; node ``i`` holds the rows ``order[begin[i]:end[i]]``."""

    order: NDArray[Any]
    """(n,) row numbers"""
    begin: NDArray[np.int64]
    """(nodes,)"""
    end: NDArray[np.int64]
    """(nodes,)"""
    centre: NDArray[np.int64]
    """(nodes,) the row that stands for the node"""
    parent: NDArray[np.int64]
    """(nodes,) -1 for the root"""


def best_factor(sample: NDArray[np.float32], k: int, seed: int) -> float:
    """The strength of the penalty that gives the most even clusters while the mean squared distance grows by at most
    5 %.

    Differs from the reference code, which takes the most even clusters at any price.
    """

    def tried(factor: float, balanced: bool) -> tuple[float, float]:
        spreads, distances = [], []
        for turn in range(3):
            state = np.array([seed + 1 + turn], np.uint64)
            centres = np.empty((k, sample.shape[1]), np.float32)
            spread, distance = cluster(
                sample,
                np.arange(len(sample)),
                0,
                len(sample),
                min(k, len(sample)),
                factor,
                balanced,
                state,
                centres,
                workspace(k, sample.shape[1], len(sample)),
            )
            spreads.append(spread)
            distances.append(distance)
        return float(np.mean(spreads)), float(np.mean(distances))

    best, (lowest, plain) = 0.0, tried(1.0, False)
    for factor in FACTORS:
        spread, distance = tried(factor, True)
        if spread < lowest and distance <= LOSS * plain:
            best, lowest = factor, spread
    return best


Take = Callable[[NDArray[Any]], NDArray[np.float32]]


def _split_streamed(
    rows: NDArray[np.int64],
    take: Take,
    k: int,
    factor: float,
    balanced: bool,
    rng: np.random.Generator,
    buffer_rows: int,
    threads: int,
) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """Split one node of ``rows`` (m,), ascending, by centres of a sample: the part of each row (m,) and the row that
    stands for each part. The rows pass in blocks, several threads at a time.
    """
    size = len(rows)
    chosen = rows if size <= 20 * SAMPLE else np.sort(rng.choice(rows, 20 * SAMPLE, replace=False))
    sample = take(chosen)
    centres = np.empty((k, sample.shape[1]), np.float32)
    state = np.array([rng.integers(1, 1 << 62)], np.uint64)
    local = np.arange(len(sample))
    work = workspace(k, sample.shape[1], len(sample))
    cluster(sample, local, 0, len(sample), k, factor, balanced, state, centres, work)
    which = assign_all(sample, local, 0, len(sample), centres, k, np.empty(len(sample), np.int32))
    which = np.unique(which[which >= 0])
    centres = np.ascontiguousarray(sample[which])
    snapped = chosen[which]
    labels = np.empty(size, np.int32)
    block = max(1, min(buffer_rows, 1 << 16))

    def assign(low: int) -> None:
        part = take(rows[low : low + block])
        assign_all(part, np.arange(len(part)), 0, len(part), centres, len(centres), labels[low : low + block])

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(assign, range(0, size, block)))
    counts = np.bincount(labels, minlength=len(centres))
    if np.count_nonzero(counts) < 2:  # all rows are equal: equal chunks
        labels = (np.arange(size) * k // size).astype(np.int32)
        counts = np.bincount(labels, minlength=k)
        snapped = rows[np.minimum(-(-np.arange(k) * size // k), size - 1)]
    astray = labels[np.searchsorted(rows, snapped)] != np.arange(len(snapped))  # a tie went to another cluster
    for lone in np.flatnonzero(astray & (counts > 0)).tolist():
        snapped[lone] = rows[np.argmax(labels == lone)]
    return labels, snapped


def split_rows(
    n: int,
    take: Take,
    *,
    k: int = 32,
    leaf: int = 8,
    balanced: bool = True,
    seed: int = 0,
    buffer_rows: int = 1 << 20,
    threads: int = 2,
    progress: Callable[[float], None] | None = None,
) -> Tree:
    """The tree over ``n`` rows that need not fit in memory: ``take(rows)`` gives them mapped, float32.

    A node of more than ``buffer_rows`` rows is split on a sample and streamed; a smaller one is taken into memory
    whole, and several threads grow such nodes at a time. The result depends on the seed only.
    """
    rng = np.random.default_rng(seed)
    kind: Any = np.uint32 if n < 1 << 32 else np.int64
    order = np.arange(n, dtype=kind)
    first = take(np.sort(rng.choice(n, min(n, 20 * SAMPLE), replace=False)).astype(np.int64)) if n > leaf else None
    factor = best_factor(first[: 4 * SAMPLE], k, seed) if first is not None and len(first) > k and balanced else 1.0
    nodes: list[tuple[int, int, int, int]] = [(0, n, 0, -1)]
    pending: list[tuple[int, int]] = []  # (node, depth) to be grown in memory
    at, depths = 0, [0]
    done = 0
    least = max(k, n // (4 * k))  # big nodes are cut here so that threads have something to share
    while at < len(nodes):
        begin, end, _, _ = nodes[at]
        size = end - begin
        if leaf < size <= min(buffer_rows, max(least, 4096)) or (size > leaf and depths[at] >= MAX_DEPTH):
            pending.append((at, depths[at]))
        elif size > leaf:
            rows = np.sort(order[begin:end]).astype(np.int64)
            labels, snapped = _split_streamed(rows, take, k, factor, balanced, rng, buffer_rows, threads)
            order[begin:end] = rows[np.argsort(labels, kind="stable")]
            start = begin
            for j, count in enumerate(np.bincount(labels, minlength=len(snapped)).tolist()):
                if count:
                    nodes.append((start, start + count, int(snapped[j]), at))
                    depths.append(depths[at] + 1)
                    start += count
        at += 1

    def subtree(job: tuple[int, int]) -> tuple[int, Any]:
        node, depth = job
        begin, end, _, _ = nodes[node]
        rows = np.sort(order[begin:end]).astype(np.int64)
        part = take(rows)
        local = np.arange(len(rows))
        found = grow(part, local, k, leaf, factor, balanced, np.uint64(seed * 1_000_003 + begin + 1), depth)
        order[begin:end] = rows[local]
        return node, (found[0] + begin, found[1] + begin, rows[found[2]], found[3])

    begins = [np.array([x[0] for x in nodes])]
    ends = [np.array([x[1] for x in nodes])]
    centre = [np.array([x[2] for x in nodes])]
    parent = [np.array([x[3] for x in nodes])]
    total = len(nodes)
    with ThreadPoolExecutor(threads) as pool:
        for node, (low, high, middle, up) in pool.map(subtree, pending):
            # the subtree's root is the node itself; its other nodes are appended
            moved = np.where(up[1:] == 0, node, up[1:] + total - 1)
            begins.append(low[1:])
            ends.append(high[1:])
            centre.append(middle[1:])
            parent.append(moved)
            total += len(low) - 1
            done += int(high[0] - low[0])
            if progress is not None:
                progress(done / n)
    arrays = [np.concatenate(x).astype(np.int64) for x in (begins, ends, centre, parent)]
    if len(nodes) == 1 and n:
        arrays[2][0] = int(order[0])
    return Tree(order, *arrays)
