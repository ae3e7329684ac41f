"""The fit behind :class:`~hasten.serve.cost.IterationCost`: the larger of two lines through measured batches.

Which line a batch lies on is unknown, so the fit alternates: give every batch to the larger of its two predictions,
solve the joint non-negative least squares on relative error, repeat until nothing moves; from several starts the best
is kept.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
from numpy.typing import NDArray

__all__ = ["fit_larger_line", "nonnegative_least_squares"]


def fit_larger_line(sums: NDArray[np.float64], measured: NDArray[np.float64]) -> tuple[float, ...]:
    """Coefficients m0, m1, m2, a, b, c, d from sums (batches, 5) and their seconds (batches,)."""
    context, sequences, tokens, attention, gathered = sums.T
    one, zero = np.ones(len(sums)), np.zeros(len(sums))
    memory = np.stack([one, context, sequences, zero, zero, zero, zero], axis=1)
    compute = np.stack([zero, context, zero, one, tokens, attention, gathered], axis=1)
    scale = np.maximum(np.abs(memory).max(axis=0), np.abs(compute).max(axis=0))
    scale[scale == 0] = 1.0
    memory, compute = memory / scale / measured[:, None], compute / scale / measured[:, None]

    best: NDArray[np.float64] | None = None
    best_loss = math.inf
    cuts = np.unique(np.quantile(tokens, (0.0, 0.2, 0.35, 0.5, 0.65, 0.8, 1.0)))
    for cut in cuts:
        bound = tokens <= cut
        for _ in range(20):
            solution = nonnegative_least_squares(np.where(bound[:, None], memory, compute), np.ones(len(sums)))
            by_memory, by_compute = memory @ solution, compute @ solution
            loss = float(((np.maximum(by_memory, by_compute) - 1) ** 2).sum())
            if loss < best_loss:
                best_loss, best = loss, solution
            again = by_memory >= by_compute
            if (again == bound).all():
                break
            bound = again
    assert best is not None
    return tuple((best / scale).tolist())


def nonnegative_least_squares(matrix: NDArray[np.float64], target: NDArray[np.float64]) -> NDArray[np.float64]:
    """Exact by trying every support: with seven columns that is 127 small solves."""
    columns = matrix.shape[1]
    gram, moment = matrix.T @ matrix, matrix.T @ target
    best, best_loss = np.zeros(columns), float(target @ target)
    for size in range(columns, 0, -1):
        for support in itertools.combinations(range(columns), size):
            index = np.array(support)
            part = gram[np.ix_(index, index)]
            try:
                solution = np.linalg.solve(part, moment[index])
            except np.linalg.LinAlgError:
                continue
            if (solution < 0).any() or not np.isfinite(solution).all():
                continue
            loss = float(target @ target - solution @ moment[index])
            if loss < best_loss - 1e-15 * float(target @ target):
                best_loss, best = loss, np.zeros(columns)
                best[index] = solution
    return best
