"""The pool that takes a pair without a branch, against a sorted list."""

import numba
import numpy as np
import pytest

from hasten.retrieve.index.kernel import hot
from hasten.retrieve.index.simd import address_of
from hasten.retrieve.index.simd_pool import WIDE, first_bit, insert


@hot
def _insert_all(distances, items, values, numbers, places):
    for t in range(values.shape[0]):
        places[t] = insert(address_of(distances), address_of(items), distances.shape[0] // 16, values[t], numbers[t])


@hot
def _first(bits):
    return first_bit(numba.int64(bits))


@pytest.mark.parametrize("chunks", [1, 2, 5])
def test_the_pool_is_a_sorted_list(chunks):
    rng = np.random.default_rng(chunks)
    values = rng.integers(0, 60, 300).astype(np.float32)  # many are equal
    numbers = np.arange(300, dtype=np.int32)
    pool_d, pool_i = np.full(chunks * WIDE, np.inf, np.float32), np.full(chunks * WIDE, -1, np.int32)
    places = np.zeros(300, np.int64)
    _insert_all(pool_d, pool_i, values, numbers, places)
    order = np.argsort(values, kind="stable")[: chunks * WIDE]
    np.testing.assert_array_equal(pool_i, order)
    np.testing.assert_array_equal(pool_d, values[order])
    before = [int((values[:t] <= values[t]).sum()) for t in range(300)]
    np.testing.assert_array_equal(places, np.minimum(before, chunks * WIDE))


def test_the_first_bit():
    assert [_first(b) for b in (1, 6, 1 << 15, (1 << 15) | 8)] == [0, 1, 15, 3]
