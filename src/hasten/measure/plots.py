"""Plots as inline SVG: vector, no external address, readable on light and on dark.

Each function takes plain numbers in SI units and returns one ``<svg>`` element. Lines and text that carry no data take
the page's text colour; data colours are mid-tones with contrast on both backgrounds.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from hasten.budget import format_quantity
from hasten.errors import ConfigurationError
from hasten.measure.labels import write_labels
from hasten.measure.roofline import Point, Roofline

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["COLOURS", "bars", "ecdf", "frontier", "lines", "roofline", "timeline", "violin"]

COLOURS = ("#3b82c4", "#e08e2b", "#2a9d74", "#c4588f", "#8a6fd1", "#8c8c5a")
_INK = "#010203"  # stands for the page's text colour until the drawing is done
_MOST_POINTS = 600
_PARTS = "figure|axes|patch|matplotlib|xtick|ytick|line2d|text|legend|PathCollection|FillBet"


def _figure(width: float = 7.2, height: float = 3.6) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    figure.patch.set_alpha(0.0)
    axes = figure.add_subplot()
    axes.patch.set_alpha(0.0)
    axes.grid(True, color=_INK, alpha=0.12, linewidth=0.6)
    axes.set_axisbelow(True)
    for name, spine in axes.spines.items():
        spine.set_visible(name in ("left", "bottom"))
        spine.set_color(_INK)
        spine.set_alpha(0.5)
    axes.tick_params(colors=_INK, labelsize=9)
    return figure, axes


def _finish(figure: Figure, axes: Axes, label_x: str, label_y: str, describe: str, *, legend: bool = True) -> str:
    axes.set_xlabel(label_x, color=_INK, fontsize=9.5)
    axes.set_ylabel(label_y, color=_INK, fontsize=9.5)
    if legend and axes.get_legend_handles_labels()[0]:
        box = axes.legend(frameon=False, fontsize=9, labelcolor=_INK)
        box.set_zorder(5)
    return _svg(figure, describe)


def _svg(figure: Figure, describe: str) -> str:
    import matplotlib

    stream = io.StringIO()
    settings: Any = {"svg.fonttype": "none", "svg.hashsalt": describe, "font.family": "sans-serif"}
    with matplotlib.rc_context(settings):
        figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = stream.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r' xmlns(:\w+)?="[^"]*"', "", text)
    text = re.sub(rf' id="({_PARTS})[^"]*"', "", text)
    text = text.replace("xlink:href", "href").replace(_INK, "currentColor")
    text = re.sub(r" font-family: [^;\"]*;?", "", text)
    escaped = describe.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
    head = f'<svg role="img" aria-label="{escaped}"'
    return re.sub(r"^<svg", head, re.sub(r"\s*\n\s*", "\n", text)).strip()


def _axis_in(axes: Axes, which: str, kind: str) -> None:
    """Ticks of an axis written with a unit."""
    from matplotlib.ticker import FuncFormatter

    axis: Any = axes.xaxis if which == "x" else axes.yaxis
    axis.set_major_formatter(FuncFormatter(lambda value, _: "0" if value == 0 else format_quantity(float(value), kind)))


def _thin(x: np.ndarray[Any, Any], *others: np.ndarray[Any, Any]) -> tuple[np.ndarray[Any, Any], ...]:
    """At most ``_MOST_POINTS`` of the points, the first and the last among them."""
    if x.size <= _MOST_POINTS:
        return (x, *others)
    keep = np.unique(np.linspace(0, x.size - 1, _MOST_POINTS).round().astype(int))
    return tuple(a[keep] for a in (x, *others))


def ecdf(
    samples: Mapping[str, ArrayLike],
    *,
    label: str = "latency",
    kind: str = "time",
    limits: Mapping[str, float] | None = None,
    logarithmic: bool = False,
) -> str:
    """Cumulative distribution of each sample; ``limits`` are vertical lines such as the SLO (name → value).

    >>> ecdf({"a": [1.0, 2.0, 3.0]}).startswith("<svg")
    True
    """
    figure, axes = _figure()
    for index, (name, values) in enumerate(samples.items()):
        x = np.sort(np.asarray(values, dtype=np.float64).ravel())
        x = x[np.isfinite(x)]
        if x.size == 0:
            continue
        share = np.arange(1, x.size + 1) / x.size
        xs, ys = _thin(x, share)
        axes.step(xs, ys, where="post", color=COLOURS[index % len(COLOURS)], linewidth=1.8, label=name)
    for name, value in (limits or {}).items():
        axes.axvline(value, color=_INK, linestyle="--", linewidth=1.0, label=name)
    if logarithmic:
        axes.set_xscale("log")
    axes.set_ylim(0, 1.02)
    _axis_in(axes, "x", kind)
    _axis_in(axes, "y", "ratio")
    return _finish(figure, axes, label, "share of samples", f"cumulative distribution of {label}")


def violin(samples: Mapping[str, ArrayLike], *, label: str = "latency", kind: str = "time") -> str:
    """Density of each sample, with its median and 99th percentile marked."""
    arrays = {n: np.asarray(v, dtype=np.float64).ravel() for n, v in samples.items()}
    arrays = {n: a[np.isfinite(a)] for n, a in arrays.items()}
    arrays = {n: a for n, a in arrays.items() if a.size}
    if not arrays:
        raise ConfigurationError("a violin of no samples cannot be drawn; measure at least once")
    figure, axes = _figure(height=1.2 + 0.7 * len(arrays))
    places = np.arange(len(arrays), 0, -1)
    for index, (place, values) in enumerate(zip(places, arrays.values(), strict=True)):
        colour = COLOURS[index % len(COLOURS)]
        if np.ptp(values) > 0 and values.size > 1:
            parts = axes.violinplot(values, positions=[place], orientation="horizontal", widths=0.8, showextrema=False)
            for body in parts["bodies"]:  # type: ignore[attr-defined,union-attr,unused-ignore]
                body.set_facecolor(colour)
                body.set_alpha(0.45)
        median, high = np.percentile(values, [50, 99])
        axes.plot([median], [place], "o", color=colour, markersize=6)
        axes.plot([high], [place], "|", color=colour, markersize=14, markeredgewidth=2)
    axes.set_yticks(places, list(arrays))
    _axis_in(axes, "x", kind)
    return _finish(figure, axes, f"{label} (dot: median, bar: p99)", "", f"density of {label}", legend=False)


def timeline(
    rows: Mapping[str, Sequence[tuple[float, Sequence[float]]]],
    *,
    most: int = 40,
) -> str:
    """When each request got its tokens: one line per request, from its arrival, one tick per token.

    ``rows``: server name → [(arrival, token times in seconds)], all on one clock. The first ``most`` requests are
    shown.
    """
    if not any(rows.values()):
        raise ConfigurationError("a timeline of no requests cannot be drawn; serve at least one")
    count = max(min(len(r), most) for r in rows.values())
    figure, axes = _figure(height=1.2 + 0.09 * count * len(rows))
    base = 0
    for index, (name, requests) in enumerate(rows.items()):
        colour = COLOURS[index % len(COLOURS)]
        shown = sorted(requests, key=lambda r: r[0])[:most]
        if not shown:
            continue
        origin = shown[0][0]
        for row, (arrival, times) in enumerate(shown):
            height = -(base + row)
            if times:
                axes.plot(
                    [arrival - origin, times[0] - origin], [height, height], color=_INK, alpha=0.35, linewidth=0.8
                )
                xs = _thin(np.asarray(times, dtype=np.float64) - origin)[0]
                axes.plot(xs, np.full(xs.size, height), "|", color=colour, markersize=4, markeredgewidth=0.8)
            axes.plot([arrival - origin], [height], ".", color=_INK, markersize=3)
        axes.plot([], [], "|", color=colour, markersize=8, label=name)
        base += len(shown) + 1
    axes.set_yticks([])
    _axis_in(axes, "x", "time")
    label = "time since the first arrival (dot: arrival, tick: token)"
    return _finish(figure, axes, label, "requests", "token timeline")


def roofline(roofs: Mapping[str, Roofline], points: Sequence[Point]) -> str:
    """Measured roofs and where the operations stand under them; only points with a time are drawn."""
    figure, axes = _figure()
    timed = [p for p in points if p.time and p.operations and p.traffic]
    lows = [p.intensity for p in timed] + [r.ridge for r in roofs.values()]
    low, high = min([*lows, 1.0]) / 4, max([*lows, 1.0]) * 4
    for index, (name, roof) in enumerate(roofs.items()):
        xs, ys = zip(*roof.curve(low, high), strict=True)
        axes.plot(xs, ys, color=COLOURS[index % len(COLOURS)], linewidth=1.8, label=f"roof, {name}")
    for index, point in enumerate(timed):
        assert point.time is not None
        share = f"{100 * (point.attainment or 0):.0f} % of its roof"
        axes.plot(
            [point.intensity],
            [point.operations / point.time],
            "oDs^vP"[index % 6],
            color=COLOURS[(index + 2) % len(COLOURS)],
            markersize=6,
            label=f"{point.name}: {share}",
        )
    axes.set_xscale("log")
    axes.set_yscale("log")
    return _finish(figure, axes, "operations per byte", "operations per second", "roofline")


def frontier(
    points: Sequence[tuple[str, float, float]],
    *,
    front: Sequence[str] = (),
    best: str | None = None,
    label_x: str = "latency",
    label_y: str = "quality",
    kind_x: str = "time",
    kind_y: str = "ratio",
    limits: Mapping[str, float] | None = None,
) -> str:
    """Candidates (name, x, y); those on the frontier are joined and named, the best one is ringed, ``limits`` are
    vertical lines."""
    figure, axes = _figure()
    on = set(front)
    rest = [(x, y) for n, x, y in points if n not in on]
    if rest:
        axes.plot(*zip(*rest, strict=True), "o", color=_INK, alpha=0.35, markersize=4, label="dominated")
    line = sorted((x, y, n) for n, x, y in points if n in on)
    if line:
        axes.plot(
            [x for x, _, _ in line], [y for _, y, _ in line], "o-", color=COLOURS[0], markersize=6, label="frontier"
        )
    for name, x, y in points:
        if name == best:
            axes.plot([x], [y], "o", markersize=14, markerfacecolor="none", markeredgecolor=COLOURS[1], label="best")
    for name, value in (limits or {}).items():
        axes.axvline(value, color=_INK, linestyle="--", linewidth=1.0, label=name)
    _axis_in(axes, "x", kind_x)
    _axis_in(axes, "y", kind_y)
    axes.margins(0.06)
    axes.set_xlabel(label_x, color=_INK, fontsize=9.5)
    axes.set_ylabel(label_y, color=_INK, fontsize=9.5)
    if points:  # above the plot, where it covers no point
        figure.legend(loc="outside upper left", ncols=4, frameon=False, fontsize=9, labelcolor=_INK)
    if line:
        write_labels(axes, [(n, x, y) for x, y, n in line], rest, colour=_INK)
    return _svg(figure, "frontier")


def lines(
    series: Mapping[str, Sequence[tuple[float, float]]],
    *,
    label_x: str,
    label_y: str,
    kind_x: str = "number",
    kind_y: str = "time",
    logarithmic: str = "",
    markers: Callable[[str], str] = lambda name: "o-",
) -> str:
    """Curves of (x, y) points; ``logarithmic`` names the axes, such as ``"xy"``; ``markers`` gives a series its
    style."""
    figure, axes = _figure()
    for index, (name, points) in enumerate(series.items()):
        ordered = sorted(points)
        axes.plot(
            [x for x, _ in ordered],
            [y for _, y in ordered],
            markers(name),
            color=COLOURS[index % len(COLOURS)],
            markersize=4,
            linewidth=1.6,
            label=name,
        )
    if "x" in logarithmic:
        axes.set_xscale("log", base=2)
    if "y" in logarithmic:
        axes.set_yscale("log")
    _axis_in(axes, "x", kind_x)
    _axis_in(axes, "y", kind_y)
    return _finish(figure, axes, label_x, label_y, f"{label_y} against {label_x}")


def bars(
    groups: Mapping[str, Mapping[str, float]],
    *,
    label: str,
    kind: str = "time",
    limits: Mapping[str, float] | None = None,
) -> str:
    """Grouped horizontal bars: group → {series → value}."""
    series = list(dict.fromkeys(s for g in groups.values() for s in g))
    if not series:
        raise ConfigurationError("bars of nothing cannot be drawn; give at least one value")
    figure, axes = _figure(height=0.9 + 0.32 * len(groups) * len(series))
    height = 0.8 / len(series)
    for index, name in enumerate(series):
        places = [-(g + (index - (len(series) - 1) / 2) * height) for g, values in enumerate(groups.values())]
        widths = [values.get(name, float("nan")) for values in groups.values()]
        axes.barh(places, widths, height * 0.9, color=COLOURS[index % len(COLOURS)], label=name)
    for name, value in (limits or {}).items():
        axes.axvline(value, color=_INK, linestyle="--", linewidth=1.0, label=name)
    axes.set_yticks([-g for g in range(len(groups))], list(groups))
    _axis_in(axes, "x", kind)
    return _finish(figure, axes, label, "", label)
