"""The five steps of the demo."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hasten.apps.demo.objective import UNTUNED, Objective, choose
from hasten.apps.demo.page import columns, verdict, write
from hasten.apps.demo.pieces import Piece, show
from hasten.apps.demo.race import Lap, lap

if TYPE_CHECKING:
    from rich.console import Console

    from hasten.language.generate import Answer
    from hasten.serve.measurement import LanguageMeasurement
    from hasten.serve.workload import Workload
    from hasten.tune.serving import ServingResult

__all__ = ["DemoResult", "run"]

Stages = Callable[["Console"], AbstractContextManager[Callable[[str, float], None]]]


@dataclass(frozen=True)
class DemoResult:
    """Everything that the demo saw."""

    answers: list[tuple[Piece, Answer]]
    measurement: LanguageMeasurement
    objective: Objective
    tuning: ServingResult
    untuned: Lap
    tuned: Lap
    verdict: str
    better: bool

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "verdict": self.verdict,
            "better": self.better,
            "slo": str(self.objective.slo),
            "why": self.objective.why,
            "workload": self.objective.workload.describe(),
            "untuned": {"knobs": self.untuned.knobs, "metrics": self.untuned.metrics.to_dict()},
            "tuned": {"knobs": self.tuned.knobs, "metrics": self.tuned.metrics.to_dict()},
            "tuning": self.tuning.to_json(),
            "measurement": self.measurement.to_json(),
        }


def _shape(data: Path | None, requests: int, context: int) -> Callable[[float], Workload]:
    """Code completion at a rate: the real code trace where it is, else the sample that comes with hasten.

    Prompts are long and answers short, so a whole prompt that goes first is felt by everybody who waits for a token.
    """
    from hasten.serve import workload as workloads

    trace = data / "llm_traces" / "azure_code.csv.gz" if data is not None else None
    recorded = workloads.load(trace).head(requests) if trace is not None and trace.is_file() else None

    def at(rate: float) -> Workload:
        if recorded is not None:
            offered = recorded.at_rate(rate, seed=0)
        else:
            offered = workloads.sample("code", rate=rate, requests=requests, seed=0)
        return offered.scaled(max_prompt=context * 3 // 4, max_output=context // 5)

    return at


def run(
    console: Console,
    stages: Stages,
    *,
    model: str = "pycode-4m",
    report: Path = Path("report.html"),
    data: Path | None = None,
    seconds: float = 20.0,
    threads: int | None = None,
    seed: int = 0,
) -> DemoResult:
    """Run the whole demo; ``seconds`` is about how long each of the two replays takes.

    ``threads`` of the model's kernels: by default one core is left to the HTTP front and to the load generator, which
    run on this machine too.
    """
    import numba
    import torch

    from hasten.language import load
    from hasten.serve.measurement import measure_language
    from hasten.tune.kv_precision import runtime_of
    from hasten.tune.language import tune_server

    threads = threads or max(1, (os.cpu_count() or 2) - 1)
    torch.set_num_threads(threads)
    numba.set_num_threads(min(threads, numba.get_num_threads()))

    console.rule("1. the model at work")
    loaded = load(model)
    with stages(console) as told:
        told(f"packing {loaded.name}", 0.0)
        executor = loaded.executor
        told(f"compiling kernels for {executor.precision} (once per machine)", 0.5)
        loaded.generate("x", max_tokens=2)
    answers = show(console, loaded)

    console.rule("2. what it costs on this machine")
    with stages(console) as told:
        measurement = measure_language(loaded, time_limit=12.0, max_num_seqs=64, progress=told)
    console.print(measurement.verdict())
    _cost_table(console, measurement)

    console.rule("3. tuned for an SLO")
    context = loaded.config.max_position_embeddings
    blocks = 24 * context // 16
    with stages(console) as told:
        probe = _shape(data, 200, context)
        objective = choose(measurement.cost, probe, blocks=blocks, overhead=_OVERHEAD, progress=told)
    rate = objective.workload.rate
    load_at = _shape(data, max(40, round(rate * seconds)), context)
    objective = Objective(objective.slo, load_at(rate), objective.why)
    console.print(f"SLO: [bold]{objective.slo}[/]\n{objective.why}.")
    with stages(console) as told:
        tuning = tune_server(
            loaded,
            objective.slo,
            objective.workload.head(max(40, round(rate * seconds / 2))),
            baseline={**UNTUNED, "precision": executor.precision},
            precisions=_precisions(executor.precision),
            costs={executor.precision: measurement.cost},
            blocks=blocks,
            overhead=_OVERHEAD,
            confirm=2,
            time_limit=60.0,
            seed=seed,
            progress=told,
        )
    console.print(tuning.verdict())

    console.rule("4. both servers, one workload, over a socket")
    laps = []
    for name, knobs in (("untuned", tuning.baseline.knobs), ("tuned", tuning.best.knobs)):
        with stages(console) as told:
            laps.append(
                lap(
                    name, model, knobs, objective.workload, objective.slo, blocks=blocks, threads=threads,
                    progress=told, cost=tuning.costs.get(runtime_of(knobs)),
                )
            )  # fmt: skip
        console.print(f"{name}: {', '.join(f'{k} {v}' for k, v in knobs.items())}")

    console.rule("5. the verdict")
    untuned, tuned = laps
    sentence, better = verdict(untuned.metrics, tuned.metrics, objective.slo)
    result = DemoResult(answers, measurement, objective, tuning, untuned, tuned, sentence, better)
    _columns_table(console, result)
    console.print(sentence, style="bold green" if better else "bold red")
    write(result, report)
    console.print(f"report: {report}")
    return result


_OVERHEAD = 0.001
"""Seconds that a step takes outside the model, with the HTTP front beside it."""


def _precisions(base: str) -> tuple[str, ...]:
    return (base, *(p for p in ("int8",) if p != base))


def _cost_table(console: Console, measurement: LanguageMeasurement) -> None:
    from rich.table import Table

    from hasten.budget import format_quantity

    table = Table("step", "measured", "roof", "bound by", "reached")
    for p in measurement.points:
        time = format_quantity(p.time or float("nan"), "time")
        share = format_quantity(p.attainment or 0.0, "ratio")
        table.add_row(p.name, time, format_quantity(p.bound, "time"), p.limit, share)
    console.print(table)
    if measurement.cost.report is not None:
        error = measurement.cost.report.holdout_median_relative_error
        console.print(f"iteration cost fitted; off by {error:.1%} (median) on batches that it never saw")


def _columns_table(console: Console, result: DemoResult) -> None:
    from rich.table import Table

    table = Table(
        "", "untuned", "tuned", title=f"{len(result.objective.workload)} requests, SLO {result.objective.slo}"
    )
    for row in columns(result.untuned.metrics, result.tuned.metrics, result.objective.slo):
        table.add_row(*row)
    console.print(table)
