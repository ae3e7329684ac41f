"""Fewer timesteps, as techniques."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from hasten.errors import ConfigurationError
from hasten.spiking import LIF, SpikeVanishing, SpikingNetwork, TimestepReduction, Timesteps, spiking_cost, to_spiking
from hasten.spiking.fit import Fitting, accuracy, fit
from hasten.spiking.timesteps import check_spikes
from hasten.testing import TechniqueKit

pytestmark = pytest.mark.usefixtures("one_thread")


def task(samples: int = 300) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    y = torch.randint(0, 3, (samples,), generator=g)
    centre = torch.rand(3, 16, generator=g)
    return (centre[y] + 0.15 * torch.randn(samples, 16, generator=g)).clamp(0, 1), y


def trained() -> SpikingNetwork:
    x, y = task()
    torch.manual_seed(0)
    ann = nn.Sequential(nn.Linear(16, 32, bias=False), nn.ReLU(), nn.Linear(32, 32, bias=False), nn.ReLU(),
                        nn.Linear(32, 3, bias=False))  # fmt: skip
    fit(ann, x, y, Fitting(15, 1e-2))
    net = to_spiking(ann, x, 5, 90.0)
    fit(net, x, y, Fitting(8, 3e-3))
    return net


@pytest.fixture(scope="module")
def parent() -> SpikingNetwork:
    return trained()


def test_reduction_keeps_the_accuracy_and_drops_the_state(parent: SpikingNetwork) -> None:
    x, y = task()
    before = {k: v.clone() for k, v in parent.state_dict().items()}
    one = TimestepReduction((5, 2, 1), epochs=(4, 6), rate=3e-3)(parent, [(x[:150], y[:150]), (x[150:], y[150:])])
    assert accuracy(one, x, y) > accuracy(parent, x, y) - 0.05 > 0.8
    assert [s.timesteps for s in one.history] == [5, 2, 1]
    assert one.state_bytes == 0
    assert one.history[-1].cost.state_bytes == 0 < one.history[0].cost.state_bytes
    energies = [s.cost.energy() for s in one.history]
    assert energies == sorted(energies, reverse=True)
    assert one.report.measured["accuracy"] == one.history[-1].accuracy
    assert all(torch.equal(v, before[k]) for k, v in parent.state_dict().items())


def test_a_run_that_was_cut_goes_on_to_the_same_weights(parent: SpikingNetwork, tmp_path: Path) -> None:
    x, y = task()
    technique = TimestepReduction((5, 2), epochs=3)
    whole = technique(parent, [(x, y)])
    fit(parent.with_timesteps(2), x[:270], y[:270], Fitting(3, 1e-4, seed=2), checkpoint=None)  # other random draws
    network = parent.with_timesteps(2)
    seen: list[float] = []

    def stop(done: float) -> None:
        seen.append(done)
        if done > 0.5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(network, x[:270], y[:270], Fitting(3, 1e-4, seed=2), checkpoint=tmp_path / "steps-2.pt", progress=stop)
    again = technique(parent, [(x, y)], checkpoint=tmp_path)
    assert all(torch.equal(v, whole.state_dict()[k]) for k, v in again.state_dict().items())


def test_silence_is_an_error_that_names_the_layer() -> None:
    net = SpikingNetwork([nn.Linear(4, 4, bias=False), LIF(0.9, 1e6), nn.Linear(4, 2)], 3)
    with pytest.raises(SpikeVanishing, match=r"layers\.1.*never fires"):
        check_spikes(net, torch.rand(8, 4))


def test_bad_schedules_and_models_are_refused(parent: SpikingNetwork) -> None:
    with pytest.raises(ValueError, match="must fall"):
        TimestepReduction((1, 5))
    with pytest.raises(ValueError, match="do not fit"):
        TimestepReduction((5, 1), epochs=(1, 2))
    with pytest.raises(ConfigurationError, match="to_spiking"):
        TimestepReduction()(nn.Linear(2, 2), [])
    with pytest.raises(ConfigurationError, match="labelled"):
        TimestepReduction()(parent)
    with pytest.raises(ConfigurationError, match="at least one step"):
        Timesteps(0)


class SpikingKit(TechniqueKit):
    def model(self) -> nn.Module:
        torch.manual_seed(0)
        layers = [nn.Linear(16, 32, bias=False), LIF(0.9, 0.3), nn.Linear(32, 10, bias=False)]
        return SpikingNetwork(layers, 8).eval()

    def example(self) -> torch.Tensor:
        return torch.rand(6, 16, generator=torch.Generator().manual_seed(1))


class TestTimesteps(SpikingKit):
    technique = Timesteps(4)
    keeps = {"sqnr": 5.0}


def test_cost_by_the_rule(parent: SpikingNetwork) -> None:
    x, _ = task(50)
    cost = spiking_cost(parent, x)
    heard: list[torch.Tensor] = []
    hooks = [
        m.register_forward_pre_hook(lambda _, a: heard.append(a[0])) for m in parent.layers if isinstance(m, nn.Linear)
    ]
    with torch.no_grad():
        parent(x)
    for hook in hooks:
        hook.remove()
    accumulates = sum(h.mean().item() * h.shape[0] * w for h, w in zip(heard[1:], (32 * 32, 32 * 3), strict=True)) / 50
    assert cost.macs == 5 * 16 * 32
    assert cost.accumulates == pytest.approx(accumulates, rel=1e-4)
    assert cost.state_bytes == 4 * 64
    assert cost.state_traffic == 2 * 4 * 64 * 5
