"""A feed-forward spiking network: stateless layers run once over all steps together, neurons run the time fused.

``network(x)`` gives logits, the mean of the last layer's output over the steps. ``direct`` coding shows the same input
at every step, so that the layers before the first neurons run only once. ``step`` is the same network one step at a
time, state in and state out; :mod:`hasten.spiking.confidence` stops it early.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from hasten.errors import ConfigurationError
from hasten.spiking.layers import Leak, Neuron
from hasten.spiking.surrogate import spike

__all__ = ["OneStep", "SpikingNetwork", "Threshold", "over_time"]


def over_time(layer: nn.Module, x: Tensor) -> Tensor:
    """Run a layer without state on (time, batch, …) as one batch of time × batch."""
    y: Tensor = layer(x.flatten(0, 1))
    return y.unflatten(0, x.shape[:2])


def has_state(layer: nn.Module) -> bool:
    """Whether the layer carries something from step to step."""
    return isinstance(layer, (Neuron, Leak)) or hasattr(layer, "scan")


class SpikingNetwork(nn.Module):
    """Layers in order, run for a number of timesteps.

    >>> from hasten.spiking.layers import IF
    >>> net = SpikingNetwork([nn.Linear(4, 8, bias=False), IF(), nn.Linear(8, 3, bias=False)], timesteps=5)
    >>> net(torch.rand(2, 4)).shape
    torch.Size([2, 3])
    """

    def __init__(self, layers: Sequence[nn.Module] | nn.Sequential, timesteps: int, direct: bool = True) -> None:
        super().__init__()
        if timesteps < 1:
            raise ConfigurationError(f"a network runs for at least one step, got {timesteps}")
        self.layers = layers if isinstance(layers, nn.Sequential) else nn.Sequential(*layers)
        if direct and not any(has_state(layer) for layer in self.layers):
            raise ConfigurationError("direct coding needs a layer of neurons that turns the input into spikes")
        self.timesteps = timesteps
        self.direct = direct

    def with_timesteps(self, timesteps: int) -> SpikingNetwork:
        """A copy that runs for another number of steps."""
        other = copy.deepcopy(self)
        other.timesteps = timesteps
        return other

    def neurons(self) -> Iterator[tuple[str, Neuron]]:
        """The layers that fire, with their names, in order."""
        for name, layer in self.layers.named_children():
            if isinstance(layer, Neuron):
                yield f"layers.{name}", layer

    def _input(self, x: Tensor) -> Tensor:
        if self.direct:
            return x.unsqueeze(0)
        if x.shape[0] != self.timesteps:
            raise ConfigurationError(f"inputs of {x.shape[0]} steps were given to a network of {self.timesteps}")
        return x

    def outputs(self, x: Tensor, timesteps: int | None = None) -> Tensor:
        """Output of the last layer at each step: (steps, batch, classes). x (batch, …) if direct, else (time, batch,
        …)."""
        steps = timesteps or self.timesteps
        x = self._input(x) if timesteps is None or self.direct else x
        waiting = self.direct  # the input is the same at every step until the first neurons
        for stateful, group in groupby(self.layers, has_state):
            if stateful:
                layer: Any
                for layer in group:
                    if waiting:
                        x, waiting = x.expand(steps, *x.shape[1:]), False
                    x = layer.scan(x, None)[0]
            else:
                part = nn.Sequential(*group).train(self.training)
                x = over_time(part, x)
        return x

    def forward(self, x: Tensor) -> Tensor:
        """Logits (batch, classes): the accumulated output over the number of steps."""
        return self.outputs(x).mean(0)

    def init_state(self) -> list[Any]:
        """Rest, for :meth:`step`."""
        return [None] * len(self.layers)

    def constant_prefix(self) -> int:
        """How many layers come before the first neurons: with direct coding they see the same input at every step."""
        return next(i for i, layer in enumerate(self.layers) if has_state(layer))

    def step(self, x: Tensor, state: list[Any]) -> tuple[Tensor, list[Any]]:
        """One step of x (batch, …) -> output (batch, classes), next state. The given state is not changed."""
        return self.step_from(0, x, state)[:2]

    def step_from(self, first: int, x: Tensor, state: list[Any]) -> tuple[Tensor, list[Any], Tensor]:
        """One step that begins at layer ``first``, and the spikes of each sample (batch,) in it."""
        following: list[Any] = list(state)
        spikes = torch.zeros(len(x))
        layer: Any
        for index, layer in enumerate(self.layers):
            if index < first:
                continue
            if has_state(layer):
                x, following[index] = layer.step(x, state[index])
                if isinstance(layer, Neuron):
                    spikes += x.flatten(1).sum(1)
            else:
                x = layer(x)
        return x, following, spikes

    def one_step(self) -> OneStep:
        """The plain network that this one is when it runs for a single step: no state, no leak, one forward."""
        layers = [
            Threshold(layer.threshold * (1 - layer.start), layer.surrogate)
            if isinstance(layer, Neuron)
            else copy.deepcopy(layer)
            for layer in self.layers
        ]
        return OneStep(nn.Sequential(*layers)).train(self.training)


class Threshold(nn.Module):
    """``1`` where ``x > threshold``, else ``0``: a neuron that lives for one step."""

    def __init__(self, threshold: Tensor, surrogate: Any) -> None:
        super().__init__()
        self.threshold = nn.Parameter(threshold.detach().clone())
        self.surrogate = surrogate

    def constrain(self) -> None:
        """Keep the threshold positive."""
        self.threshold.data.clamp_(min=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        """Any shape."""
        return spike(x, self.threshold, self.surrogate)


class OneStep(nn.Module):
    """A spiking network of one timestep: binary activations, no state; exports as it is."""

    timesteps = 1
    state_bytes = 0

    def __init__(self, layers: nn.Sequential) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, x: Tensor) -> Tensor:
        """x (batch, …) -> logits (batch, classes)."""
        logits: Tensor = self.layers(x)
        return logits
