"""What a proposer is: given what is known of some sequences, it guesses how each goes on.

``propose`` is asked for many sequences at once and may answer less than it was asked for, or nothing. ``survival[j]``
is its estimate that the first ``j + 1`` guesses all stand; what becomes of the guesses is told to ``learn``, which is
how the estimates keep to the truth. Guesses are chosen without chance, so that the coupled rule of :mod:`verify` holds.
Contract: not thread-safe; ``tokens`` of an :class:`Ask` are the caller's and are not kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from hasten.language.sampling import SamplingState

__all__ = ["Ask", "Calibration", "FirstOf", "Host", "Proposal", "Proposer"]


@dataclass(frozen=True, slots=True)
class Ask:
    """One sequence that wants guesses."""

    seq: int
    """number of the sequence; proposers keep state by it until ``forget``"""
    tokens: NDArray[np.int64]
    """(known,): prompt and answer so far"""
    count: int
    """guesses at most"""
    state: SamplingState | None = None
    """how the sequence chooses its tokens; a proposer that is close to the model chooses alike"""


@dataclass(frozen=True, slots=True)
class Host:
    """The engine that a proposer works for, for those that look into its cache."""

    executor: Any
    """the model's"""
    cache: Any
    """keys and values of all sequences; a proposer writes at most the slot of the last known token"""
    table: Callable[[int], Sequence[int]]
    """blocks of a sequence"""
    block_size: int
    """tokens of a block"""
    num_blocks: int
    """blocks of the cache"""


@dataclass(frozen=True, slots=True)
class Proposal:
    """Guesses for one sequence."""

    tokens: tuple[int, ...] = ()
    survival: tuple[float, ...] = ()
    """estimated chance that this token and all before it stand; falls"""
    parents: tuple[int, ...] | None = None
    """of a tree, as in :class:`TokenTree`; None for a chain"""
    source: str = ""
    """which proposer it came from"""
    marks: tuple[int, ...] = field(default=(), compare=False)
    """what the proposer wants to be told again when it learns"""

    @property
    def depth(self) -> int:
        """Guesses of the longest branch."""
        if self.parents is None:
            return len(self.tokens)
        depths: list[int] = []
        for parent in self.parents:
            depths.append(1 if parent < 0 else depths[parent] + 1)
        return max(depths, default=0)

    def branch(self, node: int) -> tuple[int, ...]:
        """Tokens down to ``node`` and including it; -1 gives none."""
        if self.parents is None:
            return self.tokens[: node + 1]
        out: list[int] = []
        while node >= 0:
            out.append(self.tokens[node])
            node = self.parents[node]
        return tuple(out[::-1])

    def cut(self, count: int) -> Proposal:
        """The first ``count`` guesses."""
        if count >= len(self.tokens):
            return self
        parents = None if self.parents is None else self.parents[:count]
        return Proposal(self.tokens[:count], self.survival[:count], parents, self.source, self.marks[:count])


@runtime_checkable
class Proposer(Protocol):
    """Guesses tokens."""

    @property
    def name(self) -> str:
        """For logs and metrics."""
        ...

    def propose(self, asks: Sequence[Ask]) -> list[Proposal]:
        """One proposal for each ask, of at most ``count`` tokens, possibly of none."""
        ...

    def learn(self, proposal: Proposal, accepted: int) -> None:
        """The first ``accepted`` tokens of a proposal stood, the next one (if there is one) did not.

        Of a tree a proposer with ``learn_path(proposal, path)`` is told which nodes stood instead. One with
        ``attach(host)`` gets to know the engine before it is asked, and may refuse it.
        """
        ...

    def forget(self, seq: int) -> None:
        """The sequence has ended, or lost its cache; unknown ones are ignored."""
        ...


class Calibration:
    """Chance that a guess stands, by class of guess, learnt as a decaying average from a prior.

    >>> calibration = Calibration([0.5, 0.9], weight=8, window=100)
    >>> calibration.learn(0, True); calibration.chance(0) > 0.5
    True
    """

    def __init__(self, prior: Sequence[float], *, weight: float = 8.0, window: float = 200.0) -> None:
        self._hits = [p * weight for p in prior]
        self._tries = [weight] * len(prior)
        self._keep = 1.0 - 1.0 / window

    def chance(self, mark: int) -> float:
        """Estimate for class ``mark``."""
        return self._hits[mark] / self._tries[mark]

    def learn(self, mark: int, stood: bool) -> None:
        """One guess of class ``mark`` was tested."""
        self._hits[mark] = self._hits[mark] * self._keep + stood
        self._tries[mark] = self._tries[mark] * self._keep + 1.0


class FirstOf:
    """Asks several proposers in turn; each sequence takes the first answer that is worth something.

    >>> from hasten.language.speculate.lookup import PromptLookup
    >>> FirstOf([PromptLookup(min_ngram=3)]).name
    'prompt-lookup'
    """

    def __init__(self, proposers: Sequence[Proposer], *, least: float = 0.5) -> None:
        self.proposers = list(proposers)
        self.least = least
        """chance of its first guess below which an answer is passed over, unless it is the last one's"""
        self._by_name = {p.name: p for p in self.proposers}

    @property
    def name(self) -> str:
        return "+".join(p.name for p in self.proposers)

    @property
    def most(self) -> int:
        """Guesses of one sequence at most, where one of them says so; else 0."""
        return max(getattr(p, "most", 0) for p in self.proposers)

    def propose(self, asks: Sequence[Ask]) -> list[Proposal]:
        out = [Proposal()] * len(asks)
        left = list(range(len(asks)))
        for number, proposer in enumerate(self.proposers):
            if not left:
                break
            found = proposer.propose([asks[i] for i in left])
            last = number == len(self.proposers) - 1
            still = []
            for i, proposal in zip(left, found, strict=True):
                if proposal.tokens and (last or proposal.survival[0] >= self.least):
                    out[i] = proposal
                else:
                    if proposal.tokens:
                        out[i] = proposal  # better than nothing, if nobody else answers
                    still.append(i)
            left = still
        return out

    def learn(self, proposal: Proposal, accepted: int) -> None:
        self._by_name[proposal.source].learn(proposal, accepted)

    def attach(self, host: Host) -> None:
        """Make the engine known to those who ask for it."""
        for proposer in self.proposers:
            if hasattr(proposer, "attach"):
                proposer.attach(host)

    def forget(self, seq: int) -> None:
        for proposer in self.proposers:
            proposer.forget(seq)
