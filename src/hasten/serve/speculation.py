"""Speculation inside an engine: who guesses, how far, and what is learnt from it.

A plan's decodes become ``VERIFY`` chunks of one known token and some guesses. What a step costs is measured as it runs,
what a guess is worth is learnt from what stood (:mod:`~hasten.serve.guess_costs`), and a
:class:`~hasten.serve.policy.speculation.SpeculationPolicy` puts both together, twice: before guesses are made, so that
none is made in vain, and once they are there, when the proposer knows how good they are. The second look is harmless:
the engine verifies by the coupled rule, whose tokens do not depend on what was offered.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from hasten.clock import Clock
from hasten.language.speculate.proposal import Ask, FirstOf, Proposal, Proposer
from hasten.serve.batch import Chunk, ChunkKind, StepPlan, blocks_for
from hasten.serve.guess_costs import FIRST, SpeculationStats, Stage, StepTimes, towards
from hasten.serve.policy.speculation import (
    DraftCost,
    GoodputSpeculation,
    SpeculationObservation,
    SpeculationPolicy,
    StepCost,
)
from hasten.serve.request import Sequence as Request

if TYPE_CHECKING:
    from hasten.language.sampling import SamplingState

__all__ = ["Candidate", "Speculator"]

_TRIES = 8
"""calls of a proposer after which its price is believed"""
_PIECE = 32
"""prompt tokens in a step from which nothing is guessed: such a step is long, and guesses would wait in it"""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A decoding sequence that may be guessed for."""

    chunk: Chunk
    request: Request
    tokens: NDArray[np.int64]
    """its known tokens"""
    limit: int
    """guesses that are of any use to it"""
    state: SamplingState | None = None
    """how it chooses its tokens"""


class Speculator:
    """Turns decodes of a plan into verifications. Not thread-safe; one engine owns it."""

    def __init__(
        self,
        proposer: Proposer,
        policy: SpeculationPolicy | None = None,
        *,
        times: StepCost | None = None,
    ) -> None:
        self.proposer = proposer
        usual = GoodputSpeculation()
        most = max(usual.max_length, getattr(proposer, "most", 0))
        self.policy: SpeculationPolicy = policy or GoodputSpeculation(max_length=most)
        self.stats = SpeculationStats()
        self.times = times
        window = getattr(self.policy, "window", 100)
        parts = proposer.proposers if isinstance(proposer, FirstOf) else [proposer]
        self._stages = [Stage(part, window) for part in parts]
        self._by_name = {stage.proposer.name: stage for stage in self._stages}
        self._expected = 0.0
        self._extra = 0.0  # seconds per decode that a step with guesses takes beside its rows and its drafting
        self._drafted = 0.0
        self._asked: list[Stage] = []
        self._steps = 0
        self._plain: dict[int, tuple[float, int]] = {}  # rows -> seconds of plain steps (decaying), how many were seen

    def reset(self) -> None:
        """Forget counters, not what was learnt."""
        self.stats = SpeculationStats()

    def willing(self, decodes: int) -> bool:
        """Whether guessing is worth a look in this step; cheap, and said once per step.

        A proposer whose guesses have not paid, all costs counted, is left alone for a while that its losses decide.
        """
        if not isinstance(self.policy, GoodputSpeculation):
            return True
        if decodes > self.policy.most_sequences:
            self._asked = []
            return False
        # What a plain step takes must be seen, not believed: often at first, now and then later.
        self._steps += 1
        _, seen = self._plain.get(decodes, (0.0, 0))
        if self._steps % (4 if seen < 6 else 64) == 0:
            self._asked = []
            return False
        found = False
        for stage in self._stages:
            stage.since += 1
            # A probe may cost one per cent of the steps between two of them.
            pause = stage.price / max(0.01 * self._seconds(1), 1e-9)
            stage.asleep = stage.gain < 1.0 and stage.since < pause
            found = found or not stage.asleep
        return found

    def extend(
        self, plan: StepPlan, candidates: Sequence[Candidate], free_blocks: int, block_size: int, clock: Clock
    ) -> tuple[StepPlan, dict[int, Proposal]]:
        """The plan with verifications in place of decodes, and the guesses of each.

        ``free_blocks``: those that the plan leaves. Chunks that are no decodes stay as they are.
        """
        pieces = plan.num_tokens - len(candidates)
        if not candidates or pieces >= _PIECE:
            return plan, {}
        self.stats.steps += 1
        most, limits, free = self.policy.max_length, [], free_blocks
        for c in candidates:
            spare = c.request.blocks * block_size - c.request.known
            limit = min(most, c.limit)
            if limit > spare:
                limit = min(limit, max(spare, 0) + free * block_size)
                free -= max(0, blocks_for(limit - max(spare, 0), block_size))
            limits.append(max(0, limit))
        contexts = [c.request.computed for c in candidates]
        proposals: list[Proposal] = [_NONE] * len(candidates)
        left = [i for i, limit in enumerate(limits) if limit]
        self._drafted = 0.0
        self._asked = []
        for stage in self._stages:
            if not left:
                break
            if stage.asleep:
                continue
            left = self._ask(stage, candidates, contexts, limits, pieces, left, proposals, clock)
        out = {c.request.seq: p for c, p in zip(candidates, proposals, strict=True) if p.tokens}
        if not out:
            return plan, {}
        expected = len(candidates) + sum(sum(p.survival) for p in out.values())
        rows = plan.num_tokens + sum(len(p.tokens) for p in out.values())
        seconds = self._seconds(rows) + self._drafted + self._extra * len(candidates)
        self._expected = expected / seconds if seconds > 0 else 0.0
        chunks = tuple(
            Chunk(c.seq, c.start, c.length + len(out[c.seq].tokens), ChunkKind.VERIFY) if c.seq in out else c
            for c in plan.chunks
        )
        return StepPlan(chunks, plan.preempt), out

    def _seconds(self, rows: int) -> float:
        if self.times is None:
            return 0.0
        if isinstance(self.times, StepTimes):
            return self.times.at(rows)
        return float(self.times.times(np.array([[0.0, 0, rows, 0, 0]]))[0])

    def _ask(
        self, stage: Stage, candidates: Sequence[Candidate], contexts: list[int], limits: list[int], pieces: int,
        left: list[int], proposals: list[Proposal], clock: Clock,
    ) -> list[int]:  # fmt: skip
        """Ask one proposer for the sequences that are left, where that pays; those that still are."""
        policy, goodput = self.policy, isinstance(self.policy, GoodputSpeculation)
        lengths = [limits[i] for i in left]
        probing = False
        if goodput:
            alphas = [stage.acceptance.alpha(candidates[i].request.seq) for i in left]
            step = self._seconds(len(candidates) + pieces)
            if stage.calls > _TRIES and stage.call + stage.token > 0.01 * step:  # it costs: only where it pays
                found = self._decide(alphas, [contexts[i] for i in left], len(candidates) - len(left), pieces, lengths,
                                     None, DraftCost(fixed=stage.call, per_token=stage.token))  # fmt: skip
                if not any(found):
                    if stage.since < policy.probe_every:  # type: ignore[attr-defined]
                        return left
                    found, probing = [min(stage.probe, n) for n in lengths], True
                lengths = found
        stage.since = 0
        asked = [i for i, n in zip(left, lengths, strict=True) if n]
        began = clock.now()
        asks = [
            Ask(candidates[i].request.seq, candidates[i].tokens, n, candidates[i].state)
            for i, n in zip(left, lengths, strict=True)
            if n
        ]
        answers = stage.proposer.propose(asks)
        spent = clock.now() - began
        self._drafted += spent
        self._asked.append(stage)
        stage.note(spent, sum(len(p.tokens) for p in answers))
        given = [(i, p) for i, p in zip(asked, answers, strict=True) if p.tokens]
        if not given:
            return left
        kept = [len(p.tokens) for _, p in given]
        if goodput and not probing:
            others = len(candidates) - len(given)
            where, chances = [contexts[i] for i, _ in given], [p.survival for _, p in given]
            kept = self._decide([1.0] * len(given), where, others, pieces, kept, chances, None)
        for (i, proposal), count in zip(given, kept, strict=True):
            if count:
                proposals[i] = proposal.cut(count)
        return [i for i in left if not proposals[i].tokens]

    def _decide(
        self, alphas: list[float], contexts: list[int], others: int, pieces: int, limits: list[int],
        survival: list[tuple[float, ...]] | None, draft: DraftCost | None,
    ) -> list[int]:  # fmt: skip
        """Lengths by the policy; few sequences on measured times take a path without arrays that gives the same."""
        fixed = self._extra * (len(alphas) + others) + (draft.fixed if draft else 0.0)
        each = draft.per_token if draft else 0.0
        if len(alphas) > 4 or not isinstance(self.times, StepTimes):
            # Sequences that nobody guesses for are in the step all the same, with one row each.
            more = [0.0] * others
            return self.policy.decide(
                SpeculationObservation(
                    [*alphas, *more],
                    [*contexts, *([0] * others)],
                    pieces,
                    [*limits, *([0] * others)],
                    cost=self.times,
                    survival=None if survival is None else [*survival, *([()] * others)],
                    draft=DraftCost(fixed=fixed, per_token=each),
                )  # fmt: skip
            )[: len(alphas)]
        places = []
        for who, (alpha, limit) in enumerate(zip(alphas, limits, strict=True)):
            chance = 1.0
            for place in range(limit):
                chance = min(chance, survival[who][place]) if survival is not None else chance * alpha
                places.append((-chance, place, who))
        places.sort()
        rows = len(alphas) + others + pieces
        kept = float(len(alphas) + others)
        at = self.times.at
        idle = self._plain.get(rows, (at(rows), 0))[0]
        best, rate, drafting = 0, kept / max(idle, 1e-12), fixed
        for count, (chance, _, _) in enumerate(places, 1):
            kept -= chance
            drafting += each
            now = kept / max(at(rows + count) + drafting, 1e-12)
            if now > rate:
                best, rate = count, now
        lengths = [0] * len(alphas)
        for _, _, who in places[:best]:
            lengths[who] += 1
        return lengths

    def learn(self, seq: int, proposal: Proposal, path: Sequence[int]) -> None:
        """What became of one sequence's guesses: the numbers of those that stood."""
        accepted = len(path)
        self.stats.add(len(proposal.tokens), accepted)
        stage = self._by_name.get(proposal.source)
        if stage is None:
            return
        stage.acceptance.learn(seq, accepted, len(proposal.tokens) if proposal.parents is None else proposal.depth)
        if proposal.parents is None:
            stage.proposer.learn(proposal, accepted)
        elif hasattr(stage.proposer, "learn_path"):
            stage.proposer.learn_path(proposal, path)

    def learn_step(self, rows: int, seconds: float, tokens: int, whole: float, *, guessed: int) -> None:
        """A step of so many rows, ``guessed`` of them guesses, took ``seconds`` after the guessing and ``whole`` with
        it, and brought so many tokens."""
        if not guessed:
            if isinstance(self.times, StepTimes):
                self.times.learn(rows, seconds)
            if not self._asked:
                old, seen = self._plain.get(rows, (seconds, 0))
                new = min(seconds, 2 * old)
                self._plain[rows] = (old + max(0.1, 1 / (seen + 1)) * (new - old), seen + 1)
        elif whole > 0:
            stats = self.stats
            rate = 1.0 if stats.predicted_goodput == 0.0 else 0.05
            stats.predicted_goodput += rate * (self._expected - stats.predicted_goodput)
            stats.observed_goodput += rate * (tokens / whole - stats.observed_goodput)
            decodes = rows - guessed
            self._extra = towards(self._extra, max(0.0, whole - self._drafted - self._seconds(rows)) / max(decodes, 1))
        if self._asked and whole > 0:  # what asking costs counts whether or not anything came of it
            decodes = rows - guessed
            plain = decodes / max(self._plain.get(decodes, (self._seconds(decodes), 0))[0], 1e-12)
            for stage in self._asked:
                if stage.calls <= FIRST:
                    continue
                rate = 0.05 if stage.gain >= 1.0 else 0.2
                stage.gain += rate * (min(tokens / whole / plain, 16.0) - stage.gain)
                stage.price += 0.2 * (max(0.0, whole - tokens / plain) - stage.price)
            self._asked = []

    def forget(self, seq: int) -> None:
        """The sequence has ended."""
        for stage in self._stages:
            stage.acceptance.forget(seq)
            stage.proposer.forget(seq)


_NONE = Proposal()
