"""Rows that do not stand one behind the other: where each row's key goes, and which keys it sees.

In a plain chunk row i has position ``context + i``, its key goes there, and it sees everything before. A tree of
guesses has rows side by side at one position; a compressed cache holds keys whose positions have gaps. So position
(for the rotation), slot (for the cache) and sight (a common context, then a line of slots) are three things here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numba import njit
from torch import Tensor

from hasten.language import kernels_cpu, kernels_lean
from hasten.language.ragged import RaggedBatch
from hasten.nn.bfloat import FAST, load, store

__all__ = ["PlacedStep", "Placement", "chain_placement", "tree_placement"]


@dataclass(frozen=True)
class Placement:
    """Slots and lines of all rows of a batch, as numpy arrays."""

    slots: Any
    """(tokens,) int32: cache slot of each row's key, counted along the block table of its chunk"""
    offsets: Any
    """(tokens + 1,) int32: where each row's line begins in ``line``"""
    line: Any
    """int32: slots that a row sees beyond the context of its chunk, its own last"""
    queries: list[Tensor] | None = None
    """a list here receives the queries (tokens, heads, width) of every layer, in order"""

    @classmethod
    def of(cls, slots: Sequence[int], lines: Sequence[Sequence[int]], queries: list[Tensor] | None = None) -> Placement:
        """From a list of slots for each row."""
        offsets = np.zeros(len(lines) + 1, np.int32)
        np.cumsum([len(x) for x in lines], out=offsets[1:])
        flat = np.fromiter((s for x in lines for s in x), np.int32, count=int(offsets[-1]))
        return cls(np.asarray(slots, np.int32), offsets, flat, queries)


def chain_placement(contexts: Sequence[int], lengths: Sequence[int]) -> Placement:
    """The placement of plain chunks."""
    counts = np.concatenate([np.arange(1, n + 1) for n in lengths]) if len(lengths) else np.zeros(0, np.int64)
    offsets = np.zeros(len(counts) + 1, np.int32)
    np.cumsum(counts, out=offsets[1:])
    first = np.repeat(np.asarray(contexts, np.int64), np.asarray(lengths, np.int64))  # of each row's chunk
    place = np.arange(int(offsets[-1])) - np.repeat(offsets[:-1], counts)
    line = (np.repeat(first, counts) + place).astype(np.int32)
    return Placement((first + counts - 1).astype(np.int32), offsets, line)


def tree_placement(
    context: int, parents: Sequence[int], first: int = 0
) -> tuple[list[int], list[int], list[list[int]]]:
    """Positions, slots and lines of tree nodes ``first`` on; node i sits in slot ``context + i``.

    A node hangs on ``parents[i]`` or, where that is -1, on the token in slot ``context - 1``.
    """
    depth: list[int] = []
    lines: list[list[int]] = []
    for i, parent in enumerate(parents):
        depth.append(0 if parent < 0 else depth[parent] + 1)
        lines.append(([] if parent < 0 else lines[parent]) + [context + i])
    return [context + d for d in depth[first:]], list(range(context + first, context + len(parents))), lines[first:]


@njit(cache=True, fastmath=FAST, error_model="numpy")
def _place_latent(
    qkv: Any, positions: Any, slots: Any, starts: Any, tables: Any, cos: Any, sin: Any, keys: Any, values: Any,
    heads: Any, width: Any, rope: Any, rank: Any, plain: Any, query: Any,
) -> None:  # fmt: skip
    size, pairs = keys.shape[2], rope // 2
    for chunk in range(len(starts) - 1):
        for token in range(starts[chunk], starts[chunk + 1]):
            c, s, slot = cos[positions[token]], sin[positions[token]], slots[token]
            block, at = tables[chunk, slot // size], slot % size
            for head in range(heads + 1):
                begin = head * width
                line = qkv[token, begin : begin + (width if head < heads else rope)]
                target = query[token, head] if head < heads else keys[block, 0, at]
                for i in range(pairs):
                    a, b = load(line[i]), load(line[pairs + i])
                    store(target, i, a * c[i] - b * s[i])
                    store(target, pairs + i, b * c[i] + a * s[i])
                for i in range(rope, width if head < heads else rope):
                    store(target, i, load(line[i]))
            begin = heads * width + rope
            for i in range(rank):
                if plain:
                    store(keys[block, 0, at], rope + i, load(qkv[token, begin + i]))
                else:
                    store(values[block, 0, at], i, load(qkv[token, begin + i]))


def place_latent(
    qkv: Tensor, positions: Any, slots: Any, starts: Any, tables: Any, cos: Any, sin: Any, keys: Any, values: Any,
    heads: int, width: int, rope: int, rank: int, plain: bool,
) -> Tensor:  # fmt: skip
    """Rotate latent queries and write latent tokens; -> (tokens, heads, width).

    qkv (tokens, heads * width + rope + rank).

    ``plain``: the latent stands behind the rotated part in ``keys``, else in ``values``.
    """
    query = torch.empty((qkv.shape[0], heads, width), dtype=qkv.dtype)
    arrays = [x.view(torch.uint16).numpy() if x.dtype == torch.bfloat16 else x.numpy() for x in (qkv, query)]
    _place_latent(arrays[0], positions, slots, starts, tables, cos, sin, keys, values, heads, width, rope, rank, plain,
                  arrays[1])  # fmt: skip
    return query


class PlacedStep:
    """A batch with a placement, in the form of :mod:`kernels_cpu`'s steps: ``place`` and ``attend``."""

    def __init__(self, batch: RaggedBatch, tile: int = 256) -> None:
        assert batch.placement is not None
        self.placement: Placement = batch.placement
        self.starts = batch.starts.numpy()
        self.chunk_of = np.repeat(np.arange(len(self.starts) - 1, dtype=np.int32), np.diff(self.starts))
        self.positions = batch.positions.numpy()
        self.contexts = batch.contexts.numpy()
        self.tables = batch.block_tables.numpy()
        self.copies = kernels_cpu.no_copies if batch.copies is None else batch.copies.numpy()
        self.queries = batch.queries if self.placement.queries is None else self.placement.queries
        self.tile = tile
        self.shift = 0
        self._plans: dict[int, kernels_lean.Plan] = {}
        self._lows: dict[int, Any] = {}

    def place(
        self, qkv: Tensor, cos: Any, sin: Any, keys: Any, values: Any, heads: int, q_norm: Any, k_norm: Any, eps: float
    ) -> Tensor:
        """As :func:`kernels_cpu.place`, each key to its slot."""
        return kernels_cpu.place(qkv, self, cos, sin, keys, values, heads, q_norm, k_norm, eps, self.placement.slots)

    def attend(
        self, query: Tensor, keys: Any, values: Any, scale: float, window: int | None, softcap: float | None
    ) -> Tensor:
        """As :func:`kernels_cpu.attend`, each row over the context of its chunk and its own line."""
        import numba

        kv_heads = keys.shape[1]
        plan = self._plans.get(kv_heads)
        if plan is None:
            work = int(self.contexts.sum()) * query.shape[1] * query.shape[2] * 2
            grid = numba.get_num_threads() if work >= 1 << 18 else 1
            plan = self._plans[kv_heads] = kernels_lean.Plan(self.contexts, kv_heads, self.tile, grid, whole=False)
        bound = 0 if window is None else window
        lows = self._lows.get(bound)
        if lows is None:
            lows = self._lows[bound] = (
                np.maximum(self.positions - bound + 1, 0) if bound else np.zeros_like(self.positions)
            )
        out, _ = kernels_lean.attend(
            query, self.starts, self.contexts, self.tables, self.placement.offsets, self.placement.line, lows, keys,
            values, scale=scale, softcap=softcap, plan=plan, shift=self.shift,
        )  # fmt: skip
        return out
