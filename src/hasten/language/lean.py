"""Decode attention in equal shares: all tiles of all sequences and heads are one line, cut where each worker is full.

"Lean Attention", Sanovar et al. 2024, arXiv:2405.10480. Partial attention over any piece of the context is a state
``(m, l, o)`` (largest score, sum of exponentials, unnormalised output); states merge associatively, so a share may end
inside a head: ``m = max(m1, m2)``, ``l = e^(m1-m) l1 + e^(m2-m) l2``, ``o`` likewise, result ``o / l``.
Differs from the paper in: on the CPU (:mod:`kernels_lean`) the merge follows a barrier instead of a lock; all query
rows of a key head (the group, and the guesses of a verification) go through a tile together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hasten.errors import ConfigurationError

__all__ = ["Partition", "State", "compare", "fixed_split", "partial", "partition", "per_head"]


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
