from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser

import numpy as np
import pytest

from hasten.errors import ConfigurationError
from hasten.measure import Machine, Roofline, plots
from hasten.measure.report import Report

_VOID = {"meta", "br", "img", "hr", "link", "input"}


class _Balance(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.stack: list[str] = []
        self.fetched: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in _VOID:
            self.stack.append(tag)
        self.fetched += [v for k, v in attrs if k in ("src", "href") and v and not v.startswith("#")]

    def handle_endtag(self, tag: str) -> None:
        assert self.stack.pop() == tag


def _drawings() -> dict[str, str]:
    rng = np.random.default_rng(0)
    roof = Roofline(30e9, 200e9)
    rows = [(0.1 * i, list(0.1 * i + np.cumsum(rng.gamma(2, 0.01, 20)))) for i in range(5)]
    return {
        "ecdf": plots.ecdf({"a<b": rng.gamma(2, 1, 5000), "empty": [], "one": [1.0]}, limits={"SLO": 2.0}),
        "logarithmic": plots.ecdf({"a": [0.001, 1.0]}, logarithmic=True),
        "violin": plots.violin({"a": rng.gamma(2, 1, 50), "same": [1.0, 1.0]}),
        "timeline": plots.timeline({"tuned": rows, "untuned": [*rows, (3.0, [])]}),
        "roofline": plots.roofline({"bf16": roof}, [roof.point("decode", 1e8, 1e8, 0.01), roof.point("x", 1, 1)]),
        "frontier": plots.frontier([("a", 1.0, 0.9), ("b", 2.0, 1.0), ("c", 3.0, 0.5)], front=["a", "b"], best="a"),
        "lines": plots.lines({"c": [(1, 0.1), (2, 0.2)]}, label_x="sequences", label_y="time", logarithmic="xy"),
        "bars": plots.bars({"p99": {"a": 1.0, "b": 2.0}, "p50": {"a": 0.5}}, label="latency", limits={"SLO": 1.5}),
    }


@pytest.mark.parametrize(("name", "svg"), _drawings().items())
def test_drawings_are_whole_and_take_the_page_colour(name: str, svg: str) -> None:
    root = ET.fromstring(svg)
    assert root.tag == "svg"
    assert root.get("role") == "img"
    assert "currentColor" in svg
    assert plots._INK not in svg
    assert "://" not in svg
    assert len(svg) < 200_000


def test_drawings_are_deterministic_and_keep_apart() -> None:
    first, second = _drawings(), _drawings()
    assert first == second
    ids = [set(re.findall(r' id="([^"]+)"', svg)) for svg in (first["ecdf"], first["bars"])]
    assert not ids[0] & ids[1]


def test_a_page_is_balanced_escaped_and_fetches_nothing() -> None:
    report = Report("<script>alert(1)</script>", "sub & title").verdict("a < b", good=False)
    report.section("Tables", "text").table(["n", "v"], [["<b>", 1.5], ["c", None]], caption="c", strong=[1])
    for svg in _drawings().values():
        report.plot(svg, "caption")
    page = report.data({"k": "</pre><script>"}).machine(Machine.detect()).html()
    parser = _Balance()
    parser.feed(page)
    assert parser.stack == []
    assert parser.fetched == []
    assert "<script" not in page
    assert "default-src &#x27;none&#x27;" in page or "default-src 'none'" in page
    assert "prefers-color-scheme: dark" in page


def test_nothing_to_draw_is_said() -> None:
    for call in (
        lambda: plots.violin({}),
        lambda: plots.violin({"a": [float("nan")]}),
        lambda: plots.timeline({}),
        lambda: plots.bars({}, label="x"),
    ):
        with pytest.raises(ConfigurationError, match="cannot be drawn"):
            call()
