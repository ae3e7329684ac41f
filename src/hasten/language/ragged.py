"""One ragged batch: chunks of many sequences, laid end to end, for one forward.

There is no prefill and no decode: a chunk of 500 prompt tokens and a chunk of one generated token are rows of the same
matrix. Queries of a chunk see the ``context`` tokens of their sequence that the paged cache already holds, and the
earlier positions of their own chunk.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

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
        tables = [list(table) + [0] * (width - len(table)) for _, _, table in chunks]
        if logits == "all":
            rows = list(range(len(ids)))
        elif logits == "last":
            rows = [s - 1 for s in starts[1:]]
        else:
            rows = [s - 1 for s, wanted in zip(starts[1:], logits, strict=True) if wanted]
        return cls(
            tokens=torch.tensor(ids, dtype=torch.int64),
            positions=torch.tensor(positions, dtype=torch.int32),
            starts=torch.tensor(starts, dtype=torch.int32),
            contexts=torch.tensor(contexts, dtype=torch.int32),
            block_tables=torch.tensor(tables, dtype=torch.int32).reshape(len(chunks), width),
            logit_rows=torch.tensor(rows, dtype=torch.int64),
        )

    @property
    def num_tokens(self) -> int:
        return self.tokens.shape[0]

    @property
    def num_chunks(self) -> int:
        return self.contexts.shape[0]
