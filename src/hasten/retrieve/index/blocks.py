"""Scoring the rows of one list in place, or of the rows added since.

A list is one contiguous block, so the traffic is (rows) x (bytes per row), and the next 4 KiB are asked for while a row
is scored.
"""

from __future__ import annotations

import numba

from hasten.retrieve.index.kernel import hot
from hasten.retrieve.index.offer import offer, row_value
from hasten.retrieve.index.simd import address_of, dot1, dot4, load_f32, load_i64, prefetch, squared1, squared4
from hasten.retrieve.index.simd_bytes import bytes1, bytes4

__all__ = ["scan_delta", "scan_list", "scan_lists"]

NEXT = 4096
"""bytes that are asked for ahead of the row being scored"""


@hot
def scan_list(sample, metric, query, const, width, address, count, best_d, best_r, found, k, dead, mask):
    """Offer every row of one list; returns how many answers there are. Metric 3: bytes under a query of int16."""
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
        ahead = at + NEXT
        while ahead < at + NEXT + step:
            if ahead < end:
                prefetch(ahead)
            ahead += 64
        b, c, d = at + row_bytes, at + 2 * row_bytes, at + 3 * row_bytes
        if metric == 3:
            v0, v1, v2, v3 = bytes4(query, at, b, c, d, width)
        elif metric == 0:
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
                found = offer(best_d, best_r, found, k, v0, load_i64(rows + 8 * r), dead, mask)
                worst = best_d[k - 1]
            if v1 < worst:
                found = offer(best_d, best_r, found, k, v1, load_i64(rows + 8 * r + 8), dead, mask)
                worst = best_d[k - 1]
            if v2 < worst:
                found = offer(best_d, best_r, found, k, v2, load_i64(rows + 8 * r + 16), dead, mask)
                worst = best_d[k - 1]
            if v3 < worst:
                found = offer(best_d, best_r, found, k, v3, load_i64(rows + 8 * r + 24), dead, mask)
                worst = best_d[k - 1]
        r += 4
        at += step
    while r < count:
        if metric == 3:
            value = bytes1(query, at, width)
        elif metric == 0:
            value = squared1(sample, query, at, width)
        else:
            value = dot1(sample, query, at, width)
            value = const - two * value * load_f32(factors + 4 * r) if metric == 1 else -value
        if value < worst:
            found = offer(best_d, best_r, found, k, value, load_i64(rows + 8 * r), dead, mask)
            worst = best_d[k - 1]
        r += 1
        at += row_bytes
    return found


@hot
def scan_delta(metric, query, const, head, delta, best_d, best_r, found, k, mask):
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
            value = row_value(rows, metric, query, const, width, start + row * width * rows.itemsize, factor)
            if value < best_d[k - 1]:
                found = offer(best_d, best_r, found, k, value, base + row, nothing, mask)
        entry = entry_next[entry]
    return found


@hot
def scan_lists(sample, metric, query, const, addresses, counts, best_d, best_r, found, k, dead, mask):
    """Offer the lists at ``addresses`` (any memory) with ``counts`` rows each; returns how many answers there are."""
    for t in range(addresses.shape[0]):
        found = scan_list(
            sample, metric, query, const, sample.shape[1], addresses[t], counts[t], best_d, best_r, found, k, dead, mask
        )
    return found
