"""Fewer timesteps by iterative initialisation and retraining: T = 5, 4, 3, 2, 1, each stage from the one before.

"One Timestep is All You Need: Training Spiking Neural Networks with Ultra Low Latency", Chowdhury, Rathi, Roy, 2021,
arXiv:2110.05929. A network that spikes well at T steps starts the network of fewer steps, so that its thresholds
already make up for part of the spikes that vanish. At one step the leak has nothing to leak: no state is left, and the
network is a plain one with ``u > threshold`` activations.
Differs from the paper in: 10 % of the first stage's epochs per later stage and Adam 1e-4 are our choice, as is the
width 0.3 of the triangular surrogate.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from hasten.compress.technique import LayerReport, TechniqueReport, register
from hasten.errors import ConfigurationError, ModelError
from hasten.measure.synaptic import SynapticCost
from hasten.spiking.cost import spiking_cost
from hasten.spiking.fit import Fitting, accuracy, fit
from hasten.spiking.network import SpikingNetwork

__all__ = ["SpikeVanishing", "Stage", "TimestepReduction", "Timesteps", "check_spikes"]

Batches = Sequence[tuple[Tensor, Tensor]]


class SpikeVanishing(ModelError):
    """A layer of neurons that never fires, so that nothing behind it learns."""


@dataclass(frozen=True)
class Stage:
    """What one number of timesteps reached."""

    timesteps: int
    """steps of this stage"""
    accuracy: float
    """share of right answers on the data that was held back"""
    spikes_per_neuron: Mapping[str, float]
    """spikes of a neuron for one sample, by layer: shows where they vanish"""
    cost: SynapticCost
    """of one sample"""
    losses: tuple[float, ...] = ()
    """mean training loss per epoch"""


def check_spikes(network: SpikingNetwork, x: Tensor) -> SynapticCost:
    """The cost on x; raises :class:`SpikeVanishing` when a layer stays silent."""
    cost = spiking_cost(network, x)
    for layer in cost.layers:
        if layer.state_bytes and not layer.spikes:
            raise SpikeVanishing(
                f"layer {layer.name!r} never fires at {network.timesteps} steps on {cost.samples} samples; lower its "
                "threshold (a lower percentile in to_spiking), or add a stage between"
            )
    return cost


def _stage(network: SpikingNetwork, held: tuple[Tensor, Tensor], losses: Sequence[float]) -> Stage:
    cost = check_spikes(network, held[0][:256])
    per_neuron = {x.name: x.spike_rate * network.timesteps for x in cost.layers if x.state_bytes}
    right = accuracy(network, *held)
    if network.timesteps == 1:  # nothing outlives the only step
        silent = tuple(replace(x, state_bytes=0, state_traffic=0.0) for x in cost.layers)
        cost = replace(cost, layers=silent)
    return Stage(network.timesteps, right, per_neuron, cost, tuple(losses))


@register
@dataclass(frozen=True)
class TimestepReduction:
    """Retrain a spiking network for fewer and fewer timesteps.

    Calibration is labelled batches ``[(x, labels), …]``; the last tenth is held back to report each stage's accuracy.
    The result is a :class:`~hasten.spiking.network.OneStep` where the schedule ends at 1, else a spiking network; it
    has ``history`` (one :class:`Stage` per entry of the schedule) and a ``report``.
    """

    schedule: tuple[int, ...] = (5, 4, 3, 2, 1)
    """timesteps, falling; the first is that of the model given and is not retrained"""
    epochs: int | tuple[int, ...] = 2
    """passes over the data per stage, or one number for each stage after the first"""
    rate: float = 1e-4
    """learning rate of Adam"""
    batch: int = 64
    """samples per step"""
    bf16: bool = False
    """products and convolutions in bfloat16 while training"""
    seed: int = 0
    """order of the samples"""

    name: ClassVar[str] = "timestep-reduction"

    def __post_init__(self) -> None:
        falling = all(a > b for a, b in zip(self.schedule, self.schedule[1:], strict=False))
        if not self.schedule or not falling or self.schedule[-1] < 1:
            raise ConfigurationError(
                f"schedule {self.schedule} must fall and end at 1 or more, such as (5, 4, 3, 2, 1)"
            )
        if len(self._epochs()) != len(self.schedule) - 1 or min(self._epochs(), default=0) < 0:
            raise ConfigurationError(
                f"epochs {self.epochs} do not fit the schedule {self.schedule}: "
                "one number, or one per stage after the first"
            )

    def _epochs(self) -> tuple[int, ...]:
        return (self.epochs,) * (len(self.schedule) - 1) if isinstance(self.epochs, int) else self.epochs

    def __call__(
        self,
        model: nn.Module,
        calibration: Batches | None = None,
        *,
        progress: Callable[[str, float], None] | None = None,
        checkpoint: Path | None = None,
        augment: Callable[[Tensor, torch.Generator], Tensor] | None = None,
    ) -> nn.Module:
        """The reduced network; ``model`` is not changed. ``checkpoint``: a folder in which a cut run goes on."""
        if not isinstance(model, SpikingNetwork):
            raise ConfigurationError(f"a {type(model).__name__} has no timesteps; convert it with to_spiking first")
        if calibration is None:
            raise ConfigurationError("reducing timesteps retrains: give labelled batches [(inputs, labels), …]")
        x, y = torch.cat([b[0] for b in calibration]), torch.cat([b[1] for b in calibration])
        cut = max(1, len(y) - max(1, len(y) // 10))
        held = (x[cut:], y[cut:]) if cut < len(y) else (x, y)
        network = copy.deepcopy(model).with_timesteps(self.schedule[0])
        network.eval()
        history = [_stage(network, held, ())]
        for index, (steps, epochs) in enumerate(zip(self.schedule[1:], self._epochs(), strict=True)):
            network = network.with_timesteps(steps)
            if progress is not None:
                progress(f"{steps} timesteps", index / (len(self.schedule) - 1))
            fitting = Fitting(epochs, self.rate, batch=self.batch, bf16=self.bf16, seed=self.seed + steps)
            file = checkpoint / f"steps-{steps}.pt" if checkpoint is not None else None
            losses = fit(network, x[:cut], y[:cut], fitting, checkpoint=file, augment=augment)
            history.append(_stage(network.eval(), held, losses))
        result: Any = network.one_step() if network.timesteps == 1 else network
        result.history = tuple(history)
        result.report = self._report(model, history)
        return result.train(model.training)  # type: ignore[no-any-return]

    def _report(self, model: SpikingNetwork, history: Sequence[Stage]) -> TechniqueReport:
        first, last = history[0], history[-1]
        layers = [
            LayerReport(name, f"{first.timesteps} -> {last.timesteps} steps" if len(history) > 1 else "kept",
                        "" if len(history) > 1 else "the schedule has one entry",
                        next(x.state_bytes for x in first.cost.layers if x.name == name),
                        next(x.state_bytes for x in last.cost.layers if x.name == name))
            for name, _ in model.neurons()
        ]  # fmt: skip
        note = (
            f"accuracy on held-back samples {100 * first.accuracy:.2f} % at {first.timesteps} steps and "
            f"{100 * last.accuracy:.2f} % at {last.timesteps}; bytes are neuron state"
        )
        measured = {
            "accuracy": last.accuracy,
            "accuracy_before": first.accuracy,
            "energy": last.cost.energy(),
            "energy_before": first.cost.energy(),
        }
        return TechniqueReport(self.name, tuple(layers), (note,), measured)


@register
@dataclass(frozen=True)
class Timesteps:
    """Run the same spiking network for another number of steps, without training: a knob for tuning.

    >>> from hasten.spiking.layers import IF
    >>> net = SpikingNetwork([nn.Linear(4, 8, bias=False), IF(), nn.Linear(8, 3, bias=False)], timesteps=8)
    >>> Timesteps(2)(net).timesteps
    2
    """

    steps: int = 1
    """timesteps"""

    name: ClassVar[str] = "timesteps"

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ConfigurationError(f"a network runs for at least one step, got {self.steps}")

    def __call__(self, model: nn.Module, calibration: Sequence[Any] | None = None) -> nn.Module:
        """A copy with the other number of steps, and a ``report``."""
        if not isinstance(model, SpikingNetwork):
            raise ConfigurationError(f"a {type(model).__name__} has no timesteps; give a SpikingNetwork")
        new: Any = model.with_timesteps(self.steps)
        if hasattr(new, "report"):
            del new.report
        action = f"{model.timesteps} -> {self.steps} steps" if self.steps != model.timesteps else "kept"
        reason = "" if self.steps != model.timesteps else f"it runs for {self.steps} steps already"
        layers = tuple(LayerReport(name, action, reason) for name, _ in model.neurons())
        measured = {}
        if calibration:
            from hasten.compress.technique import sqnr
            from hasten.measure.counting import call

            modes = model.training
            model.eval()
            new.eval()
            with torch.inference_mode():
                measured["sqnr"] = sqnr(
                    torch.cat([call(model, c) for c in calibration]), torch.cat([call(new, c) for c in calibration])
                )
            model.train(modes)
            new.train(modes)
        note = f"the network runs for {self.steps} steps instead of {model.timesteps}; nothing was trained"
        new.report = TechniqueReport(self.name, layers, (note,), measured)
        return new  # type: ignore[no-any-return]
