"""Rows added since the last compaction: in memory, chained to the heads of their lists.

One writer at a time; readers take :attr:`Delta.view` and are never blocked. A row is written before it is chained,
growth makes new arrays, and a view that a reader holds stays whole. A row number is ``base`` + its place here.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

from hasten.retrieve.index.metric import COSINE

__all__ = ["Delta"]

njit = numba.njit(nogil=True, cache=True)


@njit
def _chain(first, heads, sizes, start_row, start_entry, entry_row, entry_next):
    """Put new entries before the ones that each head has; ``first`` is a copy that the caller publishes."""
    entry = start_entry
    for i in range(sizes.shape[0]):
        for t in range(sizes[i]):
            h = heads[i, t]
            entry_row[entry] = start_row + i
            entry_next[entry] = first[h]
            first[h] = entry
            entry += 1
    return entry


@njit
def _pairs(first, entry_row, entry_next, alive, heads_out, rows_out):
    """(head, delta row) of every live entry; returns how many."""
    count = 0
    for h in range(first.shape[0]):
        e = first[h]
        while e >= 0:
            if alive[entry_row[e]]:
                heads_out[count] = h
                rows_out[count] = entry_row[e]
                count += 1
            e = entry_next[e]
    return count


class Delta:
    """Growable rows with their lists."""

    def __init__(
        self, base: int, heads: int, width: int, dtype: Any, metric: int, rows: int = 0, entries: int = 0
    ) -> None:
        self.base = base
        self.metric = metric
        self.count = 0
        self.entries = 0
        self.rows: NDArray[Any] = np.zeros((rows, width), dtype)
        self.factors: NDArray[np.float32] = np.zeros(rows if metric == COSINE else 0, np.float32)
        self.alive: NDArray[np.uint8] = np.zeros(rows, np.uint8)
        self.ids: NDArray[np.int64] = np.zeros(rows, np.int64)
        self.first: NDArray[np.int32] = np.full(heads if rows else 0, -1, np.int32)
        self._heads = heads
        self._entry_row: NDArray[np.int32] = np.zeros(entries, np.int32)
        self._entry_next: NDArray[np.int32] = np.zeros(entries, np.int32)
        self.place: dict[int, int] = {}
        """live id -> place"""
        self.attributes: list[dict[str, Any]] = []
        """one mapping per row"""
        self.view: tuple[Any, ...] = self._view()

    def _view(self) -> tuple[Any, ...]:
        return (self.rows, self.factors, self.alive, self.first, self._entry_row, self._entry_next, self.base)

    def _grow(self, rows: int, entries: int) -> None:
        if rows > len(self.rows) or entries > len(self._entry_row) or not len(self.first):
            size = max(rows, 2 * len(self.rows), 64)
            slots = max(entries, 2 * len(self._entry_row), 512)
            self.rows = _longer(self.rows, size)
            if self.metric == COSINE:
                self.factors = _longer(self.factors, size)
            self.alive = _longer(self.alive, size)
            self.ids = _longer(self.ids, size)
            self._entry_row = _longer(self._entry_row, slots)
            self._entry_next = _longer(self._entry_next, slots)
            self.first = self.first.copy() if len(self.first) else np.full(self._heads, -1, np.int32)

    def add(
        self,
        rows: NDArray[Any],
        factors: NDArray[np.float32],
        ids: NDArray[np.int64],
        heads: NDArray[np.int32],
        sizes: NDArray[np.int32],
        attributes: list[dict[str, Any]],
    ) -> None:
        """Add rows (m, d) with their lists ``heads`` (m, replicas), of which ``sizes`` (m,) count. Visible when it
        returns.
        """
        m = len(rows)
        self._grow(self.count + m, self.entries + int(sizes.sum()))
        low, high = self.count, self.count + m
        self.rows[low:high] = rows
        if self.metric == COSINE:
            self.factors[low:high] = factors
        self.ids[low:high] = ids
        self.alive[low:high] = 1
        self.attributes.extend(attributes)
        pending = self.first.copy()
        entry = _chain(pending, heads, sizes, low, self.entries, self._entry_row, self._entry_next)
        self.count, self.entries = high, int(entry)
        for i, name in enumerate(ids.tolist()):
            self.place[name] = low + i
        self.view = self._view()
        self.first[:] = pending  # this publishes the rows

    def kill(self, name: int) -> None:
        """Delete the live row with this id."""
        self.alive[self.place.pop(name)] = 0

    def pairs(self, count: int) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """(heads, places) of the live rows among the first ``count``."""
        heads, rows = np.empty(self.entries, np.int32), np.empty(self.entries, np.int64)
        if not len(self.first):
            return heads[:0], rows[:0]
        size = _pairs(self.first, self._entry_row, self._entry_next, self.alive, heads, rows)
        heads, rows = heads[:size], rows[:size]
        inside = rows < count
        return heads[inside], rows[inside]


def _longer(array: NDArray[Any], size: int) -> NDArray[Any]:
    out = np.zeros((size, *array.shape[1:]), array.dtype)
    out[: len(array)] = array
    return out
