"""Speculation in a step: guesses join the plan, trees get pages, and the model's choices decide which guesses stand."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from hasten.clock import Clock
from hasten.errors import OutOfBlocksError
from hasten.language.forks import Fork
from hasten.language.sampling import Sampled, Sampler, SamplingState
from hasten.language.speculate.proposal import Proposal
from hasten.language.speculate.verify import accept_chain, accept_path
from hasten.serve.batch import StepPlan, blocks_for
from hasten.serve.request import Status
from hasten.serve.roster import Roster
from hasten.serve.speculation import Candidate, Speculator
from hasten.serve.track import Track, Work

__all__ = ["Guessing", "Verdict"]

_BRANCHES = -1
"""the "sequence" whose blocks are the pages of trees of guesses, for the length of one step"""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the model chose."""

    sampled: Sampled
    tracks: list[Track]
    """who gets a token; a sequence whose guesses stood occurs again"""
    rows: list[int]
    """of ``sampled``, one for each of ``tracks``"""
    work: list[Work]
    """what counts as computed: without the guesses that fell"""


class Guessing:
    """The speculating half of an engine; ``executor`` and ``cache`` are the engine's."""

    def __init__(self, speculator: Speculator, executor: Any, cache: Any, roster: Roster, limit: int) -> None:
        """``limit``: tokens that a sequence may have."""
        self.speculator = speculator
        self._executor = executor
        self._cache = cache
        self._roster = roster
        self._limit = limit
        roster.pool.open(_BRANCHES, ())

    def extend(self, plan: StepPlan, clock: Clock) -> tuple[StepPlan, dict[int, Proposal]]:
        """Guesses for the decodes of a plan, where that pays."""
        candidates = []
        pool = self._roster.pool
        free, size = pool.num_free, pool.block_size
        for chunk in plan.chunks:
            track = self._roster.tracks[chunk.seq]
            request = track.request
            free -= max(0, blocks_for(chunk.start + chunk.length, size) - request.blocks)
            if chunk.length != 1 or not request.decoding or request.status is not Status.RUNNING:
                continue
            left = request.max_tokens - request.generated - 1
            limit = min(left, self._limit - request.known - 1) if track.state.grammar is None else 0
            candidates.append(Candidate(chunk, request, track.tokens[: request.known], limit, track.state))
        return self.speculator.extend(plan, candidates, max(0, free), size, clock)

    def branch(self, work: list[Work], guesses: dict[int, Proposal]) -> dict[int, Fork]:
        """Pages for the branches of trees, out of the free blocks; a tree that finds none is left out."""
        forks: dict[int, Fork] = {}
        pool = self._roster.pool
        held, size = pool.table(_BRANCHES), pool.block_size

        def take() -> int:
            pool.grow(_BRANCHES, (len(held) + 1) * size)
            return held[-1]

        for index, (track, start, _) in enumerate(work):
            request = track.request
            proposal = guesses.get(request.seq)
            if proposal is None or proposal.parents is None:
                continue
            fork = Fork(request.known, pool.table(request.seq), size, take)
            before = len(held)
            try:
                for parent in proposal.parents:
                    fork.add(parent)
            except OutOfBlocksError:
                pool.shrink(_BRANCHES, before * size)
                del guesses[request.seq]
                work[index] = (track, start, request.known)
            else:
                forks[request.seq] = fork
        return forks

    def judge(
        self,
        work: list[Work],
        ready: list[tuple[Track, int]],
        logits: torch.Tensor,
        guesses: dict[int, Proposal],
        forks: dict[int, Fork],
        sampler: Sampler,
    ) -> Verdict:
        """Choose a token at every wanted row and keep the guesses that equal the choices.

        logits (rows, vocabulary); keys and values of branches that stand move to their sequence's own pages.
        """
        states: list[SamplingState] = []
        spans: list[tuple[int, int]] = []
        rows: list[int] = []
        for track, row in ready:
            proposal = guesses.get(track.request.seq)
            count = 0 if proposal is None else len(proposal.tokens)
            spans.append((len(rows), count))
            for place in range(count + 1):
                states.append(track.state.ahead(proposal.branch(place - 1)) if proposal is not None else track.state)
                rows.append(row + place)
        sampled = sampler.sample(logits if len(rows) == logits.shape[0] else logits[rows], states)
        tracks: list[Track] = []
        kept: list[int] = []
        gained: dict[int, int] = {}
        for (track, _), (first, count) in zip(ready, spans, strict=True):
            seq = track.request.seq
            proposal = guesses.get(seq)
            path = [] if proposal is None else self._stand(track, proposal, sampled, first, count, forks.get(seq))
            tracks += [track] * (len(path) + 1)
            kept += [first, *(first + 1 + n for n in path)]
            gained[seq] = len(path) + 1
        done = [
            (t, start, start + gained.get(t.request.seq, 0) if t.request.seq in guesses else end)
            for t, start, end in work
        ]
        return Verdict(sampled, tracks, kept, done)

    def _stand(
        self, track: Track, proposal: Proposal, sampled: Sampled, first: int, count: int, fork: Fork | None
    ) -> list[int]:
        """Indices of the guesses that stand; the choices are written behind the known tokens."""
        seq = track.request.seq
        chosen = sampled.tokens[first : first + count + 1]
        if proposal.parents is None:
            path = list(range(accept_chain(proposal.tokens, chosen)))
        else:
            path = accept_path(proposal.tokens, proposal.parents, chosen)
        if sampled.finite is not None:  # nothing stands behind a row that says nothing
            sound = [sampled.finite[first], *(sampled.finite[first + 1 + n] for n in path)]
            path = path[: sound.index(False)] if False in sound else path
        self.speculator.learn(seq, proposal, path)
        track.foresee([chosen[0], *(chosen[1 + n] for n in path)])
        if path and fork is not None:
            self._executor.move(self._cache, fork.kept(path[-1], self._roster.pool.table(seq)))
        return path

    def settle(self, ready: list[tuple[Track, int]], guesses: dict[int, Proposal], forks: dict[int, Fork]) -> None:
        """Give back the blocks of guesses that fell and the pages of branches."""
        pool = self._roster.pool
        for track, _ in ready:
            request = track.request
            if request.seq in guesses and request.status is Status.RUNNING:
                pool.shrink(request.seq, request.known)
                request.blocks = len(pool.table(request.seq))
        if forks:
            pool.shrink(_BRANCHES, 0)
