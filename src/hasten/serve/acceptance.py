"""How often guesses stand, for each sequence and over all.

A sequence writes few tokens, so its own rate is mostly noise: of sequences that are alike, those that were lucky would
be given long guesses and the others none. Each rate is therefore drawn towards the common one, by a weight that follows
from how much more the rates of ended sequences differ than chance explains (the moment estimate of a beta-binomial:
Kleinman 1973, "Proportions with extraneous variance").
"""

from __future__ import annotations

__all__ = ["Acceptance"]

_PRIOR = (7.0, 3.0)
_WEIGHT = 20.0
"""guesses that the common rate counts for until enough sequences have ended"""
_BOUNDS = (5.0, 500.0)
"""least and most of that weight"""
_ENOUGH = 8
"""ended sequences from which their spread says something"""
_KEEP = 0.98
"""what an ended sequence's part is multiplied by when another ends"""


class Acceptance:
    """Chance that a tested guess stands, over all sequences and for each.

    A decaying average over about ``window`` steps from a prior of Beta(7, 3). A guess behind a rejected one was not
    tested and does not count.

    >>> acceptance = Acceptance()
    >>> acceptance.learn(0, accepted=3, proposed=3); acceptance.alpha(0) > acceptance.alpha(1) > 0.7
    True
    """

    def __init__(self, window: int = 100) -> None:
        self._keep = 1.0 - 1.0 / window
        self._hits, self._tries = _PRIOR[0], sum(_PRIOR)
        self._own: dict[int, tuple[float, float]] = {}
        self._weight = _WEIGHT
        self._count = self._total = self._hit = self._squares = self._ratio = 0.0

    @property
    def weight(self) -> float:
        """Guesses of a sequence that the common rate counts for."""
        return self._weight

    def alpha(self, seq: int) -> float:
        """Estimate for one sequence; for an unknown one that of all."""
        common = self._hits / self._tries
        hits, tries = self._own.get(seq, (0.0, 0.0))
        return (hits + self._weight * common) / (tries + self._weight)

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
        """The sequence has ended; its rate tells how much sequences differ."""
        hits, tries = self._own.pop(seq, (0.0, 0.0))
        if tries < 2:
            return
        self._count = self._count * _KEEP + 1
        self._total = self._total * _KEEP + tries
        self._hit = self._hit * _KEEP + hits
        self._squares = self._squares * _KEEP + tries * tries
        self._ratio = self._ratio * _KEEP + hits * hits / tries
        if self._count >= _ENOUGH:
            self._weight = self._estimate()

    def _estimate(self) -> float:
        rate = self._hit / self._total
        chance = rate * (1 - rate)
        spread = self._ratio - self._hit * rate - (self._count - 1) * chance  # beyond what chance explains
        if spread <= 0 or chance <= 0:
            return _BOUNDS[1]
        variance = spread / (self._total - self._squares / self._total)
        return min(max(chance / variance - 1, _BOUNDS[0]), _BOUNDS[1])
