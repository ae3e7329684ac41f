"""The same workload against two servers over a socket, one after the other."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from hasten.budget import SLO
from hasten.serve.metrics import RequestRecord, ServingMetrics, summarise
from hasten.tune.space import PER_STEP

if TYPE_CHECKING:
    from hasten.serve.cost import IterationCost
    from hasten.serve.workload import Workload

__all__ = ["Lap", "lap"]


@dataclass(frozen=True)
class Lap:
    """What one server did."""

    name: str
    knobs: dict[str, Any]
    records: list[RequestRecord]
    metrics: ServingMetrics
    start_up: list[dict[str, Any]]
    """phases of the engine's start, with seconds"""


def lap(
    name: str,
    model: str,
    knobs: Mapping[str, Any],
    workload: Workload,
    slo: SLO,
    *,
    blocks: int,
    threads: int,
    progress: Callable[[str, float], None],
    cost: IterationCost | None = None,
) -> Lap:
    """Start a server with ``knobs``, replay ``workload``, stop it.

    ``cost`` of a step is for a token budget that follows from the SLO; without it such a server calibrates.
    """
    from hasten.serve.bench.drive import replay
    from hasten.serve.server import start

    progress(f"{name}: starting the server", 0.0)
    settings = {k: knobs[k] for k in ("policy", "token_budget", "max_num_seqs") if k in knobs}
    done = 0
    folder = ExitStack()
    if settings.get("token_budget") == PER_STEP:
        settings |= {"token_budget": None, "slo": slo}
        if cost is not None:
            kept = Path(folder.enter_context(TemporaryDirectory())) / "cost.json"
            cost.save(kept)
            settings["calibration"] = str(kept)

    def one() -> None:
        nonlocal done
        done += 1
        progress(f"{name}: {done} of {len(workload)} requests answered", done / len(workload))

    settings |= {"dtype": knobs.get("precision", "auto"), "num_blocks": blocks, "threads": threads}
    with folder, start(model, max_queue=4096, **settings) as server:
        asyncio.run(replay(server.url, workload.head(8), seed=1))  # the first requests warm caches and pages
        records = asyncio.run(replay(server.url, workload, seed=0, progress=one))
        phases = server.phases
    return Lap(name, dict(knobs), records, summarise(records, slo), phases)
