"""Closure assignment: a row goes into several lists whose heads lie in different directions.

For a row ``x`` the nearest heads are taken in ascending order; head ``c_j`` is accepted if d(x, c_j) <= (1 + epsilon)
d(x, c_1) and, for every head ``c_a`` accepted before, factor * d(c_j, c_a) >= d(x, c_j) (the RNG rule). At most
``replicas`` are taken. A list that is too long drops its farthest rows, but never the last copy of a row.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

from hasten.retrieve.index.graph import head_distance, map_head
from hasten.retrieve.index.kernel import hot, njit
from hasten.retrieve.index.simd import address_of, squared1
from hasten.retrieve.index.walk import walk_many

__all__ = ["accept", "assign_rows", "cut_lists", "thin_copies"]


@hot
def accept(heads, extra, metric, candidates, distances, count, usable, reach, factor, rule, replicas, mapped, taken):
    """Closure rule over ``count`` sorted candidates; writes the places accepted to ``taken`` and returns how many.

    ``usable`` (heads,) uint8 marks the heads that may hold lists (empty: all). ``reach`` is (1 + epsilon)²,
    ``factor`` the RNG factor squared; ``rule`` False takes the nearest ones without the RNG rule. ``mapped``
    (replicas + 1, lanes) float32 is scratch.
    """
    size = 0
    limit = numba.float32(np.inf)
    for t in range(count):
        h = candidates[t]
        if usable.shape[0] > 0 and usable[h] == 0:
            continue
        if size == 0:
            limit = numba.float32(reach) * max(distances[t], numba.float32(1e-30))
        elif distances[t] > limit:
            break
        width = map_head(heads, extra, metric, h, mapped[size])
        own = address_of(mapped[size])
        good = True
        if rule:
            for a in range(size):
                if factor * squared1(mapped, own, address_of(mapped[a]), width) < distances[t]:
                    good = False
                    break
        if good:
            taken[size] = t
            size += 1
            if size == replicas:
                break
    return size


@njit
def _accept_many(heads, extra, metric, pool_d, pool_i, founds, usable, knobs, out_heads, out_d, sizes):
    """Closure over what the walks found."""
    candidates, _, reach, factor, rule, replicas = knobs
    mapped = np.zeros((replicas + 1, ((heads.shape[1] + 16) // 16) * 16), np.float32)
    taken = np.empty(replicas, np.int64)
    for i in range(pool_d.shape[0]):
        found = founds[i]
        if usable.shape[0] == 0:
            found = min(found, candidates)
        size = accept(
            heads,
            extra,
            metric,
            pool_i[i],
            pool_d[i],
            found,
            usable,
            reach,
            numba.float32(factor),
            rule,
            replicas,
            mapped,
            taken,
        )
        for t in range(size):
            out_heads[i, t] = pool_i[i, taken[t]]
            out_d[i, t] = pool_d[i, taken[t]]
        sizes[i] = size


@hot
def _scan_heads(queries, consts, augs, heads, extra, metric, out_d):
    """Distances to every head (queries, heads)."""
    for i in range(queries.shape[0]):
        for h in range(heads.shape[0]):
            out_d[i, h] = head_distance(heads, extra, metric, address_of(queries[i]), consts[i], augs[i], h)


def assign_rows(
    queries: Any,
    consts: Any,
    augs: Any,
    state: tuple[Any, ...],
    metric: int,
    usable: Any,
    knobs: tuple[Any, ...],
    linear: bool,
    state_of_walks: Any,
) -> tuple[NDArray[np.int32], NDArray[np.float32], NDArray[np.int32]]:
    """Lists of a block of rows: (heads, squared distances, how many of them count), (rows, replicas) and (rows,).

    ``queries`` (rows, lanes) float32 are the rows in the form that the distance takes, ``consts`` and ``augs``
    (rows,) belong to it; ``state`` is (heads, factors, graph, seeds). ``knobs`` is (candidates, beam, reach, factor,
    rule, replicas). ``linear`` looks at every head instead of walking. ``state_of_walks``
    is what one thread needs to walk (:func:`~hasten.retrieve.index.walk.marks`).
    """
    heads, extra, graph, seeds = state
    count, beam, replicas = len(queries), knobs[1], knobs[5]
    out_heads = np.empty((count, replicas), np.int32)
    out_d = np.empty((count, replicas), np.float32)
    sizes = np.zeros(count, np.int32)
    step = max(1, (1 << 22) // len(heads)) if linear else 4096
    for begin in range(0, count, step):
        cut = slice(begin, min(begin + step, count))
        size = cut.stop - begin
        if linear:
            distance = np.empty((size, len(heads)), np.float32)
            _scan_heads(queries[cut], consts[cut], augs[cut], heads, extra, metric, distance)
            pool_i = np.argsort(distance, axis=1, kind="stable").astype(np.int32)
            pool_d = np.take_along_axis(distance, pool_i, 1)
            found = np.full(size, len(heads))
        else:
            pool_d, pool_i = np.empty((size, beam), np.float32), np.empty((size, beam), np.int32)
            found = np.zeros(size, np.int64)
            walk_many(
                queries[cut],
                consts[cut],
                augs[cut],
                heads,
                extra,
                graph,
                seeds,
                metric,
                beam,
                1 << 30,
                state_of_walks,
                pool_d,
                pool_i,
                found,
                np.zeros(size, np.int64),
            )
        _accept_many(heads, extra, metric, pool_d, pool_i, found, usable, knobs, out_heads[cut], out_d[cut], sizes[cut])
    return out_heads, out_d, sizes


@hot
def thin_copies(heads, distances, sizes, lengths, most):
    """Closure that knows how long lists are: rows in order, each takes its two nearest lists and others that hold fewer
    than ``most`` rows.

    ``heads`` and ``distances`` (rows, replicas), of which ``sizes`` (rows,) count, are rewritten; ``lengths`` (heads,)
    goes on from block to block. The rows' order decides, so the result does not depend on blocks or threads.
    """
    for i in range(sizes.shape[0]):
        kept = 0
        for t in range(sizes[i]):
            h = heads[i, t]
            if t < 2 or lengths[h] < most:
                heads[i, kept], distances[i, kept] = h, distances[i, t]
                lengths[h] += 1
                kept += 1
        sizes[i] = kept


@hot
def cut_lists(begins, rows, limit, copies, keep):
    """Mark in ``keep`` what stays when every list holds at most ``limit`` rows; returns (dropped, kept beyond the
    limit).

    List ``j`` is ``rows[begins[j]:begins[j + 1]]``, nearest first. ``copies`` (rows of the collection,) uint8 counts
    the copies of a row and is lowered for each one dropped; the last copy always stays.
    """
    dropped = 0
    beyond = 0
    for j in range(begins.shape[0] - 1):
        size = begins[j + 1] - begins[j]
        for t in range(begins[j + 1] - 1, begins[j] - 1, -1):
            if size <= limit:
                break
            row = rows[t]
            if copies[row] > 1:
                copies[row] -= 1
                keep[t] = False
                dropped += 1
                size -= 1
        beyond += max(0, size - limit)
    return dropped, beyond
