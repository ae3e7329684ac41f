"""A tree of guesses that grows where the draft is sure and branches where it is not.

"DySpec: Faster Speculative Decoding with Dynamic Token Tree Structure", Xiong et al. 2024, arXiv:2410.11744. A place
has value v, the estimated chance that it is reached and its token tested: the place below ``y`` has ``v R[y]``, the
next sibling ``v (1 - R[y])``. Values fall along the way, so taking the largest each time gives the N best places of
all. Invariant: a place is chosen by its value, which is known before its token is drawn.
Differs from the paper in: for a greedy target the token of a place is chosen, not drawn, so its own value ``v R[y]`` is
known too, and the tree has the N best tokens (found lazily, since v bounds it).
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hasten.errors import ConfigurationError
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
    """layered growth: places of at least this value, one call of the draft per level; None takes the best place each
    time, with a call per place that is expanded"""
    calibrate: Callable[[float], float] | None = None
    """from the draft's probability to the chance that the token stands; None takes the one for the other"""
    calibrate_siblings: Callable[[float], float] | None = None
    """the same for a token that is tested because those before it at its place were rejected; None: as ``calibrate``"""

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

    def _stands(self, chance: float, rank: int) -> float:
        """Chance that a token of this probability is accepted once it is tested, after ``rank`` others were not."""
        curve = self.calibrate if rank == 0 or self.calibrate_siblings is None else self.calibrate_siblings
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
        """What a place is ordered by: its value, or that of its token where no chance is in it."""
        if draw is not None:
            return value
        return value * self._stands(float(left.max()), rank)

    def _greedy(self, distributions: Distributions, draw: Draw | None) -> TokenTree:
        tree = TokenTree()
        # worth, age, node, value of the place, tokens taken there, its law (None: not asked for yet, worth is a bound)
        heap: list[tuple[float, int, int, float, int, NDArray[np.float64] | None]] = [(-1.0, 0, -1, 1.0, 0, None)]
        age = 0
        while heap and len(tree) < self.budget:
            _, _, node, value, rank, left = heapq.heappop(heap)
            age += 2
            if left is None:
                left = distributions(tree, [node])[0]
                if draw is None:
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
        while level and len(tree) < self.budget:
            laws = distributions(tree, [node for _, node in level])
            heap = [(-self._worth(v, laws[i], 0, draw), i, node, v, 0, laws[i]) for i, (v, node) in enumerate(level)]
            heapq.heapify(heap)
            age, following = len(heap), []
            while heap and len(tree) < self.budget:
                worth, _, node, value, rank, left = heapq.heappop(heap)
                if -worth < self.threshold:
                    break
                child, below, beside, rest = self._expand(tree, node, left, value, rank, draw)
                if rest is not None and beside > 0.0:
                    worth = -self._worth(beside, rest, rank + 1, draw)
                    heapq.heappush(heap, (worth, age, node, beside, rank + 1, rest))
                    age += 1
                if below >= self.threshold:
                    following.append((below, child))
            level = following
        return tree
