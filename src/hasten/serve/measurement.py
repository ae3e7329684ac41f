"""What a language model spends on this machine: time of an iteration against batch and context, and its roofs.

A decode step of B sequences with C tokens of context must read every weight once and B·C cached tokens, and computes
two operations per weight and token; the roofline turns both into the least time that it can take. Steps are measured
on the fast runtime with random token ids; the fitted iteration cost is what the scheduler and the tuner use.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hasten.budget import Budget, format_quantity
from hasten.clock import Clock, MonotonicClock
from hasten.measure.bandwidth import Ceilings, measure_ceilings
from hasten.measure.latency import LatencySample, Protocol, latency
from hasten.measure.machine import Machine
from hasten.measure.roofline import Point, Roofline
from hasten.measure.stats import summarise

if TYPE_CHECKING:
    from hasten.language.loading import LanguageModel
    from hasten.measure.report import Report
    from hasten.serve.cost import IterationCost, Sample

__all__ = ["LanguageMeasurement", "add_to_report", "measure_language"]

_RATES = {"fp32": "float32", "bf16": "bfloat16", "int8": "bfloat16", "int4": "bfloat16"}


@dataclass(frozen=True)
class LanguageMeasurement:
    """One language model on one machine."""

    name: str
    """the model"""
    precision: str
    """format of the weights in the runtime"""
    step: LatencySample
    """seconds of a decode step of one sequence in the middle of its context"""
    samples: tuple[Sample, ...]
    """measured batches: chunks (context, length) and seconds"""
    cost: IterationCost
    """fitted to the samples, with the error on batches kept apart"""
    points: tuple[Point, ...]
    """decode and prefill under the roof"""
    roofline: Roofline
    """the roofs of this device"""
    weight_bytes: int
    """bytes of the packed weights"""
    bytes_per_token: int
    """bytes of cached keys and values per token"""
    machine: Machine
    """who measured"""
    budget: Budget | None = None
    """what was allowed; latency means the decode step of one sequence"""

    def values(self) -> dict[str, float]:
        """What a budget may bound: latency of a decode step, size, throughput in tokens per second of one sequence."""
        wanted = {50.0, 90.0, 99.0}
        if self.budget is not None:
            wanted |= {b.percentile for b in self.budget.bounds if b.percentile is not None}
        summary = summarise(self.step.times, sorted(wanted))
        throughput = 1 / summary.mean if summary.mean else float("inf")
        latencies = {f"latency@p{q:g}": summary.at(q) for q in sorted(wanted)}
        return {**latencies, "size": float(self.weight_bytes), "throughput": throughput}

    @property
    def violations(self) -> list[str]:
        """One line per broken bound."""
        return self.budget.violations(self.values()) if self.budget is not None else []

    def verdict(self) -> str:
        """One plain sentence."""
        first = self.points[0]
        reached = (
            f"a decode step of one sequence takes {format_quantity(self.step.median, 'time')}, "
            f"{100 * (first.attainment or 0):.0f} % of its {first.limit} roof"
        )
        if self.budget is None:
            return reached
        if self.violations:
            return f"outside the budget: {'; '.join(self.violations)}; {reached}"
        return f"inside the budget ({self.budget}); {reached}"

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "name": self.name,
            "precision": self.precision,
            "values": self.values(),
            "decode_step": self.step.to_json(),
            "iterations": [{"chunks": [list(c) for c in chunks], "seconds": t} for chunks, t in self.samples],
            "iteration_cost": self.cost.to_dict(),
            "roofline": {**self.roofline.to_json(), "points": [p.to_json() for p in self.points]},
            "weight_bytes": self.weight_bytes,
            "bytes_per_token": self.bytes_per_token,
            "budget": str(self.budget) if self.budget is not None else None,
            "violations": self.violations,
            "verdict": self.verdict(),
            "machine": self.machine.to_json(),
        }

    def report(self, path: str | os.PathLike[str]) -> None:
        """Write one self-contained HTML file."""
        from hasten.measure.report import Report

        page = Report(self.name, f"A language model in {self.precision}, measured by hasten")
        page.verdict(self.verdict(), good=None if self.budget is None else not self.violations)
        add_to_report(self, page)
        page.data(self.to_json()).machine(self.machine).write(path)


def _decodes(max_context: int, most: int) -> list[list[tuple[int, int]]]:
    contexts = sorted({max(1, int(max_context * share)) for share in (0.02, 0.25, 0.5, 0.95)})
    return [[(c, 1)] * n for c in contexts for n in (1, 2, 4, 8, 16, 32, 64) if n <= most]


def _macs_per_token(model: LanguageModel) -> int:
    """Multiply-adds of one token without context, counted on a model without memory."""
    import torch

    from hasten.language.decoder import empty_decoder
    from hasten.measure.counting import cost

    with torch.device("meta"):
        return cost(empty_decoder(model.config), torch.zeros(1, 1, dtype=torch.int64)).macs


def measure_language(
    model: LanguageModel,
    budget: Budget | str | None = None,
    *,
    time_limit: float = 15.0,
    max_num_seqs: int = 32,
    ceilings: Ceilings | None = None,
    clock: Clock | None = None,
    progress: Callable[[str, float], None] | None = None,
) -> LanguageMeasurement:
    """Measure steps of the runtime of ``model``, fit its iteration cost and place it under the roof.

    ``time_limit``: about how many seconds the batches may take. ``progress`` hears (stage, share).
    """
    import random

    import torch

    from hasten.language.ragged import RaggedBatch
    from hasten.serve.calibrate import measure_batches, shapes
    from hasten.serve.cost import IterationCost

    if isinstance(budget, str):
        budget = Budget.parse(budget)
    clock = clock or MonotonicClock()
    told: Callable[[str, float], None] = progress or (lambda stage, share: None)
    told("packing the weights", 0.0)
    executor = model.executor
    told("roofs of this machine", 0.1)
    roofs = ceilings or measure_ceilings(str(model.device), clock=clock)
    max_context = min(int(executor.max_context), 4096)
    cache_tokens = min(max_num_seqs * max_context, max(max_context + 512, 2**30 // max(1, executor.bytes_per_token)))
    room = cache_tokens // 16
    grid = [b for b in _decodes(max_context, max_num_seqs) if sum(-(-(c + n) // 16) for c, n in b) <= room]
    others = shapes(max_context=max_context, max_tokens=512, max_num_seqs=max_num_seqs, cache_tokens=cache_tokens)
    grid.sort(key=lambda b: (b[0][0] != max(1, max_context // 2), len(b) not in (1, max_num_seqs)))
    prompts = [[(0, n)] for n in (16, 128, 512, 64, 256) if n <= max_context]
    known = {tuple(b) for b in [*prompts, *grid]}
    # The most telling ones first: a short time limit cuts the tail off.
    plan = [*prompts[:3], *grid, *prompts[3:], *[b for b in others if tuple(b) not in known][:40]]
    told("compiling the kernels, once per machine", 0.15)
    samples = measure_batches(
        model,
        clock,
        time_limit=time_limit,
        max_num_seqs=max_num_seqs,
        cache_tokens=cache_tokens,
        progress=lambda share: told("iterations", 0.2 + 0.5 * min(1.0, share)),
        batches=plan,
    )
    told("one sequence", 0.75)
    middle = max_context // 2
    blocks = -(-(middle + 1) // 16)
    cache = executor.new_cache(blocks, 16)
    batch = RaggedBatch.build([([1], middle, list(range(blocks)))])
    with torch.inference_mode():
        step = latency(
            lambda: executor.step(batch, cache),
            Protocol(min_samples=100, min_time=0.5, max_time=max(2.0, time_limit / 3)),
            name="decode step",
            clock=clock,
            progress=lambda share: told("one sequence", 0.75 + 0.2 * min(1.0, share)),
        )
    mixed = list(samples)
    random.Random(0).shuffle(mixed)
    apart = len(mixed) // 5
    cost = IterationCost.fit(mixed[apart:], holdout=mixed[:apart], note=f"{model.name}, {executor.precision}")
    roof = Roofline.of(roofs, _RATES.get(executor.precision, "float32"))
    points = _points(model, executor, samples, step, middle, roof)
    told("done", 1.0)
    return LanguageMeasurement(
        model.name,
        executor.precision,
        step,
        tuple(samples),
        cost,
        points,
        roof,
        int(executor.weight_bytes),
        int(executor.bytes_per_token),
        Machine.detect(),
        budget,
    )


def _points(
    model: LanguageModel, executor: Any, samples: list[Sample], step: LatencySample, middle: int, roof: Roofline
) -> tuple[Point, ...]:
    macs = _macs_per_token(model)
    config = model.config
    per_pair = 2 * config.num_layers * config.num_heads * config.head_dim  # multiply-adds per query and key

    def place(name: str, chunks: Any, seconds: float) -> Point:
        tokens = sum(n for _, n in chunks)
        pairs = sum(n * c + n * (n + 1) // 2 for c, n in chunks)
        traffic = executor.weight_bytes + executor.bytes_per_token * sum(c + n for c, n in chunks)
        return roof.point(name, 2.0 * (macs * tokens + per_pair * (pairs - tokens)), traffic, seconds)

    points = [place(f"decode, 1 sequence, context {middle}", [(middle, 1)], step.median)]
    decodes = [(c, t) for c, t in samples if len(c) > 1 and all(n == 1 for _, n in c)]
    if decodes:
        widest = max(len(c) for c, _ in decodes)
        chunks, seconds = max((d for d in decodes if len(d[0]) == widest), key=lambda d: sum(x for x, _ in d[0]))
        points.append(place(f"decode, {widest} sequences", chunks, seconds))
    prompts = [(c, t) for c, t in samples if len(c) == 1 and c[0][0] == 0]
    if prompts:
        chunks, seconds = max(prompts, key=lambda p: p[0][0][1])
        points.append(place(f"prefill of {chunks[0][1]} tokens", chunks, seconds))
    return tuple(points)


def add_to_report(measurement: LanguageMeasurement, page: Report) -> Report:
    """Sections on latency, iterations, cost and roofline; used by ``measure`` and by the demo."""
    from hasten.measure import plots

    m = measurement
    page.section("Time of an iteration", "Decode steps: every sequence of the batch gets one token.")
    series: dict[str, list[tuple[float, float]]] = {}
    for chunks, seconds in m.samples:
        if all(n == 1 and c == chunks[0][0] for c, n in chunks):
            series.setdefault(f"context {chunks[0][0]}", []).append((len(chunks), seconds))
    shown = {n: s for n, s in sorted(series.items(), key=lambda i: int(i[0].split()[1])) if len(s) > 2}
    if shown:
        drawing = plots.lines(shown, label_x="sequences in the batch", label_y="seconds of a step", logarithmic="x")
        page.plot(drawing, "Measured on the fast runtime.")
    prompts = [(float(c[0][1]), t) for c, t in m.samples if len(c) == 1 and c[0][0] == 0]
    fitted = [(x, m.cost.time([(0, int(x))])) for x, _ in prompts]
    if prompts:
        page.plot(
            plots.lines(
                {"measured": prompts, "fitted cost": fitted},
                label_x="prompt tokens in the step",
                label_y="seconds of a step",
                markers=lambda name: "o-" if name == "measured" else "--",
            ),
            "Prefill, and what the fitted cost says.",
        )
    if m.cost.report is not None:
        error = m.cost.report.holdout_median_relative_error
        page.text(f"The fitted cost is off by {100 * error:.1f} % (median) on batches that it never saw.")
    page.section("Roofline", "Least bytes and operations of a step, against the measured roofs.")
    page.plot(plots.roofline({m.roofline.dtype: m.roofline}, m.points), "Both roofs were measured on this machine.")
    rows = [
        [
            p.name,
            format_quantity(p.time or float("nan"), "time"),
            format_quantity(p.bound, "time"),
            p.limit,
            format_quantity(p.attainment or 0.0, "ratio"),
        ]
        for p in m.points
    ]
    return page.table(["step", "measured", "roof", "bound by", "reached"], rows)
