"""A float32 matrix as three bfloat16 ones: nothing is lost."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hasten.spiking import pieces


def parts(packed: np.ndarray, inputs: int, outputs: int) -> np.ndarray:
    """(3, in, out) float32: the three matrices of a packed one."""
    plain = packed.transpose(0, 2, 1, 3).reshape(packed.shape[0] * 64, 3, -1)[:outputs, :, :inputs]
    return (plain.transpose(1, 2, 0).astype(np.uint32) << 16).view(np.float32)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 70), st.integers(1, 130), st.integers(0, 99), st.floats(-20, 20))
def test_the_pieces_are_the_number(inputs: int, outputs: int, seed: int, scale: float) -> None:
    weight = (np.random.default_rng(seed).standard_normal((inputs, outputs)) * 10.0**scale).astype(np.float32)
    small, middle, large = parts(pieces.pack(weight), inputs, outputs)
    assert np.array_equal((large + middle) + small, weight)
    assert np.all(np.abs(small) <= np.abs(middle) + np.float32(1e-37))


def test_a_product_is_as_exact_as_in_float32() -> None:
    if not pieces.available():
        pytest.skip("no matrix tiles here")
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((300, 100)).astype(np.float32)
    x = (rng.random((21, 300)) < 0.3).astype(np.float32)
    packed, lines, sums = pieces.pack(weight), pieces.room_for(300), np.zeros((32, 100), np.float32)
    for place, row in enumerate(x):
        pieces.fill_row(row, lines, place)
    pieces.rows_times(lines, 21, packed, 0, 2, sums)
    exact = x.astype(np.float64) @ weight.astype(np.float64)
    ours, theirs = np.abs(sums[:21] - exact).max(), np.abs(x @ weight - exact).max()
    assert ours <= max(2 * theirs, 1e-5)
    few = np.zeros((32, 100), np.float32)
    pieces.rows_times(lines, 3, packed, 0, 2, few)
    assert np.array_equal(few[:3], sums[:3])
