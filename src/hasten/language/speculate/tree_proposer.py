"""A draft grows trees for many sequences together: the form of DySpec that an engine asks.

A node's value is the chance that it and all its ancestors stand, the product of what the draft gives each (after
calibration: how often guesses of such a probability stood). The tree is the ``budget`` best nodes of all. Values fall
along a branch, so a round that runs the draft behind every node among the best found so far, until none is new, finds
exactly those; one call of the draft per round serves all sequences. Tokens are chosen, not drawn: the engine verifies
by the coupled rule. See :mod:`dyspec` for the publication and for trees that are drawn.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from hasten.errors import ConfigurationError, OutOfBlocksError
from hasten.language.cache import BlockPool
from hasten.language.forks import Fork
from hasten.language.ragged import RaggedBatch
from hasten.language.speculate.draft import claim
from hasten.language.speculate.proposal import Ask, Calibration, Host, Proposal

__all__ = ["TreeProposer"]

_BINS = 20
_SIZE = 16
_BRANCHES = -1


class _Growth:
    """One tree under way."""

    def __init__(self, fork: Fork, budget: int) -> None:
        self.fork, self.budget = fork, budget
        self.tokens: list[int] = []
        self.parents: list[int] = []
        self.values: list[float] = []
        self.marks: list[int] = []
        self.numbers: dict[int, int] = {}  # candidate -> its node in the fork, once the draft has run behind it

    def offer(self, parent: int, tokens: list[int], marks: list[int], chances: list[float]) -> None:
        """Candidates below one that was expanded (-1: below the last known token)."""
        above = 1.0 if parent < 0 else self.values[parent]
        self.tokens += tokens
        self.marks += marks
        self.parents += [parent] * len(tokens)
        self.values += [above * c for c in chances]

    def best(self) -> list[int]:
        """The best candidates, parents before children."""
        order = sorted(range(len(self.values)), key=lambda i: -self.values[i])  # stable, and parents are older
        return order[: self.budget]

    def proposal(self, name: str) -> Proposal:
        chosen = self.best()
        place = {old: new for new, old in enumerate(chosen)}
        return Proposal(
            tuple(self.tokens[i] for i in chosen),
            tuple(self.values[i] for i in chosen),
            tuple(place.get(self.parents[i], -1) for i in chosen),
            name,
            tuple(self.marks[i] for i in chosen),
        )


class TreeProposer:
    """Trees of a smaller model.

    >>> from hasten.language import load
    >>> trees = TreeProposer(load("pycode-draft-0.7m"), budget=6)
    >>> found = trees.propose([Ask(0, np.array([5, 6, 7]), 6)])[0]
    >>> len(found.tokens), found.parents[0]
    (6, -1)
    """

    def __init__(self, draft: Any, *, budget: int = 12, branches: int = 4, depth: int = 8, num_blocks: int = 0) -> None:
        """``draft``: a language model. ``budget``: guesses of a sequence. ``branches``: candidates below a node.

        ``depth``: calls of the draft at most, and so tokens of a branch. ``num_blocks`` of its cache: by default enough
        for eight full contexts.
        """
        if budget < 1 or branches < 1 or depth < 1:
            raise ConfigurationError(
                f"a tree of {budget} guesses, {branches} branches, {depth} deep; give at least 1 of each"
            )
        self.budget, self.branches, self.depth = budget, branches, depth
        self.vocab_size = int(draft.config.vocab_size)
        self._executor = draft.executor
        self.context = int(self._executor.max_context)
        blocks = num_blocks or 8 * (-(-self.context // _SIZE)) + 2 * budget
        self._pool = BlockPool(blocks, _SIZE)
        self._pool.open(_BRANCHES, ())
        self._cache = self._executor.new_cache(blocks, _SIZE)
        self._done: OrderedDict[int, NDArray[np.int64]] = OrderedDict()
        self._calibration = Calibration([(i + 0.5) / _BINS for i in range(_BINS)])

    @property
    def name(self) -> str:
        return "tree"

    @property
    def most(self) -> int:
        """Guesses of one sequence at most."""
        return self.budget

    @property
    def probe(self) -> int:
        """Guesses worth asking for once."""
        return self.budget

    def attach(self, host: Host) -> None:
        """Refuse a cache that could never hold the tree beside its sequence."""
        pages = self.budget * (1 + (self.depth + host.block_size - 2) // host.block_size)
        if pages >= host.num_blocks:
            raise ConfigurationError(
                f"a tree of {self.budget} guesses takes up to {pages} blocks beside those of its sequence and the "
                f"cache has {host.num_blocks}; choose a smaller tree, or give the cache more blocks"
            )

    def propose(self, asks: Sequence[Ask]) -> list[Proposal]:
        out = [Proposal()] * len(asks)
        live: list[tuple[int, _Growth]] = []
        pieces: list[tuple[list[int], int, list[int]]] = []
        for i, ask in enumerate(asks):
            if ask.count < 1 or len(ask.tokens) + self.depth + 1 > self.context:
                continue
            try:
                done = claim(self._pool, self._done, ask, 0, self.forget)
            except OutOfBlocksError:
                continue
            table = self._pool.table(ask.seq)
            fork = Fork(len(ask.tokens), table, _SIZE, self._take)
            live.append((i, _Growth(fork, min(ask.count, self.budget))))
            pieces.append((ask.tokens[done:].tolist(), done, table))
        if not live:
            return out
        self._offer([(growth, -1) for _, growth in live], self._executor.step(RaggedBatch.build(pieces), self._cache))
        try:
            for _ in range(self.depth - 1):
                rows = [(g, c) for _, g in live for c in g.best() if c not in g.numbers]
                if not rows:
                    break
                self._offer(rows, self._run(rows))
        except OutOfBlocksError:
            pass  # what has grown so far is a tree too
        finally:
            self._pool.shrink(_BRANCHES, 0)
        for i, growth in live:
            out[i] = growth.proposal(self.name)
            self._done[asks[i].seq] = asks[i].tokens
            self._pool.commit(asks[i].seq, asks[i].tokens)
        return out

    def _take(self) -> int:
        held = self._pool.table(_BRANCHES)
        self._pool.grow(_BRANCHES, (len(held) + 1) * _SIZE)
        return held[-1]

    def _run(self, rows: Sequence[tuple[_Growth, int]]) -> torch.Tensor:
        """Logits of the draft behind candidates, each seeing its own branch."""
        starts, tables, copies, tokens = [], [], [], []
        for growth, candidate in rows:
            fork, parent = growth.fork, growth.parents[candidate]
            node = fork.add(growth.numbers[parent] if parent >= 0 else -1)
            growth.numbers[candidate] = node
            tokens.append(growth.tokens[candidate])
            starts += fork.contexts([node])
            tables.append([*fork.table[: fork.first], *fork.own(node)])
            copies.append(fork.copies([node]))
        batch = RaggedBatch.build([([t], s, b) for t, s, b in zip(tokens, starts, tables, strict=True)])
        batch = batch.with_copies(torch.from_numpy(np.concatenate(copies)))
        logits: torch.Tensor = self._executor.step(batch, self._cache)
        return logits

    def _offer(self, rows: Sequence[tuple[_Growth, int]], logits: torch.Tensor) -> None:
        top, tokens = logits.topk(min(self.branches, logits.shape[1]), 1)
        chances = torch.exp(top - logits.logsumexp(1, keepdim=True))
        marks = (chances * _BINS).long().clamp_(max=_BINS - 1).tolist()
        chance = [self._calibration.chance(mark) for mark in range(_BINS)]
        for (growth, candidate), some, classes in zip(rows, tokens.tolist(), marks, strict=True):
            growth.offer(candidate, some, classes, [chance[m] for m in classes])
            if candidate < 0:
                growth.numbers.clear()

    def learn(self, proposal: Proposal, accepted: int) -> None:
        self.learn_path(proposal, range(accepted))

    def learn_path(self, proposal: Proposal, path: Sequence[int]) -> None:
        """Nodes that stood; their siblings and the children of the last one did not."""
        seen = {-1, *path}
        stood = set(path)
        parents = proposal.parents or tuple(range(-1, len(proposal.tokens) - 1))
        for node, (parent, mark) in enumerate(zip(parents, proposal.marks, strict=True)):
            if parent in seen:
                self._calibration.learn(mark, node in stood)

    def forget(self, seq: int) -> None:
        if seq in self._done:
            del self._done[seq]
            self._pool.free(seq)
