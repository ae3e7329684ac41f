"""Speculation inside an engine: who guesses, how far, and what is learnt from it.

A plan's decodes become ``VERIFY`` chunks of one known token and some guesses. What a step costs is measured as it runs
(:class:`StepTimes`), what a guess is worth is learnt from what stood (:class:`Acceptance`), and a
:class:`~hasten.serve.policy.speculation.SpeculationPolicy` puts both together, twice: before guesses are made, so that
none is made in vain, and once they are there, when the proposer knows how good they are. The second look is harmless:
the engine verifies by the coupled rule, whose tokens do not depend on what was offered.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from hasten.clock import Clock
from hasten.language.speculate.proposal import Ask, FirstOf, Proposal, Proposer
from hasten.serve.batch import Chunk, ChunkKind, StepPlan, blocks_for
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

__all__ = ["Acceptance", "Candidate", "SpeculationStats", "Speculator", "StepTimes"]

_PRIOR = (7.0, 3.0)
_SHRINK = 20.0
_ROWS = 4
"""rows of one sequence in the steps that are measured"""
_BESIDE = (6e-5, 4e-6)
"""seconds per step and per row that an engine takes beside its model, until steps have been seen"""
_FIRST = 2
"""calls of a proposer that load code and make ready, and say nothing about what it costs"""
_TRIES = 8
"""calls of a proposer after which its price is believed"""
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
    >>> round(times.at(8) * 1e3, 2)
    1.47
    """

    def __init__(self, rows: Sequence[int], seconds: Sequence[float]) -> None:
        self._rows = list(rows)
        self._seconds = np.maximum.accumulate(np.asarray(seconds, np.float64)).tolist()
        self._dense: list[float] = []
        self._slope: float = 0.0
        self._stale = 0
        self._fill()

    def _fill(self) -> None:
        """Seconds for every number of rows up to the last one measured."""
        self._dense = np.interp(np.arange(self._rows[-1] + 1), self._rows, self._seconds).tolist()
        self._stale = 0
        last, before = self._seconds[-1], self._seconds[-2] if len(self._rows) > 1 else 0.0
        step = self._rows[-1] - (self._rows[-2] if len(self._rows) > 1 else 0)
        self._slope = max((last - before) / step, 0.5 * last / self._rows[-1])

    def at(self, rows: int) -> float:
        """Predicted seconds for one number of rows."""
        if rows < len(self._dense):
            return self._dense[rows]
        return self._dense[-1] + self._slope * (rows - self._rows[-1])

    @classmethod
    def measure(
        cls, executor: Any, clock: Clock, *, context: int = 256, most: int = 96, limit: float = 0.5
    ) -> StepTimes:
        """Run steps of 1 to ``most`` rows on a cache of their own, for about ``limit`` seconds."""
        from hasten.language.ragged import RaggedBatch

        context = max(0, min(context, executor.max_context - _ROWS))
        table = list(range(blocks_for(context + _ROWS, 16)))
        counts = [n for n in (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32, 48, 64, 96) if n <= most]
        cache = executor.new_cache(len(table), 16)
        half: Any
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
            seconds.append(sorted(taken)[len(taken) // 2] + _BESIDE[0] + _BESIDE[1] * count)
            if clock.now() - began > limit and len(rows) >= 4:
                break
        return cls(rows, seconds)

    def seconds(self, rows: Any) -> NDArray[np.float64]:
        """Predicted seconds for numbers of rows."""
        rows = np.asarray(rows, np.float64)
        inside = np.interp(rows, self._rows, self._seconds)
        out: NDArray[np.float64] = np.where(
            rows > self._rows[-1], self._seconds[-1] + self._slope * (rows - self._rows[-1]), inside
        )
        return out

    def times(self, sums: NDArray[np.float64]) -> NDArray[np.float64]:
        """As :meth:`IterationCost.times`; only the number of tokens counts."""
        return self.seconds(sums[:, 2])

    def learn(self, rows: int, seconds: float) -> None:
        """One step of so many rows took so long: the nearest points move towards it. Outliers are cut off."""
        expected = self.at(rows)
        if expected <= 0.0 or rows > self._rows[-1]:
            return
        change = 0.05 * (min(max(seconds / expected, 0.5), 2.0) - 1.0)
        high = bisect_left(self._rows, rows)
        for index in (high,) if self._rows[high] == rows or high == 0 else (high - 1, high):
            share = 1.0 - abs(self._rows[index] - rows) / rows
            self._seconds[index] *= 1.0 + change * max(0.0, share)
        # What the engine does beside the model is in every step alike: a part of the surprise is everybody's.
        shift = 0.02 * min(max(seconds - expected, -0.5 * expected), expected)
        self._seconds = [t + shift for t in self._seconds]
        self._stale += 1
        if self._stale >= 16:  # more rows never take less
            self._seconds = np.maximum.accumulate(self._seconds).tolist()
            self._fill()


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
    state: SamplingState | None = None
    """how it chooses its tokens"""


class _Stage:
    """One proposer with what is known of it: how often its guesses stand, and what they cost."""

    __slots__ = (
        "acceptance", "asleep", "call", "calls", "gain", "made", "price", "probe", "proposer", "since", "spent",
        "token",
    )  # fmt: skip

    def __init__(self, proposer: Proposer, window: int) -> None:
        self.proposer = proposer
        self.acceptance = Acceptance(window)
        self.call = 0.0  # seconds of asking, decaying average
        self.token = 0.0  # seconds per guess beside that
        self.spent, self.made = 0.0, 0.0  # decaying averages of the seconds and the guesses of calls that gave some
        self.probe = getattr(proposer, "probe", 1)  # guesses that a try asks for
        self.since = 0  # steps since it was asked
        self.gain = 1.2  # tokens per second of steps with its guesses over those of plain steps, decaying average
        self.calls = 0
        self.price = 0.0  # seconds that steps which asked it lost against plain ones, decaying average
        self.asleep = False

    def note(self, seconds: float, tokens: int) -> None:
        """Asking took so long and gave so many tokens. The first calls load code and do not count."""
        self.calls += 1
        if self.calls <= _FIRST:
            return
        if tokens == 0:
            self.call = _towards(self.call, seconds)
        else:
            self.spent = _towards(self.spent, max(0.0, seconds - self.call))
            self.made += (0.1 if self.made else 1.0) * (tokens - self.made)
            self.token = self.spent / self.made


def _towards(old: float, new: float) -> float:
    """A decaying average that is quick to fall and slow to rise: what takes long now and then is not what it costs."""
    if old == 0.0:
        return new
    return old + (0.3 if new < old else 0.05) * (min(new, 4 * old) - old)


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
        self._stages = [_Stage(part, window) for part in parts]
        self._by_name = {stage.proposer.name: stage for stage in self._stages}
        self._expected = 0.0
        self._extra = 0.0  # seconds per decode that a step with guesses takes beside its rows and its drafting
        self._drafted = 0.0
        self._asked: list[_Stage] = []
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
        began = clock.now()
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
        seconds = self._seconds(rows) + clock.now() - began
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
        self, stage: _Stage, candidates: Sequence[Candidate], contexts: list[int], limits: list[int], pieces: int,
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
            self._extra = _towards(self._extra, max(0.0, whole - self._drafted - self._seconds(rows)) / max(decodes, 1))
        if self._asked and whole > 0:  # what asking costs counts whether or not anything came of it
            decodes = rows - guessed
            plain = decodes / max(self._plain.get(decodes, (self._seconds(decodes), 0))[0], 1e-12)
            for stage in self._asked:
                if stage.calls <= _FIRST:
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
