"""One sequence on one executor: its cache, and passes over chains and trees that can be taken back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hasten.errors import ContextLengthError
from hasten.language.placement import Placement, tree_placement
from hasten.language.ragged import RaggedBatch

__all__ = ["Session"]

_BLOCK = 16


class Session:
    """A private cache for ``capacity`` tokens.

    ``done`` tokens are in the cache; whoever owns the session moves it back to drop what did not stand. Counts passes,
    rows, and bytes read (weights and the keys and values of the context, once per pass).
    """

    def __init__(self, executor: Any, capacity: int) -> None:
        if capacity > executor.max_context + 256:
            raise ContextLengthError(
                f"{capacity} tokens were asked for, this model takes {executor.max_context}; shorten prompt or answer"
            )
        self.executor = executor
        self.capacity = capacity
        blocks = -(-capacity // _BLOCK)
        self.cache = executor.new_cache(blocks, _BLOCK)
        self.table = list(range(blocks))
        self.done = 0
        self.passes = 0
        self.bytes_read = 0

    def _count(self, context: int, rows: int) -> None:
        self.passes += 1
        self.bytes_read += self.executor.weight_bytes + (context + rows) * self.executor.bytes_per_token

    def need(self, rows: int) -> None:
        """Raises :class:`~hasten.errors.ContextLengthError` where ``rows`` more do not fit behind ``done``."""
        if self.done + rows > self.capacity:
            raise ContextLengthError(
                f"{rows} tokens and guesses behind {self.done} tokens do not fit into a cache for {self.capacity}; "
                "choose a smaller tree, or a shorter prompt or answer"
            )

    def feed(self, tokens: Sequence[int], *, every: bool = False, piece: int = 512) -> Tensor:
        """Compute tokens behind ``done``; logits of the last (1, vocabulary), or of every row."""
        assert tokens, "no token to compute"
        self.need(len(tokens))
        parts: list[Tensor] = []
        for begin in range(0, len(tokens), piece):
            part = tokens[begin : begin + piece]
            batch = RaggedBatch.build([(part, self.done, self.table)], "all" if every else "last")
            logits = self.executor.step(batch, self.cache)
            parts = [*parts, logits] if every else [logits]
            self._count(self.done, len(part))
            self.done += len(part)
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def check(self, pending: Sequence[int], parents: Sequence[int], tokens: Sequence[int], first: int = 0) -> Tensor:
        """Compute pending tokens, then nodes ``first`` on of a tree that hangs on the last of them.

        Logits (pending + nodes, vocabulary). ``done`` does not move: ``keep`` says what stands. With ``first`` above 0
        nothing is pending and earlier nodes are in the cache behind ``done``.
        """
        count = len(pending)
        self.need(count + len(tokens))
        context = self.done + count
        positions, slots, lines = tree_placement(context, parents, first)
        head = list(range(self.done, context))
        lines = [head[: i + 1] for i in range(count)] + [head + line for line in lines]
        batch = RaggedBatch.build([([*pending, *tokens[first:]], self.done, self.table)], "all")
        placed = RaggedBatch(
            batch.tokens, torch.tensor(head + positions, dtype=torch.int32), batch.starts, batch.contexts,
            batch.block_tables, batch.logit_rows, Placement.of(head + slots, lines),
        )  # fmt: skip
        logits: Tensor = self.executor.step(placed, self.cache)
        self._count(self.done, count + len(tokens) - first)
        return logits

    def keep(self, pending: int, nodes: Sequence[int]) -> None:
        """``pending`` tokens and these nodes (growing) of the tree behind them stand."""
        self.done += pending
        self.executor.keep(self.cache, self.table, self.done, nodes)
        self.done += len(nodes)
