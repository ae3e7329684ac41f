"""Rows of activations as signed bytes, a scale for each group of inputs, as the byte kernels want them.

``x = scale * q`` with ``q`` in -127 ... 127 and ``scale = max|x| / 127`` over the group. The kernels multiply unsigned
weights ``w + zero`` by ``q``; starting each sum at ``-zero * sum(q)`` makes the result that of ``w``.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from numba import njit, prange

from hasten.nn.bfloat import FAST, load

__all__ = ["quantise_row", "quantise_rows"]


@njit(cache=True, fastmath=FAST, error_model="numpy")
def quantise_row(line: Any, group: int, zero: int, q: Any, start: Any, scale: Any) -> None:
    """One row: line (in,), q (>= in,), start and scale (groups,); see :func:`quantise_rows`."""
    width = len(line)
    for number in range(len(scale)):
        low, high = number * group, min(number * group + group, width)
        top = np.float32(0.0)
        for i in range(low, high):
            top = max(top, abs(load(line[i])))
        inverse = np.float32(127.0) / top if top > 0 else np.float32(0.0)
        total = np.int32(0)
        for i in range(low, high):
            value = np.int32(np.rint(load(line[i]) * inverse))
            q[i] = value
            total += value
        start[number] = -zero * total
        scale[number] = top / np.float32(127.0)
    q[width:] = 0


@njit(cache=True, error_model="numpy")
def rows(x: Any, group: int, zero: int, q: Any, start: Any, scale: Any) -> None:
    """Every row of x (rows, in) uint16 or float32; q (rows, >= in) int8, start and scale (rows, groups)."""
    for row in range(len(x)):
        quantise_row(x[row], group, zero, q[row], start[row], scale[row])


@njit(cache=True, parallel=True, error_model="numpy")
def _parallel(x: Any, group: int, zero: int, q: Any, start: Any, scale: Any) -> None:
    for row in prange(len(x)):
        quantise_row(x[row], group, zero, q[row], start[row], scale[row])


def quantise_rows(x: Any, width: int, group: int, zero: int) -> tuple[Any, Any, Any]:
    """x (rows, in) bfloat16 as uint16, or float32 -> q (rows, width) int8, starts int32 and scales float32 (rows,
    groups); inputs from ``in`` to ``width`` are 0."""
    count, groups = x.shape[0], -(-width // group)
    q = np.empty((count, width), np.int8)
    start, scale = np.empty((count, groups), np.int32), np.empty((count, groups), np.float32)
    run = _parallel if x.size > 1 << 16 and numba.get_num_threads() > 1 else rows
    run(x, group, zero, q, start, scale)
    return q, start, scale
