"""All layers of a decoder with latent attention in one call, as :mod:`kernels_stack` does for grouped attention.

The phases are those of :mod:`kernels_phases`. Between them a row's queries come out of their product in latent
coordinates (the per-head factors are folded into it), are rotated and meet the pages; what heads read of the latent
goes into the output product, which the factors of the values are folded into. Every row is computed as if it were
alone, pieces of prompts apart, whose queries share the reads (:mod:`kernels_tiles`).
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import torch
from numba import njit, prange
from torch import Tensor

from hasten.language import kernels_tiles
from hasten.language.kernels_cpu import PARALLEL_WORK, Step, copy_slots
from hasten.language.kernels_latent import STEP, code_for, lanes_for, merge, plan_rows
from hasten.language.kernels_paged import PAGE
from hasten.language.kernels_phases import (
    DOWN,
    GATE_UP,
    OUT,
    QKV,
    gates,
    in_parts,
    multiply,
    multiply_gated,
    norms,
    rows_for,
)
from hasten.language.kernels_tiles_plan import plan
from hasten.language.stack import Stack
from hasten.nn.bfloat import FAST, bits_of_float, store
from hasten.nn.product.dispatch import array_at, forms_for, gates_in_place, takes_forms
from hasten.nn.team import join, meet, new_team, share_of

__all__ = ["LatentStack"]

_PIECE = 32
"""Rows of a chunk from which it is a piece of a prompt, whose bits need not be those of rows that come one by one."""
_STATES = 1 << 24
"""Numbers in states that are kept at a time."""
_NO_ITEMS = np.empty((0, 6), np.int64)
_NO_STATES = np.empty((0, 0, 0), np.float32)
_NO_QUERIES = np.empty((0, 0, 0, 0), np.uint16)
_NONE = np.zeros(0, np.int64)
# Plain functions call these and become kernels later; a type checker knows the intrinsics by their own parameters only.
_store: Any = store
_bits: Any = bits_of_float


@njit(cache=True, fastmath=FAST, error_model="numpy")
def _place_row(
    qkv: Any, c: Any, s: Any, pairs: Any, heads: int, rank: int, plain: bool, query: Any, key: Any, value: Any
) -> None:
    """Rotate the queries of a token and write its vector: qkv (heads * width + rope + rank,) float32, query (heads,
    width), key (width,), value (rank,) bfloat16; c, s: cosines and sines of all frequencies, ``pairs`` those used."""
    width, half = query.shape[1], len(pairs)
    for head in range(heads + 1):
        line = qkv[head * width : (head + 1) * width]
        target = query[head] if head < heads else key
        for i in range(half):
            cos, sin = c[pairs[i]], s[pairs[i]]
            a, b = line[i], line[half + i]
            _store(target, i, a * cos - b * sin)
            _store(target, half + i, b * cos + a * sin)
        if head < heads:
            for i in range(2 * half, width):
                _store(target, i, line[i])
    latent = qkv[heads * width + 2 * half : heads * width + 2 * half + rank]
    for i in range(rank):
        if plain:
            _store(key, 2 * half + i, latent[i])
        else:
            _store(value, i, latent[i])


@njit(cache=True, error_model="numpy")
def _places(
    qkv: Any, positions: Any, places: Any, chunk_of: Any, tables: Any, cos: Any, sin: Any, pairs: Any, keys: Any,
    values: Any, heads: int, rank: int, plain: bool, query: Any, me: int, size: int,
) -> None:  # fmt: skip
    first, last = share_of(qkv.shape[0], me, size)
    for row in range(first, last):
        block, at = tables[chunk_of[row], places[row] // PAGE], places[row] % PAGE
        _place_row(qkv[row], cos[positions[row]], sin[positions[row]], pairs, heads, rank, plain, query[row],
                   keys[block, 0, at], values[block, 0, at])  # fmt: skip


@njit(cache=True, error_model="numpy")
def _narrow(wide: Any, starts: Any, most: int, shift: int, rank: int, out: Any, me: int, size: int) -> None:
    """Rows of long chunks: out (rows, heads * rank) = the latent's columns of wide (rows, heads, width)."""
    heads = wide.shape[1]
    for chunk in range(len(starts) - 1):
        begin, count = starts[chunk], starts[chunk + 1] - starts[chunk]
        if count > most:
            first, last = share_of(count, me, size)
            for row in range(begin + first, begin + last):
                for head in range(heads):
                    out[row, head * rank : (head + 1) * rank] = wide[row, head, shift : shift + rank]


@njit(cache=True, error_model="numpy")
def _attend(
    keys: Any, values: Any, window: Any, code: Any, job: Any, cuts: Any, merges: Any, waves: Any, states: Any,
    shift: int, rank: int, many: Any, joining: Any, tiled_cuts: Any, ends: Any, wide: Any, starts: Any, most: int,
    attended: Any, team: Any, me: int, size: int,
) -> None:  # fmt: skip
    """A member's part of a layer's attention, rows that come one by one and pieces of prompts."""
    job[10], job[11], job[17] = keys.ctypes.data, values.ctypes.data, window
    for wave in range(len(cuts)):
        if wave:
            meet(team, size)  # the states are those of the wave before
        in_parts(code[0], job, cuts[wave], me, size)
        if waves[wave + 1] > waves[wave]:
            meet(team, size)
            first, last = share_of(waves[wave + 1] - waves[wave], me, size)
            merge(merges, states, shift - job[4], rank, attended, waves[wave] + first, waves[wave] + last)
    if len(wide):
        many[9], many[10], many[11] = keys.ctypes.data, values.ctypes.data, window
        in_parts(code[1], many, tiled_cuts, me, size)
        meet(team, size)
        if ends[-1]:
            in_parts(code[2], joining, ends, me, size)
            meet(team, size)
        _narrow(wide, starts, most, shift, rank, attended, me, size)


@njit(cache=True, error_model="numpy")
def _layers(
    residual: Any, matrices: Any, norm_at: Any, head: Any, last_norm: Any, windows: Any, locals_: Any, cos: Any,
    sin: Any, local_cos: Any, local_sin: Any, pairs: Any, keys: Any, values: Any, starts: Any, chunk_of: Any,
    positions: Any, places: Any, tables: Any, copies: Any, kept: Any, code: Any, cuts: Any, merges: Any, waves: Any,
    states: Any, tiled_cuts: Any, tiled_merges: Any, ends: Any, most: int, wanted: Any, heads: int, rank: int,
    plain: bool, eps: float, gelu: bool, logits: Any, h: Any, sums: Any, qkv: Any, query: Any, attended: Any,
    wide: Any, pair: Any, inner: Any, some: Any, more: Any, final: Any, forms: Any, job: Any, many: Any, fused: bool,
    team: Any, me: int, size: int,
) -> None:  # fmt: skip
    """What member ``me`` of ``size`` does of a step."""
    rows, hidden = residual.shape
    job, many = job.copy(), many.copy()  # the layer's addresses stand in them
    joining = many.copy()
    joining[13] = tiled_merges.ctypes.data
    shift = 2 * pairs.shape[1] if plain else 0  # where the latent begins in a row of values
    for layer in range(matrices.shape[0]):
        one = matrices[layer]
        norms(residual, sums, layer > 0, array_at(norm_at[layer, 0], hidden), eps, h, one[QKV], forms, me, size)
        meet(team, size)
        multiply(one[QKV], h, forms, qkv, me, size)
        meet(team, size)
        if locals_[layer]:
            _places(qkv, positions, places, chunk_of, tables, local_cos, local_sin, pairs[layer], keys[layer],
                    values[layer], heads, rank, plain, query, me, size)  # fmt: skip
        else:
            _places(qkv, positions, places, chunk_of, tables, cos, sin, pairs[layer], keys[layer], values[layer],
                    heads, rank, plain, query, me, size)  # fmt: skip
        meet(team, size)
        if len(copies):
            if me == 0:
                copy_slots(copies, keys[layer])
                if not plain:
                    copy_slots(copies, values[layer])
            meet(team, size)
        if len(kept) and me == 0:
            kept[layer] = query
        _attend(keys[layer], values[layer], windows[layer], code, job, cuts, merges, waves, states, shift, rank, many,
                joining, tiled_cuts, ends, wide, starts, most, attended, team, me, size)  # fmt: skip
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
def run_latent_stack(
    residual: Any, matrices: Any, norm_at: Any, head: Any, last_norm: Any, windows: Any, locals_: Any, cos: Any,
    sin: Any, local_cos: Any, local_sin: Any, pairs: Any, keys: Any, values: Any, starts: Any, chunk_of: Any,
    positions: Any, places: Any, tables: Any, copies: Any, kept: Any, code: Any, items: Any, cuts: Any, merges: Any,
    waves: Any, states: Any, tiled: Any, tiled_cuts: Any, tiled_merges: Any, tiled_states: Any, most: int, wanted: Any,
    heads: int, rank: int, plain: bool, scale: float, eps: float, gelu: bool, widest: int, threads: int, logits: Any,
) -> None:  # fmt: skip
    """One step; :class:`LatentStack` prepares what it takes."""
    rows, hidden = residual.shape
    width, value_width = keys.shape[4], values.shape[4]
    shift = 2 * pairs.shape[1] if plain else 0
    h = np.empty((rows, hidden), np.uint16)
    sums = np.empty((rows, hidden), np.float32)
    qkv = np.empty((rows, matrices[0, QKV, 1]), np.float32)
    query = np.empty((rows, heads, width), np.uint16)
    attended = np.empty((rows, heads * rank), np.uint16)
    wide = np.empty((rows if len(tiled) else 0, heads, width), np.uint16)
    fused = gates_in_place(matrices[0, GATE_UP], rows)
    pair = np.empty((0 if fused else rows, matrices[0, GATE_UP, 1]), np.float32)
    inner = np.empty((rows, matrices[0, DOWN, 2]), np.uint16)
    count = len(wanted)
    some, more = np.empty((count, hidden), np.float32), np.empty((count, hidden), np.float32)
    final = np.empty((count, hidden), np.uint16)
    forms = forms_for(rows, widest)
    bits = np.int64(_bits(np.float32(scale)))
    job = np.array(
        [rows, heads, width, value_width, shift // STEP * STEP, shift, rank, tables.shape[1], query.ctypes.data,
         tables.ctypes.data, 0, 0, attended.ctypes.data, items.ctypes.data, states.ctypes.data, states.shape[0],
         tables.shape[0], 0, bits, chunk_of.ctypes.data], np.int64,
    )  # fmt: skip
    many = np.array(
        [rows, heads, width, 1, tables.shape[1], query.ctypes.data, places.ctypes.data, tables.ctypes.data,
         tables.shape[0], 0, 0, 0, wide.ctypes.data, tiled.ctypes.data, tiled_states.shape[0],
         tiled_states.shape[1] // PAGE, tiled_states.ctypes.data, bits, 0], np.int64,
    )  # fmt: skip
    halves = min(threads, 1 + len(tiled_merges) // 4)
    ends = np.array([len(tiled_merges) * part // halves for part in range(halves + 1)], np.int64)
    team = new_team()
    for _ in prange(threads):
        me, size = join(team, threads)
        if me >= 0:
            _layers(residual, matrices, norm_at, head, last_norm, windows, locals_, cos, sin, local_cos, local_sin,
                    pairs, keys, values, starts, chunk_of, positions, places, tables, copies, kept, code, cuts, merges,
                    waves, states, tiled_cuts, tiled_merges, ends, most, wanted, heads, rank, plain, eps, gelu, logits,
                    h, sums, qkv, query, attended, wide, pair, inner, some, more, final, forms, job, many, fused, team,
                    me, size)  # fmt: skip


class LatentStack(Stack):
    """Runs a step of a decoder with latent layers in one call.

    Made by :meth:`over`, which returns None for what the call does not cover: what the table of a decoder with grouped
    attention leaves out, processors without matrix tiles, and rows of a cache that are not whole steps of 32 numbers.
    """

    @classmethod
    def over(cls, stack: Stack | None, pairs: Any, width: int, rank: int, plain: bool) -> LatentStack | None:
        """``stack``: the table of the layers; ``pairs`` (layers, rope / 2): frequencies; ``width``: of a key.

        ``plain``: the latent stands behind the rotated part in the row of keys.
        """
        if stack is None or width % STEP or not kernels_tiles.takes(PAGE, width):
            return None
        if not plain and rank != width:  # pieces of prompts want values as wide as keys
            return None
        found = cls(stack._config, stack._matrices, stack._norms, stack._head, stack._keep, **stack._rest)
        found._pairs, found._width, found._rank, found._plain = pairs, width, rank, plain
        codes = [code_for(lanes_for(stack._config.num_heads)), *map(kernels_tiles.code_of, ("attend", "merge"))]
        found._code = np.array([one.address for one in codes], np.int64)
        found.deterministic = stack.deterministic
        return found

    _pairs: Any
    _width: int
    _rank: int
    _plain: bool
    _code: Any

    def takes(self, cache: Any) -> bool:
        """Whether the kernels run on the pages of this cache."""
        return bool(cache.block_size == PAGE)

    def step(self, residual: Tensor, step: Step, cache: Any, wanted: Tensor) -> Tensor:
        """residual (rows, hidden) float32, overwritten; wanted (n,) rows -> logits (n, vocabulary) float32."""
        config, heads, width = self._config, self._config.num_heads, self._width
        logits = torch.empty((wanted.shape[0], config.vocab_size), dtype=torch.float32)
        kept = _NO_QUERIES
        if step.queries is not None:
            kept = np.empty((config.num_layers, len(step.positions), heads, width), np.uint16)
        parts = 1 if step.work * heads * width * 2 < PARALLEL_WORK else numba.get_num_threads()
        most = 1 << 30 if self.deterministic else _PIECE - 1
        columns = width - (2 * self._pairs.shape[1] // STEP * STEP if self._plain else 0)
        room = _STATES // (heads * (columns + 2))
        items, merges, cuts, waves, count = plan_rows(step.starts, step.places, most, parts, room)
        if len(items) <= 1:
            cuts = np.array([[0, len(items)]], np.int64)
        states = np.empty((count, heads, columns + 2), np.float32)
        tiled, tiled_merges, tiled_cuts, tiled_states = _NO_ITEMS, _NO_ITEMS, _NONE, _NO_STATES
        lengths = np.diff(step.starts)
        if int(lengths.max(initial=0)) > most:
            begins = np.where(lengths > most, step.starts[:-1], step.starts[1:]).astype(np.int64)
            tiled, tiled_merges, tiled_cuts, pieces, tiles = plan(step.starts, begins, step.places, 1, heads, parts)
            tiled_states = np.empty((pieces, tiles * PAGE, width + 2), np.float32)
        rest = self._rest
        run: Any = run_latent_stack
        run(
            residual.numpy(), self._matrices, self._norms, self._head, rest["last_norm"].ctypes.data, rest["windows"],
            rest["local"], *rest["tables"], self._pairs, *cache.arrays, step.starts, step.chunk_of, step.positions,
            step.places, np.ascontiguousarray(step.tables), step.copies, kept, self._code, items, cuts, merges, waves,
            states, tiled, tiled_cuts if len(tiled) > 1 else np.array([0, len(tiled)], np.int64), tiled_merges,
            tiled_states, most, wanted.numpy(), heads, self._rank, self._plain, float(config.attention_scale),
            float(config.norm_eps), config.activation != "silu", self._widest, numba.get_num_threads(), logits.numpy(),
        )  # fmt: skip
        if step.queries is not None:
            step.queries.extend(torch.from_numpy(kept).view(torch.bfloat16))
        return logits
