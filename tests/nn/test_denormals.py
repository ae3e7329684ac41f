"""Small numbers are 0 while the switch is set, and what they were behind it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numba import njit

from hasten.nn.product import tiles
from hasten.nn.product.denormals import flush_small, keep_small


@njit
def _products(x: Any, y: Any, out: Any) -> None:
    out[0] = x[0] * y[0]
    before = flush_small()
    out[1] = x[1] * y[1]
    keep_small(before)
    out[2] = x[2] * y[2]


@pytest.mark.skipif(not tiles.granted(), reason="kernels that need it run on processors with matrix tiles only")
def test_small_numbers_are_zero_only_between_the_two() -> None:
    x, y, out = np.full(3, 1e-30, np.float32), np.full(3, 1e-10, np.float32), np.ones(3, np.float32)
    _products(x, y, out)
    assert out[1] == 0
    assert out[0] == out[2] == np.float32(1e-30) * np.float32(1e-10) > 0
