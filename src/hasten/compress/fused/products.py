# mypy: disable-error-code="call-arg"
"""Rows of float32 times a packed matrix whose precision is a number known at run time."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from hasten.nn.bfloat import store
from hasten.nn.product import dispatch
from hasten.nn.product.float32 import multiply_rows

__all__ = ["FLOAT32", "describe_float32", "product"]

FLOAT32 = -1
"""Kind of a matrix in float32, beside those of :mod:`hasten.nn.product.dispatch`."""


def describe_float32(packed: Any, bias: Any, outs: int, ins: int) -> Any:
    """The numbers of a matrix of :func:`hasten.nn.product.float32.pack`, (fields,) int64. The arrays must outlive
    them."""
    return np.array(
        [FLOAT32, outs, ins, packed.ctypes.data, 0, 0 if bias is None else bias.ctypes.data, 0, 0], np.int64
    )


@njit(cache=True, error_model="numpy")
def product(
    matrix: Any, x: Any, start: Any, step: Any, rows: Any, words: Any, forms: Any, sums: Any, out: Any
) -> None:  # fmt: skip
    """``out = x @ W.T + bias``; x is flat float32, its rows begin at ``start`` and lie ``step`` numbers apart.

    matrix (fields,) int64 of :func:`hasten.nn.product.dispatch.describe`, or one of kind :data:`FLOAT32`; ``words``,
    ``forms`` and sums (rows * 64,) are room; out (rows, out) float32, contiguous.
    """
    ins, outs = matrix[2], matrix[1]
    if matrix[0] == FLOAT32:
        bias = dispatch.array_at(matrix[5], outs)
        multiply_rows(x.ctypes.data + start * 4, step * 4, rows, ins, matrix[3], bias, sums, out)
        return
    lines = words[: rows * ins].reshape(rows, ins)
    for row in range(rows):
        line = x[start + row * step : start + row * step + ins]
        if matrix[0] == dispatch.BF16:
            target = lines[row]
            for i in range(ins):
                store(target, i, line[i])
        else:
            dispatch.prepare_row(matrix, line, row, rows, forms)
    dispatch.part(matrix, dispatch.inputs_for(lines, forms), out, 0, dispatch.items_of(matrix, rows))
