"""Kernels for layers of different sizes: heads of their own width and frequencies, and all layers in one call.

As :mod:`kernels_stack`, with the same phases; the widths stand beside the table of addresses. Queries, keys and values
are as wide as the cache; what a layer's own width leaves is zero, and values are gathered without their zeros before
the output matrix.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit, prange

from hasten.language.kernels_phases import (
    DOWN,
    GATE_UP,
    OUT,
    QKV,
    attention,
    gates,
    multiply,
    norms,
    rows_for,
)
from hasten.nn.bfloat import FAST, load, store
from hasten.nn.product.dispatch import array_at, forms_for, takes_forms
from hasten.nn.team import join, meet, new_team, share_of

__all__ = ["place", "place_parallel", "run_sized"]


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
def _without_zeros(attended: Any, heads: int, width: int, deep: int, out: Any, first: int, last: int) -> None:
    """Rows ``first`` to ``last`` of (rows, heads * width) -> (rows, heads * deep): the first ``deep`` numbers of every
    head."""
    for row in range(first, last):
        for head in range(heads):
            for i in range(deep):
                out[row, head * deep + i] = attended[row, head * width + i]


@njit(cache=True)
def _matrix(room: Any, rows: int, width: int) -> Any:
    """The first ``rows * width`` numbers of ``room`` (n,) as (rows, width)."""
    return room[: rows * width].reshape(rows, width)


@njit(cache=True, error_model="numpy")
def _layers(
    residual: Any, matrices: Any, norm_at: Any, head: Any, last_norm: Any, windows: Any, locals_: Any, widths: Any,
    pairs: Any, cos: Any, sin: Any, local_cos: Any, local_sin: Any, keys: Any, values: Any, chunk_of: Any,
    positions: Any, tables: Any, cuts: Any, wanted: Any, heads: int, normed: bool, scale: float, eps: float, gelu: bool,
    logits: Any, h: Any, sums: Any, wide_room: Any, inner_room: Any, query: Any, attended: Any, mixed_room: Any,
    some: Any, more: Any, final: Any, forms: Any, team: Any, me: int, size: int,
) -> None:  # fmt: skip
    """What member ``me`` of ``size`` does of a step."""
    rows, hidden = residual.shape
    wide = keys.shape[4]
    first, last = share_of(rows, me, size)
    for layer in range(matrices.shape[0]):
        one = matrices[layer]
        width, deep, count = widths[layer, 0], widths[layer, 1], widths[layer, 2]
        norms(residual, sums, layer > 0, array_at(norm_at[layer, 0], hidden), eps, h, one[QKV], forms, me, size)
        meet(team, size)
        qkv = _matrix(wide_room, rows, one[QKV, 1])
        multiply(one[QKV], h, forms, qkv, me, size)
        meet(team, size)
        own = positions[first:last]
        if locals_[layer]:
            c, s = _turned(local_cos, own, pairs[layer], count), _turned(local_sin, own, pairs[layer], count)
        else:
            c, s = _turned(cos, own, pairs[layer], count), _turned(sin, own, pairs[layer], count)
        query[first:last] = 0
        q_norm, k_norm = array_at(norm_at[layer, 2], width), array_at(norm_at[layer, 3], width)
        place(qkv[first:last], own, chunk_of[first:last], tables, c, s, keys[layer], values[layer], heads, width, deep,
              normed, q_norm, k_norm, eps, query[first:last])  # fmt: skip
        meet(team, size)
        attention(query, chunk_of, positions, tables, keys[layer], values[layer], scale, windows[layer], attended,
                  cuts, me, size)  # fmt: skip
        meet(team, size)
        mixed = attended
        if deep != wide:
            mixed = _matrix(mixed_room, rows, heads * deep)
            _without_zeros(attended, heads, wide, deep, mixed, first, last)
        if takes_forms(one[OUT], rows):
            rows_for(mixed, one[OUT], forms, me, size)
        meet(team, size)
        multiply(one[OUT], mixed, forms, sums, me, size)
        meet(team, size)
        norms(residual, sums, True, array_at(norm_at[layer, 1], hidden), eps, h, one[GATE_UP], forms, me, size)
        meet(team, size)
        pair = _matrix(wide_room, rows, one[GATE_UP, 1])
        multiply(one[GATE_UP], h, forms, pair, me, size)
        meet(team, size)
        inner = _matrix(inner_room, rows, one[DOWN, 2])
        gates(pair, gelu, inner, one[DOWN], forms, me, size)
        meet(team, size)
        multiply(one[DOWN], inner, forms, sums, me, size)
        meet(team, size)
    first, last = share_of(len(wanted), me, size)
    for row in range(first, last):
        some[row] = residual[wanted[row]]
        more[row] = sums[wanted[row]]
    norms(some, more, True, array_at(last_norm, hidden), eps, final, head, forms, me, size)
    meet(team, size)
    multiply(head, final, forms, logits, me, size)


@njit(cache=True, parallel=True, error_model="numpy")
def run_sized(
    residual: Any, matrices: Any, norm_at: Any, head: Any, last_norm: Any, windows: Any, locals_: Any, widths: Any,
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
    query = np.empty((rows, heads, wide), np.uint16)
    attended = np.empty((rows, heads * wide), np.uint16)
    mixed_room = np.empty(rows * heads * wide, np.uint16)
    wide_room = np.empty(rows * max(matrices[:, QKV, 1].max(), matrices[:, GATE_UP, 1].max()), np.float32)
    inner_room = np.empty(rows * matrices[:, DOWN, 2].max(), np.uint16)
    count = len(wanted)
    some, more = np.empty((count, hidden), np.float32), np.empty((count, hidden), np.float32)
    final = np.empty((count, hidden), np.uint16)
    forms = forms_for(rows, widest)
    team = new_team()
    for _ in prange(threads):
        me, size = join(team, threads)
        if me >= 0:
            _layers(residual, matrices, norm_at, head, last_norm, windows, locals_, widths, pairs, cos, sin, local_cos,
                    local_sin, keys, values, chunk_of, positions, tables, cuts, wanted, heads, normed, scale, eps, gelu,
                    logits, h, sums, wide_room, inner_room, query, attended, mixed_room, some, more, final, forms,
                    team, me, size)  # fmt: skip
