"""Timesteps against quality: a spiking network and labelled samples in, the cheapest way to run it inside a budget out.

The knobs are a smaller number of steps for all samples, and an exit on confidence whose tolerance is tried at several
values. One half of the samples sets thresholds and is timed, the other half judges. Energy is counted: measured
operations times a named table, in joules per sample.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from hasten.budget import Budget
from hasten.errors import ConfigurationError
from hasten.measure.synaptic import HOROWITZ_45NM, OperationEnergy
from hasten.tune.model import TuneResult, tune
from hasten.tune.space import Knob, Space, recipe_space

__all__ = ["spiking_space", "tune_spiking"]

_COUNTED = 256  # samples whose operations are counted


def spiking_space(network: nn.Module) -> Space:
    """The knobs of time among those of :func:`~hasten.tune.space.recipe_space`; give that one to try weights too."""
    knobs = {k.name: k for k in recipe_space(network).knobs if k.name in ("timesteps", "tolerance")}
    kinds = (*(("timesteps",) if "timesteps" in knobs else ()), *(("confidence",) if "tolerance" in knobs else ()))
    return Space((Knob("format", ("unchanged", *kinds)), *knobs.values()))


def tune_spiking(
    network: nn.Module,
    samples: tuple[Tensor, Tensor],
    budget: Budget | str,
    *,
    batch: int = 64,
    table: OperationEnergy = HOROWITZ_45NM,
    space: Space | None = None,
    **others: Any,
) -> TuneResult:
    """Find how many steps, or which exit, make a spiking ``network`` meet ``budget`` and lose least accuracy.

    ``samples``: inputs (batch, …), or (time, batch, …) where the network does not code directly, and labels. Latency is
    that of ``batch`` samples together, quality the accuracy relative to the unchanged network's, energy joules per
    sample by ``table``. ``others`` go to :func:`hasten.tune.model.tune`; the result's ``recipe`` repeats the choice.
    """
    from hasten.spiking import SpikingNetwork, accuracy, synaptic_energy

    if not isinstance(network, SpikingNetwork):
        raise ConfigurationError(f"a {type(network).__name__} has no timesteps to trade; give a SpikingNetwork")
    inputs, labels = samples
    dim, half = 0 if network.direct else 1, len(labels) // 2
    count = inputs.shape[dim] if inputs.dim() > dim else 0
    if half < 1 or count != len(labels):
        raise ConfigurationError(
            f"{count} inputs and {len(labels)} labels were given; give as many of both, and at least two"
        )
    fitted, judged = inputs.narrow(dim, 0, half), inputs.narrow(dim, half, len(labels) - half)
    counted = judged.narrow(dim, 0, min(_COUNTED, judged.shape[dim]))
    return tune(
        network,
        list(fitted.split(batch, dim)),
        budget,
        quality=lambda model: accuracy(model, judged, labels[half:], dim=dim),
        energy=lambda model: synaptic_energy(model, counted, table),
        space=space if space is not None else spiking_space(network),
        **others,
    )
