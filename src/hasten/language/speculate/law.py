"""Randomness handed in, so that the law of an algorithm can be computed exactly.

Everything random in speculation goes through one callable, ``draw(probabilities) -> index``. :class:`Dice` draws for
real. :func:`outcomes` instead runs the same code along every branch of its draws and adds up the probabilities: what
comes out is the law of the code as it stands, not of a model of it.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from hasten.errors import ConfigurationError

__all__ = ["Dice", "Draw", "chance", "outcomes"]

Probabilities = NDArray[np.float64]
Draw = Callable[[Probabilities], int]
"""Picks an index with the given probabilities, (n,) summing to one."""

_T = TypeVar("_T", bound=Hashable)


class Dice:
    """A :data:`Draw` out of a seed.

    >>> Dice(0)(np.array([0.0, 1.0]))
    1
    """

    def __init__(self, seed: int = 0) -> None:
        self._random = np.random.default_rng(seed)

    def __call__(self, probabilities: Probabilities) -> int:
        running = np.cumsum(probabilities)
        index = int(np.searchsorted(running, self._random.random() * running[-1], side="right"))
        return min(index, len(running) - 1)


def chance(draw: Draw, probability: float) -> bool:
    """Whether an event of this probability happens; certain ones draw nothing."""
    if probability >= 1.0:
        return True
    if probability <= 0.0:
        return False
    return draw(np.array([probability, 1.0 - probability])) == 0


def outcomes(run: Callable[[Draw], _T], *, most: int = 2_000_000) -> dict[_T, float]:
    """The law of ``run(draw)``: each result with its exact probability.

    ``run`` is called once per branch and must be a function of its draws alone. Raises
    :class:`~hasten.errors.ConfigurationError` beyond ``most`` branches.

    >>> outcomes(lambda draw: draw(np.array([0.25, 0.75])))
    {0: 0.25, 1: 0.75}
    """
    law: dict[_T, float] = {}
    script: list[int] = []  # the indices to take; deeper draws take the first that is possible
    branches = 0
    while True:
        weights: list[float] = []
        supports: list[NDArray[np.int64]] = []

        def scripted(
            probabilities: Probabilities,
            weights: list[float] = weights,
            supports: list[NDArray[np.int64]] = supports,
        ) -> int:
            level = len(supports)
            support = np.flatnonzero(probabilities > 0)
            supports.append(support)
            if level == len(script):
                script.append(0)
            index = int(support[script[level]])
            weights.append(float(probabilities[index]) / float(np.sum(probabilities)))
            return index

        result = run(scripted)
        law[result] = law.get(result, 0.0) + float(np.prod(weights))
        branches += 1
        if branches > most:
            raise ConfigurationError(f"more than {most} branches; make the vocabulary or the depth smaller")
        del script[len(supports) :]
        while script and script[-1] + 1 == len(supports[len(script) - 1]):
            script.pop()
        if not script:
            return law
        script[-1] += 1
