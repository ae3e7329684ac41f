"""The stream: any cut, offline equality, malformed alerts, and what is read from files."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hasten.clock import ManualClock
from hasten.errors import ConfigurationError, DataError
from hasten.events.alerts import Alert, AlertClassifier, Classification, read_alerts, softmax
from hasten.events.gaussian_process import Kernel
from hasten.events.lightcurves import simulate
from hasten.events.observations import LSST, Observations
from hasten.testing.stream_kit import StreamKit

KERNEL = Kernel(steps=4, points=10)


def model(x: Any) -> Any:
    rng = np.random.default_rng(0)
    flat = x.reshape(len(x), -1) / 1e4
    return np.tanh(flat @ rng.normal(size=(flat.shape[1], 5))) @ rng.normal(size=(5, 3))


def alerts(objects: int = 4, points: int = 9) -> list[Alert]:
    seen, _ = simulate(objects, seed=1)
    found = [
        Alert(f"o{k}", float(seen.time[k, n]), LSST[seen.band[k, n]], float(seen.flux[k, n]), float(seen.error[k, n]))
        for k in range(objects)
        for n in range(points)
    ]
    return sorted(found, key=lambda a: a.time)


class TestKit(StreamKit):
    def stream(self) -> AlertClassifier:
        return AlertClassifier(model, batch=3, kernel=KERNEL, clock=ManualClock())

    def input(self) -> list[Alert]:
        return alerts(3, 6)

    def same(self, a: list[Classification], b: list[Classification]) -> bool:
        return len(a) == len(b) and all(
            (x.object_id, x.time, x.points) == (y.object_id, y.time, y.points)
            and np.allclose(x.probabilities, y.probabilities, atol=1e-9)
            for x, y in zip(a, b, strict=True)
        )


def test_the_last_answer_is_that_of_the_whole_curve() -> None:
    given = alerts()
    stream = AlertClassifier(model, kernel=KERNEL, classes=("a", "b", "c"), clock=ManualClock())
    last: dict[str, Classification] = {}
    for alert in given:
        for found in stream.push([alert]):
            last[found.object_id] = found
    assert stream.flush() == []
    assert stream.objects == 4
    assert stream.seen == len(given)
    curves = [
        [(a.time, LSST.index(a.band), a.flux, a.error) for a in given if a.object_id == name] for name in sorted(last)
    ]
    whole = stream.probabilities(Observations.of(curves, LSST))
    for row, name in zip(whole, sorted(last), strict=True):
        assert last[name].points == 9
        assert np.allclose(row, last[name].probabilities, atol=1e-6)
        assert last[name].label in ("a", "b", "c")
        assert sum(last[name].probabilities) == pytest.approx(1)


def test_alerts_wait_for_company_up_to_a_bound() -> None:
    clock = ManualClock()
    stream = AlertClassifier(model, batch=10, latency=0.5, kernel=KERNEL, clock=clock, min_points=1)
    given = alerts(2, 4)
    assert stream.push(given[:2]) == []
    clock.advance(0.4)
    assert stream.push(given[2:3]) == []
    clock.advance(0.2)
    assert len(stream.push(given[3:4])) == 4
    assert stream.delays[0] == pytest.approx(0.6)
    assert stream.push(given[4:]) == []
    assert len(stream.flush()) == 4


def test_malformed_alerts_are_named_or_counted() -> None:
    good = alerts(1, 3)
    bad = [
        Alert("x", 1.0, "k", 1.0, 1.0), Alert("x", 1.0, "g", float("nan"), 1.0), Alert("x", 1.0, "g", 1.0, 0.0),
        Alert("x", float("inf"), "g", 1.0, 1.0),
    ]  # fmt: skip
    for alert, word in zip(bad, ("band 'k'", "flux is nan", "error of 0", "time is inf"), strict=True):
        with pytest.raises(DataError, match=word):
            AlertClassifier(model, kernel=KERNEL).push([alert])
    stream = AlertClassifier(model, kernel=KERNEL, on_error="skip")
    found = stream.push([bad[0], good[0], bad[1], good[1], bad[2], good[2], bad[3]])
    assert len(found) == 2
    assert stream.skipped == 4
    for wrong in ({"min_points": 0}, {"batch": 0}, {"latency": -1.0}, {"on_error": "ignore"}, {"max_points": 1}):
        with pytest.raises(ConfigurationError):
            AlertClassifier(model, **wrong)  # type: ignore[arg-type]


def test_memory_is_bounded() -> None:
    stream = AlertClassifier(model, kernel=KERNEL, max_points=3, forget_after=30.0, min_points=3)
    for day in range(6):
        found = stream.push([Alert("a", float(day), "g", 1.0 + day, 1.0)])
    assert found[0].points == 3
    stream.push([Alert("b", 100.0, "g", 1.0, 1.0)])
    assert stream.objects == 1


def test_three_layouts_of_files(tmp_path: Path) -> None:
    plain = tmp_path / "a.csv"
    plain.write_text("object_id,time,band,flux,error\nx,2.0,g,5,1\nx,1.0,r,4,1\n")
    assert [(a.time, a.band) for a in read_alerts(plain)] == [(1.0, "r"), (2.0, "g")]
    ztf = tmp_path / "b.csv.gz"
    with gzip.open(ztf, "wt") as file:
        file.write("object_id,candid,jd,fid,magpsf,sigmapsf,isdiffpos\n")
        file.write(
            "z,1,2459000.5,1,20.0,0.1,t\nz,2,2459000.5,1,20.0,0.1,t\nz,2,2459001.5,2,,,\nz,3,2459002.5,2,19.0,0.1,f\n"
        )
    found = list(read_alerts(ztf))
    assert [a.band for a in found] == ["g", "r"]
    assert found[0].time == 59000.0
    assert found[0].flux > 0 > found[1].flux
    sim = tmp_path / "c.csv"
    sim.write_text("alert_id,object_id,mjd,band,flux_nJy,flux_err_nJy\n1,e,60000.1,Y,7,2\n")
    assert next(read_alerts(sim)) == Alert("e", 60000.1, "y", 7.0, 2.0)
    for text, word in (("a,b\n1,2\n", "columns a, b"), ("object_id,time,band,flux,error\nx,soon,g,1,1\n", "line 2")):
        plain.write_text(text)
        with pytest.raises(DataError, match=word):
            list(read_alerts(plain))
    with pytest.raises(DataError, match="cannot be read"):
        list(read_alerts(tmp_path / "none.csv"))
    assert softmax(np.zeros((1, 4))).tolist() == [[0.25] * 4]
