"""Rows that share a past and differ at its end: a tree of guesses on a paged cache, each node a row like any other.

Every node gets pages of its own for what lies behind the last full page of the common context. Into them go copies of
the context's last keys and of its ancestors' (``RaggedBatch.copies``), so that a node sees exactly the pages that it
would see if its branch were the text: the kernels need no mask, and a node's logits have the bits of plain decoding.
Invariant: a node's pages hold slots ``context // size * size`` to its own, in the order of the branch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

__all__ = ["Fork", "pages_of"]


def pages_of(context: int, depth: int, size: int) -> int:
    """Pages of its own that a node needs which stands ``depth`` tokens behind ``context`` tokens.

    >>> pages_of(16, 1, 16), pages_of(31, 1, 16), pages_of(31, 2, 16)
    (1, 1, 2)
    """
    return (context + depth - 1) // size - context // size + 1


class Fork:
    """Branches behind ``context`` tokens whose blocks are ``table``; ``take`` gives a free block.

    >>> blocks = iter(range(100, 200))
    >>> fork = Fork(3, [7], 4, lambda: next(blocks))
    >>> first = fork.add(-1); second = fork.add(first)
    >>> fork.contexts([first, second]), fork.pages([first, second]).tolist()
    ([3, 4], [[100, 0], [101, 102]])
    >>> fork.copies([second]).tolist()                  # three keys of the context, and the parent's own
    [[7, 0, 101, 0], [7, 1, 101, 1], [7, 2, 101, 2], [100, 3, 101, 3]]
    >>> fork.kept(second, [7, 8]).tolist()
    [[101, 3, 7, 3], [102, 0, 8, 0]]

    The table is read when copies are made; it may grow in between.
    """

    def __init__(self, context: int, table: Sequence[int], size: int, take: Callable[[], int]) -> None:
        self.context, self.size = context, size
        self.table, self._take = table, take
        self.first = context // size
        """number of the first page that is not shared"""
        self._lines: list[list[int]] = []  # of each node its ancestors and itself
        self._own: list[list[int]] = []

    def add(self, parent: int) -> int:
        """A node below another one, -1 for the last token of the context; what ``take`` raises goes through."""
        line = [] if parent < 0 else self._lines[parent]
        own = [self._take() for _ in range(pages_of(self.context, len(line) + 1, self.size))]
        self._own.append(own)
        self._lines.append([*line, len(self._lines)])
        return len(self._lines) - 1

    def contexts(self, nodes: Sequence[int]) -> list[int]:
        """Tokens before each node; also its slot and its position."""
        return [self.context + len(self._lines[node]) - 1 for node in nodes]

    def own(self, node: int) -> list[int]:
        """Blocks of one node, from page ``first`` on."""
        return self._own[node]

    def pages(self, nodes: Sequence[int]) -> NDArray[np.int32]:
        """(nodes, pages): blocks of each node from page ``first`` on, filled up with 0."""
        own = [self._own[node] for node in nodes]
        out = np.zeros((len(own), max(map(len, own), default=0)), np.int32)
        for row, blocks in zip(out, own, strict=True):
            row[: len(blocks)] = blocks
        return out

    def copies(self, nodes: Sequence[int]) -> NDArray[np.int32]:
        """What these nodes' pages lack before they are computed: (n, 4) of (block, slot) -> (block, slot)."""
        out: list[tuple[int, int, int, int]] = []
        tail, size, first = self.context % self.size, self.size, self.first
        source = self.table[first] if tail else 0
        for node in nodes:
            own = self._own[node]
            out += [(source, slot, own[0], slot) for slot in range(tail)]
            for place, ancestor in enumerate(self._lines[node][:-1]):
                page, slot = divmod(tail + place, size)
                out.append((self._own[ancestor][page], slot, own[page], slot))
        return np.array(out, np.int32).reshape(-1, 4)

    def kept(self, node: int, table: Sequence[int]) -> NDArray[np.int32]:
        """Copies that make the branch down to ``node`` part of the sequence whose blocks are ``table``."""
        own, tail, size = self._own[node], self.context % self.size, self.size
        out = []
        for place in range(len(self._lines[node])):
            page, slot = divmod(tail + place, size)
            out.append((own[page], slot, table[self.first + page], slot))
        return np.array(out, np.int32).reshape(-1, 4)
