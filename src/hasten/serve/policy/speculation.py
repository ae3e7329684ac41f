"""How many tokens to guess for each sequence of a step: as many as raise goodput, down to none.

"Optimizing Speculative Decoding for Serving Large Language Models Using Goodput", Liu et al. 2024, arXiv:2406.14066.
Goodput is tokens that will be kept per second, ``G = Σ (1 + Σ_j p_ij) / T``, where ``p_ij`` is the chance that guess j
of sequence i stands and T the time of the whole step, draft included. Guesses are added in falling order of p (T
depends on totals only, so every best set is a prefix of that order), and the prefix with the largest G is kept.
Differs from the paper in: lengths per request; T has the knee of :class:`~hasten.serve.cost.IterationCost`; in a step
that also computes prompts the G of decodes alone is the price of time, since the prompts' users wait for the guesses.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from hasten.serve.cost import IterationCost
from hasten.serve.policy.base import require

__all__ = [
    "DraftCost",
    "FixedSpeculation",
    "GoodputSpeculation",
    "SpeculationObservation",
    "SpeculationPolicy",
    "StepCost",
]


class StepCost(Protocol):
    """Seconds of a step from the sums over its batch; :class:`IterationCost` is one."""

    def times(self, sums: NDArray[np.float64]) -> NDArray[np.float64]:
        """(batches, 5) of context, sequences, tokens, attention, gathered -> (batches,) seconds."""
        ...


@dataclass(frozen=True)
class DraftCost:
    """Seconds that guessing costs.

    >>> float(DraftCost(per_round=1e-3, per_token=1e-4).seconds(longest=3, total=10))
    0.004
    """

    fixed: float = 0.0
    """per step in which anything is guessed"""
    per_round: float = 0.0
    """per token of the longest guess: a draft that steps once per token for all sequences together"""
    per_token: float = 0.0
    """per guessed token"""

    def seconds(self, longest: Any, total: Any) -> Any:
        """For the longest guess of a step and for all guesses of it; arrays are welcome."""
        return np.where(np.asarray(total) > 0, self.fixed, 0.0) + self.per_round * longest + self.per_token * total


@dataclass(frozen=True)
class SpeculationObservation:
    """What is known when the lengths of one step are to be decided."""

    alphas: Sequence[float]
    """for each decoding sequence the estimated chance that a guess stands"""
    contexts: Sequence[int]
    """tokens of each in the cache"""
    prefill_tokens: int = 0
    """prompt tokens that the same step computes"""
    limits: Sequence[int] | None = None
    """guesses that each may have at most, by memory and by what is left to write"""
    room: int | None = None
    """guesses that all may have together, by the token budget"""
    survival: Sequence[Sequence[float]] | None = None
    """chance that guess j and all before it stand, where guesses are there already; replaces ``alphas``"""
    cost: StepCost | None = None
    """time of a step, where it is better known than the policy's own"""
    draft: DraftCost | None = None
    """time of guessing; where guesses are there already it is spent, and 0"""


class SpeculationPolicy(Protocol):
    """Decides how many tokens to guess."""

    @property
    def name(self) -> str: ...

    @property
    def max_length(self) -> int:
        """Guesses for one sequence at most."""
        ...

    def decide(self, observation: SpeculationObservation) -> list[int]:
        """A length for each sequence of the observation. Pure."""
        ...


def _limits(observation: SpeculationObservation, most: int) -> NDArray[np.int64]:
    limits = np.full(len(observation.alphas), most, np.int64)
    if observation.limits is not None:
        limits = np.minimum(limits, np.asarray(observation.limits, np.int64))
    if observation.survival is not None:
        limits = np.minimum(limits, [len(s) for s in observation.survival])
    return np.maximum(limits, 0)


@dataclass(frozen=True)
class FixedSpeculation:
    """The same length always: the baseline, and what ``--speculate`` with a number asks for.

    >>> FixedSpeculation(3).decide(SpeculationObservation(alphas=[0.5, 0.5], contexts=[9, 9], limits=[9, 1]))
    [3, 1]
    """

    length: int = 4
    """guesses for every sequence"""

    def __post_init__(self) -> None:
        require(self.length >= 0, f"the length is {self.length}; give 0 (off) or more")

    @property
    def name(self) -> str:
        return f"fixed-{self.length}"

    @property
    def max_length(self) -> int:
        return self.length

    def decide(self, observation: SpeculationObservation) -> list[int]:
        lengths: list[int] = _limits(observation, self.length).tolist()
        room = observation.room
        if room is not None and sum(lengths) > room:
            for index, length in enumerate(lengths):
                lengths[index] = min(length, max(0, room))
                room -= lengths[index]
        return lengths


@dataclass(frozen=True)
class GoodputSpeculation:
    """The lengths with the largest goodput.

    >>> spec = GoodputSpeculation(max_length=10, cost=IterationCost(m0=20e-3, a=15e-3, b=1e-4))
    >>> spec.decide(SpeculationObservation(alphas=[0.9, 0.3], contexts=[900, 200]))
    [10, 10]
    >>> spec.decide(SpeculationObservation(alphas=[0.9, 0.3], contexts=[900, 200], prefill_tokens=4000))
    [10, 2]
    """

    max_length: int = 10
    """guesses for one sequence at most"""
    window: int = 100
    """steps over which acceptance is averaged"""
    per_request: bool = True
    """a length for each request; False gives all the same"""
    probe_every: int = 64
    """after so many steps without a guess one is made, so that the estimate does not starve"""
    most_sequences: int = 8
    """decodes of a step above which an engine does not ask at all: what asking costs in Python grows with them, and at
    16 sequences of a small model it was measured to cost more than the guesses brought"""
    cost: IterationCost | None = None
    """time of a step; an engine that measures its own steps gives it in the observation"""
    draft: DraftCost = DraftCost()
    """time of guessing, likewise"""

    def __post_init__(self) -> None:
        require(self.max_length >= 0, f"max_length is {self.max_length}; give 0 (off) or more")
        require(self.window >= 1 and self.probe_every >= 1, "window and probe_every must be at least 1")

    @property
    def name(self) -> str:
        return "goodput"

    def decide(self, observation: SpeculationObservation) -> list[int]:
        """See the module; ties go to the smaller lengths."""
        count = len(observation.alphas)
        limits = _limits(observation, self.max_length)
        most = int(limits.max(initial=0))
        if count == 0 or most == 0:
            return [0] * count
        cost = observation.cost or self.cost
        draft = observation.draft or self.draft
        if observation.survival is not None:
            gains = np.zeros((most, count))
            for index, chances in enumerate(observation.survival):
                stop = min(most, len(chances))
                gains[:stop, index] = chances[:stop]
            gains = np.minimum.accumulate(gains, axis=0)
        else:
            gains = np.asarray(observation.alphas, np.float64)[None, :] ** np.arange(1, most + 1)[:, None]
        allowed = np.arange(most)[:, None] < limits[None, :]
        contexts = np.asarray(observation.contexts, np.float64)
        places, who = np.nonzero(allowed)
        gain = gains[places, who]
        if self.per_request:
            order = np.argsort(-gain, kind="stable")
            places, who, gain = places[order], who[order], gain[order]
        if observation.room is not None:
            cut = max(0, observation.room)
            places, who, gain = places[:cut], who[:cut], gain[:cut]
        total = np.arange(len(gain) + 1, dtype=np.float64)
        kept = count + np.concatenate(([0.0], np.cumsum(gain)))
        longest = np.concatenate(([0], np.maximum.accumulate(places + 1))) if len(places) else np.zeros(1)
        past, piece = float(contexts.sum()), float(observation.prefill_tokens)
        sums = np.zeros((len(total), 5))
        if cost is not None:
            added = 2 * contexts[who] + 2 * (places + 1) + 1
            sums[:, 0], sums[:, 1], sums[:, 2] = past, count, count + total
            sums[:, 3] = (2 * contexts + 1).sum() + np.concatenate(([0.0], np.cumsum(added)))
        drafting = draft.seconds(longest, total)
        alone = drafting + (cost.times(sums) if cost is not None else 0.0)
        goodput = kept / np.maximum(alone, 1e-12)
        if (
            piece > 0 and cost is not None
        ):  # guesses that lengthen a prompt's step must pay as those of a decode step do
            rate = goodput.max()
            sums[:, 1] += 1
            sums[:, 2] += piece
            sums[:, 3] += piece * piece
            goodput = kept - rate * (drafting + cost.times(sums))
        if not self.per_request:  # only whole rounds: the same length for everybody who may have it
            ends = np.flatnonzero(np.diff(places, append=most + 1)) + 1
            whole = np.concatenate(([0], ends))
            best = int(whole[np.argmax(goodput[whole])])
        else:
            best = int(np.argmax(goodput))
        return np.bincount(who[:best], minlength=count).tolist()  # type: ignore[no-any-return]
