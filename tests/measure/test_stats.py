from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hasten.errors import ConfigurationError
from hasten.measure import bootstrap, paired_ratio, percentile, summarise

floats = st.floats(-1e6, 1e6)


@given(st.lists(floats, min_size=1, max_size=60), st.sampled_from([1, 25, 50, 90, 99]))
def test_interval_follows_the_binomial(values: list[float], q: float) -> None:
    """The slow twin: add up binomial terms for each order statistic."""
    n, p = len(values), q / 100
    below = [sum(math.comb(n, j) * p**j * (1 - p) ** (n - j) for j in range(k + 1)) for k in range(n)]
    ordered = sorted(values)
    # x_(i) > quantile has probability P(B < i) = below[i - 1]
    lows = [ordered[i - 1] for i in range(1, n + 1) if below[i - 1] <= 0.025 + 1e-12]
    highs = [ordered[i - 1] for i in range(1, n + 1) if below[i - 1] >= 0.975 - 1e-12]
    estimate = percentile(values, q)
    assert estimate.low == (lows[-1] if lows else -math.inf)
    assert estimate.high == (highs[0] if highs else math.inf)
    assert estimate.value == np.percentile(values, q)


def test_interval_covers_the_truth_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    covered = sum(not percentile(rng.exponential(size=80), 50).excludes(math.log(2)) for _ in range(600))
    assert covered / 600 >= 0.93


def test_a_small_sample_does_not_know_its_p99() -> None:
    estimate = percentile(range(20), 99)
    assert estimate.high == math.inf
    assert json.loads(json.dumps(estimate.to_json(), allow_nan=False))["high"] is None


def test_large_samples_stay_finite() -> None:
    estimate = percentile(np.arange(200_000.0), 99.9)
    assert estimate.low < 199_800 < estimate.high


def test_paired_ratio_cancels_drift() -> None:
    rng = np.random.default_rng(1)
    drift = np.linspace(1, 20, 200) * rng.uniform(0.99, 1.01, 200)
    ratio = paired_ratio(2.0 * drift, drift)
    assert ratio.value == pytest.approx(2.0)
    assert ratio.high - ratio.low < 1e-9


def test_bootstrap_of_a_mean_matches_its_standard_error() -> None:
    values = np.random.default_rng(2).normal(10, 2, 400)
    estimate = bootstrap(values, lambda a: a.mean(axis=-1))
    assert estimate.high - estimate.low == pytest.approx(2 * 1.96 * 2 / 20, rel=0.15)


@given(st.lists(floats, min_size=1, max_size=50))
def test_summary_agrees_with_numpy(values: list[float]) -> None:
    summary = summarise(values)
    assert summary.count == len(values)
    assert summary.mean == pytest.approx(float(np.mean(values)))
    assert (summary.minimum, summary.maximum) == (min(values), max(values))
    if len(values) > 1:
        assert summary.deviation == pytest.approx(float(np.std(values, ddof=1)), abs=1e-9)


def test_nonsense_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="no samples"):
        percentile([], 50)
    with pytest.raises(ConfigurationError, match="within"):
        percentile([1.0], 101)
    with pytest.raises(ConfigurationError, match="equal counts"):
        paired_ratio([1.0, 2.0], [1.0])
    with pytest.raises(ConfigurationError, match="positive"):
        paired_ratio([1.0], [0.0])
