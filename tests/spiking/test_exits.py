"""Exit on confidence as a technique, and counted joules."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hasten.compress import Recipe
from hasten.errors import ConfigurationError
from hasten.spiking import LIF, ConfidenceExit, Confident, DynamicConfidence, SpikingNetwork, spiking_cost
from hasten.spiking.exits import synaptic_energy
from hasten.testing import TechniqueKit

pytestmark = pytest.mark.usefixtures("one_thread")


def network(direct: bool = True) -> SpikingNetwork:
    torch.manual_seed(1)
    layers = [nn.Linear(12, 24, bias=False), LIF(0.9, 0.3), nn.Linear(24, 4, bias=False)]
    return SpikingNetwork(layers, 8, direct).eval()


def samples(count: int = 400) -> torch.Tensor:
    return torch.rand(count, 12, generator=torch.Generator().manual_seed(0))


class TestDynamicConfidence(TechniqueKit):
    technique = DynamicConfidence(theta=0.9, alpha=0.5)

    def model(self) -> nn.Module:
        return network()

    def example(self) -> torch.Tensor:
        return samples(6)


@pytest.mark.parametrize("direct", [True, False])
def test_without_labels_it_agrees_with_the_whole_run(direct: bool) -> None:
    net = network(direct)
    x = samples() if direct else (torch.rand(8, 400, 12, generator=torch.Generator().manual_seed(2)) < 0.4).float()
    first, second = x.split(200, 0 if direct else 1)
    new = DynamicConfidence(tolerance=0.1)(net, list(first.split(100, 0 if direct else 1)))
    assert isinstance(new, Confident)
    assert new.mean_timesteps(second) < 7
    with torch.inference_mode():
        assert (new(second).argmax(-1) == net(second).argmax(-1)).float().mean() > 0.8
        torch.testing.assert_close(new(second), new.plain()(second), atol=1e-5, rtol=1e-5)
    again, _ = Recipe.from_yaml(Recipe((DynamicConfidence(0.1),)).to_yaml()).apply(net, [first])
    assert again.policy == new.policy


def test_labels_count_and_a_plan_repeats_the_choice() -> None:
    net, x = network(), samples()
    y = net(x).argmax(-1)
    new = DynamicConfidence(tolerance=0.1)(net, [(x[:300], y[:300])])
    recipe = Recipe((DynamicConfidence(tolerance=0.1),))
    first, plan = recipe.apply(net, [(x[:300], y[:300])])
    repeated, _ = Recipe(recipe.techniques, plan).apply(net)
    assert repeated.policy == first.policy == new.policy
    assert new.report.measured["theta"] == new.policy.theta


def test_bad_use_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="timesteps"):
        DynamicConfidence()(nn.Linear(2, 2), [])
    with pytest.raises(ConfigurationError, match="theta"):
        DynamicConfidence()(network())
    with pytest.raises(ConfigurationError, match="tolerance"):
        DynamicConfidence(tolerance=2.0)


def test_joules_of_an_exit_are_those_of_the_steps_that_ran() -> None:
    net, x = network(), samples(40)
    never = Confident(net, ConfidenceExit(theta=2.0))
    assert synaptic_energy(never, x) == pytest.approx(spiking_cost(net, x).energy())
    at_once = Confident(net, ConfidenceExit(theta=0.0))
    assert synaptic_energy(at_once, x) == pytest.approx(spiking_cost(net.with_timesteps(1), x).energy())
    mixed = Confident(net, ConfidenceExit(theta=0.6, alpha=0.5))
    assert synaptic_energy(at_once, x) < synaptic_energy(mixed, x) < synaptic_energy(never, x)
    assert synaptic_energy(nn.Linear(12, 2), x) == pytest.approx(12 * 2 * 4.6e-12)
