"""Prompt lookup: the text repeats itself, so what followed the last time is a good guess.

The longest suffix of the known tokens (at most ``max_ngram``) that occurred before is found, and what followed its
latest occurrence is proposed (prompt lookup decoding, Saxena 2023; LLMA, Yang et al. 2023, arXiv:2304.04487). Costs one
pass over the known tokens, no model. Differs from the original in: how far to go follows from how often guesses behind
a match of that length have stood.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numba import njit

from hasten.errors import ConfigurationError
from hasten.language.speculate.proposal import Ask, Calibration, Proposal

__all__ = ["PromptLookup"]


@njit(cache=True, nogil=True)
def _find(tokens: Any, least: Any, most: Any) -> Any:  # pragma: no cover
    """Where the continuation of the longest earlier match begins, and the length of the match; (-1, 0) for none."""
    known = tokens.shape[0]
    best, where = 0, -1
    for end in range(known - 1, 0, -1):  # the match ends before tokens[end]
        length = 0
        while length < most and length < end and tokens[end - 1 - length] == tokens[known - 1 - length]:
            length += 1
        if length > best:
            best, where = length, end
            if best == most:
                break
    return (where, best) if best >= least else (-1, 0)


class PromptLookup:
    """Guesses by repetition.

    >>> lookup = PromptLookup(max_ngram=3, min_ngram=1)
    >>> lookup.propose([Ask(0, np.array([5, 6, 7, 8, 5, 6]), 3)])[0].tokens
    (7, 8, 5)
    """

    def __init__(self, max_ngram: int = 8, min_ngram: int = 1) -> None:
        """Raises :class:`~hasten.errors.ConfigurationError` unless ``1 <= min_ngram <= max_ngram``."""
        if not 1 <= min_ngram <= max_ngram:
            raise ConfigurationError(
                f"n-grams go from {min_ngram} to {max_ngram}; min_ngram must be at least 1 and at most max_ngram"
            )
        self.max_ngram, self.min_ngram = max_ngram, min_ngram
        # classes: (length of the match, place 0, 1 or later of the guess)
        prior = [1.0 - 0.6 / (length + 0.5 * (place + 1)) for length in range(1, max_ngram + 1) for place in range(3)]
        self._calibration = Calibration(prior)
        self._kept: dict[tuple[int, int], tuple[tuple[int, ...], tuple[float, ...]]] = {}

    @property
    def name(self) -> str:
        return "prompt-lookup"

    def propose(self, asks: Sequence[Ask]) -> list[Proposal]:
        return [self._one(ask) for ask in asks]

    def _one(self, ask: Ask) -> Proposal:
        where, length = _find(ask.tokens, self.min_ngram, self.max_ngram)
        if where < 0 or ask.count < 1:
            return Proposal()
        period = len(ask.tokens) - where  # a guess that runs past the end repeats itself
        if period >= ask.count:
            tokens = tuple(ask.tokens[where : where + ask.count].tolist())
        else:
            tokens = tuple(ask.tokens[where + np.arange(ask.count) % period].tolist())
        marks, survival = self._estimate(length, len(tokens))
        return Proposal(tokens, survival, None, self.name, marks)

    def _estimate(self, length: int, count: int) -> tuple[tuple[int, ...], tuple[float, ...]]:
        """Classes and chances of ``count`` guesses behind a match of ``length``; kept until something is learnt."""
        found = self._kept.get((length, count))
        if found is None:
            marks = tuple(3 * (length - 1) + min(place, 2) for place in range(count))
            survival, running = [], 1.0
            for mark in marks:
                running *= self._calibration.chance(mark)
                survival.append(running)
            found = self._kept[length, count] = (marks, tuple(survival))
        return found

    def learn(self, proposal: Proposal, accepted: int) -> None:
        for place, mark in enumerate(proposal.marks[: accepted + 1]):
            self._calibration.learn(mark, place < accepted)
        self._kept.clear()

    def forget(self, seq: int) -> None:
        pass
