"""The CPU kernel of attention in shares: a worker walks its tiles of the line, states of cut outputs are merged after.

The partition is that of :mod:`lean` (or another, so that they compare fairly); a chunk's rows see a common context, and
each a line of slots of its own: trees of guesses, caches with gaps. Any page size and width, capped scores, float32.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import torch
from numba import njit, prange
from numpy.typing import NDArray
from torch import Tensor

from hasten.errors import ConfigurationError
from hasten.language.kernels_codes import held, row_scale, width_of
from hasten.nn.bfloat import FAST, exp, load, store

__all__ = ["Plan", "attend"]


@njit(cache=True, nogil=True, fastmath=FAST, error_model="numpy")
def _tile_into(
    q: Any, count: Any, keys: Any, values: Any, table: Any, head: Any, first: Any, last: Any, low: Any, softcap: Any,
    shift: Any, top: Any, mass: Any, sums: Any, key: Any, scores: Any,
) -> None:  # fmt: skip
    """Fold the keys ``first`` to ``last`` of a paged sequence into the states of ``count`` query rows."""
    size, width, deep = keys.shape[2], q.shape[1], sums.shape[1]
    for number in range(first // size, (last + size - 1) // size):
        page, content = keys[table[number], head], values[table[number], head]
        begin, end = max(0, first - number * size), min(size, last - number * size)
        for j in range(begin, end):
            line = page[j]
            scale = row_scale(line)
            for i in range(width):
                key[i] = held(line[i]) * scale
            for r in range(count):
                total = np.float32(0.0)
                for i in range(width):
                    total += q[r, i] * key[i]
                scores[r, j] = total
        for r in range(count):
            start = begin
            if low[r] > number * size:
                start = min(end, max(begin, low[r] - number * size))
            if softcap > 0:
                for j in range(start, end):
                    scores[r, j] = np.float32(softcap) * np.tanh(scores[r, j] / np.float32(softcap))
            best = top[r]
            for j in range(start, end):
                best = max(best, scores[r, j])
            fade = exp(top[r] - best)
            top[r] = best
            share = np.float32(0.0)
            for j in range(start, end):
                scores[r, j] = exp(scores[r, j] - best)
                share += scores[r, j]
            for j in range(begin, start):
                scores[r, j] = np.float32(0.0)
            mass[r] = mass[r] * fade + share
            if fade != np.float32(1.0):
                for i in range(deep):
                    sums[r, i] *= fade
        for j in range(begin, end):
            line = content[j]
            scale = row_scale(line)
            for i in range(deep):
                key[i] = held(line[shift + i]) * scale
            for r in range(count):
                weight = scores[r, j]
                for i in range(deep):
                    sums[r, i] += weight * key[i]


@njit(cache=True, nogil=True, fastmath=FAST, error_model="numpy")
def _own_into(
    q: Any, r: Any, keys: Any, values: Any, table: Any, head: Any, slots: Any, low: Any, softcap: Any, shift: Any,
    top: Any, mass: Any, sums: Any,
) -> None:  # fmt: skip
    """Fold single keys, given by their slots, into the state of row ``r``: the row's own line of guesses."""
    size, width = keys.shape[2], q.shape[1]
    for slot in slots:
        if slot < low:
            continue
        key, content = keys[table[slot // size], head, slot % size], values[table[slot // size], head, slot % size]
        score = np.float32(0.0)
        for i in range(width):
            score += q[r, i] * held(key[i])
        score *= row_scale(key)
        if softcap > 0:
            score = np.float32(softcap) * np.tanh(score / np.float32(softcap))
        best = max(top[r], score)
        fade, share = exp(top[r] - best), exp(score - best)
        top[r] = best
        mass[r] = mass[r] * fade + share
        share *= row_scale(content)
        for i in range(sums.shape[1]):
            sums[r, i] = sums[r, i] * fade + share * held(content[shift + i])


@njit(cache=True, nogil=True, fastmath=FAST, error_model="numpy")
def _share(
    worker: Any, begin: Any, end: Any, query: Any, starts: Any, contexts: Any, tables: Any, offsets: Any, line: Any,
    lows: Any, keys: Any, values: Any, scale: Any, softcap: Any, shift: Any, tile: Any, ends: Any, tops: Any,
    masses: Any, sums: Any, owners: Any,
) -> None:  # fmt: skip
    """The tiles ``begin`` to ``end`` of the line. A worker's n-th piece of an output goes to state (output, piece)."""
    kv_heads, size, width, deep = keys.shape[1], keys.shape[2], query.shape[2], sums.shape[3]
    group = query.shape[1] // kv_heads
    most = tops.shape[2]
    q = np.empty((most, width), np.float32)
    key = np.empty(max(width, deep), np.float32)
    scores = np.empty((most, size), np.float32)
    low = np.empty(most, np.int64)
    at = begin
    output = np.searchsorted(ends, begin, side="right")
    while at < end:
        chunk, head = output // kv_heads, output % kv_heads
        first = ends[output - 1] if output > 0 else 0
        stop = min(end, ends[output])
        rows = starts[chunk + 1] - starts[chunk]
        count = rows * group
        piece = owners[output, 1] if at == first else worker - owners[output, 0]
        top, mass, total = tops[output, piece], masses[output, piece], sums[output, piece]
        for r in range(count):
            token, h = starts[chunk] + r // group, head * group + r % group
            low[r] = lows[token]
            top[r], mass[r] = np.float32(-1e30), np.float32(0.0)
            for i in range(width):
                q[r, i] = load(query[token, h, i]) * np.float32(scale)
            for i in range(deep):
                total[r, i] = np.float32(0.0)
        last = min(contexts[chunk], (stop - first) * tile)
        if last > (at - first) * tile:
            _tile_into(q, count, keys, values, tables[chunk], head, (at - first) * tile, last, low, softcap, shift, top,
                       mass, total, key, scores)  # fmt: skip
        if at == first:  # the host of an output adds what its rows have of their own
            for r in range(count):
                token = starts[chunk] + r // group
                _own_into(q, r, keys, values, tables[chunk], head, line[offsets[token] : offsets[token + 1]],
                          lows[token], softcap, shift, top, mass, total)  # fmt: skip
        at = stop
        output += 1


@njit(cache=True, nogil=True, fastmath=FAST, error_model="numpy")
def _reduce(chunk: Any, starts: Any, kv_heads: Any, group: Any, pieces: Any, tops: Any, masses: Any, sums: Any,
            out: Any, logs: Any) -> None:  # fmt: skip
    width = sums.shape[3]
    for head in range(kv_heads):
        output = chunk * kv_heads + head
        for r in range((starts[chunk + 1] - starts[chunk]) * group):
            token, h = starts[chunk] + r // group, head * group + r % group
            best = np.float32(-1e30)
            for p in range(pieces[output]):
                best = max(best, tops[output, p, r])
            mass = np.float32(0.0)
            for p in range(pieces[output]):
                mass += masses[output, p, r] * exp(tops[output, p, r] - best)
            logs[token, h] = best + np.log(mass) if mass > 0 else np.float32(-np.inf)
            inverse = np.float32(1.0) / mass if mass > 0 else np.float32(0.0)
            for i in range(width):
                value = np.float32(0.0)
                for p in range(pieces[output]):
                    value += sums[output, p, r, i] * exp(tops[output, p, r] - best)
                store(out[token], h * width + i, value * inverse)


@njit(cache=True, nogil=True, parallel=True, fastmath=FAST, error_model="numpy")
def _run_parallel(
    cuts: Any, query: Any, starts: Any, contexts: Any, tables: Any, offsets: Any, line: Any, lows: Any, keys: Any,
    values: Any, scale: Any, softcap: Any, shift: Any, tile: Any, ends: Any, tops: Any, masses: Any, sums: Any,
    owners: Any, pieces: Any, out: Any, logs: Any,
) -> None:  # fmt: skip
    for worker in prange(len(cuts) - 1):
        _share(worker, cuts[worker], cuts[worker + 1], query, starts, contexts, tables, offsets, line, lows, keys,
               values, scale, softcap, shift, tile, ends, tops, masses, sums, owners)  # fmt: skip
    kv_heads = keys.shape[1]
    for chunk in range(len(starts) - 1):
        _reduce(chunk, starts, kv_heads, query.shape[1] // kv_heads, pieces, tops, masses, sums, out, logs)


@njit(cache=True, nogil=True, fastmath=FAST, error_model="numpy")
def _run_serial(
    cuts: Any, query: Any, starts: Any, contexts: Any, tables: Any, offsets: Any, line: Any, lows: Any, keys: Any,
    values: Any, scale: Any, softcap: Any, shift: Any, tile: Any, ends: Any, tops: Any, masses: Any, sums: Any,
    owners: Any, pieces: Any, out: Any, logs: Any,
) -> None:  # fmt: skip
    for worker in range(len(cuts) - 1):
        _share(worker, cuts[worker], cuts[worker + 1], query, starts, contexts, tables, offsets, line, lows, keys,
               values, scale, softcap, shift, tile, ends, tops, masses, sums, owners)  # fmt: skip
    kv_heads = keys.shape[1]
    for chunk in range(len(starts) - 1):
        _reduce(chunk, starts, kv_heads, query.shape[1] // kv_heads, pieces, tops, masses, sums, out, logs)


class Plan:
    """The shares of one step, made once for all layers: whole-output partitions and cut lines in one form."""

    __slots__ = ("cuts", "ends", "most_pieces", "owners", "pieces", "tile")

    def __init__(self, contexts: NDArray[np.int32], kv_heads: int, tile: int, grid: int, *, whole: bool) -> None:
        tiles = np.maximum(np.repeat(-(-contexts.astype(np.int64) // tile), kv_heads), 1)
        ends = np.cumsum(tiles)
        total = int(ends[-1])
        if whole:  # one output is never cut
            goals = np.linspace(0, total, grid + 1)[1:-1]
            inner = ends[np.searchsorted(ends, goals)]
            cuts = np.concatenate(([0], np.maximum.accumulate(inner), [total]))
        else:
            share = np.full(grid, total // grid, np.int64)
            share[: total % grid] += 1
            cuts = np.concatenate(([0], np.cumsum(share)))
        self._fill(tiles, cuts, tile)

    @classmethod
    def of_pieces(cls, contexts: NDArray[np.int32], kv_heads: int, tile: int, splits: int) -> Plan:
        """A task for each of ``splits`` equal pieces of every output; threads take the tasks in blocks."""
        plan = cls.__new__(cls)
        tiles = np.maximum(np.repeat(-(-contexts.astype(np.int64) // tile), kv_heads), 1)
        piece = -(-tiles // splits)
        inner = [at for end, n, p in zip(np.cumsum(tiles), tiles, piece, strict=True)
                 for at in range(int(end - n), int(end), int(p))]  # fmt: skip
        plan._fill(tiles, np.asarray([*inner, int(tiles.sum())], np.int64), tile)
        return plan

    def _fill(self, tiles: NDArray[np.int64], cuts: NDArray[np.int64], tile: int) -> None:
        self.ends, self.cuts, self.tile = np.cumsum(tiles), cuts, tile
        host = np.searchsorted(cuts, self.ends - tiles, side="right") - 1
        last = np.searchsorted(cuts, self.ends - 1, side="right") - 1
        self.pieces = last - host + 1
        self.owners = np.stack([host, np.zeros_like(host)], axis=1)
        self.most_pieces = int(self.pieces.max())


def attend(
    query: Tensor,
    starts: Any,
    contexts: Any,
    tables: Any,
    offsets: Any,
    line: Any,
    lows: Any,
    keys: Any,
    values: Any,
    *,
    scale: float,
    softcap: float | None = None,
    tile: int = 256,
    grid: int | None = None,
    plan: Plan | None = None,
    shift: int = 0,
    deep: int | None = None,
) -> tuple[Tensor, NDArray[np.float32]]:
    """Attention of chunks of few rows over a paged cache.

    query (tokens, heads, width), a torch tensor; the rest numpy: starts (chunks + 1,), contexts (chunks,) keys that all
    rows of a chunk see, tables (chunks, blocks), offsets (tokens + 1,) and line: the slots of each row's own keys
    beyond the context, lows (tokens,) slots before which a row sees nothing (0 without a window), keys and values
    (blocks, kv_heads, block_size, width), bfloat16 as uint16. A value is ``deep`` numbers (all by default) from
    ``shift`` on. Returns (tokens, heads * deep) in the query's type, and the logarithms of the sums of exponentials
    (tokens, heads).
    """
    deep = width_of(values) - shift if deep is None else deep
    tokens, heads, width = query.shape
    kv_heads = keys.shape[1]
    if heads % kv_heads:
        raise ConfigurationError(f"{heads} heads cannot share {kv_heads} key heads evenly")
    threads = numba.get_num_threads() if grid is None else grid
    work = int(contexts.sum()) * heads * width * 2 + 1
    if grid is None and work < 1 << 18:
        threads = 1
    if plan is None:
        plan = Plan(contexts, kv_heads, tile, threads, whole=False)
    most = int(np.diff(starts).max()) * (heads // kv_heads)
    outputs = len(contexts) * kv_heads
    tops = np.empty((outputs, plan.most_pieces, most), np.float32)
    masses = np.empty_like(tops)
    sums = np.empty((outputs, plan.most_pieces, most, deep), np.float32)
    out = torch.empty((tokens, heads * deep), dtype=query.dtype)
    logs = np.empty((tokens, heads), np.float32)
    arrays = [x.view(torch.uint16).numpy() if x.dtype == torch.bfloat16 else x.numpy() for x in (query, out)]
    run = _run_serial if len(plan.cuts) == 2 else _run_parallel
    run(plan.cuts, arrays[0], starts, contexts, tables, offsets, line, lows, keys, values, scale,
        0.0 if softcap is None else softcap, shift, plan.tile, plan.ends, tops, masses, sums, plan.owners, plan.pieces,
        arrays[1], logs)  # fmt: skip
    return out, logs
