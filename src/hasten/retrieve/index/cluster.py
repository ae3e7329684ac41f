"""Balanced k-means of rows in memory: one split of the tree.

Row ``x`` goes to argmin_j |x - c_j|² + penalty * (members of j in the pass before), on a fresh sample per pass; then
one pass without the penalty. Sums are float64.
"""

from __future__ import annotations

import numba
import numpy as np

from hasten.retrieve.index.kernel import hot, njit
from hasten.retrieve.index.simd import address_of, squared1, squared4

__all__ = ["SAMPLE", "assign_all", "cluster", "workspace"]

SAMPLE = 1000
MAX_PASSES = 100
PATIENCE = 5


@hot
def _random(state):
    """xorshift64*: the next number of a stream kept in ``state`` (1,) uint64."""
    x = state[0]
    x ^= x >> numba.uint64(12)
    x ^= x << numba.uint64(25)
    x ^= x >> numba.uint64(27)
    state[0] = x
    return (x * numba.uint64(2685821657736338717)) >> numba.uint64(11)


@hot
def _nearest(rows, row, centres, k, price):
    """(place, squared distance) of the centre that is cheapest for a row, ``price`` (k,) being added to the
    distance."""
    width = rows.shape[1]
    query = address_of(rows) + row * width * 4
    base = address_of(centres)
    stride = centres.shape[1] * 4
    best, cost, distance = 0, numba.float32(np.inf), numba.float32(0.0)
    last = k - 1
    for j in range(0, k, 4):
        b, c, d = min(j + 1, last), min(j + 2, last), min(j + 3, last)
        v0, v1, v2, v3 = squared4(
            centres, query, base + j * stride, base + b * stride, base + c * stride, base + d * stride, width
        )
        if v0 + price[j] < cost:
            best, cost, distance = j, v0 + price[j], v0
        if v1 + price[b] < cost:
            best, cost, distance = b, v1 + price[b], v1
        if v2 + price[c] < cost:
            best, cost, distance = c, v2 + price[c], v2
        if v3 + price[d] < cost:
            best, cost, distance = d, v3 + price[d], v3
    return best, distance


@hot
def _shuffle_front(order, begin, end, count, state):
    """Bring a random sample of ``count`` to the front of ``order[begin:end]``."""
    for i in range(count):
        j = i + _random(state) % numba.uint64(end - begin - i)
        other = begin + numba.int64(j)
        order[begin + i], order[other] = order[other], order[begin + i]


@hot
def _pass(rows, order, begin, count, centres, k, price, labels, sums, counts, farthest):
    """Assign a sample; returns the summed squared distance. ``farthest`` (k, 2): distance and row of each cluster's
    farthest.
    """
    width = rows.shape[1]
    sums[:k] = 0.0
    counts[:k] = 0
    farthest[:k, 0] = -1.0
    total = 0.0
    for i in range(count):
        row = order[begin + i]
        j, distance = _nearest(rows, row, centres, k, price)
        labels[i] = j
        counts[j] += 1
        total += distance
        if distance > farthest[j, 0]:
            farthest[j, 0] = distance
            farthest[j, 1] = row
        for t in range(width):
            sums[j, t] += rows[row, t]
    return total


@njit
def cluster(rows, order, begin, end, k, factor, balanced, state, centres, work):
    """Balanced k-means of ``rows[order[begin:end]]`` into ``centres[:k]``; ``order`` may be shuffled inside the
    range.

    ``work`` is (labels, sums, counts, farthest, price, best centres). The penalty is ``factor`` times (max - mean
    distance in the largest cluster of the first assignment) / sample; ``balanced`` False is plain k-means. Returns
    (std / mean of the sizes, mean squared distance) of the sample without a penalty.
    """
    labels, sums, counts, farthest, price, best = work
    size = end - begin
    width = rows.shape[1]
    sample = min(SAMPLE, size)
    _shuffle_front(order, begin, end, sample, state)
    square = 0.0
    for i in range(sample):
        row = order[begin + i]
        for t in range(width):
            square += rows[row, t] * rows[row, t]
    square /= sample
    price[:k] = 0.0
    lowest = np.inf
    penalty = 0.0
    for _ in range(3):
        chosen = np.empty(k, np.int64)
        for j in range(k):  # distinct places of the sample, by a partial shuffle of it
            place = j + numba.int64(_random(state) % numba.uint64(sample - j))
            order[begin + j], order[begin + place] = order[begin + place], order[begin + j]
            chosen[j] = order[begin + j]
        for j in range(k):
            centres[j] = rows[chosen[j]]
        total = _pass(rows, order, begin, sample, centres, k, price, labels, sums, counts, farthest)
        if total < lowest:
            lowest = total
            best[:k] = centres[:k]
            largest = np.argmax(counts[:k])
            mean = 0.0
            for i in range(sample):
                if labels[i] == largest:
                    row = order[begin + i]
                    mean += squared1(rows, address_of(rows[row]), address_of(centres[largest]), width)
            mean /= max(counts[largest], 1)
            penalty = (farthest[largest, 0] - mean) / sample
    centres[:k] = best[:k]
    penalty = factor * max(penalty, 0.0) if balanced else 0.0
    lowest = np.inf
    stale = 0
    counts[:k] = 0
    for _ in range(MAX_PASSES):
        _shuffle_front(order, begin, end, sample, state)
        for j in range(k):
            price[j] = penalty * counts[j]
        total = _pass(rows, order, begin, sample, centres, k, price, labels, sums, counts, farthest)
        cost = total
        for j in range(k):
            cost += penalty * counts[j] * counts[j]
        if cost < lowest:
            lowest = cost
            stale = 0
            best[:k] = centres[:k]
        else:
            stale += 1
        shift = 0.0
        for j in range(k):
            if counts[j] == 0:
                crowded = np.argmax(counts[:k])
                row = numba.int64(farthest[crowded, 1])
                if farthest[crowded, 0] <= 0:
                    continue
                for t in range(width):
                    shift += (centres[j, t] - rows[row, t]) ** 2
                    centres[j, t] = rows[row, t]
                farthest[crowded, 0] = -1.0
                continue
            for t in range(width):
                moved = numba.float32(sums[j, t] / counts[j])
                shift += (centres[j, t] - moved) ** 2
                centres[j, t] = moved
        if shift < 1e-3 * 1e-3 * max(square, 1e-30) * k or stale >= PATIENCE:
            break
    centres[:k] = best[:k]
    price[:k] = 0.0
    total = _pass(rows, order, begin, sample, centres, k, price, labels, sums, counts, farthest)
    mean_square = 0.0
    for j in range(k):
        mean_square += (counts[j] - sample / k) ** 2
    return np.sqrt(mean_square / k) / (sample / k), total / sample


@njit
def assign_all(rows, order, begin, end, centres, k, labels):
    """Nearest centre of every row of the range, no penalty; and the row nearest to each centre (-1 for an empty
    one)."""
    nothing = np.zeros(k, np.float32)
    near = np.full(k, np.float32(np.inf))
    which = np.full(k, -1)
    for i in range(begin, end):
        j, distance = _nearest(rows, order[i], centres, k, nothing)
        labels[i - begin] = j
        if distance < near[j]:
            near[j] = distance
            which[j] = order[i]
    return which


@njit
def workspace(k, width, largest):
    return (
        np.empty(max(largest, SAMPLE), np.int32),
        np.empty((k, width), np.float64),
        np.zeros(k, np.int64),
        np.empty((k, 2), np.float64),
        np.zeros(k, np.float32),
        np.empty((k, width), np.float32),
    )
