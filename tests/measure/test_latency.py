from __future__ import annotations

import gc
import hashlib
import importlib
import json
import os
import threading

import pytest

from hasten.clock import ManualClock
from hasten.errors import ConfigurationError
from hasten.measure import Protocol, compare, latency
from hasten.measure.machine import waited


def test_times_are_what_the_clock_says() -> None:
    clock = ManualClock()
    durations = iter([9.0] + [0.001 * (i + 1) for i in range(1000)])
    sample = latency(
        lambda: clock.advance(next(durations)),
        Protocol(warmup=2, warmup_time=0, min_samples=5, min_time=0),
        clock=clock,
    )
    assert sample.warmup == pytest.approx((9.0, 0.001))  # the cold start is apart
    assert sample.times == pytest.approx((0.002, 0.003, 0.004, 0.005, 0.006))
    assert sample.median == pytest.approx(0.004)
    assert not sample.truncated


def test_candidates_take_turns() -> None:
    clock, calls = ManualClock(), []

    def candidate(name: str, seconds: float):  # type: ignore[no-untyped-def]
        return lambda: (calls.append(name), clock.advance(seconds))

    protocol = Protocol(warmup=0, warmup_time=0, min_samples=50, min_time=0)
    result = compare({"a": candidate("a", 0.002), "b": candidate("b", 0.004)}, protocol, clock=clock)
    rounds = [set(calls[i : i + 2]) for i in range(0, len(calls), 2)]
    assert rounds == [{"a", "b"}] * 50
    assert len({tuple(calls[i : i + 2]) for i in range(0, len(calls), 2)}) == 2  # both orders occur
    assert result.speedup("b").value == pytest.approx(0.5)
    assert "SLOWER" in result.verdict("b")
    document = json.loads(json.dumps(result.to_json(), allow_nan=False))
    assert document["baseline"] == "a"


def test_equal_candidates_cannot_be_told_apart() -> None:
    clock = ManualClock()
    call = lambda: clock.advance(0.001)  # noqa: E731
    verdict = compare({"a": call, "b": call}, Protocol(min_samples=5, min_time=0), clock=clock).verdict("b")
    assert "cannot be told apart" in verdict


def test_short_calls_are_repeated() -> None:
    clock = ManualClock()
    sample = latency(
        lambda: clock.advance(1e-6), Protocol(min_samples=3, min_time=0, warmup_time=0, resolution=50e-6), clock=clock
    )
    assert sample.repeats == 50
    assert sample.median == pytest.approx(1e-6)


def test_the_time_limit_ends_it_and_is_told() -> None:
    clock = ManualClock()
    sample = latency(lambda: clock.advance(10.0), Protocol(max_time=35.0), clock=clock)
    assert sample.truncated
    assert len(sample.times) == 1


def test_a_frozen_clock_ends_too() -> None:
    sample = latency(lambda: None, Protocol(min_samples=3, min_time=0), clock=ManualClock())
    assert sample.times == (0.0,) * 3


def test_the_collector_is_off_inside_and_restored() -> None:
    states: list[bool] = []
    clock = ManualClock()
    latency(
        lambda: (states.append(gc.isenabled()), clock.advance(0.1)), Protocol(min_samples=2, min_time=0), clock=clock
    )
    assert not any(states)
    assert gc.isenabled()
    with pytest.raises(ZeroDivisionError):
        latency(lambda: 1 / 0, clock=clock)
    assert gc.isenabled()


def test_outliers_stay() -> None:
    clock = ManualClock()
    durations = iter([0.001] * 3 + [0.001] * 40 + [5.0] + [0.001] * 1000)
    sample = latency(
        lambda: clock.advance(next(durations)), Protocol(min_samples=60, min_time=0, warmup_time=0), clock=clock
    )
    assert sample.summary.maximum == pytest.approx(5.0)


def test_nonsense_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="at least one candidate"):
        compare({})
    with pytest.raises(ConfigurationError, match="not a protocol"):
        Protocol(min_samples=0)


def test_who_waits_for_a_core_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    stood = iter([10.0, 10.0 + 3600.0, 5.0, 5.0])
    module = importlib.import_module("hasten.measure.latency")  # the package has a function of that name
    monkeypatch.setattr(module, "waited", lambda: next(stood))
    beside, alone = (compare({"a": int}, Protocol(min_samples=3, max_samples=3, min_time=0.0)) for _ in range(2))
    assert beside.disturbed
    assert beside.to_json()["waited"] == beside.waited
    assert not alone.disturbed
    assert alone.waited == 0


def test_waiting_grows_when_threads_outnumber_cores() -> None:
    before = waited()
    if before is None:
        pytest.skip("this system does not tell")
    block, met = bytes(2**24), threading.Barrier(4 * (os.cpu_count() or 1) + 1)

    def work() -> None:
        hashlib.sha256(block)  # without the interpreter's lock
        met.wait()
        met.wait()

    threads = [threading.Thread(target=work) for _ in range(met.parties - 1)]
    for thread in threads:
        thread.start()
    met.wait()  # a thread that has ended is not counted any more
    after = waited()
    met.wait()
    for thread in threads:
        thread.join()
    assert after is not None
    assert after > before
