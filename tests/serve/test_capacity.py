from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hasten.budget import SLO
from hasten.errors import ConfigurationError
from hasten.serve.capacity import Capacity, attainment, capacity, search
from hasten.serve.metrics import Distribution, summarise

EMPTY = replace(summarise([]), completed=1)


def server(edge):
    """A server that takes ``edge`` requests per second with a TTFT of 1 s."""
    return lambda rate: replace(EMPTY, ttft=Distribution.of([rate / edge]))


@given(st.floats(0.01, 1000.0), st.floats(0.01, 50.0))
def test_bisection_finds_the_edge_from_any_start(edge, start):
    rate, runs = search(server(edge), SLO(ttft="1s"), start=start, tolerance=0.01)
    assert edge * 0.989 <= rate <= edge
    assert runs < 40


def test_nothing_or_everything_is_accepted():
    assert search(server(1e-9), SLO(ttft="1s"))[0] == 0.0
    assert search(server(1e9), SLO(ttft="1s"), highest=100.0)[0] > 50.0


def test_a_failed_request_is_not_within_the_slo():
    assert search(lambda rate: replace(EMPTY, failed=1), SLO(ttft="1s"))[0] == 0.0


def test_attainment_is_a_share_of_requests():
    accept = attainment(SLO(ttft="1s"), 0.9)
    assert accept(replace(EMPTY, slo_attainment=0.9))
    assert not accept(replace(EMPTY, slo_attainment=0.89))
    with pytest.raises(ConfigurationError, match="share"):
        attainment(SLO(ttft="1s"), 1.5)


def test_seeds_give_a_confidence_interval():
    seen = []
    result = capacity(
        lambda rate, seed: server(2.0 + 0.1 * seed)(rate),
        SLO(ttft="1s"),
        seeds=range(5),
        tolerance=1e-3,
        progress=seen.append,
    )
    assert result.mean == pytest.approx(2.2, rel=2e-3)
    low, high = result.interval
    half = 2.776 * np.std(result.rates, ddof=1) / 5**0.5
    assert (low, high) == pytest.approx((result.mean - half, result.mean + half), rel=1e-3)
    assert seen[-1] == 1.0
    assert "5 seeds" in str(result)
    assert Capacity((1.5,)).interval == (1.5, 1.5)


def test_senseless_searches_are_refused():
    with pytest.raises(ConfigurationError, match="tolerance"):
        search(server(1.0), SLO(ttft="1s"), tolerance=0)
