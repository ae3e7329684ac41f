"""What the members of a team (:mod:`hasten.nn.team`) do between two barriers of a step: products, norms, gates.

Each takes the member's number and how many there are, and does its own panels or rows. Nothing waits here: who calls
puts the barriers between.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from hasten.language.kernels_cpu import attend_pages, gate_row
from hasten.nn.bfloat import FAST, store
from hasten.nn.product.dispatch import gated_part, inputs_for, items_of, part, prepare_row
from hasten.nn.team import share_of

__all__ = [
    "DOWN",
    "GATE_UP",
    "OUT",
    "QKV",
    "attention",
    "gates",
    "in_parts",
    "multiply",
    "multiply_gated",
    "norms",
    "rows_for",
]

_intrinsic: Callable[[Callable[..., Any]], Any] = intrinsic  # a checker would count the context of a call
QKV, OUT, GATE_UP, DOWN = range(4)
"""Order of a layer's matrices in the table."""


@njit(cache=True, error_model="numpy")
def multiply(matrix: Any, x: Any, forms: Any, out: Any, me: int, size: int) -> None:
    """A member's panels of ``out = x @ W.T``; ``forms`` hold the rows as :func:`prepare_row` left them."""
    first, last = share_of(items_of(matrix, out.shape[0]), me, size)
    if last > first:
        part(matrix, inputs_for(x, forms), out, first, last)


@njit(cache=True, error_model="numpy")
def multiply_gated(matrix: Any, x: Any, forms: Any, gelu: bool, out: Any, me: int, size: int) -> None:
    """A member's part of ``out = act(gate) * up``, see :func:`hasten.nn.product.dispatch.gated_part`."""
    first, last = share_of(items_of(matrix, out.shape[0]) // 2, me, size)
    if last > first:
        gated_part(matrix, inputs_for(x, forms), gelu, out, first, last)


@njit(cache=True, fastmath=FAST, error_model="numpy")
def _add_norm_row(residual: Any, x: Any, add: bool, weight: Any, eps: float, out: Any) -> None:
    width = len(out)
    total = np.float32(0.0)
    if add:
        for i in range(width):
            value = residual[i] + x[i]
            residual[i] = value
            total += value * value
    else:
        for i in range(width):
            total += residual[i] * residual[i]
    factor = np.float32(1.0) / np.sqrt(total / np.float32(width) + np.float32(eps))
    for i in range(width):
        store(out, i, residual[i] * factor * weight[i])


@njit(cache=True, error_model="numpy")
def norms(
    residual: Any, x: Any, add: bool, weight: Any, eps: float, h: Any, matrix: Any, forms: Any, me: int, size: int
) -> None:
    """``residual += x``, its norm, and the norm in the form that ``matrix`` multiplies; a member's rows."""
    rows = residual.shape[0]
    first, last = share_of(rows, me, size)
    for row in range(first, last):
        _add_norm_row(residual[row], x[row], add, weight, eps, h[row])
        prepare_row(matrix, h[row], row, rows, forms)


@njit(cache=True, error_model="numpy")
def gates(x: Any, gelu: bool, inner: Any, matrix: Any, forms: Any, me: int, size: int) -> None:
    """``inner = act(gate) * up`` of a member's rows, and its form for ``matrix``."""
    rows = x.shape[0]
    first, last = share_of(rows, me, size)
    for row in range(first, last):
        gate_row(x[row], gelu, inner[row])
        prepare_row(matrix, inner[row], row, rows, forms)


@njit(cache=True, error_model="numpy")
def rows_for(x: Any, matrix: Any, forms: Any, me: int, size: int) -> None:
    """A member's rows of ``x`` in the form that ``matrix`` multiplies."""
    rows = x.shape[0]
    first, last = share_of(rows, me, size)
    for row in range(first, last):
        prepare_row(matrix, x[row], row, rows, forms)


@njit(cache=True, error_model="numpy")
def attention(
    query: Any, chunk_of: Any, places: Any, tables: Any, keys: Any, values: Any, scale: float, window: int, out: Any,
    cuts: Any, me: int, size: int,
) -> None:  # fmt: skip
    """Every so-manieth part of the rows, see :func:`hasten.language.kernels_cpu.attend_pages`."""
    for at in range(me, len(cuts) - 1, size):
        attend_pages(query, chunk_of, places, tables, keys, values, scale, window, out, cuts[at], cuts[at + 1])


@_intrinsic
def _call(typing: Any, code: Any, job: Any, first: Any, last: Any) -> Any:
    """Call the code at an address, see :mod:`kernels_tiles`."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kind = ir.FunctionType(ir.VoidType(), [ir.IntType(64)] * 3)
        builder.call(builder.inttoptr(arguments[0], kind.as_pointer()), arguments[1:])
        return context.get_dummy_value()

    return types.void(*[types.intp] * 4), generate


@njit(cache=True, error_model="numpy")
def in_parts(code: Any, job: Any, cuts: Any, me: int, size: int) -> None:
    """Every so-manieth part of a job for the compiled code at an address, see :mod:`kernels_tiles`."""
    for at in range(me, len(cuts) - 1, size):
        _call(code, job.ctypes.data, cuts[at], cuts[at + 1])
