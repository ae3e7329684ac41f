"""Lists that grew are split, lists that shrank are merged.

A list that outgrew its limit is split by balanced 2-means into two new heads, one that shrank gives its rows back to
the others, and after a split the rows of neighbouring lists that are nearer to a new head than to their own join it
(the rule of SPFresh, https://arxiv.org/abs/2410.14452). The head of a list that is gone stays in the graph and
navigates.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from hasten.retrieve.index.cluster import assign_all, cluster, workspace
from hasten.retrieve.index.delta import Delta
from hasten.retrieve.index.format import HEAD_BIT, SLOT_BITS, read_list
from hasten.retrieve.index.gather import gather, list_pairs, plain
from hasten.retrieve.index.links import link_heads
from hasten.retrieve.index.lists import PAIR
from hasten.retrieve.index.metric import factors, mapped
from hasten.retrieve.index.placing import assign_stored, options_of, pairs_of
from hasten.retrieve.index.query import View

__all__ = ["Rebalance"]

NEIGHBOURS = 8
"""lists around a split one whose rows are looked at again"""
BLOCK = 4096


class Rebalance:
    """The lists of one generation on their way to the next: pairs of those that change, heads that come and go."""

    def __init__(self, view: View, delta: Delta, count: int, alive: NDArray[np.uint8], dead: NDArray[np.uint8]) -> None:
        g = view.generation
        self.view, self.g, self.delta, self.count = view, g, delta, count
        self.base = g.manifest.rows
        self.rows = self.base + count
        self.options = options_of(g.manifest)
        self.limit = self.options.row_limit(g.manifest.width, g.heads.itemsize)
        live = np.ones(self.rows, np.bool_)
        if len(dead):
            live[: self.base] = ~np.unpackbits(dead, bitorder="little")[: self.base].astype(np.bool_)
        live[self.base :] = alive != 0
        self.live = live
        self.heads, self.extra, self.graph, self.head_rows = g.heads, g.extra, g.graph, g.head_rows
        self.seeds, self.groups = g.seeds, g.groups
        self.retired = (g.directory["flags"] & 1) != 0
        self.changed = np.zeros(len(g.counts), np.bool_)
        self.loaded = np.zeros(len(g.counts), np.bool_)
        self.pairs = np.empty(0, PAIR)
        self.is_head = np.zeros(self.rows, np.bool_)
        self.is_head[self.head_rows] = True
        self.split = self.merged = self.moved = 0

    def take(self, rows: NDArray[np.int64]) -> NDArray[Any]:
        """Vectors in the user's dtype."""
        return plain(gather(self.view, rows), self.g.manifest.dtype)

    def measure(self, heads: NDArray[Any], rows: NDArray[Any]) -> NDArray[Any]:
        """Pairs with their distances, in the mapped space."""
        out = np.empty(len(heads), PAIR)
        out["head"], out["row"] = heads, rows
        metric, largest = self.g.metric, self.g.manifest.largest
        for begin in range(0, len(heads), 1 << 15):
            cut = slice(begin, begin + (1 << 15))
            left = mapped(self.take(np.ascontiguousarray(rows[cut])), metric, largest)
            right = mapped(plain(self.heads[heads[cut]], self.g.manifest.dtype), metric, largest)
            out["distance"][cut] = np.einsum("ij,ij->i", left - right, left - right)
        return out

    def load(self, chosen: NDArray[np.int64]) -> None:
        """Bring the live rows of lists that change into the pairs."""
        chosen = chosen[~self.loaded[chosen] & ~self.retired[chosen]]
        if not len(chosen):
            return
        old = chosen[chosen < len(self.g.counts)]
        for h in old:
            read_list(self.g, int(h))  # checks the checksum before the list is copied
        heads, rows = list_pairs(self.g, old)
        good = self.live[rows] & ~self.is_head[rows]
        self.pairs = np.concatenate([self.pairs, self.measure(heads[good], rows[good])])
        self.loaded[chosen] = self.changed[chosen] = True

    def add_pairs(self, pairs: NDArray[Any]) -> None:
        """Put rows into lists; a copy that is there already is dropped."""
        self.load(np.unique(pairs["head"]).astype(np.int64))
        joined = np.concatenate([self.pairs, pairs])
        order = np.lexsort((joined["row"], joined["head"]))
        joined = joined[order]
        same = (joined["head"][1:] == joined["head"][:-1]) & (joined["row"][1:] == joined["row"][:-1])
        self.pairs = joined[np.concatenate([[True], ~same])] if len(joined) else joined

    def settle(self, rows: NDArray[np.int64]) -> None:
        """Assign rows by closure to the lists that there are now."""
        usable = (~self.retired).astype(np.uint8)
        for begin in range(0, len(rows), BLOCK):
            part = rows[begin : begin + BLOCK]
            found = assign_stored(
                self.take(part),
                (self.heads, self.extra, self.graph, self.seeds),
                self.g.metric,
                self.g.manifest.largest,
                usable,
                self.options,
            )
            self.add_pairs(pairs_of(part, *found))

    def new_heads(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Make rows heads: they leave their lists and join the graph."""
        g = self.g
        vectors = self.take(rows)
        first = len(self.heads)
        kernel = vectors.view(np.uint16) if vectors.dtype == np.float16 else vectors
        self.heads = np.ascontiguousarray(np.concatenate([self.heads, kernel]))
        self.extra = np.concatenate([self.extra, factors(vectors, g.metric, g.manifest.largest)])
        self.head_rows = np.concatenate([self.head_rows, rows])
        self.graph = np.concatenate([self.graph, np.full((len(rows), self.graph.shape[1]), -1, np.int32)])
        grow = np.zeros(len(rows), np.bool_)
        self.retired = np.concatenate([self.retired, grow])
        self.changed = np.concatenate([self.changed, ~grow])
        self.loaded = np.concatenate([self.loaded, ~grow])
        self.is_head[rows] = True
        self.pairs = self.pairs[~np.isin(self.pairs["row"], rows)]
        numbers = np.arange(first, first + len(rows))
        link_heads(
            self.heads,
            self.extra,
            self.graph,
            self.seeds,
            g.metric,
            g.manifest.largest,
            numbers,
            beam=self.options.build_beam,
            alpha=self.options.alpha,
        )
        return numbers

    def retire(self, heads: NDArray[np.int64]) -> NDArray[np.int64]:
        """Close lists; returns the rows that they held."""
        gone = np.isin(self.pairs["head"], heads)
        rows = np.unique(self.pairs["row"][gone])
        self.pairs = self.pairs[~gone]
        self.retired[heads] = True
        self.changed[heads] = True
        return rows

    def split_round(self) -> bool:
        """Split every list that is too long; False where there is none."""
        counts = np.bincount(self.pairs["head"], minlength=len(self.heads))
        long = np.flatnonzero(counts > self.limit)
        if not len(long):
            return False
        rng = np.random.default_rng(self.g.manifest.generation)
        chosen: list[int] = []
        closed: list[int] = []
        taken: set[int] = set()
        for h in long:
            members = np.unique(self.pairs["row"][self.pairs["head"] == h])
            members = members[[int(r) not in taken for r in members]]
            two = _two_means(mapped(self.take(members), self.g.metric, self.g.manifest.largest), rng)
            if two is not None:
                picked = [int(members[t]) for t in two]
                taken.update(picked)
                chosen.extend(picked)
                closed.append(int(h))
        if not chosen:
            return False
        around = self._neighbours(np.array(closed))
        rows = self.retire(np.array(closed))
        heads = self.new_heads(np.array(chosen, np.int64))
        self.split += len(closed)
        self.settle(rows[~self.is_head[rows]])
        self._recheck(heads, around[~self.retired[around]])
        return True

    def _neighbours(self, heads: NDArray[np.int64]) -> NDArray[np.int64]:
        """The lists whose heads are nearest to some heads."""
        near = self.graph[heads][:, :NEIGHBOURS]
        return np.unique(near[near >= 0]).astype(np.int64)

    def _recheck(self, heads: NDArray[np.int64], around: NDArray[np.int64]) -> None:
        """Rows of neighbouring lists that are nearer to a new head than to their own join it."""
        self.load(around)
        g = self.g
        inside = self.pairs[np.isin(self.pairs["head"], around)]
        new = mapped(plain(self.heads[heads], g.manifest.dtype), g.metric, g.manifest.largest)
        square = np.einsum("ij,ij->i", new, new)
        found = []
        for begin in range(0, len(inside), 1 << 14):
            part = inside[begin : begin + (1 << 14)]
            rows = mapped(self.take(np.ascontiguousarray(part["row"])), g.metric, g.manifest.largest)
            distance = np.maximum(np.einsum("ij,ij->i", rows, rows)[:, None] + square - 2 * rows @ new.T, 0)
            best = distance.argmin(1)
            value = distance[np.arange(len(part)), best]
            nearer = value < part["distance"]
            pairs = np.empty(int(nearer.sum()), PAIR)
            pairs["head"], pairs["distance"] = heads[best[nearer]], value[nearer]
            pairs["row"] = part["row"][nearer]
            found.append(pairs)
        if found:
            pairs = np.concatenate(found)
            self.moved += len(pairs)
            self.add_pairs(pairs)

    def merge_short(self, short: NDArray[np.int64]) -> None:
        """Close lists that have become too short; their rows go to the others."""
        open_lists = int(np.count_nonzero(~self.retired))
        short = short[: max(0, open_lists - 1)]
        if len(short):
            rows = self.retire(short)
            self.merged += len(short)
            self.settle(rows)

    def locations(self) -> NDArray[np.int64]:
        """Where each row stands (rows,): its place if its list stays, its head if it is one, -1 for rows that the lists
        to be written will take, and for dead ones."""
        g = self.g
        location = np.full(self.rows, -1, np.int64)
        location[: g.manifest.rows] = g.location
        location[~self.live] = -1
        live_rows = np.flatnonzero(location >= 0)
        where = location[live_rows]
        in_list = (where & HEAD_BIT) == 0
        location[live_rows[in_list][self.changed[where[in_list] >> SLOT_BITS]]] = -1
        live_heads = self.live[self.head_rows]
        location[self.head_rows[live_heads]] = HEAD_BIT | np.flatnonzero(live_heads)
        return location


def _two_means(rows: NDArray[np.float32], rng: Any) -> tuple[int, int] | None:
    """Two rows that halve a list; None where they are all equal."""
    if len(rows) < 4:
        return None
    order = np.arange(len(rows))
    centres = np.empty((2, rows.shape[1]), np.float32)
    state = np.array([rng.integers(1, 1 << 62)], np.uint64)
    cluster(rows, order, 0, len(rows), 2, 1.0, True, state, centres, workspace(2, rows.shape[1], len(rows)))
    which = assign_all(rows, order, 0, len(rows), centres, 2, np.empty(len(rows), np.int32))
    if which[0] < 0 or which[1] < 0 or np.array_equal(rows[which[0]], rows[which[1]]):
        return None
    return int(which[0]), int(which[1])
