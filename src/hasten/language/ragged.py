"""One ragged batch: chunks of many sequences, laid end to end, for one forward.

There is no prefill and no decode: a chunk of 500 prompt tokens and a chunk of one generated token are rows of the same
matrix. Queries of a chunk see the ``context`` tokens of their sequence that the paged cache already holds, and the
earlier positions of their own chunk.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from hasten.language.placement import Placement

__all__ = ["RaggedBatch"]


@dataclass(frozen=True)
class RaggedBatch:
    """The tensors of one step; all on the CPU, int32 where the kernels read them."""

    tokens: Tensor
    """(tokens,) int64: token ids of all chunks, end to end"""
    positions: Tensor
    """(tokens,) int32: position of each token in its sequence"""
    starts: Tensor
    """(chunks + 1,) int32: where each chunk begins in ``tokens``; the last entry is the number of tokens"""
    contexts: Tensor
    """(chunks,) int32: tokens of the sequence that are already in the cache"""
    block_tables: Tensor
    """(chunks, blocks) int32: cache blocks of each sequence, in order; unused entries are 0"""
    logit_rows: Tensor
    """(rows,) int64: which tokens' logits are wanted, as indices into ``tokens``"""
    placement: Placement | None = None
    """for trees of guesses and caches with gaps: slots and lines of sight of the rows; CPU only"""
    places: Tensor | None = None
    """(tokens,) int32: slot of each token along its block table, and the last one that it sees, where that is not its
    position: a cache that lacks some positions; CPU only"""
    copies: Tensor | None = None
    """(n, 4) int32 of (block, slot) -> (block, slot): keys and values that every layer copies once those of the batch
    are written and before anybody looks; for rows whose past is partly another row's; CPU only"""
    queries: list[Tensor] | None = None
    """a list here receives the queries (tokens, heads, width) of every layer, in order; CPU only"""

    @classmethod
    def build(
        cls,
        chunks: Sequence[tuple[Sequence[int], int, Sequence[int]]],
        logits: Sequence[bool] | str = "last",
    ) -> RaggedBatch:
        """Lay out chunks given as ``(token ids, tokens already in the cache, block table)``.

        ``logits``: ``"last"`` for the last token of every chunk, ``"all"`` for every token, or one flag per chunk that
        says whether its last token's logits are wanted.
        """
        ids: list[int] = []
        positions: list[int] = []
        starts = [0]
        contexts: list[int] = []
        for tokens, context, _ in chunks:
            ids.extend(tokens)
            positions.extend(range(context, context + len(tokens)))
            starts.append(len(ids))
            contexts.append(context)
        width = max((len(table) for _, _, table in chunks), default=0)
        tables = np.zeros((len(chunks), width), np.int32)
        for row, (_, _, table) in zip(tables, chunks, strict=True):
            row[: len(table)] = table
        if logits == "all":
            rows = list(range(len(ids)))
        elif logits == "last":
            rows = [s - 1 for s in starts[1:]]
        else:
            rows = [s - 1 for s, wanted in zip(starts[1:], logits, strict=True) if wanted]
        return cls(
            tokens=_tensor(ids, np.int64),
            positions=_tensor(positions, np.int32),
            starts=_tensor(starts, np.int32),
            contexts=_tensor(contexts, np.int32),
            block_tables=torch.from_numpy(tables),
            logit_rows=_tensor(rows, np.int64),
        )

    @property
    def num_tokens(self) -> int:
        return self.tokens.shape[0]

    @property
    def num_chunks(self) -> int:
        return self.contexts.shape[0]

    def with_copies(self, copies: Tensor) -> RaggedBatch:
        """The same batch with ``copies``."""
        return replace(self, copies=copies)

    def placed(self, positions: Tensor) -> RaggedBatch:
        """The same tokens in the same slots, at other positions."""
        return replace(self, positions=positions, places=self.positions)

    def watched(self, queries: list[Tensor]) -> RaggedBatch:
        """The same batch, whose queries are put into a list."""
        return replace(self, queries=queries)

    @property
    def special(self) -> bool:
        """Whether rows are placed, copied or looked at as only the CPU does it."""
        return not (self.placement is None and self.places is None and self.copies is None and self.queries is None)


def _tensor(values: list[int], kind: Any) -> Tensor:
    return torch.from_numpy(np.array(values, kind))  # in half the time of torch.tensor, and this is done every step
