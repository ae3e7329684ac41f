"""The three decompositions of a pair of matrices, as functions of second moments in float64.

Weights are in torch's layout (out, in). Type I keeps hidden units and solves for what follows (Nyström), Type II keeps
columns of queries and keys together (column-row selection), Type III is linear and has the closed-form optimum (SVD).
"MoDeGPT: Modular Decomposition for Large Language Model Compression", Lin et al. 2024, arXiv:2408.09632. Differs from
the paper in the greedy selection, which looks at what the next matrix makes of a unit and takes one unit at a time.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["column_scores", "influence_sparsity", "joint_svd", "leverage", "nystrom", "select_greedily"]


def leverage(moment: Tensor, ridge: float = 1.0) -> Tensor:
    """Ridge leverage scores ``[C (C + λ I)⁻¹]_ii`` of a second moment (n, n); ``λ = ridge * mean(diag C)``."""
    eye = torch.eye(len(moment), dtype=moment.dtype)
    regular = moment + ridge * moment.diagonal().mean().clamp_min(1e-300) * eye
    return torch.cholesky_solve(moment, torch.linalg.cholesky(regular)).diagonal()


def select_greedily(moment: Tensor, following: Tensor, keep: int) -> Tensor:
    """Hidden units that, one after the other, take most of the error away from ``σ W``.

    moment (n, n) of σ, following (out, n) -> (keep,) indices. Orthogonal matching pursuit on the moment: the gain of
    unit i is ``|(C W)_i|² / C_ii`` in the complement of what is chosen, held by a partial Cholesky factor.
    """
    units = len(moment)
    factor = torch.zeros(units, keep, dtype=torch.float64)
    left = moment.diagonal().clone()
    floor = 1e-10 * left.max().clamp_min(1e-300)
    target = moment @ following.double().T  # (n, out): what each unit knows of the result
    chosen = torch.zeros(keep, dtype=torch.long)
    free = torch.ones(units, dtype=torch.bool)
    for step in range(keep):
        gain = torch.where(free & (left > floor), target.square().sum(1) / left.clamp_min(floor), -1.0)
        index = int(gain.argmax())
        if gain[index] < 0:  # what is left is made of what is chosen: any unit will do
            rest = free.nonzero().flatten()[: keep - step]
            chosen[step:] = rest
            return chosen
        column = moment[:, index] - factor[:, :step] @ factor[index, :step]
        column = column / left[index].sqrt()
        target = target - torch.outer(column, target[index] / column[index])
        left = (left - column.square()).clamp_min(0.0)
        factor[:, step] = column
        free[index] = False
        chosen[step] = index
    return chosen


def nystrom(moment: Tensor, following: Tensor, kept: Tensor) -> tuple[Tensor, float]:
    """The next matrix for the kept units: ``(Sᵀ C S)⁻¹ Sᵀ C W``, and the relative error of the pair.

    moment (n, n), following (out, n), kept (k,) -> (out, k) float64. A ridge is added only where the kept units
    depend on one another, the smallest that makes the system solvable.
    """
    target = following.double()
    some, cross = moment[kept][:, kept], moment[kept]
    right = cross @ target.T
    solved = None
    scale = some.diagonal().mean().clamp_min(1e-300)
    for ridge in (0.0, 1e-12, 1e-9, 1e-6):
        factor, failed = torch.linalg.cholesky_ex(some + ridge * scale * torch.eye(len(some), dtype=torch.float64))
        if not failed and (ridge or factor.diagonal().min() > 1e-7 * factor.diagonal().max()):
            solved = torch.cholesky_solve(right, factor)
            if not ridge:  # one step of refinement
                solved = solved + torch.cholesky_solve(right - some @ solved, factor)
            break
    if solved is None or not torch.isfinite(solved).all():
        solved = torch.linalg.pinv(some, hermitian=True, rtol=1e-10) @ right
    total = (moment @ target.T * target.T).sum()
    explained = 2 * (right * solved).sum() - (some @ solved * solved).sum()
    error = float(((total - explained).clamp_min(0.0) / total.clamp_min(1e-300)).sqrt())
    return solved.T, error


def column_scores(query: Tensor, keys: Tensor) -> Tensor:
    """``sqrt(sum_heads C_Q[i, i] * C_K[i, i])``: query (heads, width, width), keys (width, width) -> (width,)."""
    return (query.diagonal(dim1=-2, dim2=-1).sum(0).clamp_min(0) * keys.diagonal().clamp_min(0)).sqrt()


def joint_svd(moment: Tensor, first: Tensor, second: Tensor, keep: int) -> tuple[Tensor, Tensor, Tensor]:
    """The best pair of inner width ``keep`` for ``x firstᵀ secondᵀ`` over inputs with this moment.

    moment (d, d), first (h, d), second (out, h) -> new first (keep, d), new second (out, keep), and all singular
    values: the pair's error is ``sqrt(sum of their squares from keep on)`` exactly. Slices of several heads that
    share ``first`` are stacked in ``second``. Directions of the input that calibration never showed are left to the
    first matrix as it is.
    """
    first, second = first.double(), second.double()
    values, vectors = torch.linalg.eigh(moment)
    root = (vectors * values.clamp_min(0).sqrt()) @ vectors.T
    left, middle, right = torch.linalg.svd(root @ first.T, full_matrices=False)  # (d, r), (r,), (r, h)
    inner, kept, outer = torch.linalg.svd(middle[:, None] * right @ second.T, full_matrices=False)
    inner, outer = inner[:, :keep], outer[:keep]
    # C^{-1/2} U = W V S⁻¹ wherever S is not zero: no inverse of the moment is needed.
    inverse = torch.where(middle > middle.max() * 1e-10, 1 / middle.clamp_min(1e-300), torch.zeros_like(middle))
    balance = kept[:keep].sqrt().clamp_min(1e-150)
    mixed = first.T @ right.T @ (inverse[:, None] * inner)
    new_first = (mixed * balance).T
    new_second = (kept[:keep] / balance)[:, None] * outer
    return new_first.contiguous(), new_second.T.contiguous(), kept


def influence_sparsity(influence: Tensor, average: float, temperature: float, most: float = 0.8) -> Tensor:
    """Share of each layer that is cut: ``φ = L * average * softmax(-s / ε)``, none above ``most``, the mean kept.

    The maximiser of ``-sum(s φ) + ε entropy(φ)``. An excess goes to the others in proportion.

    >>> influence_sparsity(torch.tensor([0.5, 0.1]), 0.3, 1e9).tolist()
    [0.30000001192092896, 0.30000001192092896]
    """
    layers = len(influence)
    shares = layers * average * torch.softmax(-influence / temperature, 0)
    for _ in range(layers):
        over = shares > most
        if not over.any():
            break
        excess = (shares[over] - most).sum()
        shares = torch.where(over, torch.full_like(shares, most), shares)
        under = shares < most
        if not under.any():
            break
        shares = torch.where(under, shares + excess * shares / shares[under].sum(), shares)
    return shares.clamp(max=most)


def best_by(scores: Tensor, keep: int) -> Tensor:
    """Indices of the ``keep`` greatest scores, in rising order."""
    return torch.topk(scores, keep).indices.sort().values


Selection = Callable[[Tensor, Tensor, int], Tensor]
