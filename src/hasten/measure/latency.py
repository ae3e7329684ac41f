"""How long a call takes, measured so that the number can be believed.

Warm-up is apart and reported; candidates that are compared take turns within one run (A B A B …, the order drawn
anew in each round), so that drift of the machine hits all alike; the garbage collector is off while the clock runs;
outliers are kept, since a percentile is made of them; the load before and after is noted. The clock is handed in.
"""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from hasten.clock import Clock, MonotonicClock
from hasten.errors import ConfigurationError
from hasten.measure.machine import load_average, waited
from hasten.measure.stats import Estimate, Summary, paired_ratio, summarise

__all__ = ["Comparison", "LatencySample", "Protocol", "compare", "latency"]


@dataclass(frozen=True)
class Protocol:
    """How a measurement is taken.

    >>> Protocol(min_time=0.2).max_samples
    10000
    """

    warmup: int = 3
    """calls before the clock counts, at least"""
    warmup_time: float = 0.05
    """seconds of warm-up, at least"""
    min_samples: int = 20
    """samples per candidate, at least"""
    min_time: float = 1.0
    """seconds of measuring per candidate, at least"""
    max_samples: int = 10_000
    """samples per candidate, at most"""
    max_time: float = 60.0
    """seconds for everything, warm-up included; stops early and says so, never before one sample each"""
    resolution: float = 20e-6
    """calls shorter than this many seconds are repeated inside one sample, so that the clock's own cost does not
    show"""
    seed: int = 0
    """draws the order within a round"""

    def __post_init__(self) -> None:
        if self.min_samples < 1 or self.max_samples < self.min_samples or self.warmup < 0:
            raise ConfigurationError(
                f"{self.min_samples} to {self.max_samples} samples after {self.warmup} warm-up calls is not a "
                f"protocol; "
                "take at least one sample and no fewer at most than at least"
            )


@dataclass(frozen=True)
class LatencySample:
    """Seconds per call of one candidate, in the order in which they were taken."""

    name: str
    """the candidate"""
    times: tuple[float, ...]
    """seconds per call, one entry per sample; none is dropped"""
    warmup: tuple[float, ...]
    """seconds of the warm-up calls; the first tells what a cold start costs"""
    repeats: int = 1
    """calls inside one sample"""
    load: tuple[float | None, float | None] = (None, None)
    """load average before and after"""
    truncated: bool = False
    """True when the time limit ended the measurement early"""

    @property
    def summary(self) -> Summary:
        """p50, p90, p99 with intervals, mean and extremes."""
        return summarise(self.times)

    @property
    def median(self) -> float:
        """Seconds."""
        return self.summary.at(50)

    def at(self, q: float) -> float:
        """Percentile ``q`` in seconds."""
        return summarise(self.times, (q,)).at(q)

    def to_json(self, *, samples: bool = False) -> dict[str, Any]:
        """Summary, warm-up and load; every sample too if asked."""
        document: dict[str, Any] = {
            "name": self.name,
            **self.summary.to_json(),
            "warmup": {"count": len(self.warmup), "first": self.warmup[0] if self.warmup else None},
            "repeats": self.repeats,
            "load": list(self.load),
            "truncated": self.truncated,
        }
        if samples:
            document["times"] = list(self.times)
        return document


@dataclass(frozen=True)
class Comparison:
    """Candidates measured in turns against the first of them, the baseline."""

    samples: dict[str, LatencySample]
    """by name, the baseline first; sample i of each was taken in round i"""
    waited: float = 0.0
    """seconds in each second that threads stood ready without a core: what other work took"""

    @property
    def disturbed(self) -> bool:
        """Whether other work took so much of the cores that ratios may differ on an idle machine."""
        return self.waited > _DISTURBED

    @property
    def baseline(self) -> str:
        """Name of the candidate that the others are compared with."""
        return next(iter(self.samples))

    def speedup(self, name: str) -> Estimate:
        """Median time of the baseline over that of ``name``: above 1 is faster."""
        return paired_ratio(self.samples[self.baseline].times, self.samples[name].times)

    def verdict(self, name: str) -> str:
        """One plain sentence: faster, slower, or no difference that these samples can show."""
        ratio = self.speedup(name)
        span = f"{ratio.value:.2f}× ({ratio.low:.2f} to {ratio.high:.2f})"
        if ratio.low > 1:
            return f"{name} is faster than {self.baseline}: {span}"
        if ratio.high < 1:
            return f"{name} is SLOWER than {self.baseline}: {span}"
        return f"{name} and {self.baseline} cannot be told apart: {span}"

    def to_json(self) -> dict[str, Any]:
        """Every sample's summary, and the speed-ups over the baseline."""
        others = [n for n in self.samples if n != self.baseline]
        return {
            "baseline": self.baseline,
            "waited": self.waited,
            "samples": {n: s.to_json() for n, s in self.samples.items()},
            "speedup": {n: self.speedup(n).to_json() for n in others},
            "verdict": [self.verdict(n) for n in others],
        }


_DISTURBED = 0.2


@contextmanager
def _collector_off() -> Iterator[None]:
    """No garbage collection while the clock runs; left as it was found.

    What was made lately is collected before. A whole collection walks all that the program holds, a quarter of a second
    with torch and numba loaded, and a search would have one for each comparison.
    """
    was_on = gc.isenabled()
    gc.collect(1)
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _time_once(call: Callable[[], object], repeats: int, clock: Clock) -> float:
    begin = clock.now()
    for _ in range(repeats):
        call()
    return (clock.now() - begin) / repeats


def _warm(call: Callable[[], object], protocol: Protocol, clock: Clock, until: float) -> tuple[list[float], int]:
    """Warm-up times, and how many calls a sample needs to last as long as the protocol's resolution."""
    times: list[float] = []
    spent = 0.0
    while len(times) < protocol.warmup or (spent < protocol.warmup_time and len(times) < protocol.max_samples):
        times.append(_time_once(call, 1, clock))
        spent += times[-1]
        if clock.now() >= until or (not times[-1] and len(times) >= protocol.warmup):
            break
    typical = sorted(times)[len(times) // 2] if times else protocol.resolution
    if not typical:  # the clock did not move
        return times, 1
    return times, max(1, min(10_000, round(protocol.resolution / typical)))


def compare(
    candidates: Mapping[str, Callable[[], object]],
    protocol: Protocol | None = None,
    *,
    clock: Clock | None = None,
    synchronise: Callable[[], object] | None = None,
    progress: Callable[[float], None] | None = None,
) -> Comparison:
    """Measure ``candidates`` in turns; the first is the baseline.

    ``synchronise`` is called inside the timed region after each call (a GPU's barrier). ``progress`` hears the share
    done. What a candidate raises passes through.

    >>> from hasten.clock import ManualClock
    >>> clock = ManualClock()
    >>> fast, slow = (lambda: clock.advance(0.001)), (lambda: clock.advance(0.002))
    >>> compare({"slow": slow, "fast": fast}, clock=clock).verdict("fast")
    'fast is faster than slow: 2.00× (2.00 to 2.00)'
    """
    if not candidates:
        raise ConfigurationError("there is nothing to compare; give at least one candidate")
    protocol, clock = protocol or Protocol(), clock or MonotonicClock()
    calls = {n: _synchronised(c, synchronise) for n, c in candidates.items()}
    times: dict[str, list[float]] = {n: [] for n in calls}
    order, rng = list(calls), random.Random(protocol.seed)
    before, began = load_average(), clock.now()
    stood, real = waited(), time.perf_counter()
    deadline = began + protocol.max_time
    with _collector_off():
        warm = {n: _warm(c, protocol, clock, deadline) for n, c in calls.items()}
        spent = dict.fromkeys(calls, 0.0)
        truncated = False
        while True:
            rng.shuffle(order)
            for name in order:
                elapsed = _time_once(calls[name], warm[name][1], clock)
                times[name].append(elapsed)
                spent[name] += elapsed * warm[name][1]
            count = len(times[order[0]])
            shortest = min(spent.values())
            done_time = shortest / protocol.min_time if protocol.min_time else 1.0
            if progress is not None:
                progress(min(1.0, max(done_time, count / protocol.max_samples), count / protocol.min_samples))
            if count >= protocol.max_samples or (count >= protocol.min_samples and shortest >= protocol.min_time):
                break
            if clock.now() >= deadline:
                truncated = True
                break
    load, real, end = (before, load_average()), time.perf_counter() - real, waited()
    lost = 0.0 if stood is None or end is None else max(0.0, end - stood)
    return Comparison(
        {n: LatencySample(n, tuple(times[n]), tuple(warm[n][0]), warm[n][1], load, truncated) for n in calls},
        round(lost / real, 3) if real > 0 else 0.0,
    )


def _synchronised(call: Callable[[], object], barrier: Callable[[], object] | None) -> Callable[[], object]:
    if barrier is None:
        return call

    def both() -> None:
        call()
        barrier()

    return both


def latency(
    call: Callable[[], object],
    protocol: Protocol | None = None,
    *,
    name: str = "model",
    clock: Clock | None = None,
    synchronise: Callable[[], object] | None = None,
    progress: Callable[[float], None] | None = None,
) -> LatencySample:
    """Measure one call; see :func:`compare`.

    >>> from hasten.clock import ManualClock
    >>> clock = ManualClock()
    >>> round(latency(lambda: clock.advance(0.003), clock=clock).median, 6)
    0.003
    """
    return compare({name: call}, protocol, clock=clock, synchronise=synchronise, progress=progress).samples[name]
