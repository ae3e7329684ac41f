"""One self-contained HTML file: a verdict first, then tables and plots.

Nothing is fetched: style and drawings are inline, and a content policy in the page forbids any request. The page
follows the reader's light or dark setting. It is written whole or not at all.

>>> page = Report("A model").verdict("inside the budget", good=True).table(["name", "p99"], [["a", "3 ms"]]).html()
>>> page.startswith("<!doctype html>"), "://" in page
(True, False)
"""

from __future__ import annotations

import html as markup
import json
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from hasten.budget import format_quantity
from hasten.files import write_text

if TYPE_CHECKING:
    from hasten.measure.machine import Machine
    from hasten.measure.measurement import Measurement

__all__ = ["Report", "of_measurement"]

_STYLE = """
:root { color-scheme: light dark; --ink: #1d2127; --soft: #5c6672; --paper: #fdfdfc; --line: #d9dde2; --card: #f4f5f6;
  --good: #1f7a4d; --bad: #b3372f; --plain: #4a6a8a; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e8ea; --soft: #9aa4af; --paper: #16191d; --line: #333a42;
  --card: #1e2227; --good: #5cc492; --bad: #ef8077; --plain: #8ab4dc; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 60rem; padding: 2.5rem 1.25rem 4rem; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif; }
h1 { font-size: 1.75rem; line-height: 1.2; margin: 0 0 .25rem; letter-spacing: -.01em; }
h2 { font-size: 1.2rem; margin: 2.5rem 0 .5rem; padding-top: 1rem; border-top: 1px solid var(--line); }
p { margin: .5rem 0; max-width: 46rem; }
.soft, figcaption { color: var(--soft); font-size: .9rem; }
.verdict { margin: 1.25rem 0; padding: .8rem 1rem; background: var(--card); border-left: 4px solid var(--plain);
  border-radius: 0 6px 6px 0; font-weight: 600; }
.verdict.good { border-color: var(--good); } .verdict.bad { border-color: var(--bad); }
figure { margin: 1rem 0; } figure svg { width: 100%; height: auto; } figcaption { margin-top: .25rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .92rem; font-variant-numeric: tabular-nums; }
th, td { padding: .38rem .7rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { color: var(--soft); font-weight: 600; } th:first-child, td:first-child { text-align: left; }
tr.strong td { font-weight: 650; }
details { margin: 1.5rem 0; } summary { cursor: pointer; color: var(--soft); }
pre { overflow-x: auto; background: var(--card); padding: .8rem; border-radius: 6px; font-size: .8rem; }
footer { margin-top: 3rem; color: var(--soft); font-size: .85rem; }
"""


class Report:
    """A page built from top to bottom; every method returns the report, so calls chain.

    All text is escaped; only :meth:`plot` takes markup, from :mod:`hasten.measure.plots`.
    """

    def __init__(self, title: str, subtitle: str = "") -> None:
        self._title = title
        self._parts: list[str] = [f"<h1>{markup.escape(title)}</h1>"]
        if subtitle:
            self._parts.append(f'<p class="soft">{markup.escape(subtitle)}</p>')

    def verdict(self, sentence: str, good: bool | None = None) -> Report:
        """The plain sentence that a reader came for; ``good`` colours its edge."""
        kind = {True: " good", False: " bad", None: ""}[good]
        self._parts.append(f'<p class="verdict{kind}">{markup.escape(sentence)}</p>')
        return self

    def section(self, heading: str, text: str = "") -> Report:
        """A heading, and a sentence under it."""
        self._parts.append(f"<h2>{markup.escape(heading)}</h2>")
        return self.text(text) if text else self

    def text(self, text: str) -> Report:
        """A paragraph."""
        self._parts.append(f"<p>{markup.escape(text)}</p>")
        return self

    def table(
        self,
        columns: Sequence[str],
        rows: Sequence[Sequence[object]],
        caption: str = "",
        strong: Sequence[int] = (),
    ) -> Report:
        """A table; the first column is text, the others are right-aligned; rows listed in ``strong`` stand out."""
        head = "".join(f"<th>{markup.escape(c)}</th>" for c in columns)
        body = "".join(
            f"<tr{' class=strong' if i in strong else ''}>"
            + "".join(f"<td>{markup.escape(str(cell))}</td>" for cell in row)
            + "</tr>"
            for i, row in enumerate(rows)
        )
        note = f"<figcaption>{markup.escape(caption)}</figcaption>" if caption else ""
        table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
        self._parts.append(f'<figure><div class="scroll">{table}</div>{note}</figure>')
        return self

    def plot(self, svg: str, caption: str = "") -> Report:
        """A drawing from :mod:`hasten.measure.plots`."""
        self._parts.append(f"<figure>{svg}<figcaption>{markup.escape(caption)}</figcaption></figure>")
        return self

    def data(self, document: Mapping[str, Any], heading: str = "The numbers as JSON") -> Report:
        """Machine-readable numbers, folded away."""
        text = markup.escape(json.dumps(document, indent=1, ensure_ascii=False, default=str))
        self._parts.append(f"<details><summary>{markup.escape(heading)}</summary><pre>{text}</pre></details>")
        return self

    def machine(self, machine: Machine) -> Report:
        """Who measured, at the foot of the page."""
        self._parts.append(f"<footer>Measured on {markup.escape(str(machine))}; fingerprint {machine.hash}.</footer>")
        return self

    def html(self) -> str:
        """The whole page."""
        policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
        return (
            '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<title>{markup.escape(self._title)}</title><style>{_STYLE}</style></head><body>\n"
            + "\n".join(self._parts)
            + "\n</body></html>\n"
        )

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write the page, whole or not at all; raises :class:`~hasten.errors.DataError` if the disk refuses."""
        write_text(path, self.html())


def of_measurement(measurement: Measurement, most_modules: int = 20) -> Report:
    """The page of one measured model."""
    from hasten.measure import plots

    m, values = measurement, measurement.values()
    calls = f"{m.latency.summary.count} calls after {len(m.latency.warmup)} of warm-up"
    report = Report(m.name, f"Measured by hasten: {calls}")
    report.verdict(m.verdict(), good=None if m.budget is None else not m.violations)
    summary = m.latency.summary
    rows = []
    for q, estimate in summary.percentiles.items():
        high = format_quantity(estimate.high, "time") if estimate.high != float("inf") else "not known"
        low = format_quantity(estimate.low, "time") if estimate.low != float("-inf") else "not known"
        rows.append([f"p{q:g}", format_quantity(estimate.value, "time"), low, high])
    rows.append(["mean", format_quantity(summary.mean, "time"), "", ""])
    report.section("Latency").table(["percentile", "value", "95 % from", "to"], rows)
    limits = {}
    if m.budget is not None:
        limits = {str(b): b.limit for b in m.budget.bounds if b.metric == "latency"}
    report.plot(plots.ecdf({m.name: m.latency.times}, limits=limits), "Every call, outliers included.")
    attained = m.point.attainment or 0.0
    report.section(
        "Roofline",
        f"At {m.point.intensity:.3g} operations per byte the model is bound by {m.point.limit}: at best "
        f"{format_quantity(m.point.bound, 'time')} per call; it reaches {100 * attained:.0f} % of that."
        + (" More than all means that the weights came from the caches, which are faster." if attained > 1 else ""),
    )
    report.plot(plots.roofline({m.roofline.dtype: m.roofline}, [m.point]), "Both roofs were measured on this machine.")
    report.section("Cost").table(
        ["quantity", "value"],
        [
            ["multiply-adds", f"{m.cost.macs:,}"],
            ["parameters", f"{m.cost.parameters:,}"],
            ["weights", format_quantity(m.cost.weight_bytes, "bytes")],
            ["activations written", format_quantity(m.cost.activation_bytes, "bytes")],
            ["memory in use", format_quantity(values["memory"], "bytes")],
            ["energy per call", f"{format_quantity(m.energy.joules, 'energy')} ({m.energy.source})"],
        ],
    )
    largest = sorted(m.cost.modules, key=lambda x: -(x.macs + x.weight_bytes))[:most_modules]
    report.table(
        ["module", "kind", "multiply-adds", "weights", "traffic", "calls"],
        [
            [
                x.name or "(model)",
                x.kind,
                f"{x.macs:,}",
                format_quantity(x.weight_bytes, "bytes"),
                format_quantity(x.traffic, "bytes"),
                x.calls,
            ]
            for x in largest
        ],
        caption=f"The {len(largest)} most expensive of {len(m.cost.modules)} modules.",
    )
    if m.cost.uncounted:
        report.text(f"Not counted, since no formula is known: {', '.join(m.cost.uncounted)}.")
    return report.data(m.to_json()).machine(m.machine)
