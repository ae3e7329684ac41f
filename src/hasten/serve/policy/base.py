"""What a scheduling policy is: a pure function from the state of an engine to its next step.

A policy holds no state that changes, reads no clock and does no I/O: ``now`` is in the observation. The same object
therefore drives the real engine and the discrete-event simulator, and the same observation gives the same plan.

Blocks are counted, not handed out: a chunk that ends at token ``e`` needs ``ceil(e / block_size) - seq.blocks`` more.
For a waiting sequence ``blocks`` is 0 unless the engine knows that somebody holds its shared prefix already. A victim
is expected to give back ``seq.blocks``; where some are shared fewer come free, so an engine leaves out a chunk that
does not fit after all and asks again.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol, runtime_checkable

from hasten.errors import ConfigurationError
from hasten.serve.batch import Observation, StepPlan
from hasten.serve.request import Sequence

__all__ = ["Policy", "in_turn", "rank", "require"]


@runtime_checkable
class Policy(Protocol):
    """Decides what the next step computes."""

    @property
    def name(self) -> str:
        """The name that :func:`hasten.serve.policy.make` knows it by."""
        ...

    def decide(self, observation: Observation) -> StepPlan:
        """The next step; an empty plan when there is nothing to do until something arrives.

        Pure: it writes nothing, and equal observations give equal plans.
        """
        ...


def rank(sequence: Sequence) -> tuple[int, float, int]:
    """Order of service: priority, then when the first token is due (the arrival, where requests have no objective),
    then number. The last in rank is the first to be preempted.

    Earliest deadline first: it never changes while a sequence lives, and whoever may wait longer gives way only to
    those who arrive within that time, so nobody starves.
    """
    return (sequence.priority, sequence.due, sequence.seq)


def in_turn(sequences: Iterable[Sequence]) -> list[Sequence]:
    """The sequences in order of service."""
    return sorted(sequences, key=rank)


def require(condition: bool, message: str) -> None:
    """Raise :class:`~hasten.errors.ConfigurationError` with ``message`` unless ``condition`` holds."""
    if not condition:
        raise ConfigurationError(message)
