"""An interpolated Kneser-Ney n-gram model over token ids: the classical baseline for bits per byte.

Counts of the highest order are plain, those of lower orders are the number of distinct left neighbours; each order
gives a discount of its mass to the next lower one (Kneser and Ney 1995; Chen and Goodman 1999, section 2.7). An
n-gram of 12-bit ids is one 64-bit number, so that counting is sorting.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from hasten.errors import ConfigurationError

__all__ = ["KneserNey"]

Ids = NDArray[np.int64]
_BITS = 12


def _packed(ids: Ids, order: int) -> Ids:
    """Every ``order``-gram of ``ids`` as one number, the oldest token in the highest bits."""
    keys = np.zeros(max(0, len(ids) - order + 1), np.int64)
    for place in range(order):
        keys = (keys << _BITS) | ids[place : len(keys) + place]
    return keys


class KneserNey:
    """Counts of ``ids`` up to ``order`` (5 at most, ids below 4,096).

    >>> model = KneserNey(np.array([1, 2, 1, 2, 1, 3] * 50), order=2, vocab_size=4)
    >>> p = model.probabilities(np.array([1, 2, 1, 3]))
    >>> bool(0.5 < p[1] < 0.75 and 0.2 < p[3] < 0.5)
    True
    """

    def __init__(self, ids: Ids, order: int = 5, vocab_size: int = 4096) -> None:
        if not 1 <= order <= 5 or vocab_size > 1 << _BITS:
            raise ConfigurationError(f"order {order} and {vocab_size} ids do not fit 64 bits; at most 5 and 4096")
        self.order = order
        self.vocab_size = vocab_size
        self._tables: list[tuple[Ids, NDArray[np.float64], Ids, NDArray[np.float64], NDArray[np.float64], float]] = []
        grams = [np.unique(_packed(ids, n), return_counts=True) for n in range(1, order + 1)]
        for n in range(1, order + 1):
            keys, counts = grams[n - 1]
            if n < order:  # distinct left neighbours: the (n + 1)-grams with the oldest token cut off
                tails = grams[n][0] & ((1 << (_BITS * n)) - 1)
                keys, counts = np.unique(tails, return_counts=True)
            ones, twos = int((counts == 1).sum()), int((counts == 2).sum())
            discount = ones / (ones + 2 * twos) if ones else 0.5
            contexts, first, kinds = np.unique(keys >> _BITS, return_index=True, return_counts=True)
            totals = np.add.reduceat(counts.astype(np.float64), first)
            self._tables.append((keys, counts.astype(np.float64), contexts, totals, kinds.astype(np.float64), discount))

    def probabilities(self, ids: Ids) -> NDArray[np.float64]:
        """Probability of each token given those before it: (tokens,) -> (tokens,)."""
        result = np.full(len(ids), 1.0 / self.vocab_size)
        for n, (keys, counts, contexts, totals, kinds, discount) in enumerate(self._tables, 1):
            if len(ids) < n:
                break
            grams = _packed(ids, n)
            at = np.minimum(np.searchsorted(keys, grams), len(keys) - 1)
            count = np.where(keys[at] == grams, counts[at], 0.0)
            where = np.minimum(np.searchsorted(contexts, grams >> _BITS), len(contexts) - 1)
            known = contexts[where] == grams >> _BITS
            total = np.where(known, totals[where], 1.0)
            lower = result[n - 1 :]
            mixed = np.maximum(count - discount, 0.0) / total + discount * kinds[where] / total * lower
            result[n - 1 :] = np.where(known, mixed, lower)
        return result
