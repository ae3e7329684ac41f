"""What a network of spikes costs: accumulates where spikes arrive, multiply-adds where numbers do, and membrane
traffic.

A layer whose inputs are all 0 or 1 needs no multiplication: with a share r of ones it does ``r × MACs`` accumulates. A
layer of neurons reads and writes its state once per step. Joules follow from a named table of energies per operation:
45 nm, or this host (a stated power over the rates that were measured here). Figures of different tables are not to be
compared.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from hasten.clock import Clock, MonotonicClock
from hasten.errors import ConfigurationError
from hasten.measure.counting import call

__all__ = ["HOROWITZ_45NM", "OperationEnergy", "SynapticCost", "SynapticLayer", "host_energy", "synaptic_cost"]


@dataclass(frozen=True)
class OperationEnergy:
    """Joules per operation, with a name.

    >>> HOROWITZ_45NM.mac, HOROWITZ_45NM.accumulate
    (4.6e-12, 9e-13)
    """

    name: str
    """where the numbers come from"""
    mac: float
    """joules of one multiply-add, float32"""
    accumulate: float
    """joules of one addition, float32"""
    state_byte: float
    """joules of one byte of neuron state, read or written"""


HOROWITZ_45NM = OperationEnergy("model:45nm-Horowitz2014", 3.7e-12 + 0.9e-12, 0.9e-12, 10e-12 / 8)
"""Horowitz, ISSCC 2014: 3.7 pJ + 0.9 pJ and 0.9 pJ in float32; state in a memory of 32 KiB, 10 pJ per 64 bit (of 8 KiB
to 1 MiB: 10 to 100 pJ)."""


def host_energy(watts: float, *, clock: Clock | None = None) -> OperationEnergy:
    """The table of this machine: ``watts`` over the rates of a matrix product, of summing chosen rows, and of copying.

    ``watts`` is the power while it computes, as stated by the user or the data sheet; all three rates are measured
    with the threads that torch has. An accumulate costs here what summing a row of weights costs per number, which on a
    processor made for dense products may be more than a multiply-add.
    """
    if not watts > 0:
        raise ConfigurationError(f"a power of {watts} W is not positive; state what the processor draws under load")
    clock = clock or MonotonicClock()
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(512, 512, generator=generator)
    table = torch.randn(512, 512, generator=generator)
    chosen = torch.randint(0, 512, (256, 64), generator=generator)
    state = torch.zeros(1 << 16)

    def best(run: Callable[[], object]) -> float:
        times = []
        for _ in range(12):
            begin = clock.now()
            run()
            times.append(clock.now() - begin)
        return max(min(times[2:]), 1e-12)

    mac = best(lambda: torch.mm(a, a)) / 512**3
    add = best(lambda: nn.functional.embedding_bag(chosen, table, mode="sum")) / (chosen.numel() * 512)
    byte = best(lambda: state.mul_(1.0)) / (2 * 4 * state.numel())
    return OperationEnergy(f"model:host at {watts:g} W", watts * mac, watts * add, watts * byte)


@dataclass(frozen=True)
class SynapticLayer:
    """One layer with weights, or one layer of neurons, for one sample."""

    name: str
    """path in the model"""
    kind: str
    """class of the module"""
    macs: float = 0.0
    """multiply-adds on numbers"""
    accumulates: float = 0.0
    """additions where a spike arrived"""
    dense: float = 0.0
    """multiply-adds that the same layer would do if it did not look for spikes"""
    input_rate: float = 1.0
    """share of the inputs that are not zero"""
    spike_rate: float = 0.0
    """spikes per neuron and step; layers of neurons only"""
    spikes: float = 0.0
    """spikes in all; layers of neurons only"""
    state_bytes: int = 0
    """bytes that its neurons keep between two steps"""
    state_traffic: float = 0.0
    """bytes of state read and written"""


@dataclass(frozen=True)
class SynapticCost:
    """One sample through a network."""

    layers: tuple[SynapticLayer, ...]
    """in the order in which they ran"""
    timesteps: int = 1
    """steps of the network"""
    samples: int = 1
    """samples that were averaged"""
    notes: tuple[str, ...] = field(default=())
    """what a reader should know"""

    def _sum(self, name: str) -> float:
        return float(sum(getattr(layer, name) for layer in self.layers))

    @property
    def macs(self) -> float:
        """Multiply-adds."""
        return self._sum("macs")

    @property
    def accumulates(self) -> float:
        """Additions at spikes."""
        return self._sum("accumulates")

    @property
    def spikes(self) -> float:
        """Spikes of all neurons over all steps."""
        return self._sum("spikes")

    @property
    def state_bytes(self) -> int:
        """Bytes of neuron state; 0 where nothing outlives a step."""
        return int(self._sum("state_bytes"))

    @property
    def state_traffic(self) -> float:
        """Bytes of neuron state read and written."""
        return self._sum("state_traffic")

    @property
    def first_layer_macs(self) -> float:
        """Multiply-adds of the first layer with weights, which bound what spikes can save."""
        return next((layer.macs for layer in self.layers if layer.dense), 0.0)

    def energy(self, table: OperationEnergy = HOROWITZ_45NM, *, state: bool = True) -> float:
        """Joules of operations and, unless ``state`` is False, of the state's traffic."""
        joules = self.macs * table.mac + self.accumulates * table.accumulate
        return joules + (self.state_traffic * table.state_byte if state else 0.0)

    def repeated(self, names: frozenset[str], times: int) -> SynapticCost:
        """As if the named layers ran ``times`` times: the counting rule for inputs that are shown at every step."""
        layers = tuple(
            replace(x, macs=x.macs * times, accumulates=x.accumulates * times, dense=x.dense * times)
            if x.name in names
            else x
            for x in self.layers
        )
        return replace(self, layers=layers)

    def to_json(self, table: OperationEnergy = HOROWITZ_45NM) -> dict[str, Any]:
        """Totals, and the table of layers."""
        return {
            "timesteps": self.timesteps,
            "macs": self.macs,
            "accumulates": self.accumulates,
            "first_layer_macs": self.first_layer_macs,
            "spikes": self.spikes,
            "state_bytes": self.state_bytes,
            "state_traffic": self.state_traffic,
            "energy": {"joules": self.energy(table), "source": table.name},
            "layers": [vars(layer) for layer in self.layers],
            "notes": list(self.notes),
        }


def _macs(module: nn.Module, x: Tensor, y: Tensor) -> int:
    """Multiply-adds of a linear layer or a convolution without its bias."""
    weight: Any = module.weight
    per_output = weight[0].numel()
    return int(y.numel() * per_output)


def synaptic_cost(model: nn.Module, example: Any, *, samples: int | None = None, timesteps: int = 1) -> SynapticCost:
    """Count one forward of ``model`` on ``example``, per sample.

    Linear layers and convolutions count; one whose input holds only 0 and 1 counts accumulates, any other multiply-adds
    with its zeros included. A module with an attribute ``states`` (numbers kept per neuron) is a layer of neurons: its
    outputs, all 0 or 1, are spikes, their first dimension is time. ``samples`` is the size of the batch: by default
    that of the first tensor's first dimension.
    """
    first = example[0] if isinstance(example, tuple) else example
    count = samples if samples is not None else int(first.shape[0])
    names = {module: name for name, module in model.named_modules()}
    rows: list[SynapticLayer] = []

    def weighted(module: nn.Module, args: Any, y: Any) -> None:
        x = args[0]
        dense = _macs(module, x, y) / count
        binary = bool(((x == 0) | (x == 1)).all())
        rate = float((x != 0).float().mean())
        rows.append(
            SynapticLayer(
                names[module],
                type(module).__name__,
                0.0 if binary else dense,
                rate * dense if binary else 0.0,
                dense,
                rate,
            )  # fmt: skip
        )

    def firing(module: Any, spikes: Tensor) -> None:
        steps, per_sample = spikes.shape[0], spikes[0].numel() / count
        total = float(spikes.sum()) / count if bool(((spikes == 0) | (spikes == 1)).all()) else 0.0
        held = int(4 * module.states * per_sample)
        rows.append(
            SynapticLayer(
                names[module],
                type(module).__name__,
                spike_rate=total / (steps * per_sample),
                spikes=total,
                state_bytes=held,
                state_traffic=2.0 * held * steps,
            )  # fmt: skip
        )

    removes: list[Callable[[], None]] = []
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d)):
            removes.append(module.register_forward_hook(weighted).remove)
        elif isinstance(getattr(module, "states", None), int) and hasattr(module, "scan"):
            removes.append(_listen(module, firing))
    try:
        with torch.no_grad():
            call(model, example)
    finally:
        for remove in removes:
            remove()
    return SynapticCost(tuple(rows), timesteps, count)


def _listen(module: Any, told: Callable[[Any, Tensor], None]) -> Callable[[], None]:
    """Tell what ``module.scan`` returns, until the result is called. It is not entered through ``forward``."""
    original = module.scan

    def scan(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        told(module, result[0])
        return result

    module.scan = scan
    return lambda: delattr(module, "scan")
