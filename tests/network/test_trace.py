"""Transfers over a link that changes, against a slow walk."""

import gzip

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hasten.errors import DataError
from hasten.network import Trace


def walk(times, rates, period, start, size, step=1e-3):
    """Second by thousandth of a second."""
    t, left = start, size
    while left > 1e-9:
        phase = t % period
        rate = rates[int(np.searchsorted(times, phase + 1e-12, side="right")) - 1]
        left -= rate * step
        t += step
    return t


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    st.lists(st.sampled_from([0.0, 50.0, 100.0, 400.0]), min_size=1, max_size=5),
    st.floats(0, 7),
    st.floats(1, 900),
)
def test_finish_is_the_slow_walk(rates, start, size):
    rates = [*rates, 200.0]
    times = [0.5 * i for i in range(len(rates))]
    link = Trace.of(times, rates, period=0.5 * len(rates))
    end = link.finish(start, size)
    assert end == pytest.approx(walk(times, rates, link.period, start, size), abs=2e-2)
    assert link.delivered(end) - link.delivered(start) == pytest.approx(size, rel=1e-6, abs=1e-6)


def test_units_are_bytes_and_seconds():
    assert Trace.constant(10e9).finish(0.0, 2**30) == pytest.approx(0.1073741824)
    assert Trace.constant(5.0).scaled(2.0).mean == 10.0
    assert Trace.constant(5.0).finish(3.0, 0.0) == 3.0


def test_files_are_read_and_bad_ones_refused(tmp_path):
    np.savez(tmp_path / "cell.npz", down=np.array([0, 0, 50, 150, 151, 299], np.uint32))
    link = Trace.load(tmp_path / "cell.npz", "down")
    assert link.mean == pytest.approx(6 * 1500 / 0.3)
    assert link.rates[0] == pytest.approx(3 * 1500 / 0.1)
    with gzip.open(tmp_path / "p.csv.gz", "wt") as file:
        file.write("trace,time_s,mbit_per_s\nbus,0,8\nbus,1,4\ndead,0,0\ndead,1,0\n")
    bus = Trace.load(tmp_path / "p.csv.gz", "bus")
    assert bus.rates.tolist() == [1e6, 0.5e6]
    assert set(Trace.series(tmp_path / "p.csv.gz")) == {"bus"}
    for name, message in (("up", "no trace"),):
        with pytest.raises(DataError, match=message):
            Trace.load(tmp_path / "cell.npz", name)
    with pytest.raises(DataError, match="cannot be read"):
        Trace.load(tmp_path / "none.npz", "x")
    with pytest.raises(DataError, match="nothing"):
        Trace.of([0.0], [0.0], period=1.0)
    with pytest.raises(DataError, match="grow"):
        Trace.of([1.0, 0.0], [1.0, 1.0])
