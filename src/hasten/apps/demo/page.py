"""The two columns, the verdict and the page."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from hasten.budget import SLO, format_quantity
from hasten.serve.metrics import ServingMetrics

if TYPE_CHECKING:
    from hasten.apps.demo.run import DemoResult

__all__ = ["columns", "verdict", "write"]


def columns(untuned: ServingMetrics, tuned: ServingMetrics, slo: SLO) -> list[tuple[str, str, str]]:
    """Rows of (what, untuned, tuned); limits of the SLO stand beside the value that they bound."""
    rows = []
    names = {"ttft": "TTFT", "tpot": "TPOT", "itl": "inter-token latency", "e2e": "end to end"}
    limits = slo.targets()
    for key, name in names.items():
        for q in ("p50", "p90", "p99"):
            limit = limits.get(key)
            bound = (
                f" (limit {format_quantity(limit.limit, 'time')})" if limit and f"p{limit.percentile:g}" == q else ""
            )
            one, two = (format_quantity(getattr(getattr(m, key), q), "time") for m in (untuned, tuned))
            rows.append((f"{name} {q}{bound}", one, two))
    for label, attribute, kind in (
        ("requests inside the SLO", "slo_attainment", "ratio"),
        ("goodput, good requests", "goodput", "rate"),
        ("requests served", "request_throughput", "rate"),
        ("answer tokens", "output_throughput", "rate"),
    ):
        one, two = (format_quantity(getattr(m, attribute), kind) for m in (untuned, tuned))
        rows.append((label, one, two))
    rows.append(("requests failed", str(untuned.failed), str(tuned.failed)))
    return rows


def verdict(untuned: ServingMetrics, tuned: ServingMetrics, slo: SLO) -> tuple[str, bool]:
    """A plain sentence, and whether the tuned server is better."""
    gain = tuned.slo_attainment - untuned.slo_attainment
    met = {True: "meets", False: "misses"}
    numbers = (
        f"untuned {met[untuned.meets(slo)]} {slo} ({untuned.slo_attainment:.1%} of requests inside, goodput "
        f"{untuned.goodput:.3g} /s); tuned {met[tuned.meets(slo)]} it ({tuned.slo_attainment:.1%}, "
        f"{tuned.goodput:.3g} /s)"
    )
    if tuned.meets(slo) and not untuned.meets(slo):
        return f"The tuned server is better: {numbers}.", True
    if gain > 0.01 and tuned.goodput > untuned.goodput:
        return f"The tuned server is better, though not by the whole SLO: {numbers}.", True
    return f"The tuned server is NOT better on this machine: {numbers}.", False


def write(result: DemoResult, path: Path) -> None:
    """One self-contained HTML file."""
    from hasten.measure import plots
    from hasten.measure.report import Report
    from hasten.serve.measurement import add_to_report
    from hasten.tune.report import of_serving

    untuned, tuned, slo = result.untuned, result.tuned, result.objective.slo
    page = Report("hasten demo", f"{result.measurement.name} measured, tuned and served for {slo}")
    page.verdict(result.verdict, good=result.better)
    page.section("Untuned and tuned, the same workload over HTTP", result.objective.why + ".")
    page.table(["", "untuned", "tuned"], [list(row) for row in columns(untuned.metrics, tuned.metrics, slo)])
    page.table(
        ["server", "setting", "start-up"],
        [
            [
                lap.name,
                ", ".join(f"{k} {v}" for k, v in lap.knobs.items()),
                ", ".join(f"{p['phase']} {p['seconds']:.2f} s" for p in lap.start_up),
            ]
            for lap in (untuned, tuned)
        ],
    )
    page.section("Distributions")
    for key, name in (("ttft", "time to first token"), ("tpot", "time per output token"), ("e2e", "end to end")):
        samples = {lap.name: [getattr(r, key) for r in lap.records if r.ok] for lap in (untuned, tuned)}
        samples = {n: [v for v in values if v == v] for n, values in samples.items()}
        if not all(samples.values()):
            continue
        target = slo.targets().get(key)
        page.plot(
            plots.ecdf(samples, label=name, limits={f"limit {target}": target.limit} if target else {}),
            f"Share of requests with a {name} up to the value.",
        )
    gaps = {lap.name: [g for r in lap.records if r.ok for g in r.itls] for lap in (untuned, tuned)}
    if all(gaps.values()):
        page.plot(plots.ecdf(gaps, label="time between tokens", logarithmic=True), "Every gap between two tokens.")
    page.section("Token timeline", "One line per request, one tick per token, the first seconds of both runs.")
    rows = {}
    for lap in (untuned, tuned):
        origin = min(r.arrival for r in lap.records)
        rows[lap.name] = [(r.arrival - origin, [t - origin for t in r.token_times]) for r in lap.records if r.ok]
    page.plot(plots.timeline(rows, most=32), "A gap in a line is a client that waits.")
    page.section("What the search saw")
    of_serving(result.tuning, page)
    add_to_report(result.measurement, page)
    page.section("The model at work")
    for piece, answer in result.answers:
        first = f"{format_quantity(answer.ttft, 'time')} to the first token" if answer.times else "no token"
        page.text(f"{piece.title}: …{piece.prefix[-60:]}⟦{answer.text}⟧{(piece.suffix or '')[:40]} ({first})")
    page.data(result.to_json()).machine(result.measurement.machine).write(path)
