"""Speculation inside an engine: who guesses, how far, and what is learnt from it.

A plan's decodes become ``VERIFY`` chunks of one known token and some guesses. What a step costs is measured as it runs
(:class:`StepTimes`), what a guess is worth is learnt from what stood (:class:`Acceptance`), and a
:class:`~hasten.serve.policy.speculation.SpeculationPolicy` puts both together, twice: before guesses are made, so that
none is made in vain, and once they are there, when the proposer knows how good they are. The second look is harmless:
the engine verifies by the coupled rule, whose tokens do not depend on what was offered.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hasten.clock import Clock
from hasten.language.speculate.proposal import Ask, Proposal, Proposer
from hasten.serve.batch import Chunk, ChunkKind, StepPlan, blocks_for
from hasten.serve.policy.speculation import (
    DraftCost,
    GoodputSpeculation,
    SpeculationObservation,
    SpeculationPolicy,
    StepCost,
)
from hasten.serve.request import Sequence as Request

__all__ = ["Acceptance", "Candidate", "SpeculationStats", "Speculator", "StepTimes"]

_PRIOR = (7.0, 3.0)
_SHRINK = 20.0
_ROWS = 4
"""rows of one sequence in the steps that are measured"""
_PIECE = 32
"""prompt tokens in a step from which nothing is guessed: such a step is long, and guesses would wait in it"""


class Acceptance:
    """Chance that a tested guess stands, over all sequences and for each.

    A decaying average over about ``window`` steps from a prior of Beta(7, 3); a sequence's own estimate is drawn
    towards the common one by twenty guesses' weight. A guess behind a rejected one was not tested and does not count.

    >>> acceptance = Acceptance()
    >>> acceptance.learn(0, accepted=3, proposed=3); acceptance.alpha(0) > acceptance.alpha(1) > 0.7
    True
    """

    def __init__(self, window: int = 100) -> None:
        self._keep = 1.0 - 1.0 / window
        self._hits, self._tries = _PRIOR[0], sum(_PRIOR)
        self._own: dict[int, tuple[float, float]] = {}

    def alpha(self, seq: int) -> float:
        """Estimate for one sequence; for an unknown one that of all."""
        common = self._hits / self._tries
        hits, tries = self._own.get(seq, (0.0, 0.0))
        return (hits + _SHRINK * common) / (tries + _SHRINK)

    def learn(self, seq: int, accepted: int, proposed: int) -> None:
        """What became of one sequence's guesses."""
        tested = min(accepted + 1, proposed)
        if tested == 0:
            return
        self._hits = self._hits * self._keep + accepted
        self._tries = self._tries * self._keep + tested
        hits, tries = self._own.get(seq, (0.0, 0.0))
        self._own[seq] = (hits * self._keep + accepted, tries * self._keep + tested)

    def forget(self, seq: int) -> None:
        """The sequence has ended."""
        self._own.pop(seq, None)


class StepTimes:
    """Seconds of a step by its number of rows, measured before and corrected as steps run.

    >>> times = StepTimes([1, 4, 16], [1e-3, 1.2e-3, 2e-3])
    >>> round(float(times.seconds(8)) * 1e3, 2)
    1.47
    """

    def __init__(self, rows: Sequence[int], seconds: Sequence[float]) -> None:
        self._rows = np.asarray(rows, np.float64)
        self._seconds = np.maximum.accumulate(np.asarray(seconds, np.float64))

    @classmethod
    def measure(
        cls, executor: Any, clock: Clock, *, context: int = 256, most: int = 256, limit: float = 1.0
    ) -> StepTimes:
        """Run steps of 1 to ``most`` rows on a cache of their own, for about ``limit`` seconds."""
        from hasten.language.ragged import RaggedBatch

        context = max(0, min(context, executor.max_context - _ROWS))
        table = list(range(blocks_for(context + _ROWS, 16)))
        counts = [n for n in (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32, 48, 64, 96, 128, 192, 256) if n <= most]
        cache = executor.new_cache(len(table), 16)
        for half in (cache, getattr(cache, "keys", None), getattr(cache, "values", None)):
            if hasattr(half, "fill_"):
                half.fill_(1)
        rows, seconds = [], []
        began = clock.now()
        for count in counts:
            pieces = [min(_ROWS, count - i) for i in range(0, count, _ROWS)]  # sequences that verify a few guesses
            batch = RaggedBatch.build([([1] * n, context, table) for n in pieces], "all")
            executor.step(batch, cache)
            taken = []
            for _ in range(5):
                before = clock.now()
                executor.step(batch, cache)
                taken.append(clock.now() - before)
            rows.append(count)
            seconds.append(sorted(taken)[len(taken) // 2])
            if clock.now() - began > limit and len(rows) >= 4:
                break
        return cls(rows, seconds)

    def seconds(self, rows: Any) -> NDArray[np.float64]:
        """Predicted seconds for numbers of rows."""
        rows = np.asarray(rows, np.float64)
        inside = np.interp(rows, self._rows, self._seconds)
        if len(self._rows) < 2:
            return inside
        step = self._rows[-1] - self._rows[-2]
        slope = max((self._seconds[-1] - self._seconds[-2]) / step, self._seconds[-1] / self._rows[-1] * 0.5)
        return np.where(rows > self._rows[-1], self._seconds[-1] + slope * (rows - self._rows[-1]), inside)

    def times(self, sums: NDArray[np.float64]) -> NDArray[np.float64]:
        """As :meth:`IterationCost.times`; only the number of tokens counts."""
        return self.seconds(sums[:, 2])

    def learn(self, rows: int, seconds: float) -> None:
        """One step of so many rows took so long: the two nearest points move towards it. Outliers are cut off."""
        expected = float(self.seconds(rows))
        if expected <= 0.0 or rows > self._rows[-1]:
            return
        ratio = min(max(seconds / expected, 0.5), 2.0)
        high = int(np.searchsorted(self._rows, rows))
        for index in {max(0, high - 1) if self._rows[high] != rows else high, high}:
            share = 1.0 - abs(self._rows[index] - rows) / max(rows, 1.0)
            self._seconds[index] *= 1.0 + 0.05 * max(0.0, share) * (ratio - 1.0)
        self._seconds = np.maximum.accumulate(self._seconds)


class SpeculationStats:
    """Counters in vLLM's words: drafts, draft tokens, accepted tokens, accepted by position."""

    def __init__(self) -> None:
        self.num_drafts = 0
        """verifications"""
        self.num_draft_tokens = 0
        """guesses that were verified"""
        self.num_accepted_tokens = 0
        """guesses that stood"""
        self.accepted_per_pos: list[int] = []
        """guesses that stood, by place"""
        self.steps = 0
        """steps with decodes"""
        self.predicted_goodput = 0.0
        """decaying average of tokens per second that were expected of steps with guesses"""
        self.observed_goodput = 0.0
        """the same of what they brought"""

    @property
    def acceptance(self) -> float:
        """Share of the verified guesses that stood."""
        return self.num_accepted_tokens / self.num_draft_tokens if self.num_draft_tokens else 0.0

    @property
    def mean_length(self) -> float:
        """Guesses per verification."""
        return self.num_draft_tokens / self.num_drafts if self.num_drafts else 0.0

    def add(self, proposed: int, accepted: int) -> None:
        """One verification."""
        self.num_drafts += 1
        self.num_draft_tokens += proposed
        self.num_accepted_tokens += accepted
        while len(self.accepted_per_pos) < accepted:
            self.accepted_per_pos.append(0)
        for place in range(accepted):
            self.accepted_per_pos[place] += 1

    def counters(self) -> dict[str, int]:
        """Plain counters; the place of a guess follows the slash."""
        out = {
            "spec_decode_num_drafts": self.num_drafts,
            "spec_decode_num_draft_tokens": self.num_draft_tokens,
            "spec_decode_num_accepted_tokens": self.num_accepted_tokens,
        }
        for place, count in enumerate(self.accepted_per_pos):
            out[f"spec_decode_num_accepted_tokens_per_pos/{place}"] = count
        return out


@dataclass(frozen=True, slots=True)
class Candidate:
    """A decoding sequence that may be guessed for."""

    chunk: Chunk
    request: Request
    tokens: NDArray[np.int64]
    """its known tokens"""
    limit: int
    """guesses that are of any use to it"""


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
        self.policy: SpeculationPolicy = policy or GoodputSpeculation()
        self.stats = SpeculationStats()
        self.times = times
        self.acceptance = Acceptance(getattr(self.policy, "window", 100))
        self._draft_seconds = 0.0  # per guessed token, decaying average
        self._since = 0  # steps since the last guess
        self._expected = 0.0

    def reset(self) -> None:
        """Forget counters, not what was learnt."""
        self.stats = SpeculationStats()

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
        limits, free = [], free_blocks
        for c in candidates:
            spare = c.request.blocks * block_size - c.request.known
            limit = min(self.policy.max_length, c.limit, max(spare, 0) + free * block_size)
            if limit > spare:
                free -= blocks_for(limit - max(spare, 0), block_size)
            limits.append(max(0, limit))
        alphas = [self.acceptance.alpha(c.request.seq) for c in candidates]
        contexts = [c.request.computed for c in candidates]
        observation = SpeculationObservation(
            alphas, contexts, pieces, limits, cost=self.times, draft=DraftCost(per_token=self._draft_seconds)
        )
        lengths = self.policy.decide(observation)
        if not any(lengths):
            self._since += 1
            if self._since < getattr(self.policy, "probe_every", 1 << 60) or not any(limits):
                return plan, {}
            lengths = [min(1, limit) for limit in limits]
        elif isinstance(self.policy, GoodputSpeculation):
            # Alpha is an average over good and bad guesses: where guessing pays at all, ask for more and cut later.
            lengths = [min(most, 2 * k + 2) if k else 0 for k, most in zip(lengths, limits, strict=True)]
        probing = self._since >= getattr(self.policy, "probe_every", 1 << 60)
        self._since = 0
        asked = [i for i, length in enumerate(lengths) if length]
        began = clock.now()
        found = self.proposer.propose([Ask(candidates[i].request.seq, candidates[i].tokens, lengths[i]) for i in asked])
        total = sum(len(p.tokens) for p in found)
        if total:
            per = (clock.now() - began) / total
            self._draft_seconds += 0.05 * (min(per, 4 * self._draft_seconds or per) - self._draft_seconds)
        proposals = [Proposal()] * len(candidates)
        for i, proposal in zip(asked, found, strict=True):
            proposals[i] = proposal
        if not probing and isinstance(self.policy, GoodputSpeculation) and total:
            again = SpeculationObservation(
                alphas, contexts, pieces, [len(p.tokens) for p in proposals], cost=self.times, draft=DraftCost(),
                survival=[p.survival for p in proposals],
            )  # fmt: skip
            kept = self.policy.decide(again)
            proposals = [p.cut(k) for p, k in zip(proposals, kept, strict=True)]
        out = {c.request.seq: p for c, p in zip(candidates, proposals, strict=True) if p.tokens}
        if not out:
            return plan, {}
        expected = len(candidates) + sum(sum(p.survival) for p in out.values())
        rows = plan.num_tokens + sum(len(p.tokens) for p in out.values())
        seconds = float(self.times.times(np.array([[0.0, 0, rows, 0, 0]]))[0]) if self.times is not None else 0.0
        seconds += clock.now() - began
        self._expected = expected / seconds if seconds > 0 else 0.0
        chunks = tuple(
            Chunk(c.seq, c.start, c.length + len(out[c.seq].tokens), ChunkKind.VERIFY) if c.seq in out else c
            for c in plan.chunks
        )
        return StepPlan(chunks, plan.preempt), out

    def learn(self, seq: int, proposal: Proposal, accepted: int) -> None:
        """What became of one sequence's guesses."""
        self.stats.add(len(proposal.tokens), accepted)
        self.acceptance.learn(seq, accepted, len(proposal.tokens))
        if proposal.parents is None:
            self.proposer.learn(proposal, accepted)

    def learn_step(self, rows: int, seconds: float, tokens: int, whole: float, *, guessed: bool) -> None:
        """A step of so many rows took ``seconds`` after the guessing, ``whole`` with it, and brought so many tokens."""
        if isinstance(self.times, StepTimes):
            self.times.learn(rows, seconds)
        if guessed and whole > 0:
            stats = self.stats
            rate = 1.0 if stats.predicted_goodput == 0.0 else 0.05
            stats.predicted_goodput += rate * (self._expected - stats.predicted_goodput)
            stats.observed_goodput += rate * (tokens / whole - stats.observed_goodput)

    def forget(self, seq: int) -> None:
        """The sequence has ended."""
        self.acceptance.forget(seq)
        self.proposer.forget(seq)
