"""Searches that look at everything, at single rows, or at all within a radius."""

from __future__ import annotations

import numba
import numpy as np

from hasten.retrieve.index.blocks import scan_delta, scan_list
from hasten.retrieve.index.graph import head_distance
from hasten.retrieve.index.kernel import hot
from hasten.retrieve.index.offer import alive, list_bytes, offer, row_value
from hasten.retrieve.index.plan import mapped_value
from hasten.retrieve.index.simd import address_of, load_f32, load_i64

__all__ = ["scan_all", "score_rows", "within"]


@hot
def scan_all(metric, query, const, head_state, lists, delta, best_d, best_r, k, dead, mask):
    """Offer every head, list and addition, in the order of the heads; returns how many rows the lists have."""
    heads, extra, _, _, head_row, _ = head_state
    addresses, counts, _, _ = lists
    width = heads.shape[1]
    row_bytes = width * heads.itemsize
    found = 0
    total = 0
    for h in range(heads.shape[0]):
        factor = extra[h] if metric == 1 else numba.float32(1.0)
        value = row_value(heads, metric, query, const, width, address_of(heads) + h * row_bytes, factor)
        if value < best_d[k - 1]:
            found = offer(best_d, best_r, found, k, value, head_row[h], dead, mask)
        if counts[h] > 0:
            found = scan_list(
                heads, metric, query, const, width, addresses[h], counts[h], best_d, best_r, found, k, dead, mask
            )
        total += counts[h]
        if delta[3].shape[0] > 0:
            found = scan_delta(metric, query, const, h, delta, best_d, best_r, found, k, mask)
    return total


@hot
def score_rows(sample, metric, query, const, addresses, factors, rows, k, best_d, best_r):
    """Offer single rows that lie at ``addresses``; the brute path of a narrow filter. Returns how many answers there
    are.
    """
    found = 0
    nothing = rows[:0].view(np.uint8)
    for t in range(rows.shape[0]):
        factor = load_f32(factors[t]) if metric == 1 else numba.float32(1.0)
        value = row_value(sample, metric, query, const, sample.shape[1], addresses[t], factor)
        if value < best_d[k - 1]:
            found = offer(best_d, best_r, found, k, value, rows[t], nothing, nothing)
    return found


@hot
def within(queries, consts, q, metric, head_state, lists, delta, dead, mask, radius, limit, out_d, out_r, seen):
    """Every live row whose squared mapped distance is at most ``limit``; returns (rows found, lists read).

    A list is skipped only if the triangle inequality excludes all of it, so nothing is missed. What does not fit into
    ``out_d`` and ``out_r`` is counted but not written; ``seen`` (rows / 8) is cleared scratch that drops repeated
    rows.
    """
    heads, extra, _, _, head_row, _ = head_state
    addresses, counts, radii, _ = lists
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
            value = row_value(heads, metric, query, const, width, address_of(heads) + h * row_bytes, 1.0)
        if mapped_value(metric, const, value) <= limit:
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
                value = row_value(heads, metric, query, const, width, start + r * row_bytes, factor)
                if mapped_value(metric, const, value) <= limit:
                    found = _take(out_d, out_r, found, value, load_i64(rows + 8 * r), dead, mask, seen)
        if has_delta:
            drows, dfactors, alive, first, entry_row, entry_next, base = delta
            entry = first[h]
            while entry >= 0:
                row = entry_row[entry]
                if alive[row]:
                    factor = dfactors[row] if metric == 1 else numba.float32(1.0)
                    value = row_value(drows, metric, query, const, width, address_of(drows) + row * row_bytes, factor)
                    if mapped_value(metric, const, value) <= limit:
                        found = _take(out_d, out_r, found, value, base + row, alive[:0], mask, seen)
                entry = entry_next[entry]
    return found, read


@hot
def _take(out_d, out_r, found, value, row, dead, mask, seen):
    if not alive(row, dead, mask) or (seen[row >> 3] >> (row & 7)) & 1:
        return found
    seen[row >> 3] |= numba.uint8(1 << (row & 7))
    if found < out_d.shape[0]:
        out_d[found] = value
        out_r[found] = row
    return found + 1
