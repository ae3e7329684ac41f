"""Byte codes behind a list, so that a mapped search touches few of its rows.

With head ``h`` a row ``x`` of the mapped space is coded as ``x' = h + s (u - 128)``, ``u`` bytes and ``s`` one step for
the list; |x - x'| <= e. For a query ``q`` with residual r = q - h, coded as r' with step t, the codes give
``D² = |r|² + |x' - h|² - 2 <r', x' - h>``, and |q - x| is at least ``sqrt(D² - 2 |r - r'| |x' - h|) - e``. A row whose
bound is beyond the k-th answer is left alone, every other one is scored from its vector: the answers are those of a
search that scores all rows. Layout: 64 bytes (s, e, largest |x' - h|), then for every sixteen rows their |x' - h|²
and their codes, four dimensions by sixteen rows.
"""

from __future__ import annotations

import numba
import numpy as np
from numpy.typing import NDArray

from hasten.retrieve.index.graph import map_head
from hasten.retrieve.index.kernel import hot, njit
from hasten.retrieve.index.offer import alive, list_bytes, offer, row_value
from hasten.retrieve.index.simd import address_of, load_f32, load_i64, prefetch
from hasten.retrieve.index.simd_bytes import centre, sift
from hasten.retrieve.index.simd_pool import first_bit

__all__ = ["PICKS", "code_bytes", "encode", "score_picks", "sift_list", "span_of_codes", "touch_codes"]

HEADER = 64
PICKS = 64
"""rows that pass are scored once so many wait"""


@hot
def code_bytes(count, width):
    """Bytes of the codes of a list, of rows that are ``width`` wide in the mapped space."""
    return HEADER + (count + 15) // 16 * (64 + (width + 3) // 4 * 64) if count > 0 else 0


@njit
def _encode(rows, centres, begins, offsets, out):
    width = rows.shape[1]
    steps = (width + 3) // 4
    for j in range(begins.shape[0] - 1):
        first, last = begins[j], begins[j + 1]
        if first == last:
            continue
        at = offsets[j]
        largest = 0.0
        for r in range(first, last):
            for i in range(width):
                largest = max(largest, abs(np.float64(rows[r, i]) - centres[j, i]))
        step = np.float32(max(largest / 127.0, 2.0**-100))
        miss, length = 0.0, 0.0
        for r in range(first, last):
            lane = (r - first) % 16
            block = at + HEADER + (r - first) // 16 * (64 + 64 * steps)
            error, square = 0.0, 0.0
            for i in range(4 * steps):
                gap = np.float64(rows[r, i]) - centres[j, i] if i < width else 0.0
                code = min(max(np.rint(gap / step), -127.0), 127.0)
                error += (gap - code * step) ** 2
                square += (code * step) ** 2
                out[block + 64 + i // 4 * 64 + lane * 4 + i % 4] = np.uint8(code + 128.0)
            out[block + 4 * lane : block + 4 * lane + 4] = np.array([square], np.float32).view(np.uint8)
            miss, length = max(miss, error), max(length, square)
        head = np.array([step, np.sqrt(miss) * (1 + 1e-6), np.sqrt(length) * (1 + 1e-6)], np.float32)
        out[at : at + 12] = head.view(np.uint8)


def encode(
    rows: NDArray[np.float32],
    centres: NDArray[np.float32],
    begins: NDArray[np.int64],
    offsets: NDArray[np.int64],
    out: NDArray[np.uint8],
) -> None:
    """Write the codes of lists to ``out`` at ``offsets``: list ``j`` is ``rows[begins[j]:begins[j + 1]]``, mapped, with
    the head ``centres[j]``.
    """
    _encode(rows, centres, begins, offsets, out)


@hot
def _codes_of(address, count, row_bytes, metric):
    return (address + list_bytes(count, row_bytes, metric) + 63) & ~63


@hot
def span_of_codes(address, count, row_bytes, metric, width):
    """Where the codes of the list at ``address`` begin and end; at most 16 KiB of them."""
    start = _codes_of(address, count, row_bytes, metric)
    return start, start + min(16384, code_bytes(count, width))


@hot
def touch_codes(address, count, row_bytes, metric, width):
    """Ask for one line of each page of a list's codes: its translation is looked up while others are."""
    start = _codes_of(address, count, row_bytes, metric)
    end = start + min(16384, code_bytes(count, width))
    while start < end:
        prefetch(start)
        start = (start | 4095) + 1


@hot
def _bound(metric, const, worst, miss, slack):
    """What a coded squared distance may be at most for its row to come before the k-th answer."""
    value = const + numba.float32(2.0) * worst if metric == 2 else worst
    reach = np.sqrt(max(value, numba.float32(0.0))) + miss
    return reach * reach * numba.float32(1.000004) + slack


@hot
def score_picks(heads, metric, query, const, picks, begin, end, best_d, best_r, found, k, dead, mask):
    """Offer picked rows ``begin:end``; returns how many answers there are."""
    width = heads.shape[1]
    for t in range(begin, end):
        factor = load_f32(picks[t, 2]) if metric == 1 else numba.float32(1.0)
        value = row_value(heads, metric, query, const, width, picks[t, 0], factor)
        if value < best_d[k - 1]:
            found = offer(best_d, best_r, found, k, value, load_i64(picks[t, 1]), dead, mask)
    return found


@hot
def sift_list(
    head_state,
    metric,
    query,
    const,
    head,
    address,
    count,
    best_d,
    best_r,
    found,
    k,
    dead,
    mask,
    work,
    waiting,
    ahead,
    until,
):
    """Pick the rows of one coded list that may be near, behind the ``waiting`` ones picked before.

    The lines from ``ahead`` to ``until`` are asked for meanwhile. Returns (answers, rows that wait to be scored):
    picks are scored here only where there is no more room. ``work`` is
    (mapped head (lanes,) float32, coded query (lanes + 16,) int8, picks (PICKS + 16, 3) int64: the addresses of the
    row, of its number and of its factor).
    """
    centre_of, coded, picks = work
    heads = head_state[0]
    row_bytes = heads.shape[1] * heads.itemsize
    factors = (address + count * row_bytes + 3) & ~3
    rows = address + list_bytes(count, row_bytes, metric) - 8 * count
    at = _codes_of(address, count, row_bytes, metric)
    space = map_head(heads, head_state[1], metric, head, centre_of)
    unit, square, total, length = centre(query, address_of(centre_of), address_of(coded), centre_of.shape[0])
    step, miss, far = load_f32(at), load_f32(at + 4), load_f32(at + 8)
    slope = numba.float32(2.0) * step * unit
    base = length + numba.float32(128.0) * slope * total
    spread = numba.float32(4.0) * numba.float32(np.sqrt(space)) * far * np.sqrt(length)
    slack = numba.float32(2.0) * np.sqrt(square) * far  # the query's own coding, then rounding
    slack += numba.float32(1e-6) * (length + far * far + spread + numba.float32(2.0) * const)
    limit = _bound(metric, const, best_d[k - 1], miss, slack)
    steps = (space + 3) >> 2
    screened = dead.shape[0] > 0 or mask.shape[0] > 0
    block = at + HEADER
    fresh = waiting
    for first in range(0, count, 16):
        passed = sift(block, address_of(coded), steps, base, slope, limit, ahead if ahead < until else block)
        block += 64 + 64 * steps
        ahead += 64 + 64 * steps
        if count - first < 16:
            passed &= (1 << (count - first)) - 1
        while passed != 0:
            r = first + first_bit(passed)
            passed &= passed - 1
            if screened and not alive(load_i64(rows + 8 * r), dead, mask):
                continue
            start = address + r * row_bytes
            picks[waiting, 0], picks[waiting, 1], picks[waiting, 2] = start, rows + 8 * r, factors + 4 * r
            waiting += 1
            prefetch(start)  # the other lines when its page is known
        if waiting >= PICKS:
            found = score_picks(heads, metric, query, const, picks, 0, waiting, best_d, best_r, found, k, dead, mask)
            waiting = 0
            fresh = 0
            limit = _bound(metric, const, best_d[k - 1], miss, slack)
    while ahead < until:
        prefetch(ahead)
        ahead += 64
    for t in range(fresh, waiting):
        prefetch(picks[t, 1])
        for line in range(64, row_bytes + 63, 64):
            prefetch(picks[t, 0] + line)
    return found, waiting
