"""Accumulates at spikes, multiply-adds elsewhere, joules by a named table."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hasten.clock import ManualClock
from hasten.errors import ConfigurationError
from hasten.measure.synaptic import HOROWITZ_45NM, OperationEnergy, host_energy, synaptic_cost


class Fires(nn.Module):
    states = 1

    def scan(self, x: torch.Tensor, state: object = None) -> tuple[torch.Tensor, None]:
        return (x > 0).float(), None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.scan(x.unsqueeze(0))[0][0]


def test_binary_inputs_are_accumulates_and_others_are_not() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3, bias=False), Fires(), nn.Flatten(), nn.Linear(8, 5, bias=False))
    with torch.no_grad():
        model[0].weight[0].fill_(1.0)
        model[0].weight[1].fill_(-1.0)
    cost = synaptic_cost(model, torch.rand(3, 1, 4, 4))
    first, neurons, last = cost.layers
    assert (first.macs, first.accumulates) == (4 * 2 * 9, 0)
    assert (neurons.spikes, neurons.spike_rate, neurons.state_bytes) == (4, 0.5, 4 * 8)
    assert (last.macs, last.accumulates, last.dense) == (0, 20, 40)
    assert cost.first_layer_macs == cost.macs == 72
    assert cost.energy() == pytest.approx(72 * 4.6e-12 + 20 * 0.9e-12 + 64 * 1.25e-12)
    assert cost.energy(state=False) == pytest.approx(72 * 4.6e-12 + 20 * 0.9e-12)
    assert not hasattr(model[1], "__wrapped__")
    assert "scan" not in vars(model[1])


def test_repeated_layers_count_more() -> None:
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    cost = synaptic_cost(model, torch.rand(2, 4)).repeated(frozenset({"0"}), 5)
    assert [x.macs for x in cost.layers] == [80, 16]
    assert cost.to_json()["energy"]["source"] == HOROWITZ_45NM.name


class Ticking(ManualClock):
    def now(self) -> float:
        self.advance(1e-3)
        return super().now()


def test_the_hosts_table_is_power_over_rates() -> None:
    table = host_energy(10.0, clock=Ticking())
    assert isinstance(table, OperationEnergy)
    assert table.mac == pytest.approx(10.0 * 1e-3 / 512**3)
    assert table.accumulate == pytest.approx(10.0 * 1e-3 / (256 * 64 * 512))
    assert "10 W" in table.name
    with pytest.raises(ConfigurationError, match="power"):
        host_energy(0.0)
