"""Lays out the chunks of a step as one ragged batch, in buffers that are used again.

A running sequence owns a row of the block-table matrix, and only the blocks that are new are written there. The tensors
of a batch share memory with the buffers: they are valid until the next ``build``.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from hasten.language.forks import Fork
from hasten.language.ragged import RaggedBatch

__all__ = ["BatchLayout"]


class BatchLayout:
    """Buffers for at most ``max_blocks`` blocks per sequence; rows and tokens grow as needed.

    >>> layout = BatchLayout(max_blocks=4)
    >>> slot = layout.open()
    >>> layout.extend(slot, 0, [7])
    >>> layout.build([np.array([5, 6])], [0], [slot], [1], 1).block_tables.tolist()
    [[7]]
    """

    def __init__(self, max_blocks: int) -> None:
        self._tables = np.zeros((16, max_blocks), dtype=np.int32)
        self._free = list(range(15, -1, -1))
        self._reserve(512)

    def _reserve(self, tokens: int) -> None:
        self._tokens = np.zeros(tokens, dtype=np.int64)
        self._positions = np.zeros(tokens, dtype=np.int32)
        self._arange = np.arange(tokens + 1, dtype=np.int32)

    def open(self) -> int:
        """A row for a sequence."""
        if not self._free:
            rows = self._tables.shape[0]
            self._tables = np.concatenate([self._tables, np.zeros_like(self._tables)])
            self._free = list(range(2 * rows - 1, rows - 1, -1))
        return self._free.pop()

    def close(self, slot: int) -> None:
        """Give the row back."""
        self._free.append(slot)

    def extend(self, slot: int, begin: int, blocks: Sequence[int]) -> None:
        """Write the blocks of a sequence from its ``begin``-th on."""
        self._tables[slot, begin : begin + len(blocks)] = blocks

    def build_decode(self, tokens: list[int], contexts: list[int], slots: list[int], width: int) -> RaggedBatch:
        """The batch where every chunk is one token and all logits are wanted; ``width`` is the longest block table."""
        count = len(tokens)
        if count > self._tokens.shape[0]:
            self._reserve(2 * count)
        ids = self._tokens[:count]
        ids[:] = tokens
        positions = self._positions[:count]
        positions[:] = contexts
        where = torch.from_numpy(positions)
        return RaggedBatch(
            tokens=torch.from_numpy(ids),
            positions=where,
            starts=torch.from_numpy(self._arange[: count + 1]),
            contexts=where,
            block_tables=torch.from_numpy(self._tables[slots, :width]),
            logit_rows=torch.arange(count),
        )

    def build(
        self,
        pieces: Sequence[np.ndarray],
        contexts: Sequence[int],
        slots: Sequence[int],
        rows: Sequence[int],
        width: int,
    ) -> RaggedBatch:
        """Token ids of every chunk, tokens before it, its row, and the wanted rows as indices into all tokens."""
        return self._batch(pieces, contexts, rows, self._tables[list(slots), :width])

    def build_forked(
        self,
        pieces: Sequence[np.ndarray],
        contexts: Sequence[int],
        slots: Sequence[int],
        rows: Sequence[int],
        width: int,
        forks: Sequence[Fork | None],
    ) -> RaggedBatch:
        """As :meth:`build`; where there is a fork, its nodes are the last tokens of the piece, each a chunk of its own
        that sees its own branch."""
        parts: list[np.ndarray] = []
        before: list[int] = []
        owners: list[int] = []
        own: list[tuple[int, Fork, list[int]]] = []
        for piece, context, slot, fork in zip(pieces, contexts, slots, forks, strict=True):
            if fork is None:
                parts.append(piece)
                before.append(context)
                owners.append(slot)
                continue
            known = fork.context - context
            nodes = list(range(len(piece) - known))
            own.append((len(parts) + 1, fork, nodes))
            parts += [piece[:known], *(piece[known + n : known + n + 1] for n in nodes)]
            before += [context, *fork.contexts(nodes)]
            owners += [slot] * (1 + len(nodes))
        pages = [fork.pages(nodes) for _, fork, nodes in own]
        most = max(fork.first + p.shape[1] for (_, fork, _), p in zip(own, pages, strict=True))
        tables = np.zeros((len(parts), max(width, most)), np.int32)
        tables[:, :width] = self._tables[owners, :width]
        for (at, fork, nodes), p in zip(own, pages, strict=True):
            tables[at : at + len(nodes), fork.first : fork.first + p.shape[1]] = p
        copies = np.concatenate([fork.copies(nodes) for _, fork, nodes in own])
        return self._batch(parts, before, rows, tables).with_copies(torch.from_numpy(copies))

    def _batch(
        self, pieces: Sequence[np.ndarray], contexts: Sequence[int], rows: Sequence[int], tables: np.ndarray
    ) -> RaggedBatch:
        lengths = np.fromiter((len(p) for p in pieces), dtype=np.int32, count=len(pieces))
        starts = np.zeros(len(pieces) + 1, dtype=np.int32)
        np.cumsum(lengths, out=starts[1:])
        total = int(starts[-1])
        if total > self._tokens.shape[0]:
            self._reserve(2 * total)
        ids = self._tokens[:total]
        np.concatenate(pieces, out=ids)
        before = np.asarray(contexts, dtype=np.int32)
        positions = self._positions[:total]
        np.add(self._arange[:total], np.repeat(before - starts[:-1], lengths), out=positions)
        return RaggedBatch(
            tokens=torch.from_numpy(ids),
            positions=torch.from_numpy(positions),
            starts=torch.from_numpy(starts),
            contexts=torch.from_numpy(before),
            block_tables=torch.from_numpy(tables),
            logit_rows=torch.tensor(rows, dtype=torch.int64),
        )
