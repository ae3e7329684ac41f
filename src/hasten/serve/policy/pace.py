"""How many prompt tokens a step may compute beside its decodes, so that it ends in time.

A fixed token budget must suit the worst step: every seat taken, every context full. Most steps are far from it. With a
fitted cost the room of each step follows from its own batch::

    n = largest piece with  cost(decodes + piece of n) <= limit

where the limit is the tightest objective on the tokens of those who decode in it.
The budget is that of Sarathi-Serve, https://arxiv.org/abs/2403.02310, section 4.3; differs from the paper in: it is
derived for each step and not once, a request waits while its decode would push the step over the limit, and an
objective that its request would miss even alone bounds nothing.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, replace
from math import inf

from hasten.budget import SLO
from hasten.serve.cost import IterationCost
from hasten.serve.policy.base import require
from hasten.serve.request import Sequence

__all__ = ["Pace", "Share"]


@dataclass(frozen=True)
class Pace:
    """The time that steps may take.

    >>> from hasten.serve.cost import IterationCost
    >>> pace = Pace(IterationCost.preset("opt-13b/a100"), limit=0.1)
    >>> busy = Sequence(seq=0, arrival=0.0, prompt_len=1000, max_tokens=99, known=1001, computed=1000)
    >>> pace.share(2048, [busy] * 4).piece(0, 4000), pace.share(2048, [busy] * 60).piece(0, 4000)
    (732, 356)
    >>> pace.share(2048, []).piece(0, 4000)                # nobody waits for a token
    2048
    """

    cost: IterationCost
    """seconds of a step from its batch"""
    limit: float = inf
    """seconds between two tokens, for requests that bring no objective of their own"""
    least: int = 16
    """prompt tokens that a step computes even if it takes too long then, so that prompts go on"""
    tile: int = 16
    """a step of more tokens is rounded down to this multiple, since kernels pay whole tiles"""
    margin: float = 0.0
    """share by which one step may take longer than predicted; limits on ITL, kept by every step, are lowered by it"""
    drift: float = 0.0
    """share by which many steps together may; limits on TPOT, a mean over steps, are lowered by it"""

    def __post_init__(self) -> None:
        require(self.limit > 0, f"the limit of a step is {self.limit} s; it must be above 0")
        for name in ("margin", "drift"):
            require(getattr(self, name) >= 0, f"{name} is {getattr(self, name)}; it is a share of at least 0")
        require(self.least >= 1 and self.tile >= 1, f"least is {self.least} and tile {self.tile}; both are at least 1")

    @classmethod
    def for_slo(cls, cost: IterationCost, slo: SLO) -> Pace:
        """The pace that keeps the objectives on TPOT and ITL.

        Margins are what the fit missed on batches that it had not seen: P90 for one step, the median for many.
        """
        pace, report = cls(cost), cost.report
        if report is not None and report.num_holdout:
            margin, drift = report.holdout_p90_relative_error, report.holdout_median_relative_error
            pace = replace(pace, margin=min(margin, 0.5), drift=min(drift, 0.5))
        return replace(pace, limit=pace.between(slo))

    def between(self, slo: SLO) -> float:
        """Seconds that a step may be predicted to take for a request with this objective."""
        tpot = inf if slo.tpot is None else slo.tpot.limit / (1 + self.drift)
        return tpot if slo.itl is None else min(tpot, slo.itl.limit / (1 + self.margin))

    def ceiling(self, at_least: int, at_most: int = 2048) -> int:
        """Tokens of the largest step that is ever needed: a prompt alone, with nothing in the cache."""
        alone = self.cost.piece_within(self.limit, (0, 0, 0, 0, 0), 0) // 64 * 64
        return max(at_least, min(alone, at_most))

    def share(self, tokens: int, decodes: SequenceOf[Sequence]) -> Share:
        """What prompts may have of a step with these decodes; ``tokens`` are left of the token budget."""
        shortest: dict[float, int] = {}  # smallest context of those with the same limit
        last, bound = None, self.limit
        for seq in decodes:
            slo = seq.slo
            if slo is not last:
                last, bound = slo, self.limit if slo is None else self.between(slo)
            if seq.computed < shortest.get(bound, seq.computed + 1):
                shortest[bound] = seq.computed
        limit = inf
        for bound in sorted(shortest):
            if self.cost.seconds(shortest[bound], 1, 1, 2 * shortest[bound] + 1) <= bound:
                limit = bound
                break
        return Share(tokens, self, limit, decodes)


class Share:
    """Prompt tokens that a step has room for; shrinks as pieces are taken."""

    __slots__ = ("_context", "_done", "_limit", "_pace", "_sums", "tokens")

    def __init__(
        self, tokens: int, pace: Pace | None = None, limit: float = inf, decodes: SequenceOf[Sequence] = ()
    ) -> None:
        self.tokens = tokens
        """left of the token budget"""
        self._pace = pace if limit < inf else None
        self._limit = limit
        self._done = 0
        if self._pace is not None:
            context = sum([s.computed for s in decodes])
            count = len(decodes)
            self._sums = (context, count, count, 2 * context + count, 0)

    def piece(self, past: int, wanted: int) -> int:
        """Tokens, of ``wanted``, that a prompt with ``past`` tokens in the cache may compute now; at least 0."""
        length = min(wanted, self.tokens)
        pace = self._pace
        if pace is None or length <= 0:
            return length
        fits = pace.cost.piece_within(self._limit, self._sums, past)
        total = self._sums[2] + fits
        if fits < length and fits > pace.tile:
            fits -= total % pace.tile
        return min(length, max(fits, pace.least - self._done))

    def take(self, past: int, length: int) -> None:
        """Note a piece that is in the step."""
        self.tokens -= length
        self._done += length
        if self._pace is not None:
            context, sequences, tokens, attention, gathered = self._sums
            self._sums = (
                context + past,
                sequences + 1,
                tokens + length,
                attention + length * (2 * past + length),
                gathered + (past if length > 1 else 0),
            )

    def admits(self, prompt: int) -> bool:
        """Whether a request of ``prompt`` tokens could decode beside the others within the limit."""
        if self._pace is None:
            return True
        context, count = self._sums[0] + prompt, self._sums[1] + 1  # a token for each: pieces are over by then
        return self._pace.cost.seconds(context, count, count, 2 * context + count) <= self._limit
