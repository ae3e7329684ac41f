"""Guesses in a simulator: the real policy decides their lengths, the real estimate learns, chance says which stand."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

import numpy as np

from hasten.serve.acceptance import Acceptance
from hasten.serve.cost import IterationCost
from hasten.serve.policy.speculation import DraftCost, SpeculationObservation, SpeculationPolicy

__all__ = ["Guesser", "SimulatedSpeculation"]


@dataclass(frozen=True)
class SimulatedSpeculation:
    """Speculation for a simulated engine: the real policy and the real estimate, with acceptance drawn by chance.

    The policy is not told ``alpha``; it learns it from what stands, as in the engine.
    """

    policy: SpeculationPolicy
    """decides the lengths"""
    alpha: Callable[[float], float]
    """chance that a guess stands, by simulated time; guesses behind one that fell are not tested"""
    cost: IterationCost
    """what the policy believes a step to cost"""
    draft: DraftCost = DraftCost()
    """what guessing costs, in truth and in the policy's belief"""
    seed: int = 0

    def start(self) -> Guesser:
        """State for one engine."""
        return Guesser(self)


class Guesser:
    """What a simulated engine learns while it guesses."""

    def __init__(self, plan: SimulatedSpeculation) -> None:
        self.policy, self.draft = plan.policy, plan.draft
        self.acceptance = Acceptance(getattr(plan.policy, "window", 100))
        self._plan = plan
        self._random = np.random.default_rng(plan.seed)
        self._since = 0
        self.now = 0.0

    def lengths(
        self, seqs: SequenceOf[int], contexts: SequenceOf[int], pieces: int, limits: SequenceOf[int]
    ) -> list[int]:
        """Guesses for each decode, with a probe now and then where none would be made."""
        found = self.policy.decide(
            SpeculationObservation(
                [self.acceptance.alpha(s) for s in seqs],
                contexts,
                pieces,
                limits,
                cost=self._plan.cost,
                draft=self.draft,
            )
        )
        if any(found):
            self._since = 0
            return found
        self._since += 1
        if self._since >= getattr(self.policy, "probe_every", 1 << 60):
            self._since = 0
            return [min(1, limit) for limit in limits]
        return found

    def outcome(self, seq: int, proposed: int) -> int:
        """How many of the guesses stand; the estimate learns it."""
        alpha = self._plan.alpha(self.now)
        stood = 0
        while stood < proposed and self._random.random() < alpha:
            stood += 1
        self.acceptance.learn(seq, stood, proposed)
        return stood
