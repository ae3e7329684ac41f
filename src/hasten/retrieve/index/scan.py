"""The hot path of a search: walk the heads, prune the lists, score them in place, keep the best k.

One call scores a batch of queries without the GIL, straight out of the memory map: a list is one contiguous block, so
the traffic per query is (lists) x (rows per list) x (bytes per row), and the next 4 KiB are asked for while a block
is scored. Candidates carry row numbers; a row in several lists is offered once. Nothing here allocates per list.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

from hasten.retrieve.index.graph import head_distance, walk
from hasten.retrieve.index.simd import (
    address_of,
    dot1,
    dot4,
    load_f32,
    load_i64,
    prefetch,
    squared1,
    squared4,
)

__all__ = [
    "CANDIDATES",
    "CHECKS",
    "LISTS",
    "PAGES",
    "RUNS",
    "list_bytes",
    "scan_lists",
    "score_rows",
    "search",
    "within",
]

PAGE = 4096
AHEAD = 4096
"""bytes that are asked for ahead of the row being scored"""
LISTS, PAGES, RUNS, CHECKS, CANDIDATES = range(5)
"""columns of the statistics: lists kept, pages they fill, contiguous reads, head distances, rows scored"""

njit = numba.njit(nogil=True, cache=True)
_inline = njit


@njit
def list_bytes(count, row_bytes, metric):
    """Bytes of one list: rows, factors (cosine only), padding to 8, row numbers."""
    size = count * row_bytes
    if metric == 1:
        size = ((size + 3) & ~3) + 4 * count
    return ((size + 7) & ~7) + 8 * count


@_inline
def _bit(bits, row):
    return (bits[row >> 3] >> (row & 7)) & 1


@njit
def _offer(best_d, best_r, found, k, value, row, dead, mask):
    """Take a candidate that is nearer than the k-th into the sorted answer; returns how many there are."""
    if dead.shape[0] > 0 and (row >> 3) < dead.shape[0] and _bit(dead, row):
        return found
    if mask.shape[0] > 0 and ((row >> 3) >= mask.shape[0] or not _bit(mask, row)):
        return found
    for t in range(found):
        if best_r[t] == row:
            return found
    place = found if found < k else k - 1
    if found < k:
        found += 1
    while place > 0 and best_d[place - 1] > value:
        best_d[place] = best_d[place - 1]
        best_r[place] = best_r[place - 1]
        place -= 1
    best_d[place] = value
    best_r[place] = row
    return found


@njit
def _scan_list(sample, metric, query, const, width, address, count, best_d, best_r, found, k, dead, mask):
    """Offer every row of one list; returns how many answers there are."""
    row_bytes = width * sample.itemsize
    factors = address + count * row_bytes
    rows = factors
    if metric == 1:
        factors = (factors + 3) & ~3
        rows = factors + 4 * count
    rows = (rows + 7) & ~7
    end = rows + 8 * count
    two = numba.float32(2.0)
    worst = best_d[k - 1]
    step = 4 * row_bytes
    r = 0
    at = address
    while r + 4 <= count:
        ahead = at + AHEAD
        while ahead < at + AHEAD + step:
            if ahead < end:
                prefetch(ahead)
            ahead += 64
        b, c, d = at + row_bytes, at + 2 * row_bytes, at + 3 * row_bytes
        if metric == 0:
            v0, v1, v2, v3 = squared4(sample, query, at, b, c, d, width)
        else:
            v0, v1, v2, v3 = dot4(sample, query, at, b, c, d, width)
            if metric == 1:
                v0 = const - two * v0 * load_f32(factors + 4 * r)
                v1 = const - two * v1 * load_f32(factors + 4 * r + 4)
                v2 = const - two * v2 * load_f32(factors + 4 * r + 8)
                v3 = const - two * v3 * load_f32(factors + 4 * r + 12)
            else:
                v0, v1, v2, v3 = -v0, -v1, -v2, -v3
        if min(min(v0, v1), min(v2, v3)) < worst:
            if v0 < worst:
                found = _offer(best_d, best_r, found, k, v0, load_i64(rows + 8 * r), dead, mask)
                worst = best_d[k - 1]
            if v1 < worst:
                found = _offer(best_d, best_r, found, k, v1, load_i64(rows + 8 * r + 8), dead, mask)
                worst = best_d[k - 1]
            if v2 < worst:
                found = _offer(best_d, best_r, found, k, v2, load_i64(rows + 8 * r + 16), dead, mask)
                worst = best_d[k - 1]
            if v3 < worst:
                found = _offer(best_d, best_r, found, k, v3, load_i64(rows + 8 * r + 24), dead, mask)
                worst = best_d[k - 1]
        r += 4
        at += step
    while r < count:
        if metric == 0:
            value = squared1(sample, query, at, width)
        else:
            value = dot1(sample, query, at, width)
            value = const - two * value * load_f32(factors + 4 * r) if metric == 1 else -value
        if value < worst:
            found = _offer(best_d, best_r, found, k, value, load_i64(rows + 8 * r), dead, mask)
            worst = best_d[k - 1]
        r += 1
        at += row_bytes
    return found


@njit
def _row_value(sample, metric, query, const, width, address, factor):
    """Value of one row: squared distance, 2 - 2 cos, or minus the inner product."""
    if metric == 0:
        return squared1(sample, query, address, width)
    dot = dot1(sample, query, address, width)
    if metric == 1:
        return const - numba.float32(2.0) * dot * factor
    return -dot


@njit
def _scan_delta(metric, query, const, head, delta, best_d, best_r, found, k, mask):
    """Offer the rows added since the last compaction that belong to ``head``."""
    rows, factors, alive, first, entry_row, entry_next, base = delta
    width = rows.shape[1]
    nothing = alive[:0]
    start = address_of(rows)
    entry = first[head]
    while entry >= 0:
        row = entry_row[entry]
        if alive[row]:
            factor = factors[row] if metric == 1 else numba.float32(1.0)
            value = _row_value(rows, metric, query, const, width, start + row * width * rows.itemsize, factor)
            if value < best_d[k - 1]:
                found = _offer(best_d, best_r, found, k, value, base + row, nothing, mask)
        entry = entry_next[entry]
    return found


@njit
def _offer_heads(head_state, metric, query, const, pool_i, size, best_d, best_r, found, k, dead, mask):
    """The heads that the walk met are rows too."""
    heads, extra, head_row = head_state[0], head_state[1], head_state[4]
    width = heads.shape[1]
    base = address_of(heads)
    for t in range(size):
        h = pool_i[t]
        factor = extra[h] if metric == 1 else numba.float32(1.0)
        value = _row_value(heads, metric, query, const, width, base + h * width * heads.itemsize, factor)
        if value < best_d[k - 1]:
            found = _offer(best_d, best_r, found, k, value, head_row[h], dead, mask)
    return found


@njit
def _mapped(metric, const, value):
    """A candidate's value as a squared distance of the mapped space."""
    return const + numba.float32(2.0) * value if metric == 2 else value


@njit
def _plan(head_state, lists, metric, query, const, knobs, scratch):
    """The lists that one query reads, nearest head first: fills ``scratch``'s pool; returns (found, kept, checks).

    ``knobs`` is (lists, ratio, floor, beam, max_check, radius rule) with ``ratio`` = (1 + epsilon)²: list ``j`` is
    kept iff d²(q, c_j) <= ratio * max(d²(q, c_1), floor).
    """
    heads, extra, graph, seeds, head_row = head_state
    counts = lists[1]
    limit, ratio, floor, beam, max_check, _ = knobs
    stamps, epoch, pool_d, pool_i, order = scratch
    found, checks = walk(
        heads,
        extra,
        graph,
        seeds,
        metric,
        query,
        const,
        numba.float32(0.0),
        int(beam),
        int(max_check),
        stamps,
        epoch,
        pool_d,
        pool_i,
    )
    kept = 0
    if found:
        reach = numba.float32(ratio) * max(pool_d[0], numba.float32(floor))
        for t in range(found):
            if kept == limit or pool_d[t] > reach:
                break
            if counts[pool_i[t]] > 0:
                order[kept] = t
                kept += 1
    return found, kept, checks


@njit
def _runs(lists, metric, row_bytes, pool_i, order, kept, work):
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


@njit
def scan_lists(sample, metric, query, const, addresses, counts, best_d, best_r, found, k, dead, mask):
    """Offer the lists at ``addresses`` (any memory) with ``counts`` rows each; returns how many answers there are."""
    for t in range(addresses.shape[0]):
        found = _scan_list(
            sample, metric, query, const, sample.shape[1], addresses[t], counts[t], best_d, best_r, found, k, dead, mask
        )
    return found


@njit
def _scan_all(metric, query, const, head_state, lists, delta, best_d, best_r, k, dead, mask):
    """Offer every head, list and addition, in the order of the heads; returns how many rows the lists have."""
    heads, extra, _, _, head_row = head_state
    addresses, counts, _ = lists
    width = heads.shape[1]
    row_bytes = width * heads.itemsize
    found = 0
    total = 0
    for h in range(heads.shape[0]):
        factor = extra[h] if metric == 1 else numba.float32(1.0)
        value = _row_value(heads, metric, query, const, width, address_of(heads) + h * row_bytes, factor)
        if value < best_d[k - 1]:
            found = _offer(best_d, best_r, found, k, value, head_row[h], dead, mask)
        if counts[h] > 0:
            found = _scan_list(
                heads, metric, query, const, width, addresses[h], counts[h], best_d, best_r, found, k, dead, mask
            )
        total += counts[h]
        if delta[3].shape[0] > 0:
            found = _scan_delta(metric, query, const, h, delta, best_d, best_r, found, k, mask)
    return total


@njit
def search(
    queries,
    consts,
    metric,
    head_state,
    lists,
    delta,
    dead,
    mask,
    knobs,
    filtered,
    k,
    scratch,
    out_d,
    out_r,
    stats,
    detail,
):
    """Search a batch: queries (count, lanes) float32 -> values ``out_d`` and rows ``out_r`` (count, k), ascending.

    ``lists`` is (addresses, counts, radii). A negative number of lists scores everything. ``filtered`` lists are read
    at most under a ``mask``. ``stats`` (count, 5) int64. ``detail`` also counts pages and reads. Slots without an
    answer hold inf and -1.
    """
    heads = head_state[0]
    addresses, counts, radii = lists
    stamps, epoch, pool_d, pool_i, order = scratch
    width = heads.shape[1]
    row_bytes = width * heads.itemsize
    has_delta = delta[3].shape[0] > 0
    limit = knobs[0]
    work = np.empty((max(order.shape[0], 1) if detail else 1, 2), np.int64)
    for q in range(queries.shape[0]):
        query = address_of(queries[q])
        const = consts[q]
        best_d, best_r = out_d[q], out_r[q]
        best_d[:] = np.inf
        best_r[:] = -1
        found = 0
        if limit < 0:
            total = _scan_all(metric, query, const, head_state, lists, delta, best_d, best_r, k, dead, mask)
            stats[q, LISTS], stats[q, CHECKS], stats[q, CANDIDATES] = heads.shape[0], heads.shape[0], total
            continue
        size, kept, checks = _plan(head_state, lists, metric, query, const, knobs, scratch)
        if kept:  # the first block comes while the heads are offered
            first = addresses[pool_i[order[0]]]
            for line in range(0, 2048, 64):
                prefetch(first + line)
        found = _offer_heads(head_state, metric, query, const, pool_i, size, best_d, best_r, found, k, dead, mask)
        candidates = 0
        read = 0
        if mask.shape[0] > 0:
            stretch = numba.float32(knobs[1])
            for t in range(size):
                h = pool_i[t]
                if read >= filtered:
                    break
                if (
                    read >= limit
                    and found == k
                    and pool_d[t] > stretch * max(_mapped(metric, const, best_d[k - 1]), 0.0)
                ):
                    break
                if counts[h] > 0:
                    order[read] = t
                    read += 1
                    candidates += counts[h]
                    found = _scan_list(
                        heads,
                        metric,
                        query,
                        const,
                        width,
                        addresses[h],
                        counts[h],
                        best_d,
                        best_r,
                        found,
                        k,
                        dead,
                        mask,
                    )
                if has_delta:
                    found = _scan_delta(metric, query, const, h, delta, best_d, best_r, found, k, mask)
        else:
            for t in range(kept):
                h = pool_i[order[t]]
                if t + 1 < kept:
                    nearby = addresses[pool_i[order[t + 1]]]
                    for line in range(0, 4096, 64):
                        prefetch(nearby + line)
                if knobs[5] != 0 and found == k:
                    edge = np.sqrt(max(pool_d[order[t]], numba.float32(0.0))) - radii[h]
                    if edge > 0 and edge * edge > _mapped(metric, const, best_d[k - 1]):
                        continue
                order[read] = order[t]
                read += 1
                candidates += counts[h]
                found = _scan_list(
                    heads, metric, query, const, width, addresses[h], counts[h], best_d, best_r, found, k, dead, mask
                )
            if has_delta:
                for t in range(min(size, max(limit, 1))):
                    found = _scan_delta(metric, query, const, pool_i[t], delta, best_d, best_r, found, k, mask)
        stats[q, LISTS], stats[q, CHECKS], stats[q, CANDIDATES] = read, checks, candidates
        if detail:
            stats[q, PAGES], stats[q, RUNS] = _runs(lists, metric, row_bytes, pool_i, order, read, work)


@njit
def score_rows(sample, metric, query, const, addresses, factors, rows, k, best_d, best_r):
    """Offer single rows that lie at ``addresses``; the brute path of a narrow filter. Returns how many answers there
    are.
    """
    found = 0
    nothing = np.empty(0, np.uint8)
    for t in range(rows.shape[0]):
        factor = load_f32(factors[t]) if metric == 1 else numba.float32(1.0)
        value = _row_value(sample, metric, query, const, sample.shape[1], addresses[t], factor)
        if value < best_d[k - 1]:
            found = _offer(best_d, best_r, found, k, value, rows[t], nothing, nothing)
    return found


@njit
def within(queries, consts, q, metric, head_state, lists, delta, dead, mask, radius, limit, out_d, out_r, seen):
    """Every live row whose squared mapped distance is at most ``limit``; returns (rows found, lists read).

    A list is skipped only if the triangle inequality excludes all of it, so nothing is missed. What does not fit into
    ``out_d`` and ``out_r`` is counted but not written; ``seen`` (rows / 8) is cleared scratch that drops repeated
    rows.
    """
    heads, extra, _, _, head_row = head_state
    addresses, counts, radii = lists
    width = heads.shape[1]
    row_bytes = width * heads.itemsize
    query = address_of(queries[q])
    const = consts[q]
    found = 0
    read = 0
    has_delta = delta[3].shape[0] > 0
    for h in range(heads.shape[0]):
        near = head_distance(heads, extra, metric, query, const, numba.float32(0.0), h)
        value = near
        if metric == 2:
            value = _row_value(heads, metric, query, const, width, address_of(heads) + h * row_bytes, 1.0)
        if _mapped(metric, const, value) <= limit:
            found = _take(out_d, out_r, found, value, head_row[h], dead, mask, seen)
        slack = numba.float32(1e-3) * (radii[h] + radius)
        if counts[h] > 0 and np.sqrt(max(near, numba.float32(0.0))) - radii[h] <= radius + slack:
            read += 1
            start = addresses[h]
            end = start + list_bytes(counts[h], row_bytes, metric)
            rows = end - 8 * counts[h]
            factors = (start + counts[h] * row_bytes + 3) & ~3
            for r in range(counts[h]):
                factor = load_f32(factors + 4 * r) if metric == 1 else numba.float32(1.0)
                value = _row_value(heads, metric, query, const, width, start + r * row_bytes, factor)
                if _mapped(metric, const, value) <= limit:
                    found = _take(out_d, out_r, found, value, load_i64(rows + 8 * r), dead, mask, seen)
        if has_delta:
            drows, dfactors, alive, first, entry_row, entry_next, base = delta
            entry = first[h]
            while entry >= 0:
                row = entry_row[entry]
                if alive[row]:
                    factor = dfactors[row] if metric == 1 else numba.float32(1.0)
                    value = _row_value(drows, metric, query, const, width, address_of(drows) + row * row_bytes, factor)
                    if _mapped(metric, const, value) <= limit:
                        found = _take(out_d, out_r, found, value, base + row, alive[:0], mask, seen)
                entry = entry_next[entry]
    return found, read


@njit
def _take(out_d, out_r, found, value, row, dead, mask, seen):
    if dead.shape[0] > 0 and (row >> 3) < dead.shape[0] and _bit(dead, row):
        return found
    if mask.shape[0] > 0 and ((row >> 3) >= mask.shape[0] or not _bit(mask, row)):
        return found
    if _bit(seen, row):
        return found
    seen[row >> 3] |= numba.uint8(1 << (row & 7))
    if found < out_d.shape[0]:
        out_d[found] = value
        out_r[found] = row
    return found + 1


def scratch(num_heads: int, beam: int) -> tuple[Any, ...]:
    """What one thread needs to search: visited marks, their epoch, the pool and the order of the kept lists."""
    return (
        np.zeros(num_heads, np.uint16),
        np.zeros(1, np.int64),
        np.empty(max(beam, 1), np.float32),
        np.empty(max(beam, 1), np.int32),
        np.empty(max(beam, 1), np.int64),
    )
