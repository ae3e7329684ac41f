"""TriForce for an engine: the model drafts for itself over the part of its cache that matters, many sequences at once.

"TriForce: Lossless Acceleration of Long Sequence Generation with Hierarchical Speculative Decoding", Sun et al. 2024,
arXiv:2404.11912. Three levels: a cheap proposer guesses, the model over a :class:`RetrievalView` says which of these it
would choose itself (the coupled rule, with the sequence's own seed), and what it chose is what the engine verifies over
the whole cache. A pass of the middle level costs the weights and ``budget`` keys instead of the whole context.
Differs from the paper in: all levels choose by the coupled rule, so every token is that of plain decoding; chunks are
chosen by attention unless ``choose="query", follow=False``. See :mod:`triforce` for the rejection rule, one sequence.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from hasten.errors import ConfigurationError
from hasten.language.ragged import RaggedBatch
from hasten.language.sampling import Sampler, SamplingState
from hasten.language.speculate.proposal import Ask, Calibration, Host, Proposal, Proposer
from hasten.language.speculate.verify import accept_chain
from hasten.language.speculate.view import PAGE, RetrievalView, check_budget, check_way, draft_batch, slots_for

__all__ = ["RetrievalProposer", "Windowed"]

_BINS = 20


class Windowed:
    """A proposer that sees the first tokens and the most recent ones: a small model reads no long context.

    The window slides by its own length at a time, so that a model's cache is of use in between.

    >>> from hasten.language.speculate.lookup import PromptLookup
    >>> Windowed(PromptLookup(), sinks=2, window=4).propose([Ask(0, np.array([1, 2, 7, 8, 7, 8, 7]), 1)])[0].tokens
    (8,)
    """

    def __init__(self, proposer: Proposer, *, sinks: int = 16, window: int = 240) -> None:
        if sinks < 0 or window < 1:
            raise ConfigurationError(f"{sinks} first tokens and a window of {window}; give at least 0 and 1")
        self.proposer, self.sinks, self.window = proposer, sinks, window
        self._from: dict[int, int] = {}

    @property
    def name(self) -> str:
        return self.proposer.name

    def propose(self, asks: Sequence[Ask]) -> list[Proposal]:
        short = []
        for ask in asks:
            known = len(ask.tokens)
            tokens = ask.tokens
            if known > self.sinks + 2 * self.window:
                start = self._from.get(ask.seq, 0)
                if not self.window <= known - start <= 2 * self.window:
                    start = self._from[ask.seq] = known - self.window
                tokens = np.concatenate([tokens[: self.sinks], tokens[start:]])
            short.append(Ask(ask.seq, tokens, ask.count, ask.state))
        return self.proposer.propose(short)

    def learn(self, proposal: Proposal, accepted: int) -> None:
        self.proposer.learn(proposal, accepted)

    def forget(self, seq: int) -> None:
        self._from.pop(seq, None)
        self.proposer.forget(seq)


@dataclass
class _Line:
    """One sequence that drafts."""

    ask: Ask
    view: RetrievalView
    index: int
    drafted: list[int] = field(default_factory=list)
    chances: list[float] = field(default_factory=list)
    held: int = 0
    running: float = 1.0

    @property
    def pending(self) -> list[int]:
        """Tokens that the view lacks: the last known one at first, then the last drafted one."""
        return [self.drafted[-1] if self.drafted else int(self.ask.tokens[-1])]


class RetrievalProposer:
    """Drafts with the engine's own model over a part of its cache.

    Needs an engine (``attach``); sequences of at most twice the budget get no guesses of it.
    """

    def __init__(
        self, inner: Proposer | None = None, *, budget: int = 512, chunk: int = 8, gamma: int = 8, ahead: int = 4,
        refresh: int = 128, least: float = 0.1, views: int = 8, choose: str = "mass", follow: bool = True,
    ) -> None:  # fmt: skip
        """``inner``: who guesses for the middle level; None leaves it to draft token by token.

        ``budget`` tokens of the cache in chunks of ``chunk``; ``gamma`` guesses at most, ``ahead`` of them by the inner
        level in one go. A view is made anew after ``refresh`` tokens. A draft less probable than ``least`` is not gone
        on with. ``views``: sequences that have one at a time. ``choose`` and ``follow``: as of :class:`TriForce`; query
        and False choose by mean keys, as published.
        """
        if gamma < 1 or ahead < 1 or refresh < 1 or views < 1:
            raise ConfigurationError("gamma, ahead, refresh and views must be at least 1")
        check_budget(budget, chunk)
        check_way(choose)
        self.choose, self.follow = choose, follow
        self.inner, self.budget, self.chunk, self.gamma = inner, budget, chunk, gamma
        self.ahead, self.refresh, self.least, self.views = ahead, refresh, least, views
        self.passes = self.built = 0
        self._host: Host | None = None
        self._views: OrderedDict[int, RetrievalView] = OrderedDict()
        self._free: list[list[int]] = []
        self._calibration = Calibration([(i + 0.5) / _BINS for i in range(_BINS)])

    @property
    def name(self) -> str:
        return "triforce"

    @property
    def most(self) -> int:
        """Guesses of one sequence at most."""
        return self.gamma

    @property
    def probe(self) -> int:
        """Guesses worth asking for once: the first pass costs as much as those that follow."""
        return self.gamma

    def attach(self, host: Host) -> None:
        """Take the engine's model and cache."""
        config = getattr(host.executor, "config", None)
        if config is None or getattr(config, "sliding_window", None) is not None:
            raise ConfigurationError(
                "the model attends through a sliding window already, or has no cache to retrieve from; "
                "leave triforce out"
            )
        if getattr(getattr(host.executor, "device", None), "type", "cpu") != "cpu":
            raise ConfigurationError("triforce runs on the CPU; on another device use a draft or ngram")
        pages = slots_for(self.budget, self.refresh + 2 * (self.gamma + self.ahead) + 8) // PAGE
        self._host = host
        self._scale = getattr(config, "attention_scale", None)
        self._cache = host.executor.new_cache(self.views * pages, PAGE)
        self._free = [list(range(i * pages, (i + 1) * pages)) for i in range(self.views)]
        self._views.clear()
        self._sampler = Sampler(int(host.executor.vocab_size))

    def propose(self, asks: Sequence[Ask]) -> list[Proposal]:
        assert self._host is not None, "attach an engine first"
        out = [Proposal()] * len(asks)
        lines = [_Line(ask, self._view(ask.seq), i) for i, ask in enumerate(asks)
                 if ask.count > 0 and len(ask.tokens) > 2 * self.budget][: self.views]  # fmt: skip
        self._renew(lines)
        lines = [line for line in lines if line.view.end and line.view.end <= len(line.ask.tokens) - 1]
        for line in lines:
            line.view.extend(self._host.cache, self._host.table(line.ask.seq), len(line.ask.tokens) - 1)
        live = lines
        while live:
            self._round(live)
            live = [line for line in live if len(line.drafted) < self._count(line) and line.running >= self.least]
        for line in lines:
            count = self._count(line)
            marks = tuple(min(int(c * _BINS), _BINS - 1) for c in line.chances[:count])
            survival, running = [], 1.0
            for mark in marks:
                running *= self._calibration.chance(mark)
                survival.append(running)
            out[line.index] = Proposal(tuple(line.drafted[:count]), tuple(survival), None, self.name, marks)
        return out

    def _count(self, line: _Line) -> int:
        return min(self.gamma, line.ask.count)

    def _view(self, seq: int) -> RetrievalView:
        if seq in self._views:
            self._views.move_to_end(seq)
            return self._views[seq]
        if not self._free:
            self.forget(next(iter(self._views)))
        table = self._free.pop()
        view = self._views[seq] = RetrievalView(
            self._cache, table, self.budget, self.chunk, self.choose, self.follow, self._scale
        )
        return view

    def _renew(self, lines: Sequence[_Line]) -> None:
        """Make views that are missing, old or full; a pass over the whole cache gives the queries.

        The pass computes the last known token where the engine computes it next, with the same result; where its block
        is not there yet, the old view has to do for one more step.
        """
        host = self._host
        assert host is not None
        due = []
        for line in lines:
            computed, view = len(line.ask.tokens) - 1, line.view
            old = view.end == 0 or computed - view.built >= self.refresh or view.end > computed
            table = host.table(line.ask.seq)
            if (old or not view.room(computed - view.end + 2 * self.gamma)) and computed < len(table) * host.block_size:
                due.append((line, computed, table))
            elif not view.room(computed - view.end + 2 * self.gamma):
                view.clear()
        if not due:
            return
        batch = RaggedBatch.build([([int(x.ask.tokens[-1])], at, table) for x, at, table in due])
        queries: list[torch.Tensor] = []
        host.executor.step(batch.watched(queries), host.cache)
        for row, (line, computed, table) in enumerate(due):
            line.view.build(host.cache, table, computed, [q[row] for q in queries])
        self.built += len(due)

    def _round(self, live: Sequence[_Line]) -> None:
        """One pass of the middle level: each sequence gains a token, and those that the inner level guessed right."""
        guesses = self._inner(live)
        rows = [(x.view, [*x.pending, *g], x.held) for x, g in zip(live, guesses, strict=True)]
        assert self._host is not None
        logits = self._host.executor.step(draft_batch(rows), self._cache)
        self.passes += 1
        states: list[SamplingState] = []
        for line, guess in zip(live, guesses, strict=True):
            state = line.ask.state or _greedy()
            states += [state.ahead([*line.drafted, *guess[:i]]) for i in range(len(guess) + 1)]
        chosen = self._sampler.sample(logits, states).tokens
        own = logits[torch.arange(len(chosen)), torch.tensor(chosen)]
        chances = torch.exp(own - logits.logsumexp(1)).tolist()
        at = 0
        for line, guess in zip(live, guesses, strict=True):
            count = len(guess) + 1
            mine, sure = chosen[at : at + count], chances[at : at + count]
            stood = accept_chain(guess, mine)
            line.drafted += mine[: stood + 1]
            line.chances += sure[: stood + 1]
            line.running *= float(np.prod(sure[: stood + 1]))
            line.held += 1 + stood
            at += count
        for proposal, line_stood in self._asked(live, guesses, chosen):
            assert self.inner is not None
            self.inner.learn(proposal, line_stood)

    def _inner(self, live: Sequence[_Line]) -> list[list[int]]:
        self._proposals: list[Proposal] = [Proposal()] * len(live)
        if self.inner is not None:
            asks = []
            for line in live:
                known = line.ask.tokens
                text: NDArray[np.int64] = np.concatenate([known, line.drafted]) if line.drafted else known
                room = self._count(line) - len(line.drafted) - 1
                asks.append(Ask(line.ask.seq, text.astype(np.int64, copy=False), min(self.ahead, room)))
            some = [i for i, ask in enumerate(asks) if ask.count > 0]
            for i, proposal in zip(some, self.inner.propose([asks[i] for i in some]) if some else [], strict=True):
                self._proposals[i] = proposal if proposal.parents is None else Proposal()
        return [list(p.tokens) for p in self._proposals]

    def _asked(
        self, live: Sequence[_Line], guesses: Sequence[list[int]], chosen: Sequence[int]
    ) -> list[tuple[Proposal, int]]:
        out, at = [], 0
        for proposal, guess in zip(self._proposals, guesses, strict=True):
            if guess:
                out.append((proposal, accept_chain(guess, chosen[at : at + len(guess) + 1])))
            at += len(guess) + 1
        return out

    def learn(self, proposal: Proposal, accepted: int) -> None:
        for place, mark in enumerate(proposal.marks[: accepted + 1]):
            self._calibration.learn(mark, place < accepted)

    def forget(self, seq: int) -> None:
        view = self._views.pop(seq, None)
        if view is not None:
            self._free.append(view.table)
        if self.inner is not None:
            self.inner.forget(seq)


def _greedy() -> Any:
    from hasten.language.params import SamplingParams

    return SamplingState(SamplingParams(temperature=0.0), 0, (), 1)
