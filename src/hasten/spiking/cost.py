"""The cost of a spiking network by the field's counting rule, next to the network that it came from.

Per layer ``spike rate of its input × MACs × steps`` accumulates; the layers before the first neurons see numbers and
count ``MACs × steps`` (this library runs them once, since the input does not change, but a spiking chip would not); the
potential of each neuron is read and written at each step, except in a network of one step, which has none.
"""

from __future__ import annotations

from torch import Tensor, nn

from hasten.measure.synaptic import SynapticCost, synaptic_cost
from hasten.spiking.network import SpikingNetwork, has_state

__all__ = ["spiking_cost"]


def spiking_cost(network: nn.Module, x: Tensor) -> SynapticCost:
    """Cost of one sample of x; direct coding: (batch, …), else (time, batch, …). Any other module counts as it is.

    >>> import torch
    >>> from hasten.spiking.layers import IF
    >>> net = SpikingNetwork([nn.Linear(4, 8, bias=False), IF(), nn.Linear(8, 3, bias=False)], timesteps=5)
    >>> cost = spiking_cost(net, torch.full((2, 4), 0.5))
    >>> cost.macs, cost.state_bytes, cost.state_traffic
    (160.0, 32, 320.0)
    """
    if not isinstance(network, SpikingNetwork):
        return synaptic_cost(network, x)
    dim = 0 if network.direct else 1
    counted = synaptic_cost(network, x, samples=x.shape[dim], timesteps=network.timesteps)
    if not network.direct:
        return counted
    before = set()
    for name, layer in network.layers.named_children():
        if has_state(layer):
            break
        before.add(f"layers.{name}")
    note = f"layers before the first neurons are counted {network.timesteps} times and run once"
    repeated = counted.repeated(frozenset(before), network.timesteps)
    return SynapticCost(repeated.layers, repeated.timesteps, repeated.samples, (note,))
