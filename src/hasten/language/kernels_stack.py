"""All layers of a dense decoder in one call, for batches whose time is that of reading the weights.

With few rows a layer's arithmetic is over in microseconds, and a dozen calls from Python cost more than a small
model's whole step. Here the interpreter is left once per step, and the threads come together once: the layers are a
table of addresses, and a team (:mod:`hasten.nn.team`) goes through their phases, each member with its own panels or
rows. Every row is computed as if it were alone.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from numba import njit, prange

from hasten.language.kernels_cpu import copy_slots, place_token
from hasten.language.kernels_phases import (
    DOWN,
    GATE_UP,
    OUT,
    QKV,
    attention,
    gates,
    in_parts,
    multiply,
    multiply_gated,
    norms,
    rows_for,
)
from hasten.nn.bfloat import bits_of_float
from hasten.nn.product.dispatch import array_at, forms_for, gates_in_place, takes_forms
from hasten.nn.product.tiles import room_for
from hasten.nn.team import join, meet, new_team, share_of

__all__ = ["run_stack", "threads"]


@njit(cache=True)
def _floats(rows: int, width: int) -> Any:
    """(rows, width) float32 that begin at a line of memory."""
    return room_for(rows * width * 4).view(np.float32).reshape((rows, width))


@njit(cache=True, error_model="numpy")
def _places(
    qkv: Any, positions: Any, places: Any, chunk_of: Any, tables: Any, cos: Any, sin: Any, keys: Any, values: Any,
    heads: int, normed: bool, q_norm: Any, k_norm: Any, eps: float, query: Any, me: int, size: int,
) -> None:  # fmt: skip
    first, last = share_of(qkv.shape[0], me, size)
    for row in range(first, last):
        place_token(qkv[row], positions[row], places[row], tables[chunk_of[row]], cos, sin, keys, values, heads,
                    normed, q_norm, k_norm, eps, query[row])  # fmt: skip


@njit(cache=True, error_model="numpy")
def _layers(
    residual: Any, matrices: Any, norm_at: Any, head: Any, last_norm: Any, windows: Any, locals_: Any, cos: Any,
    sin: Any, local_cos: Any, local_sin: Any, keys: Any, values: Any, chunk_of: Any, positions: Any, places: Any,
    near: Any, tables: Any, copies: Any, kept: Any, shares: Any, cuts: Any, code: Any, merges: Any, ends: Any,
    wanted: Any, heads: int, normed: bool, scale: float, eps: float, gelu: bool, logits: Any, h: Any, sums: Any,
    qkv: Any, query: Any, attended: Any, pair: Any, inner: Any, some: Any, more: Any, final: Any, forms: Any, job: Any,
    fused: bool, team: Any, me: int, size: int,
) -> None:  # fmt: skip
    """What member ``me`` of ``size`` does of a step."""
    rows, hidden = residual.shape
    width = query.shape[2]
    job = job.copy()  # the layer's addresses stand in it
    joining, alone = job.copy(), job.copy()
    joining[13] = merges.ctypes.data
    alone[6], alone[13] = near.ctypes.data, chunk_of.ctypes.data
    for layer in range(matrices.shape[0]):
        one = matrices[layer]
        norms(residual, sums, layer > 0, array_at(norm_at[layer, 0], hidden), eps, h, one[QKV], forms, me, size)
        meet(team, size)
        multiply(one[QKV], h, forms, qkv, me, size)
        meet(team, size)
        q_norm, k_norm = array_at(norm_at[layer, 2], width), array_at(norm_at[layer, 3], width)
        if locals_[layer]:
            _places(qkv, positions, places, chunk_of, tables, local_cos, local_sin, keys[layer], values[layer], heads,
                    normed, q_norm, k_norm, eps, query, me, size)  # fmt: skip
        else:
            _places(qkv, positions, places, chunk_of, tables, cos, sin, keys[layer], values[layer], heads, normed,
                    q_norm, k_norm, eps, query, me, size)  # fmt: skip
        meet(team, size)
        if len(copies):
            if me == 0:
                copy_slots(copies, keys[layer])
                copy_slots(copies, values[layer])
            meet(team, size)
        if len(kept) and me == 0:
            kept[layer] = query
        if len(shares) and code[2] != 0:
            alone[9], alone[10], alone[11] = keys[layer].ctypes.data, values[layer].ctypes.data, windows[layer]
            in_parts(code[2], alone, shares, me, size)
        elif len(shares):
            attention(query, chunk_of, near, tables, keys[layer], values[layer], scale, windows[layer], attended,
                       shares, me, size)  # fmt: skip
        if code[0] != 0:
            job[9], job[10], job[11] = keys[layer].ctypes.data, values[layer].ctypes.data, windows[layer]
            in_parts(code[0], job, cuts, me, size)
            if len(merges):
                meet(team, size)
                in_parts(code[1], joining, ends, me, size)
        meet(team, size)
        if takes_forms(one[OUT], rows):
            rows_for(attended, one[OUT], forms, me, size)
            meet(team, size)
        multiply(one[OUT], attended, forms, sums, me, size)
        meet(team, size)
        norms(residual, sums, True, array_at(norm_at[layer, 1], hidden), eps, h, one[GATE_UP], forms, me, size)
        meet(team, size)
        if fused:
            multiply_gated(one[GATE_UP], h, forms, gelu, inner, me, size)
            meet(team, size)
            rows_for(inner, one[DOWN], forms, me, size)
        else:
            multiply(one[GATE_UP], h, forms, pair, me, size)
            meet(team, size)
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
def run_stack(
    residual: Any, matrices: Any, norm_at: Any, head: Any, last_norm: Any, windows: Any, locals_: Any, cos: Any,
    sin: Any, local_cos: Any, local_sin: Any, keys: Any, values: Any, chunk_of: Any, positions: Any, places: Any,
    near: Any, tables: Any, copies: Any, kept: Any, shares: Any, cuts: Any, code: Any, items: Any, merges: Any,
    states: Any, wanted: Any, heads: int, normed: bool, scale: float, eps: float, gelu: bool, widest: int, threads: int,
    logits: Any,
) -> None:  # fmt: skip
    """One step; :class:`hasten.language.stack.Stack` prepares what it takes."""
    rows, hidden = residual.shape
    width = matrices[0, QKV, 1] // (heads + 2 * keys.shape[2])
    h = np.empty((rows, hidden), np.uint16)
    sums, qkv = _floats(rows, hidden), _floats(rows, matrices[0, QKV, 1])
    query = np.empty((rows, heads, width), np.uint16)
    attended = np.empty((rows, heads * width), np.uint16)
    fused = gates_in_place(matrices[0, GATE_UP], rows)
    pair = _floats(0 if fused else rows, matrices[0, GATE_UP, 1])
    inner = np.empty((rows, matrices[0, DOWN, 2]), np.uint16)
    count = len(wanted)
    some, more = np.empty((count, hidden), np.float32), np.empty((count, hidden), np.float32)
    final = np.empty((count, hidden), np.uint16)
    forms = forms_for(rows, widest)
    job = np.array(
        [rows, heads, width, keys.shape[2], tables.shape[1], query.ctypes.data, places.ctypes.data, tables.ctypes.data,
         tables.shape[0], 0, 0, 0, attended.ctypes.data, items.ctypes.data, states.shape[0], states.shape[1] // 16,
         states.ctypes.data, np.int64(bits_of_float(np.float32(scale))), keys.shape[4] != width], np.int64,
    )  # fmt: skip
    halves = min(threads, 1 + len(merges) // 4)
    ends = np.array([len(merges) * part // halves for part in range(halves + 1)], np.int64)
    team = new_team()
    for _ in prange(threads):
        me, size = join(team, threads)
        if me >= 0:
            _layers(residual, matrices, norm_at, head, last_norm, windows, locals_, cos, sin, local_cos, local_sin,
                    keys, values, chunk_of, positions, places, near, tables, copies, kept, shares, cuts, code, merges,
                    ends, wanted, heads, normed, scale, eps, gelu, logits, h, sums, qkv, query, attended, pair, inner,
                    some, more, final, forms, job, fused, team, me, size)  # fmt: skip


def threads() -> int:
    """Threads of a parallel region."""
    return int(numba.get_num_threads())
