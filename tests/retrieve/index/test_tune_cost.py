"""Tuning meets what it was asked for, and the cost model says how far off it is."""

import json
import math

import numpy as np
import pytest

import hasten.retrieve as hr
from hasten.clock import ManualClock
from hasten.errors import ConfigurationError
from hasten.retrieve.index import cost_model
from hasten.retrieve.index.cost_model import Fall, Run, cost, fit_runs, measure_runs
from hasten.retrieve.index.tune import measure_point, recall_of


class CountedClock(ManualClock):
    """Time is the number of distances that searches computed: no machine can disturb it."""

    def watch(self, index):
        real = index.search

        def search(*arguments, **named):
            named["detail"] = True
            hit = real(*arguments, **named)
            self.advance(float(hit.stats.distances.sum()) * 1e-8)
            return hit

        index.search = search
        index._clock = self


@pytest.fixture
def counted(built):
    with hr.Spann.open(built, read_only=True) as index:
        CountedClock().watch(index)
        yield index


def test_tuning_for_a_recall(counted, collection):
    queries = hr.clustered(2000, 12, 240)[1][40:]
    tuned = counted.tune(queries, recall=0.9)
    assert tuned.met
    assert tuned.recall >= 0.88
    assert tuned.p50 <= tuned.p99
    cheapest = [p for p in tuned.curve if p.recall - p.error >= 0.9]
    assert tuned.options in [p.options for p in sorted(cheapest, key=lambda p: p.seconds)[:5]]
    assert "met" in str(tuned)
    json.dumps(tuned.to_json())


def test_more_recall_costs_more(counted):
    queries = hr.clustered(2000, 12, 240)[1][40:]
    low, high = counted.tune(queries, recall=0.7), counted.tune(queries, recall=0.99)
    truth = counted.exact(queries).ids
    points = [measure_point(counted, queries, truth, 10, t.options) for t in (low, high)]
    assert points[0].distances < points[1].distances


def test_tuning_for_a_latency(counted):
    queries = hr.clustered(2000, 12, 240)[1][40:]
    tuned = counted.tune(queries, p99="6us")
    assert tuned.met
    assert tuned.p99 <= 6e-6
    roomy = counted.tune(queries, p99=20e-6)
    assert roomy.recall >= tuned.recall
    hopeless = counted.tune(queries, p99=1e-9)
    assert not hopeless.met
    assert "NOT met" in str(hopeless)


@pytest.mark.parametrize(
    ("given", "word"), [({}, "one goal"), ({"recall": 0.9, "p99": 1.0}, "one goal"), ({"recall": 1.5}, r"\(0, 1\]")]
)
def test_goals_that_cannot_be_meant(counted, given, word):
    with pytest.raises(ConfigurationError, match=word):
        counted.tune(np.zeros((30, 12), np.float32), **given)
    with pytest.raises(ConfigurationError, match="at least 20"):
        counted.tune(np.zeros((3, 12), np.float32), recall=0.9)


def test_recall_by_hand():
    found, truth = np.array([[1, 2, 3], [4, 5, -1]]), np.array([[3, 2, 9], [4, 6, 7]])
    assert recall_of(found, truth) == pytest.approx(3 / 6)
    assert recall_of(found, truth, 1) == pytest.approx(1 / 2)


def test_the_published_configuration():
    """SIFT1B at a ratio of 0.12: 36 GB of memory and 0.6 TB of lists, and no error, since nothing was fitted."""
    told = cost(10**9, 128, 1, 0.12)
    assert told.memory == pytest.approx(36e9, rel=0.02)
    assert told.disk - 0.12e9 * 2048 == pytest.approx(0.6e12, rel=0.05)  # and half a page for each list
    assert math.isnan(told.error)
    assert "no fit" in str(told)


def runs(noise=0.0):
    rng = np.random.default_rng(0)
    out = []
    for n in (10_000, 30_000, 100_000, 300_000):
        off = 1 + noise * rng.normal(size=4)
        checks, scored = (50 + 40 * math.log(n)) * off[0], (100 + 30 * math.log(n)) * off[1]
        lists, copies = (2 + math.log(n)) * off[2], (3 + 0.2 * math.log(n)) * off[3]
        out.append(Run(n, n // 6, copies, checks, lists, scored, 0.95, checks * 2e-8 + scored * 4e-8, checks * 2e-8))
    return out


def test_a_law_that_holds_is_found():
    fit = fit_runs(runs())
    assert fit.error < 1e-9
    told = cost(10**9, 96, 4, 0.16, fit=fit)
    assert told.lists == pytest.approx(2 + math.log(1e9))
    expected = (50 + 40 * math.log(1e9)) * 2e-8 + (100 + 30 * math.log(1e9)) * 4e-8
    assert told.warm == pytest.approx(expected)
    assert told.error_latency < 1e-9
    assert told.high == 300_000
    assert "fit error 0%" in str(told)


def test_a_law_that_does_not_hold_is_told():
    fit = fit_runs(runs(noise=0.1))
    assert fit.error > 0.05
    assert cost(10**9, 96, 4, fit=fit).error == fit.error


def test_what_falls_stays_at_the_largest_run():
    falling = [Run(n, n // 6, 4.0, 500.0, 3e4 / n**0.5, 9e5 / n**0.5, 0.95, 1e-5, 5e-6) for n in (10**4, 10**5, 10**6)]
    fit = fit_runs(falling)
    assert fit.error < 1e-9
    assert fit.at("lists", 10**5) == pytest.approx(3e4 / 10**2.5)
    assert fit.at("lists", 10**9) == pytest.approx(30.0)


def test_a_fall_between_plateaus_is_found(monkeypatch):
    sizes = (12_500, 25_000, 50_000, 100_000, 200_000)
    true = Fall(math.log(30.0), math.log(6.0), 50_000.0, 3.0)
    lists = [true.at(n) for n in sizes]
    taken = [Run(n, n // 6, 4.0, 500.0, v, 20 * v, 0.95, 1e-5, 5e-6) for n, v in zip(sizes, lists, strict=True)]
    fit = fit_runs(taken)
    assert fit.laws["lists"].fall is not None
    monkeypatch.setattr(cost_model, "POWER", math.inf)
    assert fit.error < 0.7 * fit_runs(taken).error  # of a power of n alone
    np.testing.assert_allclose([fit.at("lists", n) for n in sizes], lists, rtol=0.25)
    assert fit.at("lists", 10**9) == fit.at("lists", 200_000)


def test_one_point_is_not_extrapolated():
    with pytest.raises(ConfigurationError, match="at least 3 sizes"):
        fit_runs(runs()[:2])
    with pytest.raises(ConfigurationError, match="no collection"):
        cost(10, 3, 7)


def test_runs_are_measured(tmp_path):
    rows, queries = hr.clustered(4000, 8, 40)
    measured = measure_runs(rows, queries, [800, 1600, 3200], recall=0.9)
    assert [r.n for r in measured] == [800, 1600, 3200]
    assert all(r.recall >= 0.9 and r.copies >= 1 and r.checks > 0 for r in measured)
    assert fit_runs(measured).error < 1


def test_the_cost_of_an_index(tmp_path):
    rows, _ = hr.clustered(4200, 8)
    with hr.Spann.build(rows, tmp_path / "index") as index:
        told = index.cost(1_000_000, recall=0.9)
        assert told.memory > index.memory()["total"]
        assert not math.isnan(told.error)
    with (
        hr.Spann.build(rows[:100], tmp_path / "small") as index,
        pytest.raises(ConfigurationError, match="at least 4000"),
    ):
        index.cost(10**6)
