# mypy: disable-error-code="call-arg, var-annotated"
"""The loop that runs a fused network: one call for some samples, without Python's lock.

Every value lies in one arena of float32; an operation is a row of a table of whole numbers (:mod:`program` writes
them). What takes lines takes them as they lie, or gathers them first where their numbers lie apart.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from hasten.compress.fused.adaptive import adapt
from hasten.compress.fused.attention import attend
from hasten.compress.fused.lines import binary, norms, pair, reduce, softmaxes, unary
from hasten.compress.fused.products import product
from hasten.nn.bfloat import FAST
from hasten.nn.product import dispatch
from hasten.nn.product.denormals import flush_small, keep_small

__all__ = [
    "ADAPTIVE",
    "ATTENTION",
    "BINARY",
    "COLUMNS",
    "LOOKUP",
    "MATMUL",
    "NORM",
    "PRODUCT",
    "REDUCE",
    "SOFTMAX",
    "UNARY",
    "run_samples",
]

UNARY, BINARY, PRODUCT, NORM, REDUCE, SOFTMAX, ATTENTION, MATMUL, ADAPTIVE, LOOKUP = range(10)
COLUMNS = 48
"""0 kind, 1 code, 2 flag, 3 matrix, 4 the address of a look-up's lines, 5 to 9 sizes, then for the result and up to
four sources the start and five strides: 10, 16, 22, 28, 34; 40 the sixth size of an attention."""
_FEW = 64
"""Numbers of a line below which they are taken one by one."""
_SIZES, _OUT, _A, _B, _C, _D, _SHARED = 5, 10, 16, 22, 28, 34, 40


@njit(cache=True, error_model="numpy")
def _line(arena: Any, start: Any, stride: Any, count: Any, room: Any) -> Any:
    """``count`` numbers ``stride`` apart: as they lie, or gathered in ``room``."""
    if stride == 1:
        return arena[start : start + count]
    line = room[:count]
    for i in range(count):
        line[i] = arena[start + i * stride]
    return line


@njit(cache=True, error_model="numpy")
def _place(op: Any, at: int, i: Any, j: Any, k: Any, m: Any) -> Any:
    return op[at] + i * op[at + 1] + j * op[at + 2] + k * op[at + 3] + m * op[at + 4]


@njit(cache=True, fastmath=FAST, error_model="numpy")
def _elements(op: Any, arena: Any, room: Any) -> None:
    """A function of one or two arrays, line by line."""
    count, wide = op[_SIZES + 4], len(room) // 4
    step_out, step_a, step_b = op[_OUT + 5], op[_A + 5], op[_B + 5]
    few = count < _FEW or step_out != 1
    for i in range(op[_SIZES]):
        for j in range(op[_SIZES + 1]):
            for k in range(op[_SIZES + 2]):
                for m in range(op[_SIZES + 3]):
                    at, first = _place(op, _OUT, i, j, k, m), _place(op, _A, i, j, k, m)
                    second = _place(op, _B, i, j, k, m)
                    if few and (op[0] == BINARY or op[1] == 0):
                        for n in range(count):
                            x = arena[first + n * step_a]
                            if op[0] == BINARY:
                                x = pair(op[1], x, arena[second + n * step_b])
                            arena[at + n * step_out] = x
                        continue
                    out = room[:count] if step_out != 1 else arena[at : at + count]
                    a = _line(arena, first, step_a, count, room[wide : 2 * wide])
                    if op[0] == UNARY:
                        unary(op[1], a, out)
                    else:
                        b = _line(arena, second, step_b, count, room[2 * wide : 3 * wide])
                        binary(op[1], a, b, out)
                    if step_out != 1:
                        for n in range(count):
                            arena[at + n * step_out] = out[n]


@njit(cache=True, fastmath=FAST, error_model="numpy")
def _sums(op: Any, arena: Any, number: Any, room: Any) -> None:
    """Sums (times ``number``) or largest numbers over the last two sizes."""
    count = op[_SIZES + 4]
    for i in range(op[_SIZES]):
        for j in range(op[_SIZES + 1]):
            for k in range(op[_SIZES + 2]):
                total = np.float32(0) if op[1] == 0 else np.float32(-np.inf)
                for m in range(op[_SIZES + 3]):
                    part = reduce(op[1], _line(arena, _place(op, _A, i, j, k, m), op[_A + 5], count, room))
                    total = total + part if op[1] == 0 else max(total, part)
                arena[_place(op, _OUT, i, j, k, 0)] = total * number


@njit(cache=True, error_model="numpy")
def _rows(op: Any, arena: Any, number: Any) -> None:
    """Norms and softmax of (rows, n), which lie in order."""
    rows, count = op[_SIZES], op[_SIZES + 1]
    x = arena[op[_A] : op[_A] + rows * count].reshape(rows, count)
    out = arena[op[_OUT] : op[_OUT] + rows * count].reshape(rows, count)
    if op[0] == SOFTMAX:
        softmaxes(x, out)
        return
    weight = arena[op[_B] : op[_B] + (count if op[_B] >= 0 else 0)]
    bias = arena[op[_C] : op[_C] + (count if op[_C] >= 0 else 0)]
    norms(x, weight, bias, number, op[2] == 0, out)


@njit(cache=True, error_model="numpy")
def _product(op: Any, arena: Any, matrices: Any, words: Any, forms: Any, room: Any) -> None:
    """(rows, in) times a packed matrix (out, in)."""
    rows, outs = op[_SIZES], op[_SIZES + 2]
    out = arena[op[_OUT] : op[_OUT] + rows * outs].reshape(rows, outs)
    product(matrices[op[3]], arena, op[_A], op[_A + 1], rows, words, forms, room, out)


@njit(cache=True, error_model="numpy")
def _adaptive(op: Any, arena: Any, matrices: Any, words: Any, forms: Any, room: Any) -> None:
    """(rows, width) through as many learners as a gate says for each row."""
    rows, width, count = op[_SIZES], op[_SIZES + 1], op[_SIZES + 2]
    out = arena[op[_OUT] : op[_OUT] + rows * width].reshape(rows, width)
    counts = np.empty(rows, np.int64)
    adapt(
        arena, op[_A], op[_A + 1], matrices[op[3] : op[3] + count], op[2], op[1], words, forms, room, False, counts, out
    )


@njit(cache=True, fastmath=FAST, error_model="numpy")
def _matmul(op: Any, arena: Any, room: Any) -> None:
    """Batches of (rows, inner) times (inner, columns), both computed; the right one is gathered once for each batch."""
    rows, inner, columns = op[_SIZES + 2], op[_SIZES + 3], op[_SIZES + 4]
    right = room[: inner * columns]
    for i in range(op[_SIZES]):
        for j in range(op[_SIZES + 1]):
            b = op[_B] + i * op[_B + 1] + j * op[_B + 2]
            for k in range(inner):
                for n in range(columns):
                    right[k * columns + n] = arena[b + k * op[_B + 3] + n * op[_B + 4]]
            for r in range(rows):
                at = op[_OUT] + i * op[_OUT + 1] + j * op[_OUT + 2] + r * columns
                out = arena[at : at + columns]
                out[:] = 0
                a = op[_A] + i * op[_A + 1] + j * op[_A + 2] + r * op[_A + 3]
                for k in range(inner):
                    factor, line = arena[a + k * op[_A + 4]], right[k * columns : k * columns + columns]
                    for n in range(columns):
                        out[n] += factor * line[n]


@njit(cache=True, error_model="numpy")
def _lookup(op: Any, arena: Any) -> None:
    """Lines (entries, width) by whole numbers, which were checked before; others read an entry that is there."""
    count, width, entries = op[_SIZES], op[_SIZES + 1], op[_SIZES + 2]
    lines = dispatch.array_at(op[4], entries * width)
    for i in range(count):
        at = min(max(np.int64(arena[op[_A] + i]), np.int64(0)), entries - 1) * width
        arena[op[_OUT] + i * width : op[_OUT] + (i + 1) * width] = lines[at : at + width]


@njit(cache=True, nogil=True, error_model="numpy")
def run_samples(
    samples: Any, places: Any, table: Any, numbers: Any, arena: Any, matrices: Any, result: Any, outs: Any, rows: int,
    widest: int, room: Any,
) -> None:  # fmt: skip
    """All operations on each sample, by the calling thread.

    samples (batch, numbers) float32, the model's inputs one behind the other; ``places`` (inputs, 2): start in the
    arena and numbers; table (operations, COLUMNS) int64, numbers (operations,) float32; matrices (products, fields) of
    :func:`hasten.nn.product.dispatch.describe`, whose kind is -1 for float32; ``result``: start; outs (batch, numbers);
    ``rows`` and ``widest``: the most rows and inputs of a product; ``room`` float32.
    """
    before = flush_small()
    forms = dispatch.forms_for(rows, widest)
    words = np.empty(rows * widest, np.uint16)
    for number in range(len(samples)):
        at = 0
        for i in range(len(places)):
            start, size = places[i, 0], places[i, 1]
            arena[start : start + size] = samples[number, at : at + size]
            at += size
        for index in range(len(table)):
            op = table[index]
            kind = op[0]
            if kind == PRODUCT:
                _product(op, arena, matrices, words, forms, room)
            elif kind in (NORM, SOFTMAX):
                _rows(op, arena, numbers[index])
            elif kind == REDUCE:
                _sums(op, arena, numbers[index], room)
            elif kind == ATTENTION:
                attend(
                    arena, op[_SIZES : _SIZES + 5], op[_SHARED], op[_A : _A + 4], op[_B : _B + 4], op[_C : _C + 4],
                    op[_D : _D + 4], op[_OUT], numbers[index], op[2] == 1, room,
                )  # fmt: skip
            elif kind == MATMUL:
                _matmul(op, arena, room)
            elif kind == LOOKUP:
                _lookup(op, arena)
            elif kind == ADAPTIVE:
                _adaptive(op, arena, matrices, words, forms, room)
            else:
                _elements(op, arena, room)
        outs[number] = arena[result : result + outs.shape[1]]
    keep_small(before)
