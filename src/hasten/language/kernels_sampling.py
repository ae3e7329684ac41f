"""Top-k, top-p and min-p for whole batches on a CPU, without sorting the vocabulary.

A row's tokens are put into bins by the leading bits of their probability, which for positive numbers order as the
numbers do. Where the cut falls, and which token a draw meets, is found bin by bin; only the bins at those two places
are sorted. Invariant: the token is the one that a whole sort (by probability, then by id) would give, up to the
rounding of sums; it depends on its own row alone.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

__all__ = ["draw_cut"]

_SHIFT = 17
"""bits of a float32 that a bin leaves out: 64 bins to a factor of two"""
_BINS = 2048
_FEW = 64
"""so many tokens are sorted at once"""
_FLOORS = (2.0**-10, 2.0**-20, 0.0)
"""shares of the likeliest; tokens below one are looked at only if those above do not settle the cut"""


@njit(cache=True, nogil=True)
def draw_cut(
    probability: Any, bits: Any, top_k: Any, top_p: Any, min_p: Any, draws: Any, out: Any
) -> None:  # pragma: no cover
    """Draw one token for each row.

    probability (rows, vocab) float32, bits the same memory as int32; top_k (rows,) int64, vocab or more for none;
    top_p, min_p, draws (rows,) float64; tokens go to out (rows,) int64. Top-p cuts what top-k left, min-p what both
    left.
    """
    rows, vocab = probability.shape
    keys = np.empty(vocab, np.uint64)
    some = np.empty(vocab, np.uint64)
    counts = np.empty(_BINS, np.int64)
    weights = np.empty(_BINS, np.float64)
    for row in range(rows):
        values, codes = probability[row], bits[row]
        top = codes[0]
        best = 0
        for i in range(1, vocab):
            if codes[i] > top:
                top = codes[i]
                best = i
        peak = np.float64(values[best])
        k, p = top_k[row], top_p[row]
        n, mass = 0, 0.0
        for share in _FLOORS:
            floor = np.float32(peak * share)
            n, mass = 0, 0.0
            for i in range(vocab):
                if values[i] > floor:
                    keys[n] = (np.uint64(codes[i]) << np.uint64(32)) | np.uint64(0xFFFFFFFF - i)
                    n += 1
                    mass += values[i]
            if n >= k if k < vocab else mass > p * (1.0 + 1e-6):
                break
        if n == 0:
            out[row] = best
            continue
        few = n <= _FEW
        for b in range(_BINS):
            counts[b] = 0
            weights[b] = 0.0
            if few:
                break
        if few:  # everything is in one bin
            counts[0] = n
            weights[0] = mass
        else:
            for j in range(n):
                b = _bin(keys[j], top)
                counts[b] += 1
                weights[b] += _weight(keys[j], probability[row])
        bins = 1 if few else _BINS
        end, kept = bins - 1, counts[bins - 1]  # the last bin of the cut, and how many of its tokens are in it
        total = mass
        if k < n:
            end, kept, total = _first(k, keys, n, top, few, some, values, counts, weights)
        goal = p * (total if k < vocab else 1.0)
        if p < 1.0:
            before = 0.0
            for b in range(end + 1):
                if before + weights[b] >= goal or b == end:
                    m = _sorted(keys, n, top, b, few, some)
                    most = kept if b == end else counts[b]
                    taken = 0
                    while taken < most and (before < goal or (b == 0 and taken == 0)):
                        before += _weight(some[m - 1 - taken], values)
                        taken += 1
                    end, kept = b, taken
                    break
                before += weights[b]
            total = before
        if min_p[row] > 0.0:
            least = min_p[row] * peak
            likely, taken = 0, kept
            for j in range(n):
                if _weight(keys[j], values) >= least:
                    likely += 1
            for b in range(end):
                taken += counts[b]
            if likely < taken:
                end, kept, total = _first(max(1, likely), keys, n, top, few, some, values, counts, weights)
        goal = draws[row] * total
        running = 0.0
        token = best
        for b in range(end + 1):
            if running + weights[b] > goal or b == end:
                m = _sorted(keys, n, top, b, few, some)
                most = kept if b == end else counts[b]
                for j in range(most):
                    key = some[m - 1 - j]
                    running += _weight(key, values)
                    token = int(0xFFFFFFFF - (key & np.uint64(0xFFFFFFFF)))
                    if running > goal:
                        break
                if running > goal:
                    break
            else:
                running += weights[b]
                if counts[b]:
                    token = -1 - b  # rounding may leave no token beyond: then the last one of this bin
        if token < 0:
            _sorted(keys, n, top, -1 - token, few, some)
            token = int(0xFFFFFFFF - (some[0] & np.uint64(0xFFFFFFFF)))
        out[row] = token


@njit(cache=True, nogil=True, inline="always")
def _bin(key: Any, top: Any) -> Any:  # pragma: no cover
    return min((top - np.int64(key >> np.uint64(32))) >> _SHIFT, _BINS - 1)


@njit(cache=True, nogil=True, inline="always")
def _weight(key: Any, values: Any) -> Any:  # pragma: no cover
    return np.float64(values[np.int64(0xFFFFFFFF - (key & np.uint64(0xFFFFFFFF)))])


@njit(cache=True, nogil=True)
def _first(
    k: Any, keys: Any, n: Any, top: Any, whole: Any, some: Any, values: Any, counts: Any, weights: Any
) -> Any:  # pragma: no cover
    """The bin in which the first ``k`` tokens end, how many of that bin are among them, and their mass."""
    before, seen, b = 0.0, 0, 0
    while seen + counts[b] < k:
        seen += counts[b]
        before += weights[b]
        b += 1
    m = _sorted(keys, n, top, b, whole, some)
    for j in range(k - seen):
        before += _weight(some[m - 1 - j], values)
    return b, k - seen, before


@njit(cache=True, nogil=True)
def _sorted(keys: Any, n: Any, top: Any, b: Any, whole: Any, some: Any) -> Any:  # pragma: no cover
    """Put the keys of bin ``b`` into ``some``, ascending, and return how many there are."""
    m = 0
    for j in range(n):
        if whole or _bin(keys[j], top) == b:
            some[m] = keys[j]
            m += 1
    some[:m].sort()
    return m
