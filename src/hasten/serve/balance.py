"""Which replica takes the next request.

A balancer is pure, as a policy is: it sees how many requests it has placed so far and the load of every replica, and
answers an index. Round robin is what DeepSpeed-FastGen's server does; least tokens is ours: it looks at the work that
is queued, which differs by two orders of magnitude between prompts of real traces.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from hasten.errors import ConfigurationError

__all__ = ["BALANCERS", "Balancer", "LeastTokens", "Load", "RoundRobin", "make_balancer"]


@dataclass(frozen=True, slots=True)
class Load:
    """What one replica still has to do."""

    requests: int = 0
    """requests that wait or run"""
    tokens: int = 0
    """known tokens that are not computed yet: prompts, and one for each running answer"""
    alive: bool = True
    """whether the replica takes requests"""


@runtime_checkable
class Balancer(Protocol):
    """Places requests on replicas."""

    def choose(self, placed: int, prompt_len: int, loads: Sequence[Load]) -> int:
        """Index of the replica for a request of ``prompt_len`` tokens, after ``placed`` others were placed.

        Raises :class:`~hasten.errors.ConfigurationError` when no replica is alive.
        """
        ...


def _alive(loads: Sequence[Load]) -> list[int]:
    alive = [i for i, load in enumerate(loads) if load.alive]
    if not alive:
        raise ConfigurationError(f"none of {len(loads)} replicas is alive; start one before sending requests")
    return alive


@dataclass(frozen=True)
class RoundRobin:
    """One after the other, whatever they have to do.

    >>> [RoundRobin().choose(n, 10, [Load(), Load(), Load()]) for n in range(4)]
    [0, 1, 2, 0]
    """

    def choose(self, placed: int, prompt_len: int, loads: Sequence[Load]) -> int:
        alive = _alive(loads)
        return alive[placed % len(alive)]


@dataclass(frozen=True)
class LeastTokens:
    """The replica with the fewest outstanding tokens; ties go round robin.

    >>> LeastTokens().choose(0, 10, [Load(requests=1, tokens=900), Load(requests=3, tokens=12)])
    1
    """

    answer: int = 16
    """tokens that a request is expected to need beyond those that are known: answers are not known in advance"""

    def choose(self, placed: int, prompt_len: int, loads: Sequence[Load]) -> int:
        alive = _alive(loads)
        count = len(loads)
        return min(alive, key=lambda i: (loads[i].tokens + self.answer * loads[i].requests, (i - placed) % count))


BALANCERS: dict[str, Callable[..., Balancer]] = {"round-robin": RoundRobin, "least-tokens": LeastTokens}
"""Balancers by name."""


def make_balancer(name: str) -> Balancer:
    """Build a balancer by its name. Raises :class:`~hasten.errors.ConfigurationError` for an unknown one."""
    try:
        return BALANCERS[name]()
    except KeyError:
        raise ConfigurationError(f"balancer {name!r} is not known; choose one of {', '.join(BALANCERS)}") from None
