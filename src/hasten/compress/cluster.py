"""Weight clustering: every weight of a matrix is one of k values, which are trained on.

Centroids start evenly spaced over the range of the weights (which keeps large, rare weights better than density does)
and each weight is tied to its nearest; the gradient of a centroid is the sum over its weights. With zeros to preserve,
one centroid is exactly 0 and does not move. Stored: an index of log2 k bits per weight and k numbers.

"Deep Compression", Han, Mao and Dally 2016, arXiv:1510.00149. Differs from the paper in that zeros keep an index of
their own instead of being left out; the packed file decides which form is smaller.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from hasten.compress.finetune import Loss, batches_of, match_outputs, weights_of
from hasten.compress.technique import LayerReport, TechniqueReport, register
from hasten.errors import ConfigurationError
from hasten.train.fit import fit

__all__ = ["Clustering", "nearest_centroid", "starting_centroids"]


def starting_centroids(weight: Tensor, clusters: int, *, zero: bool, rounds: int = 3) -> Tensor:
    """``clusters`` values, ascending: evenly spaced over the range, then ``rounds`` of moving to their members' mean.

    ``zero``: one of them is exactly 0 and stays; zeros of the weight do not pull the others.

    >>> starting_centroids(torch.tensor([-1.0, 0.0, 0.0, 1.0]), 3, zero=True)
    tensor([-1.,  0.,  1.])
    """
    values = weight.detach().reshape(-1)
    values = values[values != 0] if zero else values
    if not len(values):
        return torch.zeros(clusters, dtype=weight.dtype)
    others = clusters - 1 if zero else clusters
    centroids = torch.linspace(float(values.min()), float(values.max()), others, dtype=weight.dtype)
    if others == 1:
        centroids = values.mean().reshape(1)
    for _ in range(rounds):
        index = nearest_centroid(values, centroids)
        counts = torch.zeros_like(centroids).index_add_(0, index, torch.ones_like(values))
        sums = torch.zeros_like(centroids).index_add_(0, index, values)
        centroids = torch.where(counts > 0, sums / counts.clamp(min=1), centroids).sort().values
    if zero:
        centroids = torch.cat([centroids, torch.zeros(1, dtype=weight.dtype)]).sort().values
    return centroids


def nearest_centroid(weight: Tensor, centroids: Tensor) -> Tensor:
    """Index of the nearest of ascending centroids for every weight, int64 in the shape of the weight."""
    middles = (centroids[1:] + centroids[:-1]) / 2
    return torch.bucketize(weight.detach().contiguous(), middles)


class Clustered(nn.Module):
    """A weight that is looked up: ``centroids[index]``; the original does not count any more."""

    index: Tensor
    free: Tensor

    def __init__(self, weight: Tensor, clusters: int, *, zero: bool) -> None:
        super().__init__()
        centroids = starting_centroids(weight, clusters, zero=zero)
        index = nearest_centroid(weight, centroids)
        free = torch.ones_like(centroids)
        if zero:
            at = int(centroids.abs().argmin())
            free[at] = 0
            nonzero = weight.detach() != 0  # a weight that is not zero stays so
            index = torch.where(nonzero & (index == at), _beside(weight.detach(), centroids, at), index)
            index = torch.where(nonzero, index, torch.full_like(index, at))
        self.centroids = nn.Parameter(centroids)
        self.register_buffer("index", index)
        self.register_buffer("free", free)

    def forward(self, weight: Tensor) -> Tensor:
        """The tied weight; ``weight`` is only its shape."""
        return (self.centroids * self.free)[self.index]


def _beside(weight: Tensor, centroids: Tensor, at: int) -> Tensor:
    """The neighbour of the zero centroid on the side of the weight, or on the other where there is none."""
    below, above = max(at - 1, 0), min(at + 1, len(centroids) - 1)
    below, above = (above if below == at else below), (below if above == at else above)
    return torch.where(weight < 0, below, above)


def cluster_in_place(
    model: nn.Module,
    paths: Mapping[str, bool],
    clusters: int,
    *,
    given: Any,
    loss: Loss | None,
    epochs: int,
    rate: float,
    seed: int,
    progress: Callable[[str, float], None] | None,
) -> None:
    """Tie the named weights of ``model`` to centroids and train these; True: with a centroid for the zeros."""
    tied = []
    for path, zero in paths.items():
        owner, _, leaf = path.rpartition(".")
        module = model.get_submodule(owner)
        part = Clustered(getattr(module, leaf).detach(), clusters, zero=zero)
        parametrize.register_parametrization(module, leaf, part)
        getattr(module.parametrizations, leaf).original.requires_grad_(False)
        tied.append(path)
    if epochs:
        assert loss is not None
        batches, _ = batches_of(given, "clustering with fine-tuning")
        fit(model, batches, loss, epochs=epochs, rate=rate, seed=seed, progress=progress)
    for path in tied:
        owner, _, leaf = path.rpartition(".")
        module = model.get_submodule(owner)
        getattr(module.parametrizations, leaf).original.requires_grad_(True)
        parametrize.remove_parametrizations(module, leaf)


@register
@dataclass(frozen=True)
class Clustering:
    """At most ``clusters`` distinct values in every weight of two axes or more.

    >>> model = Clustering(4)(nn.Linear(16, 16))
    >>> len(model.weight.unique())
    4
    """

    clusters: int = 16
    """distinct values of a weight, 2 to 256"""
    preserve_sparsity: bool = True
    """keep zeros exactly zero, with a centroid of their own; only where a weight has zeros"""
    epochs: int = 0
    """of fine-tuning the centroids; 0: one shot"""
    rate: float = 1e-3
    """peak learning rate of it"""
    layers: tuple[str, ...] = ("*",)
    """patterns of parameter paths that are clustered"""
    skip: tuple[str, ...] = ()
    """patterns that are not"""
    seed: int = 0
    """of the fine-tuning"""

    name: ClassVar[str] = "clustering"

    def __post_init__(self) -> None:
        if not 2 <= self.clusters <= 256:
            raise ConfigurationError(f"{self.clusters} clusters are not 2 to 256; give 16")
        if self.epochs < 0 or self.rate <= 0:
            raise ConfigurationError(f"epochs ({self.epochs}) must not be negative and rate ({self.rate}) positive")

    def __call__(
        self,
        model: nn.Module,
        calibration: Any = None,
        *,
        loss: Loss | None = None,
        progress: Callable[[str, float], None] | None = None,
    ) -> nn.Module:
        """The clustered copy; without a ``loss`` fine-tuning matches the outputs of the model given."""
        clone = copy.deepcopy(model)
        modes = [(m, m.training) for m in clone.modules()]
        weights = weights_of(clone, self.layers, self.skip)
        small = [p for p, w in weights.items() if w.numel() <= self.clusters]
        paths = [p for p in weights if p not in small]
        zeros = {p: self.preserve_sparsity and bool((weights[p] == 0).any()) for p in paths}
        cluster_in_place(
            clone, zeros, self.clusters, given=calibration, loss=loss or match_outputs(model), epochs=self.epochs,
            rate=self.rate, seed=self.seed, progress=progress,
        )  # fmt: skip
        for module, training in modes:
            module.training = training
        bits = max(1, (self.clusters - 1).bit_length())
        reports = []
        for path, weight in weights_of(clone, self.layers, self.skip).items():
            size = weight.numel() * weight.element_size()
            if path in small:
                reports.append(LayerReport(path, "kept", f"it has no more than {self.clusters} numbers", size, size))
                continue
            after = -(-weight.numel() * bits // 8) + self.clusters * weight.element_size()
            reports.append(LayerReport(path, f"{len(weight.unique())} values", "", size, after))
        notes = [f"{len(paths)} weights hold at most {self.clusters} values each"]
        clone.report = TechniqueReport(self.name, tuple(reports), tuple(notes))  # type: ignore[assignment]
        return clone
