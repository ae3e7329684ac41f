"""Zeros by magnitude, in one shot and gradually."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from hasten.compress.prune import MagnitudePruning, cubic_sparsity, magnitude_mask, sparsity_of
from hasten.errors import ConfigurationError
from hasten.testing.technique_kit import TechniqueKit


class TestKit(TechniqueKit):
    technique = MagnitudePruning(0.25)
    keeps = {}


@given(st.lists(st.floats(-3, 3, width=32), min_size=1, max_size=40), st.floats(0, 0.99))
@settings(max_examples=60, deadline=None)
def test_exactly_the_smallest_go(values: list[float], sparsity: float) -> None:
    weight = torch.tensor(values)
    mask = magnitude_mask(weight, sparsity)
    assert int((mask == 0).sum()) == round(sparsity * len(values))
    gone, stays = weight[mask == 0].abs(), weight[mask == 1].abs()
    assert not len(gone) or not len(stays) or gone.max() <= stays.min()


def test_the_schedule_rises_to_its_end() -> None:
    steps = [cubic_sparsity(t / 20, 0.8) for t in range(25)]
    assert steps == sorted(steps)
    assert steps[0] == 0
    assert steps[-1] == pytest.approx(0.8)
    assert steps[5] > 0.8 / 4, "steep at first"


def problem() -> tuple[nn.Module, list[Any]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 2))
    x = torch.randn(256, 16)
    from hasten.train.fit import fit

    batches = [(x, (x[:, 0] * x[:, 1] > 0).long())]
    fit(model, batches, loss, epochs=100, rate=1e-2)
    return model, batches


def loss(model: nn.Module, batch: Any) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def test_training_on_beats_one_shot_and_keeps_the_zeros() -> None:
    model, batches = problem()
    shot = MagnitudePruning(0.8)(model)
    tuned = MagnitudePruning(0.8, epochs=80, rate=1e-2, every=5)(model, batches, loss=loss)
    for one in (shot, tuned):
        assert sparsity_of(one[0].weight) == pytest.approx(0.8, abs=0.01)
        assert sparsity_of(one[0].bias) == 0
    with torch.no_grad():
        assert float(loss(tuned, batches[0])) < 0.85 * float(loss(shot, batches[0]))
    assert set(tuned.state_dict()) == set(model.state_dict())
    matched = MagnitudePruning(0.8, epochs=40, rate=1e-2)(model, [batches[0][0]])
    with torch.no_grad():
        x = batches[0][0]
        assert (matched(x) - model(x)).square().mean() < (shot(x) - model(x)).square().mean()


def test_what_is_wrong_is_named() -> None:
    model, _ = problem()
    for wrong in ({"sparsity": 1.0}, {"sparsity": -0.1}, {"every": 0}, {"phase": 0.0}, {"epochs": -1}):
        with pytest.raises(ConfigurationError):
            MagnitudePruning(**wrong)
    with pytest.raises(ConfigurationError, match="needs data"):
        MagnitudePruning(0.5, epochs=1)(model)
    kept = MagnitudePruning(0.5, skip=("2.*",))(model)
    assert sparsity_of(kept[2].weight) == 0
    model[0].weight.data[0, 0] = float("inf")
    with pytest.raises(ConfigurationError, match=r"0\.weight holds NaN"):
        MagnitudePruning(0.5)(model)
