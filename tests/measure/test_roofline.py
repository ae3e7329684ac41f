from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hasten.errors import ConfigurationError
from hasten.measure import Ceilings, Roofline

positive = st.floats(1e-3, 1e15)


@given(positive, positive, positive, positive)
def test_the_bound_is_the_larger_of_the_two(bandwidth: float, rate: float, operations: float, traffic: float) -> None:
    roof = Roofline(bandwidth, rate)
    point = roof.point("x", operations, traffic, time=1.0)
    assert point.bound == max(traffic / bandwidth, operations / rate)
    assert point.attainment == point.bound
    assert (point.limit == "compute") == (operations / rate > traffic / bandwidth)
    assert roof.attainable(point.intensity) <= rate


def test_one_gibibyte_over_ten_gigabytes_per_second() -> None:
    assert Roofline(10e9, 1e12).point("read", 0, 2**30).bound == pytest.approx(0.1073741824)


def test_the_curve_bends_at_the_ridge() -> None:
    roof = Roofline(10.0, 100.0)
    curve = dict(roof.curve())
    assert curve[10.0] == 100.0
    assert all(y == min(100.0, 10.0 * x) for x, y in curve.items())


def test_of_ceilings() -> None:
    roofs = Ceilings("cpu", 2.0, 1.0, {"float32": 4.0, "bfloat16": 8.0})
    assert Roofline.of(roofs, "bfloat16").ridge == 4.0
    with pytest.raises(ConfigurationError, match="not positive"):
        Roofline(0.0, 1.0)
