"""The part of a long cache that matters: copies of its keys and values, chosen anew now and then.

Chunks of the context are scored, for each layer and key head, by the query of the last token against the mean of their
keys ("TriForce", Sun et al. 2024, arXiv:2404.11912), or by the attention that it pays to them; the first, the last and
the best are copied, rotated as they are, into ``budget`` slots in front. Behind them stands what was verified since,
then what is drafted. So the model itself drafts over a short cache: position and slot of a token differ, nothing else
does (``RaggedBatch.places``). Differs from the paper in: the view is made anew after some tokens; the scores of a group
of query heads are added up; ``mass`` (a mean of eight keys hides the one that is meant); with ``follow`` a chunk counts
as much as the one before it, since a draft reads on from where the query points.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hasten.errors import ConfigurationError
from hasten.language.pages import widened
from hasten.language.ragged import RaggedBatch

__all__ = ["PAGE", "WAYS", "RetrievalView", "check_budget", "check_way", "draft_batch", "slots_for"]

PAGE = 16
WAYS = ("query", "mass", "recent", "random")
"""how chunks are chosen"""


def slots_for(budget: int, extra: int) -> int:
    """Slots of a view, in whole pages."""
    return -(-(budget + extra) // PAGE) * PAGE


def check_budget(budget: int, chunk: int) -> None:
    """Raises :class:`~hasten.errors.ConfigurationError` for a budget that is not at least four whole chunks."""
    if chunk < 1:
        raise ConfigurationError(f"chunks of {chunk} tokens; give at least 1")
    if budget % chunk or budget < 4 * chunk:
        raise ConfigurationError(
            f"a budget of {budget} tokens is not four or more whole chunks of {chunk}; give a multiple of {chunk} from "
            f"{4 * chunk} on"
        )


def check_way(choose: str) -> None:
    """Raises :class:`~hasten.errors.ConfigurationError` for a way to choose chunks that is not known."""
    if choose not in WAYS:
        raise ConfigurationError(f"choose is {choose!r}; {', '.join(WAYS[:-1])} and {WAYS[-1]} are known")


class RetrievalView:
    """A view of one sequence's cache.

    Contract: ``build`` and ``extend`` read the cache that they are given and write the view; a view is valid as long as
    the tokens that it was made of stay the beginning of the sequence. Not thread-safe.
    """

    def __init__(
        self, cache: Any, table: Sequence[int], budget: int, chunk: int, choose: str = "query", follow: bool = False,
        scale: float | None = None,
    ) -> None:  # fmt: skip
        """``cache`` and ``table``: where the copies lie, pages of 16. ``choose``: query (mean keys), mass (attention),
        or recent or random chunks for comparison. ``follow``: with a chunk that the query likes goes the one behind.
        ``scale``: what attention scores are multiplied by, None for the root of the width.
        """
        check_budget(budget, chunk)
        check_way(choose)
        self.cache, self.table = cache, list(table)
        self.budget, self.chunk, self.choose, self.follow = budget, chunk, choose, follow
        self.scale = scale
        self.capacity = len(self.table) * PAGE
        self.filled = 0
        """slots in use"""
        self.end = 0
        """position of the next token"""
        self.built = 0
        """tokens of the sequence when the view was made"""
        self.looked = 0
        """tokens whose keys were read to choose, the last time"""
        self.kept: Tensor | None = None
        """chosen chunks (layers, kv_heads, chunks), for inspection"""
        self._means: Tensor | None = None  # (layers, kv_heads, chunks, width) of the chunks seen so far
        self._where = torch.tensor(self.table)

    def clear(self) -> None:
        """Forget the sequence."""
        self.filled = self.end = self.built = 0
        self._means = None

    def build(self, cache: Any, table: Sequence[int], length: int, queries: Sequence[Tensor]) -> None:
        """Choose among the first ``length`` tokens of a paged cache; ``queries`` (heads, width) of each layer."""
        chunk, whole = self.chunk, length // self.chunk
        tail = length - whole * chunk
        wanted = min(whole, (self.budget - tail) // chunk)
        where = torch.as_tensor(table)[: -(-length // cache.block_size)]
        layers, _, kv_heads, _, _ = cache.keys.shape
        self.looked = 0
        if self.choose in ("query", "mass"):
            scores = (self._by_mean if self.choose == "query" else self._by_mass)(cache, where, whole, queries)
            if self.follow:
                scores[..., 1:] = torch.maximum(scores[..., 1:], scores[..., :-1])
        elif self.choose == "recent":
            scores = torch.arange(whole, dtype=torch.float32).expand(layers, kv_heads, whole).clone()
        else:
            scores = torch.rand(layers, kv_heads, whole, generator=torch.Generator().manual_seed(0))
        scores[..., 0] = torch.inf
        scores[..., -1] = torch.inf
        best = scores.topk(wanted, dim=2).indices.sort(dim=2).values
        self.kept = best
        slots = (best[..., None] * chunk + torch.arange(chunk)).flatten(2)
        slots = torch.cat([slots, torch.arange(whole * chunk, length).expand(layers, kv_heads, tail)], 2)
        count = slots.shape[2]
        layer = torch.arange(layers)[:, None, None]
        head = torch.arange(kv_heads)[None, :, None]
        target = torch.arange(count).expand(layers, kv_heads, count)
        for half, source in self._halves(cache):
            some = source[layer, where[slots // cache.block_size], head, slots % cache.block_size]
            half[layer, self._where[target // PAGE], head, target % PAGE] = some
        self.filled, self.end, self.built = count, length, length

    def _by_mean(self, cache: Any, where: Tensor, whole: int, queries: Sequence[Tensor]) -> Tensor:
        """Products of queries and mean keys (layers, kv_heads, chunks)."""
        means = self._all_means(cache, where, whole)
        layers, kv_heads, _, width = means.shape
        query = torch.stack([q.float() for q in queries]).view(layers, kv_heads, -1, width).sum(2)
        return torch.einsum("lkw,lkcw->lkc", query, means)

    def _by_mass(self, cache: Any, where: Tensor, whole: int, queries: Sequence[Tensor]) -> Tensor:
        """Attention that the queries pay to each chunk (layers, kv_heads, chunks); reads all keys, once per view."""
        self.looked = whole * self.chunk
        found = []
        for keys, query in zip(cache.keys, queries, strict=True):
            line = widened(keys.index_select(0, where)).transpose(0, 1).flatten(1, 2)[:, : whole * self.chunk]
            scale = line.shape[2] ** -0.5 if self.scale is None else self.scale
            logits = query.float().view(line.shape[0], -1, line.shape[2]) @ line.transpose(1, 2) * scale
            found.append(logits.softmax(2).unflatten(2, (whole, self.chunk)).sum(3).sum(1))
        return torch.stack(found)

    def _all_means(self, cache: Any, where: Tensor, whole: int) -> Tensor:
        """Mean keys of the first ``whole`` chunks; those of older chunks are kept from the last time."""
        known = 0 if self._means is None else self._means.shape[2]
        if self._means is None or known < whole:
            size, chunk = cache.block_size, self.chunk
            self.looked = (whole - known) * chunk
            first = known * chunk // size
            pages = cache.keys[:, where[first : -(-whole * chunk // size)]]  # (layers, pages, kv_heads, size, width)
            line = pages.transpose(1, 2).flatten(2, 3)[:, :, known * chunk - first * size :]
            line = line[:, :, : (whole - known) * chunk]
            new = widened(line).unflatten(2, (whole - known, chunk)).mean(3)
            self._means = new if self._means is None else torch.cat([self._means, new], 2)
        return self._means[:, :, :whole]

    def _halves(self, cache: Any) -> list[tuple[Tensor, Tensor]]:
        pairs = [(self.cache.keys, cache.keys)]
        if cache.keys.data_ptr() != cache.values.data_ptr():
            pairs.append((self.cache.values, cache.values))
        return pairs

    def extend(self, cache: Any, table: Sequence[int], end: int) -> None:
        """Copy the exact keys and values of the tokens up to ``end``, which the target has verified."""
        count = end - self.end
        if count <= 0:
            return
        source = torch.arange(self.end, end)
        target = torch.arange(self.filled, self.filled + count)
        blocks = torch.tensor([table[i // cache.block_size] for i in range(self.end, end)])
        for half, old in self._halves(cache):
            half[:, self._where[target // PAGE], :, target % PAGE] = old[:, blocks, :, source % cache.block_size]
        self.filled += count
        self.end = end

    def room(self, extra: int) -> bool:
        """Whether so many more tokens fit."""
        return self.filled + extra <= self.capacity


def draft_batch(rows: Sequence[tuple[RetrievalView, Sequence[int], int]]) -> RaggedBatch:
    """Tokens over views, as (view, tokens, tokens between the view's end and the first); all logits are wanted."""
    batch = RaggedBatch.build([(tokens, view.filled + ahead, view.table) for view, tokens, ahead in rows], "all")
    shift = [view.end - view.filled for view, tokens, _ in rows for _ in tokens]
    positions = batch.positions + torch.tensor(shift, dtype=torch.int32)
    return batch.placed(positions)
