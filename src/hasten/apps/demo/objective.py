"""An SLO and a load that make a fair question for this machine.

A fixed SLO would be trivial on one machine and hopeless on the next. Both follow from the measured cost, by simulation:
the load is a share of what a tuned server could carry, and the limits lie between the tails that the simulator expects
of the untuned and of a tuned server. Whether they are met is decided later, by real servers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hasten.budget import SLO, Target, format_quantity

if TYPE_CHECKING:
    from hasten.serve.cost import IterationCost
    from hasten.serve.metrics import ServingMetrics
    from hasten.serve.workload import Workload

__all__ = ["UNTUNED", "Objective", "choose"]

UNTUNED = {"policy": "prefill-first", "precision": "bf16", "max_num_seqs": 64}
"""Continuous batching with whole prompts first: what serving systems did by default before chunked prefill."""

_BUDGETS = (32, 64, 128, 256)
_LOAD = 0.65  # at half of it prompts rarely fall into a decode, and the untuned server does well enough
_STALLED = 4.0  # a median wait of this many times the unloaded one marks overload


@dataclass(frozen=True)
class Objective:
    """What the demo's servers are asked for."""

    slo: SLO
    workload: Workload
    why: str
    """how it was chosen, in one sentence"""


def choose(
    cost: IterationCost,
    shape: Callable[[float], Workload],
    *,
    blocks: int,
    overhead: float,
    progress: Callable[[str, float], None] = lambda stage, share: None,
) -> Objective:
    """Pick the load and the limits. ``shape(rate)`` is the workload at a rate; ``overhead`` seconds go to every
    step."""
    from hasten.serve.policy import make
    from hasten.serve.simulate import Simulator

    def simulate(name: str, load: Workload, **knobs: int) -> ServingMetrics:
        policy = make(name, max_num_seqs=64, **knobs)
        return Simulator(cost, policy, blocks=blocks, overhead=overhead).run(load).metrics

    progress("load that this machine can carry", 0.1)
    idle = simulate("stall-free", shape(0.05), token_budget=128)
    low, high = 0.05, 0.1
    while high < 2000 and simulate("stall-free", shape(high), token_budget=128).ttft.p50 < _STALLED * idle.ttft.p50:
        low, high = high, 2 * high
    for _ in range(4):
        middle = math.sqrt(low * high)
        carried = simulate("stall-free", shape(middle), token_budget=128).ttft.p50 < _STALLED * idle.ttft.p50
        low, high = (middle, high) if carried else (low, middle)
    rate = float(f"{_LOAD * low:.2g}")
    load = shape(rate)
    progress("tails at that load", 0.7)
    untuned = simulate("prefill-first", load)
    tuned = min((simulate("stall-free", load, token_budget=b) for b in _BUDGETS if b >= 64), key=lambda m: m.tpot.p99)
    tpot = math.sqrt(untuned.tpot.p99 * tuned.tpot.p99)
    ttft = 2.0 * max(untuned.ttft.p99, tuned.ttft.p99)
    slo = SLO(ttft=Target(_round(ttft)), tpot=Target(_round(tpot)))
    why = (
        f"{rate:g} requests/s is {_LOAD:.0%} of the load that a chunked schedule can carry here; the simulator expects "
        f"a p99 TPOT of {format_quantity(untuned.tpot.p99, 'time')} untuned and "
        f"{format_quantity(tuned.tpot.p99, 'time')} tuned, so the limit lies between them"
    )
    progress("done", 1.0)
    return Objective(slo, load, why)


def _round(seconds: float) -> float:
    """Two significant digits, as a person would write a limit."""
    return float(f"{seconds:.2g}")
