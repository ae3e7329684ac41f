"""The page of a search: the verdict, the frontier, and every candidate with what it was worth."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hasten.budget import format_quantity
from hasten.measure import plots
from hasten.measure.machine import Machine
from hasten.measure.report import Report
from hasten.tune.frontier import Candidate, Frontier

if TYPE_CHECKING:
    from hasten.tune.model import TuneResult
    from hasten.tune.serving import ServingResult

__all__ = ["of_frontier", "of_result", "of_serving"]

_MOST_BARS = 30
_KINDS = {"size": "bytes", "quality": "ratio", "attainment": "ratio", "throughput": "rate", "goodput": "rate"}


def _kind(key: str) -> str:
    return "time" if "@p" in key else _KINDS.get(key, "number")


def _cell(candidate: Candidate, key: str) -> str:
    """What was measured; in brackets what was predicted where it was not."""
    if key in candidate.values:
        return format_quantity(candidate.values[key], _kind(key))
    return f"({format_quantity(candidate.predicted[key], _kind(key))})" if key in candidate.predicted else "–"


def _table(report: Report, candidates: tuple[Candidate, ...], best: Candidate | None) -> Report:
    keys = list(dict.fromkeys(k for c in candidates for k in c.values))
    rows = []
    for c in candidates:
        state = "inside" if c.feasible else "; ".join(c.violations) or "not measured"
        prefix = "" if c.measured else "rejected by prediction: " if "error" not in c.detail else "impossible: "
        cells = [_cell(c, k) for k in keys]
        speedup = c.detail.get("speedup") or {}
        span = f"{speedup['value']:.2f}× ({speedup['low']:.2f} to {speedup['high']:.2f})" if speedup else "–"
        rows.append([c.name, *cells, span, prefix + state])
    strong = [i for i, c in enumerate(candidates) if best is not None and c.name == best.name]
    return report.table(["candidate", *keys, "speed-up", "budget"], rows, strong=strong)


def of_frontier(frontier: Frontier, title: str, best: Candidate | None = None) -> Report:
    """A page with the frontier alone."""
    report = Report(title)
    x, y = frontier.axes[0], frontier.axes[1]
    if frontier.points():
        front = [c.name for c in frontier.front]
        report.plot(
            plots.frontier(
                frontier.points(),
                front=front,
                best=best.name if best else None,
                label_x=x.key,
                label_y=y.key,
                kind_x=x.kind,
                kind_y=y.kind,
            ),
            "Every measured candidate; nothing beats those on the line.",
        )
    return _table(report, frontier.candidates, best)


def of_result(result: TuneResult) -> Report:
    """The page of a tuned model."""
    report = Report("Tuned for a budget", f"Budget: {result.budget}")
    report.verdict(result.verdict(), good=result.best is not None)
    frontier, x = result.frontier, result.frontier.axes[0]
    report.section("Frontier")
    if frontier.points():
        limits = {str(b): b.limit for b in result.budget.bounds if b.metric == "latency"}
        report.plot(
            plots.frontier(
                frontier.points(),
                front=[c.name for c in frontier.front],
                best=result.best.name if result.best else None,
                label_x=x.key,
                limits=limits,
            ),
            "Latency against the quality that is kept.",
        )
    _table(report, frontier.candidates, result.best)
    if result.comparison is not None:
        report.section(
            "Confirmed", "The best candidate, those nearly as fast and the unchanged model, in turns in one fresh run."
        )
        samples = {n: s.times for n, s in result.comparison.samples.items()}
        report.plot(plots.ecdf(samples), "Every call of each.")
    _layers(report, result)
    report.section("Recipe")
    for line in result.recipe.to_yaml().splitlines()[:40]:
        report.text(line)
    return report.data(result.to_json()).machine(Machine.detect())


def _layers(report: Report, result: TuneResult) -> None:
    """What each layer costs alone, and what became of it."""
    plan = result.recipe.plan
    if plan is None or not plan.steps:
        return
    report.section("Layers", "What became of each layer, technique by technique, and what that costs.")
    lost = result.sensitivity
    if lost:
        most = sorted(lost, key=lambda p: -lost[p])[:_MOST_BARS]
        shown = {p: {"quality lost": max(lost[p], 0.0)} for p in lost if p in most}
        rest = "" if len(most) == len(lost) else f" The {len(most)} most sensitive of {len(lost)} are drawn."
        report.plot(
            plots.bars(shown, label="quality lost", kind="ratio"),
            "Each layer in its new form alone, all others unchanged." + rest,
        )
    names = [getattr(t, "name", type(t).__name__) for t in result.recipe.techniques]
    told = result.best.detail.get("layers", {}) if result.best is not None else {}  # of the last technique
    rows = []
    for number, (name, step) in enumerate(zip(names, plan.steps, strict=False)):
        for layer, action in step.items():
            why, size = told[layer] if number == len(names) - 1 and layer in told else ("", None)
            alone = f"{100 * lost[layer]:.3g} %" if layer in lost and action != "kept" else "–"
            held = format_quantity(size, "bytes") if size is not None else "–"
            rows.append([layer, name, action, held, alone, why])
    report.table(["layer", "technique", "now", "size", "quality lost alone", "why"], rows)


def of_serving(result: ServingResult, report: Report | None = None) -> Report:
    """The page of a tuned server; adds to ``report`` where one is given."""
    page = report or Report("Tuned for an SLO", f"SLO: {result.slo}")
    page.verdict(result.verdict(), good=result.best.values["attainment"] >= result.target)
    page.section("Predicted and confirmed", f"{len(result.predicted)} settings were predicted on the fitted cost.")
    keys = ["attainment", "goodput", "ttft@p99", "tpot@p99", "e2e@p99"]
    rows = []
    for c in result.confirmed:
        cells = []
        for k in keys:
            expected = format_quantity(c.predicted[k], _kind(k)) if k in c.predicted else "–"
            cells.append(f"{format_quantity(c.values[k], _kind(k))} ({expected})" if k in c.values else "–")
        rows.append([c.name + (" (untuned)" if c.knobs == result.baseline.knobs else ""), *cells])
    strong = [i for i, c in enumerate(result.confirmed) if c.knobs == result.best.knobs]
    page.table(["setting", *keys], rows, "Measured, and in brackets what the simulator predicted.", strong)
    points = [(c.name, c.predicted["e2e@p99"], c.predicted["attainment"]) for c in result.predicted if c.predicted]
    points = [p for p in points if p[1] == p[1]]
    if points:
        front = Frontier(
            tuple(Candidate(n, {}, {"e2e@p99": x, "attainment": y}) for n, x, y in points), result.frontier.axes
        )
        best = result.best.name if any(p[0] == result.best.name for p in points) else None
        names = [c.name for c in front.front][:6]
        page.plot(
            plots.frontier(points, front=names, best=best, label_x="end to end, p99", label_y="SLO attainment"),
            "Every predicted setting.",
        )
    return page
