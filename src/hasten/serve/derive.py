"""From the SLO of a server to how much a step may compute, by a cost that is measured on this machine."""

from __future__ import annotations

import hashlib
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import hasten
from hasten.budget import SLO, format_quantity
from hasten.clock import Clock

if TYPE_CHECKING:
    from hasten.serve.cost import IterationCost
    from hasten.serve.policy.pace import Pace
    from hasten.serve.worker import WorkerConfig

__all__ = ["Derived", "derive_budget"]


class Derived(NamedTuple):
    """What a server takes from its SLO."""

    token_budget: int
    """tokens of a step at most"""
    pace: Pace | None
    """what each step leaves to prompts; None for policies that know one budget only"""
    why: str
    """one sentence for the log"""


def derive_budget(model: Any, config: WorkerConfig, clock: Clock, blocks: int | None, *, paced: bool) -> Derived:
    """Budget and pace for the objectives of ``config``; calibrates ``model`` where that was not done before.

    ``blocks``: of the KV cache, None where memory does not bound it. ``paced``: whether the policy takes a pace.
    """
    from hasten.serve.policy.pace import Pace

    assert config.slo is not None
    cost, source = _cost(model, config, clock)
    slo, seats = SLO.parse(config.slo), config.max_num_seqs
    worst = cost.budget_for(
        slo,
        max_num_seqs=seats,
        context=int(model.executor.max_context),
        cache_tokens=blocks * config.block_size if blocks else None,
    )
    if not paced:
        return Derived(worst.token_budget, None, f"{worst.why}; {source}")
    pace = Pace.for_slo(cost, slo)
    budget = pace.ceiling(seats)
    if pace.limit == inf or budget <= worst.token_budget:
        return Derived(worst.token_budget, pace, f"{worst.why}; {source}")
    why = (
        f"token budget {budget} at most, and in each step as many prompt tokens as its own decodes leave of "
        f"{format_quantity(pace.limit, 'time')} between two tokens (a fixed budget for the worst step would be "
        f"{worst.token_budget}); {source}"
    )
    return Derived(budget, pace, why)


def _cost(model: Any, config: WorkerConfig, clock: Clock) -> tuple[IterationCost, str]:
    """The cost of a step, and where it comes from."""
    from hasten.measure.machine import busy
    from hasten.serve.cost import IterationCost

    path = Path(config.calibration) if config.calibration else _path(model)
    if path.is_file():
        return IterationCost.read(path), f"calibration read from {path}"
    shared = busy()
    cost = IterationCost.calibrate(
        model,
        clock,
        time_limit=config.calibration_seconds,
        max_num_seqs=min(config.max_num_seqs, 32),
        progress=False,
        statistic="minimum" if shared else "median",
    )
    if config.calibration is None and (shared or busy()):
        return cost, "calibrated now and not kept, since other work shares the cores; start again on a quiet machine"
    path.parent.mkdir(parents=True, exist_ok=True)
    cost.save(path)
    return cost, f"calibrated now, kept in {path}"


def _path(model: Any) -> Path:
    """Where the calibration of this machine, model, precision, number of threads and state of the kernels is kept."""
    import torch

    from hasten.measure.cache import cache_folder
    from hasten.measure.machine import Machine

    executor = model.executor
    name = "".join(c if c.isalnum() or c in "-._" else "-" for c in str(model.name))[-80:]
    what = f"{name}-{executor.weight_bytes}-{executor.precision}-{torch.get_num_threads()}-{_kernels()}"
    return cache_folder() / "calibration" / f"{Machine.detect().fingerprint}-{what}.json"


def _kernels() -> str:
    """Changes with the code that a step runs; a new version of it is measured anew."""
    root = Path(hasten.__file__).parent
    files = sorted(path for room in ("language", "nn") for path in (root / room).rglob("*.py"))
    stamps = [f"{path.relative_to(root)} {path.stat().st_size} {path.stat().st_mtime_ns}" for path in files]
    return hashlib.sha256("\n".join(stamps).encode()).hexdigest()[:8]
