"""Rows of activations as signed bytes, a scale for each group of inputs, as the byte kernels want them.

``x = scale * q`` with ``q`` in -127 ... 127 and ``scale = max|x| / 127`` over the group. The kernels multiply unsigned
weights ``w + zero`` by ``q``; starting each sum at ``-zero * sum(q)`` makes the result that of ``w``.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from numba import njit, prange

from hasten.nn.bfloat import FAST, bits_of_float, float_of_bits, load

__all__ = ["quantise_row", "quantise_rows"]


@njit(cache=True, fastmath=FAST, error_model="numpy")
def quantise_row(line: Any, group: int, zero: int, q: Any, start: Any, scale: Any) -> None:
    """One row: line (in,), q (>= in,), start and scale (groups,); see :func:`quantise_rows`."""
    width = len(line)
    for number in range(len(scale)):
        low, high = number * group, min(number * group + group, width)
        # slices, since their indices are known not to be negative; whole numbers, since the largest float is searched
        # for one by one: without it the bits of floats are in the order of the floats
        part, target = line[low:high], q[low:high]
        largest = np.uint32(0)
        for i in range(len(part)):
            bits = np.uint32(bits_of_float(load(part[i])) & np.uint32(0x7FFFFFFF))
            largest = bits if bits > largest else largest
        top = float_of_bits(largest)
        inverse = np.float32(127.0) / top if top > 0 else np.float32(0.0)
        for i in range(len(part)):
            target[i] = np.int8(np.int32(np.rint(load(part[i]) * inverse)))
        total = np.int32(0)
        for i in range(len(target)):
            total += np.int32(target[i])
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
