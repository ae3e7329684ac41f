"""Weights tied to a few values: nearest, trained, and with zeros that stay."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hasten.compress.cluster import Clustered, Clustering, nearest_centroid, starting_centroids
from hasten.compress.prune import MagnitudePruning, sparsity_of
from hasten.errors import ConfigurationError
from hasten.testing.technique_kit import TechniqueKit


class TestKit(TechniqueKit):
    technique = Clustering(16)
    keeps = {}


def test_assignment_is_to_the_nearest() -> None:
    torch.manual_seed(0)
    weight = torch.randn(30, 7)
    centroids = starting_centroids(weight, 6, zero=False)
    slow = (weight[..., None] - centroids).abs().argmin(-1)
    assert torch.equal(nearest_centroid(weight, centroids), slow)
    assert torch.equal(centroids, centroids.sort().values)


def test_gradients_of_tied_weights_are_summed() -> None:
    weight = torch.tensor([[-1.0, -0.9], [0.9, 1.0]])
    part = Clustered(weight, 2, zero=False)
    (part(weight) * torch.tensor([[1.0, 2.0], [3.0, 4.0]])).sum().backward()
    assert part.centroids.grad is not None
    assert part.centroids.grad.tolist() == [3.0, 7.0]


def test_zeros_stay_and_no_weight_joins_them() -> None:
    torch.manual_seed(0)
    sparse = MagnitudePruning(0.5)(nn.Linear(40, 30))
    zeros = sparse.weight == 0
    x = torch.randn(64, 40)
    kept = Clustering(8, epochs=20, rate=1e-2)(sparse, [x])
    assert torch.equal(kept.weight == 0, zeros)
    assert len(kept.weight.unique()) <= 8
    lost = Clustering(8, preserve_sparsity=False, epochs=5, rate=1e-2)(sparse, [x])
    assert sparsity_of(lost.weight) < 0.01
    lonely = Clustering(2)(sparse)
    assert len(lonely.weight.unique()) == 2
    assert torch.equal(lonely.weight == 0, zeros)


def test_training_the_values_helps() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 4))
    x = torch.randn(128, 16)
    shot, tuned = Clustering(4)(model), Clustering(4, epochs=60, rate=1e-2)(model, [x])
    with torch.no_grad():
        assert (tuned(x) - model(x)).square().mean() < 0.9 * (shot(x) - model(x)).square().mean()
    assert all(len(tuned[k].weight.unique()) <= 4 for k in (0, 2))
    assert model[0].weight.requires_grad
    assert tuned[0].weight.requires_grad


def test_small_weights_are_kept_and_bad_knobs_named() -> None:
    tiny = Clustering(16)(nn.Linear(4, 2))
    assert tiny.report.skipped == {"weight": "it has no more than 16 numbers"}
    for wrong in (1, 257):
        with pytest.raises(ConfigurationError, match="2 to 256"):
            Clustering(wrong)
    assert starting_centroids(torch.zeros(3), 4, zero=True).tolist() == [0.0] * 4
