"""How far a model is from its budget on this machine: one call that measures all of it.

Latency with its distribution, multiply-adds and bytes, memory, energy, the roofline that bounds it, and the verdict
against the budget, together with the machine that measured.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hasten.budget import Budget
from hasten.clock import Clock, MonotonicClock
from hasten.measure import energy as energies
from hasten.measure.bandwidth import Ceilings, measure_ceilings
from hasten.measure.counting import Cost, call, cost
from hasten.measure.energy import Energy
from hasten.measure.latency import LatencySample, Protocol, latency
from hasten.measure.machine import Machine
from hasten.measure.memory import rise
from hasten.measure.roofline import Point, Roofline
from hasten.measure.stats import summarise

if TYPE_CHECKING:
    from torch import nn

__all__ = ["Measurement", "measure"]


@dataclass(frozen=True)
class Measurement:
    """What one model spends on one machine."""

    name: str
    """the model"""
    latency: LatencySample
    """seconds per call"""
    cost: Cost
    """multiply-adds and bytes"""
    memory: int
    """bytes by which one call lifted the process, plus the model's weights"""
    energy: Energy
    """joules per call and where the figure comes from"""
    roofline: Roofline
    """the roofs of this device"""
    point: Point
    """where the model stands under them"""
    machine: Machine
    """who measured"""
    budget: Budget | None = None
    """what was allowed"""

    def values(self) -> dict[str, float]:
        """Every value that a budget may bound, under its name: ``latency@p99``, memory, size, energy, throughput."""
        wanted = {50.0, 90.0, 99.0}
        if self.budget is not None:
            wanted |= {b.percentile for b in self.budget.bounds if b.percentile is not None}
        summary = summarise(self.latency.times, sorted(wanted))
        return {
            **{f"latency@p{q:g}": summary.at(q) for q in sorted(wanted)},
            "memory": float(self.memory),
            "size": float(self.cost.weight_bytes),
            "energy": self.energy.joules,
            "throughput": 1 / summary.mean if summary.mean else float("inf"),
        }

    @property
    def violations(self) -> list[str]:
        """One line per broken bound; empty when the budget is met or none was given."""
        return self.budget.violations(self.values()) if self.budget is not None else []

    def verdict(self) -> str:
        """One plain sentence."""
        if self.budget is None:
            return "no budget was given"
        unjudged = [b.metric for b in self.budget.bounds if b.metric == "quality"]
        rest = "; quality was not measured here, hasten tune does" if unjudged else ""
        if self.violations:
            return f"outside the budget: {'; '.join(self.violations)}{rest}"
        return f"inside the budget ({self.budget}){rest}"

    def to_json(self) -> dict[str, Any]:
        """Everything but the single samples."""
        return {
            "name": self.name,
            "values": self.values(),
            "latency": self.latency.to_json(),
            "cost": self.cost.to_json(),
            "memory": self.memory,
            "energy": self.energy.to_json(),
            "roofline": {**self.roofline.to_json(), "model": self.point.to_json()},
            "budget": str(self.budget) if self.budget is not None else None,
            "violations": self.violations,
            "verdict": self.verdict(),
            "machine": self.machine.to_json(),
        }

    def report(self, path: str | os.PathLike[str]) -> None:
        """Write one self-contained HTML file. Raises :class:`~hasten.errors.DataError` if it cannot be written."""
        from hasten.measure.report import of_measurement

        of_measurement(self).write(path)


def _dtype(model: object) -> str:
    """Number format that most of the weights have, float32 where there are none."""
    parameters = getattr(model, "parameters", None)
    count: dict[str, int] = {}
    for parameter in parameters() if callable(parameters) else ():
        name = str(parameter.dtype).removeprefix("torch.")
        count[name] = count.get(name, 0) + parameter.numel()
    return max(count, key=lambda n: count[n]) if count else "float32"


def measure(
    model: nn.Module | Callable[..., Any],
    example: Any,
    budget: Budget | str | None = None,
    *,
    name: str | None = None,
    protocol: Protocol | None = None,
    device: str = "cpu",
    power: float | None = None,
    ceilings: Ceilings | None = None,
    clock: Clock | None = None,
    progress: Callable[[str, float], None] | None = None,
) -> Measurement:
    """Measure any ``nn.Module`` or callable on ``example`` (a tensor, a tuple of arguments, a dict of named ones).

    ``budget`` is a :class:`~hasten.budget.Budget` or its text. ``power`` in watts makes the energy ``model:cpu-tdp``
    where there is no meter; without it the 45 nm model is used. A module is measured in eval mode without gradients and
    is left as it was found; it and ``example`` lie on ``device`` (cpu, cuda, cuda:1), or one line says otherwise.

    >>> import torch
    >>> quick = Protocol(min_samples=5, min_time=0.0, warmup_time=0.0)
    >>> roofs = Ceilings("cpu", read=10e9, copy=10e9, rates={"float32": 50e9})
    >>> m = measure(torch.nn.Linear(8, 8), torch.zeros(1, 8), "p99<10s", protocol=quick, ceilings=roofs)
    >>> m.verdict(), m.cost.macs
    ('inside the budget (p99 ≤ 10 s)', 64)
    """
    import torch

    from hasten.errors import ConfigurationError
    from hasten.measure.device import lies_on, resolve, synchronise

    where = resolve(device)
    lies = lies_on(model) if isinstance(model, torch.nn.Module) else None
    if lies is not None and lies != where:
        raise ConfigurationError(
            f"the model lies on {lies} and would be measured on {where}; say device='{lies}', or move it and its "
            f"example with .to('{where}') first"
        )
    if isinstance(budget, str):
        budget = Budget.parse(budget)
    told: Callable[[str, float], None] = progress or (lambda stage, share: None)
    clock = clock or MonotonicClock()
    modes = [(m, m.training) for m in model.modules()] if isinstance(model, torch.nn.Module) else []
    if isinstance(model, torch.nn.Module):
        model.eval()
    barrier = (lambda: synchronise(where)) if where.type == "cuda" else None

    def run() -> None:
        with torch.inference_mode():
            call(model, example)

    try:
        told("counting", 0.0)
        counted = cost(model, example)
        told("roofs of this machine", 0.1)
        roofs = ceilings or measure_ceilings(device, clock=clock)
        told("memory", 0.3)
        memory = rise(run, where) + counted.weight_bytes
        told("latency", 0.35)
        sample = latency(
            run,
            protocol,
            name=name or type(model).__name__,
            clock=clock,
            synchronise=barrier,
            progress=lambda share: told("latency", 0.35 + 0.55 * min(share, 1.0)),
        )
        told("energy", 0.9)
        dtype = _dtype(model)
        meter = energies.detect_meter(device)
        if meter is not None:
            joules = energies.measure_energy(run, meter, clock=clock)
        elif power is not None:
            joules = energies.tdp(sample.median, power)
        else:
            joules = energies.horowitz(counted.macs, counted.traffic, dtype)
    finally:
        for module, training in modes:
            module.training = training
    roof = Roofline.of(roofs, dtype)
    point = roof.point(sample.name, counted.flops, counted.traffic, sample.median)
    told("done", 1.0)
    return Measurement(sample.name, sample, counted, memory, joules, roof, point, Machine.detect(), budget)
