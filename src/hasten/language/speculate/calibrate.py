"""How likely a tested guess stands, given the draft's probability of it: measured, and never falling.

DySpec (Xiong et al. 2024, arXiv:2410.11744) takes the one for the other. A drawn guess stands with ``min(1, t / q)``,
so an improbable one stands far more often than its probability says, and a tree that believes it branches too much.
Isotonic regression over buckets of equal size (pool adjacent violators) gives the curve a tree may use instead.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hasten.errors import ConfigurationError
from hasten.language.speculate.session import Session
from hasten.language.speculate.verify import probabilities

__all__ = ["AcceptanceCurve", "Tried", "laws_of", "guesses_tried"]


@dataclass(frozen=True)
class Tried:
    """One candidate at one position of a calibration text."""

    rank: int
    """0 for the first candidate there"""
    chance: float
    """its probability for the draft, among what was left"""
    stands: float
    """probability that the target accepts it once it is tested"""
    reached: float
    """probability that it is tested at all, since all before it were rejected"""


def laws_of(model: Any, tokens: Sequence[int], temperature: float) -> NDArray[np.float64]:
    """The model's distribution after every token of a list (tokens, vocabulary)."""
    session = Session(model.executor, len(tokens) + 16)
    return probabilities(session.feed(tokens, every=True, piece=len(tokens)).numpy(), temperature=temperature)


def guesses_tried(
    target: Any, draft: Any, calibration: Sequence[Sequence[int]], *, temperature: float = 0.0,
    draft_temperature: float = 0.6, ranks: int = 8, every: int = 4,
) -> Iterator[Tried]:  # fmt: skip
    """Candidates of the draft at positions of token lists, by the rule that verification uses.

    Greedy: the draft's likeliest tokens, in order. At a temperature they are drawn without replacement and the expected
    outcome of the rejection rule is followed; one draw per position.
    """
    if not calibration:
        raise ConfigurationError("guesses are calibrated on token lists, and none was given")
    rng = np.random.default_rng(0)
    for tokens in calibration:
        ours = laws_of(target, tokens, temperature)[8::every]
        theirs = laws_of(draft, tokens, draft_temperature)[8::every]
        for t, q in zip(ours, theirs, strict=True):
            reached = 1.0
            for rank in range(ranks):
                if temperature <= 1e-5:
                    token = int(q.argmax())
                    stands = float(t[token])
                else:
                    token = int(rng.choice(len(q), p=q / q.sum()))
                    stands = min(1.0, float(t[token] / q[token]))
                yield Tried(rank, float(q[token]), stands, reached)
                reached *= 1.0 - stands
                if reached <= 1e-9:
                    break
                if temperature > 1e-5:
                    rest = np.maximum(t - q, 0.0)
                    t = rest / rest.sum() if rest.sum() > 0 else t
                q = q.copy()
                q[token] = 0.0
                if q.sum() <= 1e-12:
                    break
                q /= q.sum()


@dataclass(frozen=True)
class AcceptanceCurve:
    """From the draft's probability of a token to the chance that it stands when tested; linear between its points.

    >>> curve = AcceptanceCurve((0.0, 0.5, 1.0), (0.2, 0.5, 0.9))
    >>> [round(curve(p), 2) for p in (0.0, 0.25, 0.75)]
    [0.2, 0.35, 0.7]
    """

    chances: tuple[float, ...]
    """rising"""
    rates: tuple[float, ...]
    """never falling"""

    def __post_init__(self) -> None:
        if len(self.chances) != len(self.rates) or not self.chances:
            raise ConfigurationError(
                f"{len(self.chances)} chances and {len(self.rates)} rates; give equally many, at least one"
            )
        if list(self.chances) != sorted(self.chances) or list(self.rates) != sorted(self.rates):
            raise ConfigurationError("chances and rates of an acceptance curve must not fall; sort or fit them")

    def __call__(self, chance: float) -> float:
        """The rate at ``chance``."""
        return float(np.interp(chance, self.chances, self.rates))

    def expected(self, law: NDArray[np.float64]) -> float:
        """The rate of a token that is still to be drawn from ``law`` (vocabulary,)."""
        return float(law @ np.interp(law, self.chances, self.rates))

    @classmethod
    def of(
        cls, chances: Sequence[float], stands: Sequence[float], weights: Sequence[float], bins: int = 16
    ) -> AcceptanceCurve:
        """Isotonic regression over ``bins`` buckets of equal weight."""
        order = np.argsort(chances, kind="stable")
        x, y, w = (np.asarray(v, np.float64)[order] for v in (chances, stands, weights))
        if not len(x) or w.sum() <= 0:
            raise ConfigurationError("no guess was tested, so there is nothing to fit; give longer token lists")
        edge = np.minimum((np.cumsum(w) / w.sum() * bins).astype(int), bins - 1)
        blocks: list[tuple[float, float, float]] = []  # weight, weighted chance, weighted rate
        for number in range(bins):
            some = edge == number
            if w[some].sum() <= 0:
                continue
            weight = float(w[some].sum())
            blocks.append((weight, float((w * x)[some].sum()), float((w * y)[some].sum())))
            while len(blocks) > 1 and blocks[-2][2] / blocks[-2][0] >= blocks[-1][2] / blocks[-1][0]:
                a, b = blocks.pop(), blocks.pop()
                blocks.append((a[0] + b[0], a[1] + b[1], a[2] + b[2]))
        points = np.array([(chance / weight, rate / weight) for weight, chance, rate in blocks])
        points = np.maximum.accumulate(points)  # sums round
        return cls(tuple(points[:, 0].tolist()), tuple(points[:, 1].tolist()))

    @classmethod
    def fit(
        cls, target: Any, draft: Any, calibration: Sequence[Sequence[int]], *, temperature: float = 0.0,
        draft_temperature: float = 0.6, ranks: int = 4, every: int = 1,
    ) -> tuple[AcceptanceCurve, AcceptanceCurve]:  # fmt: skip
        """Measured on token lists at one temperature: of first candidates, and of those that follow a rejected one."""
        found = list(
            guesses_tried(
                target, draft, calibration, temperature=temperature, draft_temperature=draft_temperature, ranks=ranks,
                every=every,
            )
        )  # fmt: skip
        return cls._of_some([g for g in found if g.rank == 0]), cls._of_some([g for g in found if g.rank > 0] or found)

    @classmethod
    def _of_some(cls, found: Sequence[Tried]) -> AcceptanceCurve:
        return cls.of([g.chance for g in found], [g.stands for g in found], [g.reached for g in found])

    @classmethod
    def fit_ranks(
        cls, target: Any, draft: Any, calibration: Sequence[Sequence[int]], *, temperature: float = 0.0,
        draft_temperature: float = 0.6, ranks: int = 5, every: int = 1,
    ) -> tuple[AcceptanceCurve, ...]:  # fmt: skip
        """The same with a curve for every rank: what is tested third stands less often than what is tested second.

        Ends before the first rank that no guess reached; the first of them is for ``calibrate`` of a dynamic tree, the
        others for ``calibrate_siblings``.
        """
        found = list(
            guesses_tried(
                target, draft, calibration, temperature=temperature, draft_temperature=draft_temperature, ranks=ranks,
                every=every,
            )
        )  # fmt: skip
        by_rank = [[g for g in found if g.rank == rank and g.reached > 0] for rank in range(ranks)]
        return tuple(cls._of_some(some) for some in by_rank[: next((i for i, x in enumerate(by_rank) if not x), ranks)])
