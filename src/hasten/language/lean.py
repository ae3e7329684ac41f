"""Decode attention in equal shares: all tiles of all sequences and heads are one line, cut where each worker is full.

"Lean Attention", Sanovar et al. 2024, arXiv:2405.10480. Partial attention over any piece of the context is a state
``(m, l, o)`` (largest score, sum of exponentials, unnormalised output); states merge associatively, so a share may end
inside a head: ``m = max(m1, m2)``, ``l = e^(m1-m) l1 + e^(m2-m) l2``, ``o`` likewise, result ``o / l``.
Differs from the paper in: on the CPU the merge follows a barrier instead of a lock; all query rows of a key head (the
group, and the guesses of a verification) go through a tile together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numba
import numpy as np
import torch
from numba import njit, prange
from numpy.typing import NDArray
from torch import Tensor

from hasten.errors import ConfigurationError
from hasten.nn.bfloat import FAST, exp, load, store

__all__ = ["Partition", "State", "attend", "compare", "fixed_split", "partial", "partition", "per_head"]


# ---- the algebra ----------------------------------------------------------------------------------------------------


class State(NamedTuple):
    """Attention over a part of the context.

    >>> q, k, v = torch.randn(2, 8), torch.randn(2, 6, 8), torch.randn(2, 6, 8)
    >>> whole = partial(q, k, v).output()
    >>> parts = partial(q, k[:, :2], v[:, :2]).merge(partial(q, k[:, 2:], v[:, 2:])).output()
    >>> torch.allclose(whole, parts, atol=1e-6)
    True
    """

    top: Tensor
    """(..., 1): largest score, -inf over nothing"""
    mass: Tensor
    """(..., 1): sum of exp(score - top)"""
    sums: Tensor
    """(..., width): sum of exp(score - top) * value"""

    @classmethod
    def empty(cls, heads: int, width: int, dtype: torch.dtype = torch.float32) -> State:
        """The identity: attention over nothing."""
        return cls(
            torch.full((heads, 1), -torch.inf, dtype=dtype),
            torch.zeros(heads, 1, dtype=dtype),
            torch.zeros(heads, width, dtype=dtype),
        )

    def merge(self, other: State) -> State:
        """Attention over both parts."""
        top = torch.maximum(self.top, other.top)
        safe = torch.where(torch.isinf(top), torch.zeros_like(top), top)  # -inf minus -inf is not a number
        left, right = torch.exp(self.top - safe), torch.exp(other.top - safe)
        return State(top, left * self.mass + right * other.mass, left * self.sums + right * other.sums)

    def output(self) -> Tensor:
        """(..., width); zero over nothing."""
        return torch.where(self.mass > 0, self.sums / self.mass.clamp_min(torch.finfo(self.mass.dtype).tiny), 0.0)

    @property
    def lse(self) -> Tensor:
        """(..., 1): logarithm of the sum of exponentials of all scores; -inf over nothing."""
        return self.top + torch.log(self.mass)


def partial(query: Tensor, keys: Tensor, values: Tensor, *, scale: float | None = None) -> State:
    """State of query (heads, width) over keys and values (heads, time, width); scale 1/sqrt(width) by default."""
    if keys.shape[-2] == 0:
        return State.empty(query.shape[0], values.shape[-1], query.dtype)
    scores = (keys @ query[..., None]).squeeze(-1) * (query.shape[-1] ** -0.5 if scale is None else scale)
    top = scores.amax(-1, keepdim=True)
    weights = torch.exp(scores - top)
    return State(top, weights.sum(-1, keepdim=True), (weights[..., None, :] @ values).squeeze(-2))


# ---- the partition --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Partition:
    """Which tiles each worker takes: worker g has the tiles ``cuts[g]`` to ``cuts[g + 1]`` of the line."""

    tiles: NDArray[np.int64]
    """(outputs,): tiles of each (sequence, key head), sequence by sequence"""
    cuts: NDArray[np.int64]
    """(workers + 1,)"""
    name: str = "lean"

    @property
    def total(self) -> int:
        """Tiles in all."""
        return int(self.tiles.sum())

    @property
    def longest(self) -> int:
        """Tiles of the busiest worker: what the time follows."""
        return int(np.diff(self.cuts).max(initial=0))

    @property
    def occupancy(self) -> float:
        """Work done over work possible while the busiest worker runs."""
        return self.total / (self.longest * (len(self.cuts) - 1)) if self.longest else 0.0

    @property
    def partials(self) -> int:
        """States that are written in all: pieces of outputs, one per worker that touches them."""
        ends = np.cumsum(self.tiles)
        inner = np.setdiff1d(self.cuts[1:-1], np.concatenate(([0], ends)))
        return int((self.tiles > 0).sum() + len(inner))


def _count(lengths: Sequence[int], kv_heads: int, tile: int) -> NDArray[np.int64]:
    if kv_heads < 1 or tile < 1:
        raise ConfigurationError(f"{kv_heads} key heads and tiles of {tile} tokens; both must be at least 1")
    array = np.asarray(lengths, np.int64)
    if (array < 0).any():
        raise ConfigurationError(f"a context has {array.min()} tokens; it must be 0 or more")
    return np.repeat(-(-array // tile), kv_heads)


def partition(lengths: Sequence[int], kv_heads: int, tile: int = 256, grid: int = 264) -> Partition:
    """Equal shares: the first ``L - (ceil(L/G) - 1) G`` workers have ``ceil(L/G)`` tiles, the others one fewer.

    >>> plan = partition(lengths=[512, 70_000, 3], kv_heads=8, tile=256, grid=264)
    >>> plan.longest, plan.total, round(plan.occupancy, 2)
    (9, 2216, 0.93)
    """
    if grid < 1:
        raise ConfigurationError(f"a grid of {grid} workers; at least 1 must work")
    tiles = _count(lengths, kv_heads, tile)
    total = int(tiles.sum())
    most = -(-total // grid)
    full = total - (most - 1) * grid if total else 0
    shares = np.full(grid, max(most - 1, 0), np.int64)
    shares[:full] = most
    return Partition(tiles, np.concatenate(([0], np.cumsum(shares))))


def per_head(lengths: Sequence[int], kv_heads: int, tile: int = 256, grid: int = 264) -> Partition:
    """One worker per (sequence, key head), as in FlashAttention-2; more outputs than workers run in turns."""
    tiles = _count(lengths, kv_heads, tile)
    return Partition(tiles, _in_waves(tiles, grid), "flash-2")


def fixed_split(
    lengths: Sequence[int], kv_heads: int, tile: int = 256, grid: int = 264, splits: int | None = None
) -> Partition:
    """Each output is cut into ``splits`` equal pieces, as in FlashDecoding.

    By default as many as fill the grid at least 85 % as well as the best number would (FlashAttention's heuristic).
    """
    tiles = _count(lengths, kv_heads, tile)
    if splits is None:
        splits = _heuristic(len(tiles), int(tiles.max(initial=1)), grid)
    piece = np.maximum(-(-tiles // splits), 1)
    pieces = [min(int(p), int(n) - at) for n, p in zip(tiles, piece, strict=True) for at in range(0, int(n), int(p))]
    return Partition(tiles, _in_waves(np.asarray(pieces, np.int64), grid), "flash-decoding")


def _heuristic(outputs: int, tiles: int, grid: int) -> int:
    if outputs >= 0.8 * grid:
        return 1
    most = min(128, grid, tiles)

    def efficiency(splits: int) -> float:
        waves = outputs * splits / grid
        return waves / -(-outputs * splits // grid)

    best = max(efficiency(s) for s in range(1, most + 1))
    return next(s for s in range(1, most + 1) if efficiency(s) >= 0.85 * best)


def _in_waves(pieces: NDArray[np.int64], grid: int) -> NDArray[np.int64]:
    """Cuts such that ``longest`` is the time of pieces handed to workers in order, as they get free."""
    import heapq

    free = [0] * min(grid, max(1, len(pieces)))
    for piece in pieces.tolist():
        heapq.heapreplace(free, free[0] + piece)
    loads = np.sort(np.asarray(free + [0] * (grid - len(free)), np.int64))[::-1]
    return np.concatenate(([0], np.cumsum(loads)))


def compare(lengths: Sequence[int], kv_heads: int, tile: int = 256, grid: int = 264) -> dict[str, int]:
    """Longest shares, in tiles, of the three partitions.

    >>> compare([512 * 256], kv_heads=32)
    {'lean': 63, 'flash-2': 512, 'flash-decoding': 64}
    """
    plans = (partition(lengths, kv_heads, tile, grid), per_head(lengths, kv_heads, tile, grid),
             fixed_split(lengths, kv_heads, tile, grid))  # fmt: skip
    return {p.name: p.longest for p in plans}


# ---- the CPU kernel -------------------------------------------------------------------------------------------------


@njit(cache=True, nogil=True, fastmath=FAST, error_model="numpy")
def _tile_into(
    q: Any, count: Any, keys: Any, values: Any, table: Any, head: Any, first: Any, last: Any, low: Any, softcap: Any,
    shift: Any, top: Any, mass: Any, sums: Any, key: Any, scores: Any,
) -> None:  # fmt: skip
    """Fold the keys ``first`` to ``last`` of a paged sequence into the states of ``count`` query rows."""
    size, width, deep = keys.shape[2], keys.shape[3], sums.shape[1]
    for number in range(first // size, (last + size - 1) // size):
        page, content = keys[table[number], head], values[table[number], head]
        begin, end = max(0, first - number * size), min(size, last - number * size)
        for j in range(begin, end):
            line = page[j]
            for i in range(width):
                key[i] = load(line[i])
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
            for i in range(deep):
                key[i] = load(line[shift + i])
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
    size, width = keys.shape[2], keys.shape[3]
    for slot in slots:
        if slot < low:
            continue
        key, content = keys[table[slot // size], head, slot % size], values[table[slot // size], head, slot % size]
        score = np.float32(0.0)
        for i in range(width):
            score += q[r, i] * load(key[i])
        if softcap > 0:
            score = np.float32(softcap) * np.tanh(score / np.float32(softcap))
        best = max(top[r], score)
        fade, share = exp(top[r] - best), exp(score - best)
        top[r] = best
        mass[r] = mass[r] * fade + share
        for i in range(sums.shape[1]):
            sums[r, i] = sums[r, i] * fade + share * load(content[shift + i])


@njit(cache=True, nogil=True, fastmath=FAST, error_model="numpy")
def _share(
    worker: Any, begin: Any, end: Any, query: Any, starts: Any, contexts: Any, tables: Any, offsets: Any, line: Any,
    lows: Any, keys: Any, values: Any, scale: Any, softcap: Any, shift: Any, tile: Any, ends: Any, tops: Any,
    masses: Any, sums: Any, owners: Any,
) -> None:  # fmt: skip
    """The tiles ``begin`` to ``end`` of the line. A worker's n-th piece of an output goes to state (output, piece)."""
    kv_heads, size, width, deep = keys.shape[1], keys.shape[2], keys.shape[3], sums.shape[3]
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
    deep = values.shape[3] - shift if deep is None else deep
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
