"""The best k answers of one query, kept sorted, and the value of one row."""

from __future__ import annotations

import numba

from hasten.retrieve.index.kernel import hot
from hasten.retrieve.index.simd import dot1, squared1

__all__ = ["alive", "list_bytes", "offer", "row_value"]


@hot
def list_bytes(count, row_bytes, metric):
    """Bytes of one list: rows, factors (cosine only), padding to 8, row numbers. Its codes are not counted."""
    size = count * row_bytes
    if metric == 1:
        size = ((size + 3) & ~3) + 4 * count
    return ((size + 7) & ~7) + 8 * count


@hot
def alive(row, dead, mask):
    """Whether a row is not deleted and passes the filter; an empty bitmap says nothing."""
    if dead.shape[0] > 0 and (row >> 3) < dead.shape[0] and (dead[row >> 3] >> (row & 7)) & 1:
        return False
    return mask.shape[0] == 0 or ((row >> 3) < mask.shape[0] and (mask[row >> 3] >> (row & 7)) & 1 == 1)


@hot
def offer(best_d, best_r, found, k, value, row, dead, mask):
    """Take a candidate that is nearer than the k-th into the sorted answer; returns how many there are."""
    if not alive(row, dead, mask):
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


@hot
def row_value(sample, metric, query, const, width, address, factor):
    """Value of one row: squared distance, 2 - 2 cos, or minus the inner product."""
    if metric == 0:
        return squared1(sample, query, address, width)
    dot = dot1(sample, query, address, width)
    if metric == 1:
        return const - numba.float32(2.0) * dot * factor
    return -dot
