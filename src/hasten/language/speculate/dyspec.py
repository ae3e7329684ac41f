"""A tree of guesses that grows where the draft is sure and branches where it is not.

"DySpec: Faster Speculative Decoding with Dynamic Token Tree Structure", Xiong et al. 2024, arXiv:2410.11744. A place
has value v, the estimated chance that it is reached and its token tested: the place below ``y`` has ``v R[y]``, the
next sibling ``v (1 - R[y])``. Values fall along the way, so taking the largest each time gives the N best places of
all. Invariant: a place is chosen by what is known before its token is drawn.
Differs from the paper in: for a greedy target the token of a place is chosen, not drawn, so its own value ``v R[y]`` is
known too, and the tree has the N best tokens (found lazily, since v bounds it). With ``calibrate`` a place where a
token will be drawn is ordered by ``v sum_y R[y] a(R[y])``, the chance that whatever is drawn there stands.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hasten.errors import ConfigurationError
from hasten.language.speculate.calibrate import AcceptanceCurve
from hasten.language.speculate.law import Draw
from hasten.language.speculate.shapes import Distributions, take
from hasten.language.speculate.tree import TokenTree

__all__ = ["DynamicTree"]


@dataclass(frozen=True)
class DynamicTree:
    """Grows at run time.

    >>> law = np.array([0.7, 0.2, 0.1])
    >>> tree = DynamicTree(budget=3).grow(lambda tree, nodes: np.stack([law] * len(nodes)), None)
    >>> tree.paths(), [round(v, 2) for v in tree.values]
    ([(0, 0, 0)], [0.7, 0.49, 0.34])
    """

    budget: int = 64
    """nodes at most"""
    threshold: float | None = None
    """layered growth: places of at least this value, one call of the draft per level, then the best of the places whose
    law is known until the tree is full; None takes the best place each time, with a call per place that is expanded"""
    calibrate: Callable[[float], float] | None = None
    """from the draft's probability to the chance that the token stands; None takes the one for the other"""
    calibrate_siblings: Callable[[float], float] | Sequence[Callable[[float], float]] | None = None
    """the same for a token that is tested because those before it at its place were rejected, or one for the second,
    the third and so on (the last for all beyond); None: as ``calibrate``"""

    def __post_init__(self) -> None:
        if self.budget < 1:
            raise ConfigurationError(f"a tree of {self.budget} nodes; the budget must be at least 1")
        if self.threshold is not None and not 0.0 < self.threshold < 1.0:
            raise ConfigurationError(f"the threshold is {self.threshold}; it must be between 0 and 1, such as 1/budget")

    @property
    def name(self) -> str:
        return f"dynamic {self.budget}" + ("" if self.threshold is None else f" layered {self.threshold:g}")

    def grow(self, distributions: Distributions, draw: Draw | None) -> TokenTree:
        """See :class:`~hasten.language.speculate.shapes.Shape`; ``values`` of the tree are the chances to stand."""
        return self._greedy(distributions, draw) if self.threshold is None else self._layered(distributions, draw)

    def _curve(self, rank: int) -> Callable[[float], float] | None:
        siblings = self.calibrate_siblings
        if rank == 0 or siblings is None or (isinstance(siblings, Sequence) and not siblings):
            return self.calibrate
        return siblings[min(rank, len(siblings)) - 1] if isinstance(siblings, Sequence) else siblings

    def _stands(self, chance: float, rank: int) -> float:
        """Chance that a token of this probability is accepted once it is tested, after ``rank`` others were not."""
        curve = self._curve(rank)
        return chance if curve is None else min(max(curve(chance), 0.0), 1.0)

    def _expand(
        self, tree: TokenTree, node: int, left: NDArray[np.float64], value: float, rank: int, draw: Draw | None
    ) -> tuple[int, float, float, NDArray[np.float64] | None]:
        """Take a token at a place: the new node, its value, the value and law of the next sibling's place."""
        token, chance, rest = take(left, draw)
        chance = self._stands(chance, rank)
        child = tree.add(token, node, None if draw is None else left, value * chance)
        return child, value * chance, value * (1.0 - chance), rest

    def _worth(self, value: float, left: NDArray[np.float64], rank: int, draw: Draw | None) -> float:
        """What a place is ordered by: the value of its token where no chance is in it; of a token to be drawn the
        expected value with a curve, and without one, as in the paper, the value of the place."""
        if draw is None:
            return value * self._stands(float(left.max()), rank)
        curve = self._curve(rank)
        return value if curve is None else value * _expected(curve, left)

    def _greedy(self, distributions: Distributions, draw: Draw | None) -> TokenTree:
        tree = TokenTree()
        by_value = draw is not None and self.calibrate is None
        # worth, age, node, value of the place, tokens taken there, its law (None: not looked at yet, worth is a bound)
        heap: list[tuple[float, int, int, float, int, NDArray[np.float64] | None]] = [(-1.0, 0, -1, 1.0, 0, None)]
        age = 0
        while heap and len(tree) < self.budget:
            _, _, node, value, rank, left = heapq.heappop(heap)
            age += 2
            if left is None:
                left = distributions(tree, [node])[0]
                if not by_value:
                    heapq.heappush(heap, (-self._worth(value, left, rank, draw), age, node, value, rank, left))
                    continue
            child, below, beside, rest = self._expand(tree, node, left, value, rank, draw)
            if rest is not None and beside > 0.0:
                worth = self._worth(beside, rest, rank + 1, draw)
                heapq.heappush(heap, (-worth, age, node, beside, rank + 1, rest))
            if below > 0.0:
                heapq.heappush(heap, (-below, age + 1, child, below, 0, None))
        return tree

    def _layered(self, distributions: Distributions, draw: Draw | None) -> TokenTree:
        assert self.threshold is not None
        tree = TokenTree()
        level: list[tuple[float, int]] = [(1.0, -1)]
        spare: list[_Place] = []
        age = 0
        while level and len(tree) < self.budget:
            laws = distributions(tree, [node for _, node in level])
            heap = [
                (-self._worth(value, law, 0, draw), age + i, node, value, 0, law)
                for i, ((value, node), law) in enumerate(zip(level, laws, strict=True))
            ]
            age += len(heap)
            found = self._fill(tree, heap, self.threshold, draw, age)
            age += len(found)
            level = [(below, child) for below, child in found if below >= self.threshold]
            spare += heap
        self._fill(tree, spare, 0.0, draw, age)
        return tree

    def _fill(
        self, tree: TokenTree, heap: list[_Place], least: float, draw: Draw | None, age: int
    ) -> list[tuple[float, int]]:
        """Take the best places whose laws are known while they are worth ``least`` and the tree has room; what was
        taken, as (value, node). Places that are left stay in ``heap``."""
        heapq.heapify(heap)
        found = []
        while heap and len(tree) < self.budget and -heap[0][0] >= least:
            _, _, node, value, rank, left = heapq.heappop(heap)
            child, below, beside, rest = self._expand(tree, node, left, value, rank, draw)
            if rest is not None and beside > 0.0:
                worth = self._worth(beside, rest, rank + 1, draw)
                heapq.heappush(heap, (-worth, age, node, beside, rank + 1, rest))
                age += 1
            found.append((below, child))
        return found


_Place = tuple[float, int, int, float, int, NDArray[np.float64]]
"""minus its worth, its age, the node, the value of the place, tokens taken there, the law that is left"""


def _expected(curve: Callable[[float], float], law: NDArray[np.float64]) -> float:
    """The mean of ``curve`` over a token drawn from ``law``; beyond the likeliest, tokens count as equally likely."""
    if isinstance(curve, AcceptanceCurve):
        return curve.expected(law)
    some = np.sort(law[np.argpartition(law, -8)[-8:]]) if len(law) > 8 else law
    total = sum(chance * min(max(curve(chance), 0.0), 1.0) for chance in some.tolist())
    others = max(0.0, 1.0 - float(some.sum()))
    return float(total + others * min(max(curve(others / max(1, len(law) - len(some))), 0.0), 1.0))
