"""A tree of guessed tokens: its nodes, who descends from whom, and the order in which a kernel likes them.

Node ``i`` holds ``tokens[i]`` and hangs on node ``parents[i]``, or on the last known token where that is -1. Parents
come before children, siblings in the order in which they were drawn. ``residuals[i]`` is the distribution out of which
token ``i`` was drawn (exact verification needs it); None says that it was chosen without chance.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hasten.errors import ConfigurationError

__all__ = ["TokenTree"]


@dataclass
class TokenTree:
    """Guessed continuations of one sequence.

    >>> tree = TokenTree.chain([7, 8])
    >>> fork = tree.add(9, parent=0)
    >>> tree.paths(), tree.depths.tolist(), tree.mask().tolist()
    ([(7, 8), (7, 9)], [1, 2, 2], [[True, False, False], [True, True, False], [True, False, True]])
    """

    tokens: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    residuals: list[NDArray[np.float64] | None] = field(default_factory=list)
    values: list[float] = field(default_factory=list)
    """estimated chance that a node is reached and accepted"""

    def __len__(self) -> int:
        return len(self.tokens)

    @classmethod
    def chain(cls, tokens: Sequence[int], residuals: Sequence[NDArray[np.float64] | None] | None = None) -> TokenTree:
        """One continuation."""
        count = len(tokens)
        return cls(list(tokens), list(range(-1, count - 1)), list(residuals or [None] * count), [1.0] * count)

    def add(self, token: int, parent: int = -1, residual: NDArray[np.float64] | None = None, value: float = 1.0) -> int:
        """Hang a node on ``parent``; returns its number. Raises :class:`ConfigurationError` for an unknown parent."""
        if not -1 <= parent < len(self.tokens):
            raise ConfigurationError(f"node {parent} is not in a tree of {len(self.tokens)}; add parents first")
        self.tokens.append(token)
        self.parents.append(parent)
        self.residuals.append(residual)
        self.values.append(value)
        return len(self.tokens) - 1

    def children(self, node: int) -> list[int]:
        """Children of ``node`` (-1: of the last known token), in the order in which they were drawn."""
        return [i for i, parent in enumerate(self.parents) if parent == node]

    @property
    def depths(self) -> NDArray[np.int64]:
        """(nodes,): 1 for children of the last known token."""
        out = np.empty(len(self.tokens), np.int64)
        for i, parent in enumerate(self.parents):
            out[i] = 1 if parent < 0 else out[parent] + 1
        return out

    @property
    def expected_length(self) -> float:
        """Tokens that a pass is expected to accept: the sum of all values."""
        return float(sum(self.values))

    @property
    def is_chain(self) -> bool:
        """Whether every node hangs on the one before."""
        return all(parent == i - 1 for i, parent in enumerate(self.parents))

    def path(self, node: int) -> list[int]:
        """Nodes from the first below the root to ``node``."""
        out = []
        while node >= 0:
            out.append(node)
            node = self.parents[node]
        return out[::-1]

    def paths(self) -> list[tuple[int, ...]]:
        """Tokens from the root to every leaf."""
        inner = set(self.parents)
        return [tuple(self.tokens[j] for j in self.path(i)) for i in range(len(self)) if i not in inner]

    def mask(self) -> NDArray[np.bool_]:
        """(nodes, nodes): True where the column is an ancestor of the row, or the row itself."""
        count = len(self.tokens)
        out = np.zeros((count, count), bool)
        for i, parent in enumerate(self.parents):
            if parent >= 0:
                out[i] = out[parent]
            out[i, i] = True
        return out

    def depth_first(self) -> tuple[TokenTree, list[int]]:
        """The same tree in depth-first order, heaviest child first, and the old number of every new node.

        Ancestors then stand in long runs, so that a blocked mask has few blocks. The order of siblings is kept in the
        result's ``children`` only up to their weights; verify the tree that was drawn.
        """
        count = len(self.tokens)
        weight = [1] * count
        for i in range(count - 1, -1, -1):
            if self.parents[i] >= 0:
                weight[self.parents[i]] += weight[i]
        below: dict[int, list[int]] = {}
        for i, parent in enumerate(self.parents):
            below.setdefault(parent, []).append(i)
        order: list[int] = []
        stack = sorted(below.get(-1, []), key=lambda i: weight[i])
        while stack:
            node = stack.pop()
            order.append(node)
            stack.extend(sorted(below.get(node, []), key=lambda i: weight[i]))
        place = {old: new for new, old in enumerate(order)}
        return (
            TokenTree(
                [self.tokens[i] for i in order],
                [place[self.parents[i]] if self.parents[i] >= 0 else -1 for i in order],
                [self.residuals[i] for i in order],
                [self.values[i] for i in order],
            ),
            order,
        )

    def tiles(self, size: int = 32) -> int:
        """Blocks of ``size`` by ``size`` that the mask touches."""
        mask = self.mask()
        padded = -(-len(self) // size) * size
        wide = np.zeros((padded, padded), bool)
        wide[: len(self), : len(self)] = mask
        return int(wide.reshape(padded // size, size, padded // size, size).any((1, 3)).sum())

    def render(self, tokenizer: Any = None) -> str:
        """The tree as indented text, one node a line, with its value."""
        lines = []

        def show(node: int, depth: int) -> None:
            for child in self.children(node):
                token = self.tokens[child]
                text = repr(tokenizer.decode([token])) if tokenizer is not None else str(token)
                lines.append("  " * depth + f"{text} {self.values[child]:.3f}")
                show(child, depth + 1)

        show(-1, 0)
        return "\n".join(lines)

    def check_integrity(self) -> None:
        """Raise :class:`ConfigurationError` unless parents come first and all lists are of one length."""
        sizes = {len(self.tokens), len(self.parents), len(self.residuals), len(self.values)}
        if len(sizes) != 1 or any(not -1 <= p < i for i, p in enumerate(self.parents)):
            raise ConfigurationError(f"the tree is malformed: parents {self.parents} of {len(self.tokens)} tokens")
