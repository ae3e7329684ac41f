"""All layers of a dense decoder in one call, for batches whose time is that of reading the weights.

With few rows a layer's arithmetic is over in microseconds, and a dozen calls from Python cost more than a small
model's whole step. Here the interpreter is left once per step: the layers are a table of addresses, each product is one
parallel region over its panels, and what lies between the products is done by the thread that is there (few rows) or by
rows. Every row is computed as if it were alone.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import njit, prange, types
from numba.extending import intrinsic

from hasten.language.kernels_cpu import attend_pages, copy_slots, gate_row, place_token
from hasten.nn.bfloat import FAST, bits_of_float, store
from hasten.nn.product.blocks import GROUP, PANEL
from hasten.nn.product.dispatch import (
    BF16,
    array_at,
    forms_for,
    gated_part,
    gates_in_place,
    inputs_for,
    part,
    prepare_row,
)
from hasten.nn.product.tiles import FEWEST

__all__ = ["GATE_UP", "DOWN", "OUT", "QKV", "run_stack"]

QKV, OUT, GATE_UP, DOWN = range(4)
"""Order of a layer's matrices in the table."""
_SERIAL = 3
"""Rows up to which the work between products is not worth a parallel region."""


@njit(cache=True, error_model="numpy")
def _items(matrix: Any, rows: Any) -> Any:
    return (matrix[1] + PANEL - 1) // PANEL * ((rows + GROUP - 1) // GROUP)


@njit(cache=True, parallel=True, error_model="numpy")
def _product(matrix: Any, inputs: Any, out: Any, threads: int) -> None:
    items = _items(matrix, out.shape[0])
    for thread in prange(threads):
        part(matrix, inputs, out, items * thread // threads, items * (thread + 1) // threads)


@njit(cache=True, parallel=True, error_model="numpy")
def _gated_product(matrix: Any, inputs: Any, gelu: bool, out: Any, threads: int) -> None:
    items = _items(matrix, out.shape[0]) // 2
    for thread in prange(threads):
        gated_part(matrix, inputs, gelu, out, items * thread // threads, items * (thread + 1) // threads)


@njit(cache=True)
def _multiply_gated(matrix: Any, x: Any, forms: Any, gelu: bool, out: Any, threads: int) -> None:
    _gated_product(matrix, inputs_for(x, forms), gelu, out, threads)


@njit(cache=True)
def _multiply(matrix: Any, x: Any, forms: Any, out: Any, threads: int) -> None:
    # whoever calls holds ``forms`` meanwhile; addresses alone would not keep them
    _product(matrix, inputs_for(x, forms), out, threads)


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


@njit(cache=True, parallel=True, error_model="numpy")
def _norms(residual: Any, x: Any, add: bool, weight: Any, eps: float, h: Any, matrix: Any, forms: Any) -> None:
    """``residual += x``, its norm, and the norm in the form that ``matrix`` multiplies."""
    rows = residual.shape[0]
    if rows <= _SERIAL:
        for row in range(rows):
            _add_norm_row(residual[row], x[row], add, weight, eps, h[row])
            prepare_row(matrix, h[row], row, rows, forms)
    else:
        for row in prange(rows):
            _add_norm_row(residual[row], x[row], add, weight, eps, h[row])
            prepare_row(matrix, h[row], row, rows, forms)


@njit(cache=True, parallel=True, error_model="numpy")
def _gates(x: Any, gelu: bool, inner: Any, matrix: Any, forms: Any) -> None:
    rows = x.shape[0]
    if rows <= _SERIAL:
        for row in range(rows):
            gate_row(x[row], gelu, inner[row])
            prepare_row(matrix, inner[row], row, rows, forms)
    else:
        for row in prange(rows):
            gate_row(x[row], gelu, inner[row])
            prepare_row(matrix, inner[row], row, rows, forms)


@njit(cache=True, parallel=True, error_model="numpy")
def _rows_for(x: Any, matrix: Any, forms: Any) -> None:
    rows = x.shape[0]
    if matrix[0] != BF16 or (matrix[7] != 0 and rows >= FEWEST):
        for row in prange(rows):
            prepare_row(matrix, x[row], row, rows, forms)


@njit(cache=True, parallel=True, error_model="numpy")
def _places(
    qkv: Any, positions: Any, places: Any, chunk_of: Any, tables: Any, cos: Any, sin: Any, keys: Any, values: Any,
    heads: int, normed: bool, q_norm: Any, k_norm: Any, eps: float, query: Any,
) -> None:  # fmt: skip
    rows = qkv.shape[0]
    if rows <= _SERIAL:
        for row in range(rows):
            place_token(qkv[row], positions[row], places[row], tables[chunk_of[row]], cos, sin, keys, values, heads,
                        normed, q_norm, k_norm, eps, query[row])  # fmt: skip
    else:
        for row in prange(rows):
            place_token(qkv[row], positions[row], places[row], tables[chunk_of[row]], cos, sin, keys, values, heads,
                        normed, q_norm, k_norm, eps, query[row])  # fmt: skip


@njit(cache=True, parallel=True, error_model="numpy")
def _attention(
    query: Any, chunk_of: Any, places: Any, tables: Any, keys: Any, values: Any, scale: float, window: int, out: Any,
    cuts: Any,
) -> None:  # fmt: skip
    if len(cuts) == 2:
        attend_pages(query, chunk_of, places, tables, keys, values, scale, window, out, cuts[0], cuts[1])
    else:
        for thread in prange(len(cuts) - 1):
            attend_pages(query, chunk_of, places, tables, keys, values, scale, window, out, cuts[thread],
                         cuts[thread + 1])  # fmt: skip


@intrinsic
def _call(typing: Any, code: Any, job: Any, first: Any, last: Any) -> Any:
    """Call the code at an address, see :mod:`kernels_tiles`."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kind = ir.FunctionType(ir.VoidType(), [ir.IntType(64)] * 3)
        builder.call(builder.inttoptr(arguments[0], kind.as_pointer()), arguments[1:])
        return context.get_dummy_value()

    return types.void(*[types.intp] * 4), generate


@njit(cache=True, parallel=True, error_model="numpy")
def _in_parts(code: Any, job: Any, cuts: Any) -> None:
    if len(cuts) == 2:
        _call(code, job.ctypes.data, cuts[0], cuts[1])
    else:
        for thread in prange(len(cuts) - 1):
            _call(code, job.ctypes.data, cuts[thread], cuts[thread + 1])


@njit(cache=True, error_model="numpy")
def run_stack(
    residual: Any, matrices: Any, norms: Any, head: Any, last_norm: Any, windows: Any, locals_: Any, cos: Any, sin: Any,
    local_cos: Any, local_sin: Any, keys: Any, values: Any, chunk_of: Any, positions: Any, places: Any, near: Any,
    tables: Any, copies: Any, kept: Any, shares: Any, cuts: Any, code: Any, items: Any, merges: Any, states: Any,
    wanted: Any, heads: int, normed: bool, scale: float, eps: float, gelu: bool, widest: int, threads: int, logits: Any,
) -> None:  # fmt: skip
    """One step; :class:`hasten.language.stack.Stack` prepares what it takes."""
    rows, hidden = residual.shape
    width = matrices[0, QKV, 1] // (heads + 2 * keys.shape[2])
    depth = matrices.shape[0]
    h = np.empty((rows, hidden), np.uint16)
    sums = np.empty((rows, hidden), np.float32)
    qkv = np.empty((rows, matrices[0, QKV, 1]), np.float32)
    query = np.empty((rows, heads, width), np.uint16)
    attended = np.empty((rows, heads * width), np.uint16)
    fused = gates_in_place(matrices[0, GATE_UP], rows)
    pair = np.empty((0 if fused else rows, matrices[0, GATE_UP, 1]), np.float32)
    inner = np.empty((rows, matrices[0, DOWN, 2]), np.uint16)
    forms = forms_for(rows, widest)
    job = np.array(
        [rows, heads, width, keys.shape[2], tables.shape[1], query.ctypes.data, places.ctypes.data, tables.ctypes.data,
         tables.shape[0], 0, 0, 0, attended.ctypes.data, items.ctypes.data, states.shape[0], states.shape[1] // 16,
         states.ctypes.data, np.int64(bits_of_float(np.float32(scale))), keys.shape[4] != width], np.int64,
    )  # fmt: skip
    joining = job.copy()
    joining[13] = merges.ctypes.data
    alone = job.copy()
    alone[6], alone[13] = near.ctypes.data, chunk_of.ctypes.data
    halves = min(threads, 1 + len(merges) // 4)
    ends = np.array([len(merges) * part // halves for part in range(halves + 1)], np.int64)
    for layer in range(depth):
        one = matrices[layer]
        _norms(residual, sums, layer > 0, array_at(norms[layer, 0], hidden), eps, h, one[QKV], forms)
        _multiply(one[QKV], h, forms, qkv, threads)
        q_norm, k_norm = array_at(norms[layer, 2], width), array_at(norms[layer, 3], width)
        if locals_[layer]:
            _places(qkv, positions, places, chunk_of, tables, local_cos, local_sin, keys[layer], values[layer], heads,
                    normed, q_norm, k_norm, eps, query)  # fmt: skip
        else:
            _places(qkv, positions, places, chunk_of, tables, cos, sin, keys[layer], values[layer], heads, normed,
                    q_norm, k_norm, eps, query)  # fmt: skip
        if len(copies):
            copy_slots(copies, keys[layer])
            copy_slots(copies, values[layer])
        if len(kept):
            kept[layer] = query
        if len(shares) and code[2] != 0:
            alone[9], alone[10], alone[11] = keys[layer].ctypes.data, values[layer].ctypes.data, windows[layer]
            _in_parts(code[2], alone, shares)
        elif len(shares):
            _attention(query, chunk_of, near, tables, keys[layer], values[layer], scale, windows[layer], attended,
                       shares)  # fmt: skip
        if code[0] != 0:
            job[9], job[10], job[11] = keys[layer].ctypes.data, values[layer].ctypes.data, windows[layer]
            _in_parts(code[0], job, cuts)
            if len(merges):
                _in_parts(code[1], joining, ends)
        _rows_for(attended, one[OUT], forms)
        _multiply(one[OUT], attended, forms, sums, threads)
        _norms(residual, sums, True, array_at(norms[layer, 1], hidden), eps, h, one[GATE_UP], forms)
        if fused:
            _multiply_gated(one[GATE_UP], h, forms, gelu, inner, threads)
            _rows_for(inner, one[DOWN], forms)
        else:
            _multiply(one[GATE_UP], h, forms, pair, threads)
            _gates(pair, gelu, inner, one[DOWN], forms)
        _multiply(one[DOWN], inner, forms, sums, threads)
    count = len(wanted)
    some, more = np.empty((count, hidden), np.float32), np.empty((count, hidden), np.float32)
    for row in range(count):
        some[row] = residual[wanted[row]]
        more[row] = sums[wanted[row]]
    final = np.empty((count, hidden), np.uint16)
    _norms(some, more, True, array_at(last_norm, hidden), eps, final, head, forms)
    _multiply(head, final, forms, logits, threads)


def threads() -> int:
    """Threads of a parallel region."""
    return int(numba.get_num_threads())
