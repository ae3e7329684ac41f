"""How far one set of images is from another: the Fréchet distance between Gaussians of a classifier's features.

``|μ₁ - μ₂|² + tr(Σ₁ + Σ₂ - 2 (Σ₁ Σ₂)^½)``. "GANs Trained by a Two Time-Scale Update Rule", Heusel et al. 2017,
arXiv:1706.08500. Differs from the paper in the features: any classifier's, handed in, so figures compare only within
one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hasten.errors import DataError

__all__ = ["frechet_distance"]


def frechet_distance(one: Tensor, two: Tensor) -> float:
    """Distance between features (n, width) and (m, width), in float64.

    >>> frechet_distance(torch.tensor([[0.0], [2.0]]), torch.tensor([[3.0], [5.0]]))
    9.0
    """
    for name, rows in (("first", one), ("second", two)):
        if rows.dim() != 2 or len(rows) < 2 or not torch.isfinite(rows).all():
            raise DataError(
                f"the {name} set is {tuple(rows.shape)} or not finite; give at least two rows of finite features"
            )
    means = [rows.double().mean(0) for rows in (one, two)]
    spreads = [torch.atleast_2d(torch.cov(rows.double().T)) for rows in (one, two)]
    values, vectors = torch.linalg.eigh(spreads[0])
    root = (vectors * values.clamp_min(0).sqrt()) @ vectors.T
    inner = torch.linalg.eigvalsh(root @ spreads[1] @ root).clamp_min(0).sqrt().sum()
    total = (means[0] - means[1]).square().sum() + spreads[0].trace() + spreads[1].trace() - 2 * inner
    return max(float(total), 0.0)
