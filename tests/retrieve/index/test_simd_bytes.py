import numba
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hasten.retrieve.index import simd_bytes
from hasten.retrieve.index.simd import address_of
from hasten.retrieve.index.simd_bytes import bytes1, bytes4, centre, sift


@numba.njit
def _bytes(query, rows, width):
    at, size = address_of(rows), rows.shape[1]
    four = bytes4(address_of(query), at, at + size, at + 2 * size, at + 3 * size, width)
    return bytes1(address_of(query), at, width), four


@numba.njit
def _centre(query, head, out):
    return centre(address_of(query), address_of(head), address_of(out), query.shape[0])


@numba.njit
def _sift(block, query, steps, base, slope, limit):
    kind = numba.float32
    return sift(address_of(block), address_of(query), steps, kind(base), kind(slope), kind(limit), address_of(block))


@settings(max_examples=40, deadline=None)
@given(width=st.integers(1, 200), seed=st.integers(0, 1000))
def test_sums_of_squares_are_whole(width, seed):
    rng = np.random.default_rng(seed)
    rows = rng.integers(0, 256, (4, width), dtype=np.uint8)
    query = np.zeros((width + 32) // 32 * 32, np.int16)
    query[:width] = rng.integers(-300, 600, width)
    wanted = ((rows.astype(np.int64) - query[:width]) ** 2).sum(1)
    one, four = _bytes(query, rows, width)
    assert one == np.float32(wanted[0])
    assert list(four) == wanted.astype(np.float32).tolist()


@pytest.mark.parametrize("lanes", [16, 96, 112])
def test_a_residual_is_coded_with_its_error(lanes):
    rng = np.random.default_rng(lanes)
    query, head = rng.normal(size=(2, lanes)).astype(np.float32)
    out = np.zeros(lanes, np.int8)
    unit, error, total, length = _centre(query, head, out)
    gap = (query - head).astype(np.float64)
    assert unit == pytest.approx(np.abs(gap).max() / 127, rel=1e-5)
    assert error == pytest.approx(((gap - unit * out) ** 2).sum(), rel=1e-3)
    assert total == out.sum()
    assert length == pytest.approx((gap**2).sum(), rel=1e-5)
    assert _centre(query, query, out)[3] == 0
    assert not out.any()


@settings(max_examples=30, deadline=None)
@given(steps=st.integers(1, 40), seed=st.integers(0, 1000))
def test_sifting_is_a_comparison_of_sixteen_rows(steps, seed):
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 256, (steps, 16, 4), dtype=np.uint8)
    norms = (rng.random(16) * 1000).astype(np.float32)
    query = rng.integers(-127, 128, 4 * steps).astype(np.int8)
    block = np.concatenate([norms.view(np.uint8), codes.reshape(-1)])
    dots = np.einsum("sri,si->r", codes.astype(np.int64), query.reshape(steps, 4).astype(np.int64))
    value = norms + np.float32(5) - np.float32(0.01) * dots
    limit = float(np.sort(value)[6:8].mean())
    passed = _sift(block, query, steps, 5.0, 0.01, limit)
    sure = np.abs(value - limit) > 1e-3 * (1 + np.abs(value))
    bits = (passed >> np.arange(16)) & 1
    np.testing.assert_array_equal(bits[sure], (value <= limit)[sure])


def test_without_the_instructions_the_sums_are_the_same(monkeypatch):
    monkeypatch.setattr(simd_bytes, "_vnni", lambda: False)

    @numba.njit
    def both(query, rows, width, block, coded):
        kind = numba.float32
        mask = sift(address_of(block), address_of(coded), 3, kind(0), kind(-1), kind(100), address_of(block))
        return bytes1(address_of(query), address_of(rows), width), mask

    rng = np.random.default_rng(1)
    rows = rng.integers(0, 256, (1, 45), dtype=np.uint8)
    query = np.zeros(64, np.int16)
    query[:45] = rng.integers(0, 256, 45)
    codes = rng.integers(0, 256, (3, 16, 4), dtype=np.uint8)
    coded = rng.integers(-127, 128, 12).astype(np.int8)
    block = np.concatenate([np.zeros(64, np.uint8), codes.reshape(-1)])
    dots = np.einsum("sri,si->r", codes.astype(np.int64), coded.reshape(3, 4).astype(np.int64))
    value, mask = both(query, rows, 45, block, coded)
    assert value == ((rows[0].astype(np.int64) - query[:45]) ** 2).sum()
    assert mask == sum(1 << i for i in range(16) if dots[i] <= 100)
