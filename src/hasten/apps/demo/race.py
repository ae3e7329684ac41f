"""The same workload against two servers over a socket, one after the other."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hasten.budget import SLO
from hasten.serve.metrics import RequestRecord, ServingMetrics, summarise

if TYPE_CHECKING:
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
) -> Lap:
    """Start a server with ``knobs``, replay ``workload``, stop it."""
    from hasten.serve.bench.drive import replay
    from hasten.serve.server import start

    progress(f"{name}: starting the server", 0.0)
    settings = {k: knobs[k] for k in ("policy", "token_budget", "max_num_seqs") if k in knobs}
    done = 0

    def one() -> None:
        nonlocal done
        done += 1
        progress(f"{name}: {done} of {len(workload)} requests answered", done / len(workload))

    precision = knobs.get("precision", "auto")
    with start(model, dtype=precision, num_blocks=blocks, threads=threads, max_queue=4096, **settings) as server:
        asyncio.run(replay(server.url, workload.head(8), seed=1))  # the first requests warm caches and pages
        records = asyncio.run(replay(server.url, workload, seed=0, progress=one))
        phases = server.phases
    return Lap(name, dict(knobs), records, summarise(records, slo), phases)
