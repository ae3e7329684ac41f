"""The vector instructions agree with numpy for every width, type and alignment."""

import numba
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hasten.retrieve.index.simd import address_of, dot1, dot4, load_f32, load_i64, prefetch, squared1, squared4, widen


@numba.njit(cache=True)
def both(rows, query, out):
    width = rows.shape[1]
    q, base, stride = address_of(query), address_of(rows), width * rows.itemsize
    prefetch(base)
    for r in range(rows.shape[0] - 3):
        a, b, c, d = base + r * stride, base + (r + 1) * stride, base + (r + 2) * stride, base + (r + 3) * stride
        four, dots = squared4(rows, q, a, b, c, d, width), dot4(rows, q, a, b, c, d, width)
        for t in range(4):
            out[0, r + t] = four[t]
            out[1, r + t] = dots[t]
    for r in range(rows.shape[0]):
        out[2, r] = squared1(rows, q, base + r * stride, width)
        out[3, r] = dot1(rows, q, base + r * stride, width)


@numba.njit(cache=True)
def widened(rows, out):
    for r in range(rows.shape[0]):
        widen(rows, address_of(rows) + r * rows.shape[1] * rows.itemsize, address_of(out[r]), rows.shape[1])


def draw(width, dtype, seed):
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(9, width)) * (40 if np.dtype(dtype).kind in "iu" else 1)
    rows = np.abs(rows) if dtype == np.uint8 else rows
    return rows.astype(dtype), rng.normal(size=width).astype(np.float32)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.uint8, np.int8])
@settings(max_examples=30, deadline=None)
@given(width=st.integers(1, 70), seed=st.integers(0, 100))
def test_distances_are_those_of_numpy(dtype, width, seed):
    rows, query = draw(width, dtype, seed)
    kernel = rows.view(np.uint16) if dtype == np.float16 else rows
    out = np.zeros((4, len(rows)), np.float32)
    both(kernel, query, out)
    exact = rows.astype(np.float64)
    squared, dots = ((exact - query) ** 2).sum(1), exact @ query.astype(np.float64)
    for row, wanted in zip(out, (squared, dots, squared, dots), strict=True):
        np.testing.assert_allclose(row, wanted, rtol=1e-5, atol=1e-3)


def test_whole_numbers_are_summed_exactly():
    rng = np.random.default_rng(0)
    rows = rng.integers(0, 256, (8, 128)).astype(np.uint8)
    query = rng.integers(0, 256, 128).astype(np.float32)
    out = np.zeros((4, 8), np.float32)
    both(rows, query, out)
    exact = ((rows.astype(np.int64) - query.astype(np.int64)) ** 2).sum(1)
    np.testing.assert_array_equal(out[0].astype(np.int64), exact)  # below 2^24 float32 counts every unit


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.uint8, np.int8])
@pytest.mark.parametrize("width", [1, 15, 16, 17, 40])
def test_widening_fills_whole_groups_with_zeros(dtype, width):
    rows, _ = draw(width, dtype, 1)
    out = np.full((len(rows), (width + 16) // 16 * 16), 7.0, np.float32)
    widened(rows.view(np.uint16) if dtype == np.float16 else rows, out)
    np.testing.assert_array_equal(out[:, :width], rows.astype(np.float32))
    assert (out[:, width : -(-width // 16) * 16] == 0).all()


def test_loads_need_no_alignment():
    raw = np.zeros(32, np.uint8)
    raw[3:7] = np.array([1.5], np.float32).view(np.uint8)
    raw[9:17] = np.array([-5], np.int64).view(np.uint8)

    @numba.njit
    def read(array):
        base = address_of(array)
        return load_f32(base + 3), load_i64(base + 9)

    assert read(raw) == (1.5, -5)


def test_a_type_without_distance_is_refused():
    with pytest.raises(TypeError, match="no distance"):
        both(np.zeros((8, 3), np.int64), np.zeros(3, np.float32), np.zeros((4, 8), np.float32))
