"""What an engine learns about guesses as it runs: what they cost, and what a step of n rows takes.

Each is a decaying average that starts from a prior, quick to believe what is cheaper and slow to believe what is
dearer: one slow step says little. :class:`~hasten.serve.speculation.Speculator` decides by them.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hasten.clock import Clock
from hasten.language.speculate.proposal import Proposer
from hasten.serve.acceptance import Acceptance
from hasten.serve.batch import blocks_for

__all__ = ["FIRST", "SpeculationStats", "Stage", "StepTimes", "towards"]

_ROWS = 4
"""rows of one sequence in the steps that are measured"""
_BESIDE = (6e-5, 4e-6)
"""seconds per step and per row that an engine takes beside its model, until steps have been seen"""
FIRST = 2
"""calls of a proposer that load code and make ready, and say nothing about what it costs"""


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


class Stage:
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
        if self.calls <= FIRST:
            return
        if tokens == 0:
            self.call = towards(self.call, seconds)
        else:
            self.spent = towards(self.spent, max(0.0, seconds - self.call))
            self.made += (0.1 if self.made else 1.0) * (tokens - self.made)
            self.token = self.spent / self.made


def towards(old: float, new: float) -> float:
    """A decaying average that is quick to fall and slow to rise: what takes long now and then is not what it costs."""
    if old == 0.0:
        return new
    return old + (0.3 if new < old else 0.05) * (min(new, 4 * old) - old)
