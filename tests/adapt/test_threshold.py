"""Thresholds on recorded scores."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hasten.adapt.threshold import best_stage, calibrate, interval, stops
from hasten.errors import ConfigurationError


def recorded(seed: int, stages: int, samples: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    sure = rng.random((stages, samples)) * np.linspace(0.3, 1, stages)[:, None]
    return sure, rng.random((stages, samples)) < np.linspace(0.5, 0.9, stages)[:, None]


@given(st.integers(0, 1000), st.integers(1, 8), st.integers(1, 40), st.floats(0, 1))
def test_stops_is_the_first_stage_above(seed: int, stages: int, samples: int, threshold: float) -> None:
    score, _ = recorded(seed, stages, samples)
    for sample, at in enumerate(stops(score, threshold)):
        slow = next((t for t in range(stages) if score[t, sample] > threshold), stages - 1)
        assert at == slow


@settings(max_examples=50)
@given(st.integers(0, 1000), st.integers(1, 8), st.integers(1, 40))
def test_frontier_and_choice(seed: int, stages: int, samples: int) -> None:
    score, correct = recorded(seed, stages, samples)
    found = calibrate(score, correct)
    assert found.full.threshold == math.inf
    assert found.full.mean_stages == stages
    assert found.full.accuracy == pytest.approx(correct[-1].mean())
    best = found.best()
    assert best.accuracy >= found.full.accuracy - 1e-9
    assert all(p.mean_stages >= best.mean_stages for p in found.points if p.accuracy >= found.full.accuracy)
    edge = found.frontier()
    assert all(a.mean_stages < b.mean_stages and a.accuracy < b.accuracy for a, b in zip(edge, edge[1:], strict=False))
    for p in found.points:
        assert any(q.mean_stages <= p.mean_stages and q.accuracy >= p.accuracy for q in edge)
    low, high = found.flat()
    assert 0 <= low <= high <= 1


@given(st.integers(0, 1000), st.integers(1, 8), st.integers(1, 40))
def test_the_oracle_is_a_bound(seed: int, stages: int, samples: int) -> None:
    score, correct = recorded(seed, stages, samples)
    oracle = best_stage(correct)
    for p in calibrate(score, correct).points:
        assert correct.any(0).mean() >= p.accuracy
    assert (correct[oracle, np.arange(samples)] == correct.any(0)).all()


def test_interval_is_wilsons_and_narrows() -> None:
    assert interval(0.9, 100) == pytest.approx((0.8256, 0.9448), abs=1e-3)
    assert np.diff(interval(0.9, 10_000))[0] < np.diff(interval(0.9, 100))[0]


def test_what_cannot_be_used_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"\(stages, samples\)"):
        calibrate(np.zeros((3, 4)), np.zeros((3, 5), bool))
    with pytest.raises(ConfigurationError, match="stage 2"):
        calibrate([[0.1], [float("nan")]], [[True], [True]])
    with pytest.raises(ConfigurationError, match="no samples"):
        interval(0.5, 0)


def test_the_table_names_the_frontier() -> None:
    text = calibrate([[0.9, 0.4], [0.9, 0.9]], [[True, False], [True, True]]).table()
    assert text.splitlines()[0].split() == ["threshold", "stages", "accuracy"]
    assert len(text.splitlines()) >= 2
