"""Kernels for layers of different sizes: heads of their own width and frequencies, and all layers in one call.

As :mod:`kernels_stack`, whose products, norms and attention it takes; the widths stand beside the table of addresses.
Queries, keys and values are as wide as the cache; what a layer's own width leaves is zero, and values are gathered
without their zeros before the output matrix.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit, prange

from hasten.language.kernels_stack import (
    DOWN,
    GATE_UP,
    OUT,
    QKV,
    _attention,
    _gates,
    _multiply,
    _norms,
    _rows_for,
)
from hasten.nn.bfloat import FAST, load, store
from hasten.nn.product.dispatch import array_at, forms_for

__all__ = ["place", "place_parallel", "run_sized"]

_SERIAL = 3


@njit(cache=True, fastmath=FAST, error_model="numpy")
def _place_token(
    line: Any, block: int, at: int, c: Any, s: Any, keys: Any, values: Any, heads: int, width: int, deep: int,
    normed: bool, q_norm: Any, k_norm: Any, eps: float, query: Any,
) -> None:  # fmt: skip
    """Norm and turn the queries and keys of one token, ``width`` numbers each, and write its keys and values.

    c, s (kv_heads, pairs): cosines and sines of the frequencies that each key head kept.
    """
    kv_heads, count = keys.shape[1], c.shape[1]
    share = heads // kv_heads
    for head in range(heads + kv_heads):
        source = line[head * width : (head + 1) * width]
        group = head // share if head < heads else head - heads
        target = query[head] if head < heads else keys[block, group, at]
        weight = q_norm if head < heads else k_norm
        cosines, sines = c[group], s[group]
        factor = np.float32(1.0)
        if normed:
            total = np.float32(0.0)
            for i in range(width):
                value = load(source[i])
                total += value * value
            factor = np.float32(1.0) / np.sqrt(total / np.float32(width) + np.float32(eps))
        for i in range(count):
            a = load(source[i]) * factor * weight[i]
            b = load(source[count + i]) * factor * weight[count + i]
            store(target, i, a * cosines[i] - b * sines[i])
            store(target, count + i, b * cosines[i] + a * sines[i])
        for i in range(2 * count, width):
            store(target, i, load(source[i]) * factor * weight[i])
    begin = (heads + kv_heads) * width
    for head in range(kv_heads):
        target = values[block, head, at]
        for i in range(deep):
            store(target, i, load(line[begin + head * deep + i]))


@njit(cache=True, error_model="numpy")
def place(
    qkv: Any, slots: Any, chunk_of: Any, tables: Any, c: Any, s: Any, keys: Any, values: Any, heads: int, width: int,
    deep: int, normed: bool, q_norm: Any, k_norm: Any, eps: float, query: Any,
) -> None:  # fmt: skip
    """Every token of qkv (tokens, (heads + kv_heads) * width + kv_heads * deep); c and s (tokens, kv_heads, pairs)."""
    size = keys.shape[2]
    for token in range(len(slots)):
        block, at = tables[chunk_of[token], slots[token] // size], slots[token] % size
        _place_token(qkv[token], block, at, c[token], s[token], keys, values, heads, width, deep, normed, q_norm,
                     k_norm, eps, query[token])  # fmt: skip


@njit(cache=True, parallel=True, error_model="numpy")
def place_parallel(
    qkv: Any, slots: Any, chunk_of: Any, tables: Any, c: Any, s: Any, keys: Any, values: Any, heads: int, width: int,
    deep: int, normed: bool, q_norm: Any, k_norm: Any, eps: float, query: Any,
) -> None:  # fmt: skip
    """As :func:`place`, by rows."""
    size = keys.shape[2]
    for token in prange(len(slots)):
        block, at = tables[chunk_of[token], slots[token] // size], slots[token] % size
        _place_token(qkv[token], block, at, c[token], s[token], keys, values, heads, width, deep, normed, q_norm,
                     k_norm, eps, query[token])  # fmt: skip


@njit(cache=True, error_model="numpy")
def _turned(table: Any, positions: Any, pairs: Any, count: int) -> Any:
    """Rows of a rotary table for each token and key head: (tokens, kv_heads, count)."""
    out = np.empty((len(positions), pairs.shape[0], count), np.float32)
    for token in range(len(positions)):
        line = table[positions[token]]
        for group in range(pairs.shape[0]):
            for i in range(count):
                out[token, group, i] = line[pairs[group, i]]
    return out


@njit(cache=True, error_model="numpy")
def _without_zeros(attended: Any, heads: int, width: int, deep: int) -> Any:
    """(rows, heads * width) -> (rows, heads * deep): the first ``deep`` numbers of every head."""
    out = np.empty((attended.shape[0], heads * deep), np.uint16)
    for row in range(attended.shape[0]):
        for head in range(heads):
            for i in range(deep):
                out[row, head * deep + i] = attended[row, head * width + i]
    return out


@njit(cache=True, error_model="numpy")
def run_sized(
    residual: Any, matrices: Any, norms: Any, head: Any, last_norm: Any, windows: Any, locals_: Any, widths: Any,
    pairs: Any, cos: Any, sin: Any, local_cos: Any, local_sin: Any, keys: Any, values: Any, chunk_of: Any,
    positions: Any, tables: Any, cuts: Any, wanted: Any, heads: int, normed: bool, scale: float, eps: float, gelu: bool,
    widest: int, threads: int, logits: Any,
) -> None:  # fmt: skip
    """One step of all layers. widths (layers, 3): of keys, of values, and how many of ``pairs`` (layers, kv_heads,
    most) count."""
    rows, hidden = residual.shape
    wide = keys.shape[4]
    h = np.empty((rows, hidden), np.uint16)
    sums = np.empty((rows, hidden), np.float32)
    attended = np.empty((rows, heads * wide), np.uint16)
    forms = forms_for(rows, widest)
    for layer in range(matrices.shape[0]):
        one = matrices[layer]
        width, deep, count = widths[layer, 0], widths[layer, 1], widths[layer, 2]
        _norms(residual, sums, layer > 0, array_at(norms[layer, 0], hidden), eps, h, one[QKV], forms)
        qkv = np.empty((rows, one[QKV, 1]), np.float32)
        _multiply(one[QKV], h, forms, qkv, threads)
        if locals_[layer]:
            c = _turned(local_cos, positions, pairs[layer], count)
            s = _turned(local_sin, positions, pairs[layer], count)
        else:
            c, s = _turned(cos, positions, pairs[layer], count), _turned(sin, positions, pairs[layer], count)
        query = np.zeros((rows, heads, wide), np.uint16)
        q_norm, k_norm = array_at(norms[layer, 2], width), array_at(norms[layer, 3], width)
        if rows <= _SERIAL:
            place(qkv, positions, chunk_of, tables, c, s, keys[layer], values[layer], heads, width, deep, normed,
                  q_norm, k_norm, eps, query)  # fmt: skip
        else:
            place_parallel(qkv, positions, chunk_of, tables, c, s, keys[layer], values[layer], heads, width, deep,
                           normed, q_norm, k_norm, eps, query)  # fmt: skip
        _attention(query, chunk_of, positions, tables, keys[layer], values[layer], scale, windows[layer], attended,
                   cuts)  # fmt: skip
        mixed = attended if deep == wide else _without_zeros(attended, heads, wide, deep)
        _rows_for(mixed, one[OUT], forms)
        _multiply(one[OUT], mixed, forms, sums, threads)
        _norms(residual, sums, True, array_at(norms[layer, 1], hidden), eps, h, one[GATE_UP], forms)
        pair = np.empty((rows, one[GATE_UP, 1]), np.float32)
        _multiply(one[GATE_UP], h, forms, pair, threads)
        inner = np.empty((rows, one[DOWN, 2]), np.uint16)
        _gates(pair, gelu, inner, one[DOWN], forms)
        _multiply(one[DOWN], inner, forms, sums, threads)
    number = len(wanted)
    some, more = np.empty((number, hidden), np.float32), np.empty((number, hidden), np.float32)
    for row in range(number):
        some[row] = residual[wanted[row]]
        more[row] = sums[wanted[row]]
    final = np.empty((number, hidden), np.uint16)
    _norms(some, more, True, array_at(last_norm, hidden), eps, final, head, forms)
    _multiply(head, final, forms, logits, threads)
