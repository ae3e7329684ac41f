"""Which rows become heads, and the seeds from which the walk over them starts.

The tree is walked bottom-up with the number of rows that nobody stands for yet. A node with at least ``select`` of
them gives its centre as a head; if it has more than ``split``, the centres of its ceil(count / split_factor) largest
children too. The pair of thresholds whose count is nearest to ratio * n is found by bisection.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

from hasten.retrieve.index.tree import Tree, split_rows

__all__ = ["make_seeds", "select_heads", "threshold_heads"]

njit = numba.njit(nogil=True, cache=True)


@njit
def _mark(begin, end, centre, parent, order, select, split, split_factor, chosen):
    """Mark the heads of one pair of thresholds in ``chosen`` (rows,); returns how many."""
    nodes = begin.shape[0]
    left = np.zeros(nodes, np.int64)  # rows below that have no head yet
    inner = np.zeros(nodes, np.int64)
    first = np.full(nodes, -1)
    after = np.full(nodes, -1)
    count = 0
    for i in range(1, nodes):
        inner[parent[i]] += 1
        after[i] = first[parent[i]]
        first[parent[i]] = i
    for i in range(nodes - 1, -1, -1):
        if inner[i] == 0:
            left[i] = end[i] - begin[i]
        if left[i] >= select:
            if not chosen[centre[i]]:
                chosen[centre[i]] = True
                count += 1
            if left[i] > split:
                wanted = int(np.ceil(left[i] / split_factor))
                if inner[i] == 0:
                    for t in range(begin[i], end[i]):
                        if wanted <= 0:
                            break
                        wanted -= 1
                        if not chosen[order[t]]:
                            chosen[order[t]] = True
                            count += 1
                else:
                    sizes = np.empty(inner[i], np.int64)
                    which = np.empty(inner[i], np.int64)
                    c = first[i]
                    filled = 0
                    while c >= 0:
                        if left[c] > 0:
                            sizes[filled], which[filled] = left[c], c
                            filled += 1
                        c = after[c]
                    ranks = np.argsort(-sizes[:filled])
                    for t in range(min(wanted, filled)):
                        row = centre[which[ranks[t]]]
                        if not chosen[row]:
                            chosen[row] = True
                            count += 1
            left[i] = 0
        if parent[i] >= 0:
            left[parent[i]] += left[i]
    if count == 0:
        chosen[centre[0]] = True
        count = 1
    return count


def threshold_heads(tree: Tree, select: int, split: int, split_factor: int = 6) -> NDArray[np.int64]:
    """Heads of one pair of thresholds, in the order of the tree, so that near heads are neighbours in memory."""
    chosen = np.zeros(len(tree.order), np.bool_)
    _mark(tree.begin, tree.end, tree.centre, tree.parent, tree.order, select, split, split_factor, chosen)
    return tree.order[chosen[tree.order]].astype(np.int64)


def select_heads(tree: Tree, ratio: float, split_factor: int = 6) -> tuple[NDArray[np.int64], int, int]:
    """(heads, select, split): the thresholds whose number of heads is nearest to ``ratio * n``."""
    n = len(tree.order)
    target = max(1, round(ratio * n))
    best: tuple[int, NDArray[np.int64], int, int] | None = None
    for select in sorted({2, 3, 4, 5, 6, 8, 10, 12, 16, 24, 32, 48, 64, 96, 128, max(2, round(1 / ratio))}):
        low, high = select, 2048
        while low <= high:
            split = (low + high) // 2
            heads = threshold_heads(tree, select, split, split_factor)
            miss = abs(len(heads) - target)
            if best is None or miss < best[0]:
                best = (miss, heads, select, split)
            if len(heads) > target:
                low = split + 1
            else:
                high = split - 1
        assert best is not None
        if best[0] <= 0.005 * target:
            break
    assert best is not None
    return best[1], best[2], best[3]


def make_seeds(
    mapped: NDArray[np.float32], seed: int = 0, threads: int = 2
) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Two levels of the balanced tree over the heads: (group heads, seed heads, begins of the groups' seeds).

    ``mapped`` (heads, width) are the heads in the mapped space. About ``sqrt(heads / 8)`` groups of as many seeds:
    both levels together cost some hundred distances to contiguous rows.
    """
    count = len(mapped)
    if count <= 64:
        return np.empty(0, np.int32), np.empty(0, np.int32), np.zeros(1, np.int32)
    groups = int(min(128, max(4, round(np.sqrt(count / 8)))))
    each = int(min(64, max(4, round(count / 8 / groups))))
    tree = split_rows(
        count, lambda rows: mapped[rows], k=groups, leaf=max(8, count // groups // 4), seed=seed, threads=threads
    )
    top = np.flatnonzero(tree.parent == 0)
    group_heads: list[int] = []
    seed_heads: list[int] = []
    begins = [0]
    for node in top:
        members = np.sort(tree.order[tree.begin[node] : tree.end[node]]).astype(np.int64)
        part = np.ascontiguousarray(mapped[members])
        inner = split_rows(
            len(members),
            part.__getitem__,
            k=each,
            leaf=max(1, len(members) // each),
            seed=seed,
            threads=1,
        )
        below = inner.centre[inner.parent == 0] if len(inner.centre) > 1 else inner.centre[:1]
        chosen = np.unique(members[below])
        group_heads.append(int(tree.centre[node]))
        seed_heads.extend(int(c) for c in chosen)
        begins.append(len(seed_heads))
    return np.array(group_heads, np.int32), np.array(seed_heads, np.int32), np.array(begins, np.int32)
