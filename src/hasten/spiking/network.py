"""A feed-forward spiking network: stateless layers run once over all steps together, neurons run the time fused.

``network(x)`` gives logits, the mean of the last layer's output over the steps. ``direct`` coding shows the same input
at every step, so that the layers before the first neurons run only once. Without gradients the time runs in pieces that
carry their state, and only a piece of each layer is held. ``step`` is the same network one step at a time, state in and
state out; :mod:`hasten.spiking.confidence` stops it early.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn

from hasten.errors import ConfigurationError
from hasten.spiking.chain import chain_of
from hasten.spiking.events import watched
from hasten.spiking.layers import Leak, Neuron
from hasten.spiking.pool import max_pool, pool, pools
from hasten.spiking.surrogate import spike

__all__ = ["OneStep", "SpikingNetwork", "Threshold", "over_time"]

_HELD = 1 << 21  # bytes of one layer's output that a piece of the time may take


def over_time(layer: nn.Module, x: Tensor) -> Tensor:
    """Run a layer without state on (time, batch, …) as one batch of time × batch."""
    return stateless(layer, x.flatten(0, 1)).unflatten(0, x.shape[:2])


def stateless(layer: nn.Module, x: Tensor) -> Tensor:
    """A layer without state on (batch, …)."""
    y: Tensor = pool(layer, x) if pools(layer, x) else layer(x)
    return y


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
        self._tiled: list[bool] = []  # see hasten.spiking.chain

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
        if torch.is_grad_enabled() or self._joint():
            return self._through(0, x, self.init_state(), steps)[0]
        return self._pieces(x, self.init_state(), steps)[0]

    @torch.no_grad()
    def advance(self, x: Tensor, state: list[Any] | None = None) -> tuple[Tensor, list[Any]]:
        """The next steps of a stream: x (time, batch, …) from ``state`` (None is rest) -> outputs (time, batch,
        classes), next state. The given state is not changed; without gradients."""
        if self.direct:
            raise ConfigurationError("a network that codes directly has no stream of inputs; make it with direct=False")
        state = self.init_state() if state is None else state
        if self._joint():
            return self._through(0, x, state, len(x))
        return self._pieces(x, state, len(x))

    def _joint(self) -> bool:
        """Whether all steps must run together: somebody looks on, or layers draw or take statistics as in training."""
        training = (nn.modules.batchnorm._BatchNorm, nn.modules.dropout._DropoutNd)
        return watched(self) or any(m.training and isinstance(m, training) for m in self.layers.modules())

    def _through(self, first: int, x: Tensor, state: list[Any], steps: int) -> tuple[Tensor, list[Any]]:
        """Layers from ``first`` on, each over all steps; x has one step where the input does not change."""
        following = list(state)
        layer: Any
        for index, layer in enumerate(self.layers):
            if index < first:
                continue
            if has_state(layer):
                x, following[index] = layer.scan(x.expand(steps, *x.shape[1:]), state[index])
            else:
                x = over_time(layer, x)
        return x.expand(steps, *x.shape[1:]), following

    def _pieces(self, x: Tensor, state: list[Any], steps: int) -> tuple[Tensor, list[Any]]:
        """As :meth:`_through`, a few steps at a time; linear chains in one fused call."""
        if not self.direct and x.dim() == 3 and x.dtype == torch.float32 and x.device.type == "cpu":
            chain = chain_of(list(self.layers), self._tiled)
            result = chain.run(x, state) if chain is not None else None
            if result is not None:
                return result
        first = self.constant_prefix() if self.direct else 0
        for layer in list(self.layers)[:first]:
            x = over_time(layer, x)
        size = self._piece(x.shape[1:], steps) if x.device.type == "cpu" else steps
        outs = []
        for begin in range(0, steps, size):
            count = min(size, steps - begin)
            part = x if self.direct else x[begin : begin + count]
            out, state = self._through(first, part, state, count)
            outs.append(out)
        return (outs[0] if len(outs) == 1 else torch.cat(outs)), state

    def _piece(self, shape: torch.Size, steps: int) -> int:
        """Steps of a piece, by the bytes of a step of what the first neurons or layers take."""
        numel = 1
        for n in shape:
            numel *= n
        return max(1, min(steps, _HELD // max(1, 4 * numel)))

    def forward(self, x: Tensor) -> Tensor:
        """Logits (batch, classes): the accumulated output over the number of steps."""
        return self.outputs(x).mean(0)

    def init_state(self) -> list[Any]:
        """Rest, for :meth:`step`."""
        return [None] * len(self.layers)

    def constant_prefix(self) -> int:
        """How many layers come before the first neurons: with direct coding they see the same input at every step."""
        return next((i for i, layer in enumerate(self.layers) if has_state(layer)), len(self.layers))

    def step(self, x: Tensor, state: list[Any]) -> tuple[Tensor, list[Any]]:
        """One step of x (batch, …) -> output (batch, classes), next state. The given state is not changed."""
        return self.step_from(0, x, state)[:2]

    def step_from(self, first: int, x: Tensor, state: list[Any]) -> tuple[Tensor, list[Any], Tensor]:
        """One step that begins at layer ``first``, and the spikes of each sample (batch,) in it."""
        out, following, spikes = self.steps_from(first, x.unsqueeze(0), state, 1)
        return out[0], following, spikes[0]

    def steps_from(self, first: int, x: Tensor, state: list[Any], steps: int) -> tuple[Tensor, list[Any], Tensor]:
        """Some steps that begin at layer ``first``: x (steps, batch, …), or (1, batch, …) where it does not change ->
        outputs (steps, batch, classes), next state, spikes of each sample (steps, batch). The given state is not
        changed."""
        following: list[Any] = list(state)
        spikes = torch.zeros(steps, x.shape[1])
        layer: Any
        for index, layer in enumerate(self.layers):
            if index < first:
                continue
            if has_state(layer):
                x, following[index] = layer.scan(x.expand(steps, *x.shape[1:]), state[index])
                if isinstance(layer, Neuron):
                    spikes += x.flatten(2).sum(2)
            else:
                x = over_time(layer, x)
        return x.expand(steps, *x.shape[1:]), following, spikes

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
        skip = False
        for layer, following in zip_longest(self.layers, list(self.layers)[1:]):
            if skip:
                skip = False
            elif not pools(layer, x):
                x = layer(x)
            elif isinstance(layer, nn.MaxPool2d) and isinstance(following, Threshold) and not following.threshold.dim():
                x, skip = max_pool(x, float(following.threshold)), True
            else:
                x = pool(layer, x)
        return x
