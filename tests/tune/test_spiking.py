"""Timesteps traded for quality, from one call."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import hasten.tune
from hasten.compress import Recipe
from hasten.errors import ConfigurationError
from hasten.measure import Protocol
from hasten.spiking import LIF, SpikingNetwork, accuracy, synaptic_energy
from hasten.tune import tune_spiking
from hasten.tune.spiking import spiking_space

pytestmark = pytest.mark.usefixtures("one_thread")
QUICK = Protocol(warmup=1, warmup_time=0, min_samples=3, min_time=0)


def network() -> SpikingNetwork:
    torch.manual_seed(1)
    layers = [nn.Linear(12, 24, bias=False), LIF(0.9, 0.3), nn.Linear(24, 4, bias=False)]
    return SpikingNetwork(layers, 4).eval()


def samples() -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.rand(800, 12, generator=torch.Generator().manual_seed(0))
    return x, network()(x).argmax(-1)


def test_energy_is_bought_with_steps() -> None:
    net, (x, y) = network(), samples()
    unchanged = synaptic_energy(net, x[400:656])
    budget = f"energy<{0.6 * unchanged:.4g}J, quality>50%"
    result = tune_spiking(net, (x, y), budget, protocol=QUICK, time_limit=None)
    assert result.points == len(result.frontier.candidates) == 1 + 3 + 4
    assert result.best is not None
    assert result.best.values["energy"] <= 0.6 * unchanged
    assert result.baseline.values["energy"] == pytest.approx(unchanged)
    kept = {c.name: c.values["quality"] for c in result.frontier.candidates if c.feasible}
    assert result.best.values["quality"] == max(kept.values())
    again, _ = Recipe.from_yaml(result.recipe.to_yaml()).apply(net)
    assert accuracy(again, x[400:], y[400:]) == result.best.values["quality"]
    assert net.timesteps == 4


def test_the_general_search_knows_both_knobs() -> None:
    x, _ = samples()
    result = hasten.tune(
        network(), [x[:300]], "quality>80%", space=spiking_space(network()), protocol=QUICK, time_limit=None
    )
    assert {c.knobs["format"] for c in result.frontier.candidates} == {"unchanged", "timesteps", "confidence"}


def test_other_models_and_uneven_samples_are_refused() -> None:
    x, y = samples()
    with pytest.raises(ConfigurationError, match="SpikingNetwork"):
        tune_spiking(nn.Linear(2, 2), (x, y), "quality>90%")
    with pytest.raises(ConfigurationError, match="800 inputs and 10 labels"):
        tune_spiking(network(), (x, y[:10]), "quality>90%")
