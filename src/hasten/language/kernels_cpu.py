"""The operations of a step on the CPU: fused numba kernels, bfloat16 or float32.

Between two matrix products a layer does little arithmetic but, written in separate operations, many passes and many
calls; each kernel here is one pass. A row's result depends on that row alone and is summed in a fixed order, whatever
else is in the batch. :mod:`hasten.language.kernels_torch` holds the same operations in plain form, for tests.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numba
import numpy as np
import torch
from numba import njit, prange
from torch import Tensor

from hasten.errors import InvalidRequestError
from hasten.language.kernels_codes import held, put_key, put_value, row_scale, widen_page, width_of
from hasten.language.kernels_paged import PAGE, attend_page, paged_kernel_takes
from hasten.language.ragged import RaggedBatch
from hasten.nn.bfloat import FAST, exp, load, store
from hasten.nn.gating import gated

if TYPE_CHECKING:
    from hasten.language.placement import PlacedStep

__all__ = [
    "PARALLEL_WORK",
    "Step",
    "add_norm",
    "attend",
    "attend_pages",
    "constant",
    "copy_slots",
    "gate",
    "gate_row",
    "look_up",
    "no_copies",
    "norm",
    "place",
    "place_token",
    "prepare",
]

PARALLEL_WORK = 1 << 18  # multiply-adds from which a second thread pays for its start


def _array(x: Tensor) -> Any:
    """The tensor's memory as a numpy array; bfloat16 as uint16."""
    return x.view(torch.uint16).numpy() if x.dtype == torch.bfloat16 else x.numpy()


no_copies = np.zeros((0, 4), np.int32)


class Step:
    """What the kernels read of a batch, as numpy arrays, made once per step and not once per layer."""

    __slots__ = ("chunk_of", "copies", "cuts", "places", "positions", "queries", "starts", "tables", "work")

    def __init__(self, batch: RaggedBatch) -> None:
        self.starts = batch.starts.numpy()
        self.positions = batch.positions.numpy()
        self.places = self.positions if batch.places is None else batch.places.numpy()
        self.copies = no_copies if batch.copies is None else batch.copies.numpy()
        self.queries = batch.queries
        self.tables = batch.block_tables.numpy()
        count = len(self.starts) - 1
        self.chunk_of = np.arange(count, dtype=np.int32)
        if len(self.positions) != count:
            self.chunk_of = np.repeat(self.chunk_of, np.diff(self.starts))
        self.work = int(self.places.sum()) + len(self.places)
        self.cuts: dict[int, Any] = {}

    def parts(self, kv_heads: int) -> Any:
        """Where to cut (token, key head) items so that each thread reads about as many keys: (threads + 1,)."""
        cuts = self.cuts.get(kv_heads)
        if cuts is None:
            cuts = self.cuts[kv_heads] = cut_rows(self.places, kv_heads, numba.get_num_threads())
        return cuts


@njit(cache=True)
def cut_rows(places: Any, kv_heads: int, threads: int) -> Any:
    """Where to cut (token, key head) items so that each thread reads about as many keys: (threads + 1,).

    places (tokens,): the last slot that each token sees; -1 for one that is left out.
    """
    total = np.int64(0)
    for place in places:
        total += (place + 1) * kv_heads
    cuts = np.full(threads + 1, len(places) * kv_heads, np.int64)
    cuts[0] = 0
    done, thread, item = np.int64(0), 1, 0
    for place in places:
        for _ in range(kv_heads):
            done += place + 1
            while thread < threads and done * threads >= total * thread:
                cuts[thread] = item
                thread += 1
            item += 1
    return cuts


def prepare(batch: RaggedBatch) -> Step:
    """The form of a batch that the kernels take."""
    return Step(batch)


def constant(x: Tensor) -> Any:
    """The form of a weight or table that the kernels take."""
    return _array(x)


@njit(cache=True, error_model="numpy")
def _look_up(words: Any, tokens: Any, out: Any) -> Any:
    """The first row without such a token, -1 if all have one."""
    for row in range(len(tokens)):
        if not 0 <= tokens[row] < len(words):
            return row
        line, target = words[tokens[row]], out[row]
        for i in range(len(line)):
            target[i] = load(line[i])
    return -1


def look_up(weight: Tensor, tokens: Tensor) -> Tensor:
    """Rows ``tokens`` (n,) int64 of an embedding (vocabulary, hidden) bfloat16, as float32: in one pass, where torch
    takes two and their calls.

    Raises :class:`~hasten.errors.InvalidRequestError` for a token outside the vocabulary.
    """
    out, target = _empty((len(tokens), weight.shape[1]), torch.float32)
    wrong = _look_up(_array(weight), tokens.numpy(), target)
    if wrong >= 0:
        token = int(tokens[wrong])
        raise InvalidRequestError(f"the batch has token {token}; token ids of this model are 0 to {len(weight) - 1}")
    return out


def _empty(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Any]:
    out = torch.empty(shape, dtype=dtype)
    return out, _array(out)


@njit(cache=True, fastmath=FAST, error_model="numpy")
def _norm(residual: Any, x: Any, add: bool, weight: Any, eps: float, out: Any) -> None:
    rows, width = out.shape
    for row in range(rows):
        total = np.float32(0.0)
        line = residual[row]
        if add:
            more = x[row]
            for i in range(width):
                value = line[i] + load(more[i])
                line[i] = value
                total += value * value
        else:
            for i in range(width):
                total += line[i] * line[i]
        factor = np.float32(1.0) / np.sqrt(total / np.float32(width) + np.float32(eps))
        target = out[row]
        for i in range(width):
            store(target, i, line[i] * factor * weight[i])


@njit(cache=True, fastmath=FAST, error_model="numpy")
def _norm_only(x: Any, weight: Any, eps: float, out: Any) -> None:
    rows, width = out.shape
    for row in range(rows):
        line, target = x[row], out[row]
        total = np.float32(0.0)
        for i in range(width):
            value = load(line[i])
            total += value * value
        factor = np.float32(1.0) / np.sqrt(total / np.float32(width) + np.float32(eps))
        for i in range(width):
            store(target, i, load(line[i]) * factor * weight[i])


def norm(x: Tensor, weight: Any, eps: float, dtype: torch.dtype) -> Tensor:
    """Root-mean-square norm: x (rows, width) -> (rows, width) in ``dtype``; weight (width,) float32, a constant."""
    out, array = _empty(x.shape, dtype)
    _norm_only(_array(x), weight, eps, array)
    return out


def add_norm(residual: Tensor, x: Tensor, weight: Any, eps: float, dtype: torch.dtype) -> Tensor:
    """``residual += x`` in place (float32), then its norm in ``dtype``."""
    out, array = _empty(residual.shape, dtype)
    _norm(residual.numpy(), _array(x), True, weight, eps, array)
    return out


@njit(cache=True, error_model="numpy")
def gate_row(line: Any, gelu: bool, target: Any) -> None:
    """line (2 * inner,) holding gate and up -> target (inner,)."""
    inner = len(target)
    gated(line[:inner], line[inner:], gelu, target)


@njit(cache=True, fastmath=FAST, error_model="numpy")
def _gate_rows(x: Any, gelu: bool, first: int, last: int, out: Any) -> None:
    for row in range(first, last):
        gate_row(x[row], gelu, out[row])


@njit(cache=True, parallel=True, fastmath=FAST, error_model="numpy")
def _gate_parallel(x: Any, gelu: bool, parts: int, out: Any) -> None:
    rows = out.shape[0]
    for part in prange(parts):
        _gate_rows(x, gelu, rows * part // parts, rows * (part + 1) // parts, out)


def gate(x: Tensor, gelu: bool) -> Tensor:
    """x (rows, 2 * inner) holding gate and up side by side -> act(gate) * up (rows, inner)."""
    out, array = _empty((x.shape[0], x.shape[1] // 2), x.dtype)
    if array.size * 8 < PARALLEL_WORK:
        _gate_rows(_array(x), gelu, 0, array.shape[0], array)
    else:
        _gate_parallel(_array(x), gelu, numba.get_num_threads(), array)
    return out


@njit(cache=True, fastmath=FAST, error_model="numpy")
def _head_factor(line: Any, width: int, normed: bool, eps: float) -> Any:
    if not normed:
        return np.float32(1.0)
    total = np.float32(0.0)
    for i in range(width):
        value = load(line[i])
        total += value * value
    return np.float32(1.0) / np.sqrt(total / np.float32(width) + np.float32(eps))


@njit(cache=True, fastmath=FAST, error_model="numpy")
def place_token(
    qkv: Any, position: int, place: int, table: Any, cos: Any, sin: Any, keys: Any, values: Any, heads: int,
    normed: bool, q_norm: Any, k_norm: Any, eps: float, query: Any,
) -> None:  # fmt: skip
    """One token: qkv ((heads + 2 kv_heads) * width,), table (blocks,), query (heads, width); see :func:`place`.

    ``position`` turns, ``place`` is the slot along the table; they differ for trees of guesses and caches with gaps.
    """
    _, kv_heads, size, _ = keys.shape
    width, pairs = query.shape[1], cos.shape[1]
    c, s = cos[position], sin[position]
    block, slot = table[place // size], place % size
    for head in range(heads + kv_heads):
        line = qkv[head * width : (head + 1) * width]
        factor = _head_factor(line, width, normed, eps)
        if head < heads:
            put_key(line, factor, q_norm, c, s, pairs, width, query[head])
        else:
            put_key(line, factor, k_norm, c, s, pairs, width, keys[block, head - heads, slot])
    for head in range(kv_heads):
        put_value(qkv[(heads + kv_heads + head) * width :], width, values[block, head, slot])


@njit(cache=True, fastmath=FAST, error_model="numpy")
def _place(
    qkv: Any, positions: Any, places: Any, chunk_of: Any, tables: Any, cos: Any, sin: Any, keys: Any, values: Any,
    heads: int, normed: bool, q_norm: Any, k_norm: Any, eps: float, query: Any,
) -> None:  # fmt: skip
    for token in range(len(positions)):
        place_token(qkv[token], positions[token], places[token], tables[chunk_of[token]], cos, sin, keys, values, heads,
                    normed, q_norm, k_norm, eps, query[token])  # fmt: skip


@njit(cache=True, error_model="numpy")
def copy_slots(copies: Any, half: Any) -> None:
    """Copy slots of one layer's keys or values (blocks, kv_heads, size, width); copies (n, 4), see the batch."""
    for n in range(len(copies)):
        for head in range(half.shape[1]):
            source = half[copies[n, 0], head, copies[n, 1]]
            target = half[copies[n, 2], head, copies[n, 3]]
            for i in range(half.shape[3]):
                target[i] = source[i]


_ONES: dict[int, Any] = {}


def place(
    qkv: Tensor,
    step: Step | PlacedStep,
    cos: Any,
    sin: Any,
    keys: Any,
    values: Any,
    heads: int,
    q_norm: Any | None,
    k_norm: Any | None,
    eps: float,
    places: Any | None = None,
) -> Tensor:
    """Norm and rotate queries and keys, write keys and values into the cache; returns the queries.

    qkv (tokens, (heads + 2 kv_heads) * width); cos, sin (context, pairs) float32; keys and values of one layer
    (blocks, kv_heads, block_size, width); all but ``qkv`` are constants -> (tokens, heads, width). ``places``: slots of
    the tokens along their block tables, where these are not their positions.
    """
    width = width_of(keys)
    ones = _ONES.get(width)
    if ones is None:
        ones = _ONES[width] = np.ones(width, np.float32)
    query, array = _empty((qkv.shape[0], heads, width), qkv.dtype)
    slots = getattr(step, "places", None) if places is None else places
    _place(
        _array(qkv), step.positions, slots, step.chunk_of, step.tables,
        cos, sin, keys, values, heads, q_norm is not None,
        ones if q_norm is None else q_norm, ones if k_norm is None else k_norm, eps, array,
    )  # fmt: skip
    if len(step.copies):
        copy_slots(step.copies, keys)
        copy_slots(step.copies, values)
    if step.queries is not None:
        step.queries.append(query)
    return query


@njit(cache=True, fastmath=FAST, error_model="numpy")
def _attend_one(
    query: Any, table: Any, position: int, head: int, group: int, keys: Any, values: Any, scale: float, window: int,
    softcap: float, out: Any, q: Any, acc: Any, scores: Any, best: Any, total: Any,
) -> None:  # fmt: skip
    """The ``group`` query heads of one token that share key head ``head``; block by block, online softmax."""
    size, width = keys.shape[2], query.shape[1]
    first = 0 if window <= 0 else max(0, position - window + 1)
    for h in range(group):
        best[h] = np.float32(-1e30)
        total[h] = np.float32(0.0)
        line, source, sums = q[h], query[head * group + h], acc[h]
        for i in range(width):
            line[i] = load(source[i]) * np.float32(scale)
            sums[i] = np.float32(0.0)
    for number in range(first // size, position // size + 1):
        block = table[number]
        low = max(0, first - number * size)
        high = min(size, position + 1 - number * size)
        page, content = keys[block, head], values[block, head]
        for h in range(group):
            line, sums = q[h], acc[h]
            for j in range(low, high):
                key = page[j]
                score = np.float32(0.0)
                for i in range(width):
                    score += line[i] * held(key[i])
                scores[j] = score * row_scale(key)
            if softcap > 0:
                for j in range(low, high):
                    squashed = np.float32(2.0) / (np.float32(1.0) + exp(np.float32(-2.0 / softcap) * scores[j]))
                    scores[j] = np.float32(softcap) * (squashed - np.float32(1.0))
            top = best[h]
            for j in range(low, high):
                top = max(top, scores[j])
            fade = exp(best[h] - top)
            best[h] = top
            share = np.float32(0.0)
            for j in range(low, high):
                scores[j] = exp(scores[j] - top)
                share += scores[j]
            total[h] = total[h] * fade + share
            if fade != np.float32(1.0):
                for i in range(width):
                    sums[i] *= fade
            for j in range(low, high):
                value = content[j]
                weight = scores[j] * row_scale(value)
                for i in range(width):
                    sums[i] += weight * held(value[i])
    for h in range(group):
        inverse = np.float32(1.0) / total[h]
        at, sums = (head * group + h) * width, acc[h]
        for i in range(width):
            store(out, at + i, sums[i] * inverse)


@njit(cache=True, fastmath=FAST, error_model="numpy")
def _attend_items(
    query: Any, chunk_of: Any, positions: Any, tables: Any, keys: Any, values: Any, scale: float, window: int,
    softcap: float, out: Any, first: int, last: int,
) -> None:  # fmt: skip
    kv_heads, size, width = keys.shape[1], keys.shape[2], query.shape[2]
    group = query.shape[1] // kv_heads
    q = np.empty((group, width), np.float32)
    acc = np.empty((group, width), np.float32)
    scores = np.empty(size, np.float32)
    best = np.empty(group, np.float32)
    total = np.empty(group, np.float32)
    for item in range(first, last):
        token, head = item // kv_heads, item % kv_heads
        _attend_one(query[token], tables[chunk_of[token]], positions[token], head, group, keys, values, scale, window,
                    softcap, out[token], q, acc, scores, best, total)  # fmt: skip


@njit(cache=True, fastmath=FAST, error_model="numpy")
def attend_pages(
    query: Any, chunk_of: Any, positions: Any, tables: Any, keys: Any, values: Any, scale: float, window: int, out: Any,
    first: int, last: int,
) -> None:  # fmt: skip
    """As :func:`_attend_items`, through the kernel for pages of sixteen keys; a position below 0 leaves a row out."""
    kv_heads, width = keys.shape[1], query.shape[2]
    group = query.shape[1] // kv_heads
    wide = np.empty((2, PAGE, width), np.uint16)  # a page of codes as bfloat16
    coded = keys.shape[3] != width
    sums = np.empty((group, width), np.float32)
    weights = np.empty((group, PAGE), np.float32)
    state = np.empty((3, group), np.float32)
    best, total, fade = state[0], state[1], state[2]
    for item in range(first, last):
        token, head = item // kv_heads, item % kv_heads
        position = positions[token]
        if position < 0:
            continue
        start = 0 if window <= 0 else max(0, position - window + 1)
        best[:] = np.float32(-1e30)
        total[:] = 0
        sums[:] = 0
        table, last_page = tables[chunk_of[token]], position // PAGE
        for number in range(start // PAGE, last_page + 1):
            block = table[number]
            following = table[min(number + 1, last_page)]
            ahead = 0 if coded else (following - block) * keys.strides[0]
            attend_page(query[token, head * group].ctypes.data,
                        widen_page(keys, block, head, following, width, wide[0]),
                        widen_page(values, block, head, following, width, wide[1]), ahead,
                        max(0, start - number * PAGE), min(PAGE, position + 1 - number * PAGE), group, width,
                        np.float32(scale), best.ctypes.data, total.ctypes.data, weights.ctypes.data, fade.ctypes.data,
                        sums.ctypes.data)  # fmt: skip
        for h in range(group):
            inverse = np.float32(1.0) / total[h]
            at, line = (head * group + h) * width, sums[h]
            target = out[token, at : at + width]  # a slice, whose indices are known not to be negative
            for i in range(len(target)):
                store(target, i, line[i] * inverse)


@njit(cache=True, parallel=True, fastmath=FAST, error_model="numpy")
def _pages_parallel(
    query: Any, chunk_of: Any, positions: Any, tables: Any, keys: Any, values: Any, scale: float, window: int, out: Any,
    cuts: Any,
) -> None:  # fmt: skip
    for part in prange(len(cuts) - 1):
        attend_pages(query, chunk_of, positions, tables, keys, values, scale, window, out, cuts[part], cuts[part + 1])


@njit(cache=True, parallel=True, fastmath=FAST, error_model="numpy")
def _attend_parallel(
    query: Any, chunk_of: Any, positions: Any, tables: Any, keys: Any, values: Any, scale: float, window: int,
    softcap: float, out: Any, cuts: Any,
) -> None:  # fmt: skip
    for part in prange(len(cuts) - 1):
        _attend_items(query, chunk_of, positions, tables, keys, values, scale, window, softcap, out, cuts[part],
                      cuts[part + 1])  # fmt: skip


def attend(
    query: Tensor,
    step: Step,
    keys: Any,
    values: Any,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """Each token attends to its sequence in the cache, itself included.

    query (tokens, heads, width); keys and values (blocks, kv_heads, block_size, width) -> (tokens, heads * width).
    Work is cut into one part per thread of equal numbers of keys, so that one long sequence does not hold up the rest.
    """
    tokens, heads, width = query.shape
    kv_heads = keys.shape[1]
    out, array = _empty((tokens, heads * width), query.dtype)
    alone = step.work * heads * width * 2 < PARALLEL_WORK or tokens * kv_heads < 2
    if query.dtype is torch.bfloat16 and softcap is None and paged_kernel_takes(keys.shape[2], width):
        given = (_array(query), step.chunk_of, step.places, step.tables, keys, values, scale, window or 0, array)
        if alone:
            attend_pages(*given, 0, tokens * kv_heads)
        else:
            _pages_parallel(*given, step.parts(kv_heads))
        return out
    arguments = (
        _array(query), step.chunk_of, step.places, step.tables, keys, values, scale,
        0 if window is None else window, 0.0 if softcap is None else softcap, array,
    )  # fmt: skip
    if alone:
        _attend_items(*arguments, 0, tokens * kv_heads)
    else:
        _attend_parallel(*arguments, step.parts(kv_heads))
    return out
