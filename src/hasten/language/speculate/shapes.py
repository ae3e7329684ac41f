"""Shapes of guesses that are the same for every text: a chain, a k-ary tree, a tree fitted to a calibration text.

A shape grows a tree out of the draft's distributions: ``grow(distributions, draw)``, where ``distributions(tree,
nodes)`` gives the draft's law after each node (-1: after the last known token), one call for all of them. ``draw``
None chooses the likeliest tokens instead of drawing (for a greedy target). The fitted tree is that of Sequoia (Chen et
al. 2024, arXiv:2402.12374): the size-N tree with the most expected tokens when the r-th candidate of any node stands
with p_r.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from hasten.errors import ConfigurationError
from hasten.language.speculate.law import Draw
from hasten.language.speculate.tree import TokenTree

__all__ = ["Chain", "Distributions", "FixedTree", "KAry", "Shape", "take"]

Distributions = Callable[[TokenTree, Sequence[int]], NDArray[np.float64]]
"""(tree, nodes) -> (nodes, vocabulary): the draft's law after each node"""


class Shape(Protocol):
    """Which places of the tree of all continuations are guessed."""

    @property
    def name(self) -> str: ...

    def grow(self, distributions: Distributions, draw: Draw | None) -> TokenTree: ...


def take(law: NDArray[np.float64], draw: Draw | None) -> tuple[int, float, NDArray[np.float64] | None]:
    """A token out of ``law``, its probability there, and what is left of the law without it (None: nothing)."""
    token = int(law.argmax()) if draw is None else draw(law)
    chance = float(law[token])
    rest = law.copy()
    rest[token] = 0.0
    mass = rest.sum()
    return token, chance, rest / mass if mass > 1e-12 else None


def _grow_by_counts(
    distributions: Distributions, draw: Draw | None, children: Callable[[int, int], Sequence[int]]
) -> TokenTree:
    """Level by level; ``children(place, rank)`` are the places below a place of the structure, best first."""
    tree = TokenTree()
    level: list[tuple[int, int]] = [(-1, -1)]  # node of the tree, place of the structure
    while level:
        level = [(node, place) for node, place in level if children(place, 0)]
        if not level:
            break
        laws = distributions(tree, [node for node, _ in level])
        following = []
        for (node, place), law in zip(level, laws, strict=True):
            left: NDArray[np.float64] | None = law
            for below in children(place, 0):
                if left is None:
                    break
                token, chance, rest = take(left, draw)
                value = chance * (1.0 if node < 0 else tree.values[node])
                child = tree.add(token, node, None if draw is None else left, value)
                following.append((child, below))
                left = rest
        level = following
    return tree


@dataclass(frozen=True)
class Chain:
    """One continuation of ``length`` tokens."""

    length: int = 5
    """guesses"""

    def __post_init__(self) -> None:
        if self.length < 1:
            raise ConfigurationError(f"a chain of {self.length} guesses; give at least 1")

    @property
    def name(self) -> str:
        return f"chain {self.length}"

    def grow(self, distributions: Distributions, draw: Draw | None) -> TokenTree:
        """See :class:`Shape`."""
        return _grow_by_counts(distributions, draw, lambda place, _: [place + 1] if place + 1 < self.length else [])


@dataclass(frozen=True)
class KAry:
    """Every node has ``width`` children down to ``depth``, or until ``budget`` nodes are there."""

    width: int = 2
    """children of a node"""
    depth: int = 4
    """levels"""
    budget: int | None = None
    """nodes at most"""

    def __post_init__(self) -> None:
        if self.width < 1 or self.depth < 1 or (self.budget is not None and self.budget < 1):
            raise ConfigurationError(f"width {self.width}, depth {self.depth}: both must be at least 1")

    @property
    def name(self) -> str:
        return f"{self.width}-ary {self.depth}"

    def grow(self, distributions: Distributions, draw: Draw | None) -> TokenTree:
        """See :class:`Shape`."""
        total = sum(self.width**d for d in range(1, self.depth + 1))
        size = min(total, self.budget or total)

        def children(place: int, _: int) -> list[int]:  # places count level by level, the root is -1
            first = self.width * (place + 1)
            return [p for p in range(first, first + self.width) if p < size]

        return _grow_by_counts(distributions, draw, children)


@dataclass(frozen=True)
class FixedTree:
    """A structure given by the parent of each place; siblings in the order of their rank.

    >>> FixedTree.best([0.6, 0.2], 4).parents          # a chain of three and one second choice at the top
    (-1, 0, 1, -1)
    >>> FixedTree.best([0.5, 0.4], 4).parents
    (-1, -1, 0, 1)
    """

    parents: tuple[int, ...]
    """of each place, -1 for the root"""

    def __post_init__(self) -> None:
        if not self.parents or any(not -1 <= p < i for i, p in enumerate(self.parents)):
            raise ConfigurationError(f"parents {self.parents} are no tree; every parent stands before its children")

    @property
    def name(self) -> str:
        return f"fixed {len(self.parents)}"

    def grow(self, distributions: Distributions, draw: Draw | None) -> TokenTree:
        """See :class:`Shape`."""
        below: dict[int, list[int]] = {}
        for place, parent in enumerate(self.parents):
            below.setdefault(parent, []).append(place)
        return _grow_by_counts(distributions, draw, lambda place, _: below.get(place, []))

    @classmethod
    def best(cls, rates: Sequence[float], size: int) -> FixedTree:
        """The tree of ``size`` places with the most expected tokens, where the r-th child is the one that stands with
        probability ``rates[r]``.

        The value of a place is the product of the rates on its way; with falling rates every place is worth less than
        its parent and its earlier siblings, so the ``size`` best places are a tree, found best first.
        """
        rates = np.minimum.accumulate(np.asarray(rates, np.float64)).tolist()
        if size < 1 or not rates:
            raise ConfigurationError(f"a tree of {size} nodes with {len(rates)} rates; both must be at least 1")
        heap: list[tuple[float, int, int, int, float]] = [(-rates[0], 0, -1, 0, 1.0)]  # value, age, parent, rank, above
        parents: list[int] = []
        age = 0
        while heap and len(parents) < size:
            value, _, parent, rank, above = heapq.heappop(heap)
            parents.append(parent)
            age += 2
            if rank + 1 < len(rates):
                heapq.heappush(heap, (-above * rates[rank + 1], age, parent, rank + 1, above))
            heapq.heappush(heap, (value * rates[0], age + 1, len(parents) - 1, 0, -value))
        return cls(tuple(parents))

    @classmethod
    def fit(
        cls, target: Any, draft: Any, calibration: Sequence[Sequence[int]], size: int, *, temperature: float = 0.0,
        draft_temperature: float = 0.6, ranks: int = 8,
    ) -> FixedTree:  # fmt: skip
        """Rates measured on token lists: how often the r-th candidate of the draft is the one that stands."""
        from hasten.language.speculate.compare import rank_rates

        return cls.best(
            rank_rates(target, draft, calibration, temperature=temperature, draft_temperature=draft_temperature,
                       ranks=ranks), size
        )  # fmt: skip
