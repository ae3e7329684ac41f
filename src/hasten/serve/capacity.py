"""The largest arrival rate that a server can take inside its SLO.

Latency grows with the rate, so the edge is found by bisection: the upper bound doubles while the SLO holds, then the
bracket is halved until it is within a tolerance. The same seed gives the same arrivals, only compressed, at every rate.
Several seeds give a mean with a confidence interval.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from hasten.budget import SLO
from hasten.errors import ConfigurationError
from hasten.serve.metrics import ServingMetrics
from hasten.serve.simulate import Simulator
from hasten.serve.workload import Workload

__all__ = ["Capacity", "attainment", "capacity", "search", "simulated"]

Accept = Callable[[ServingMetrics], bool]


@dataclass(frozen=True)
class Capacity:
    """Largest rates that were accepted, one per seed."""

    rates: tuple[float, ...]
    """requests per second"""
    evaluations: int = 0
    """runs that the search took"""

    @property
    def mean(self) -> float:
        """Requests per second, the mean over seeds."""
        return float(np.mean(self.rates)) if self.rates else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """95 % confidence interval of the mean (Student's t); the mean twice for a single seed."""
        count = len(self.rates)
        if count < 2:
            return (self.mean, self.mean)
        half = _student(count - 1) * float(np.std(self.rates, ddof=1)) / math.sqrt(count)
        return (self.mean - half, self.mean + half)

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.mean:.2f} requests/s (95 % CI {low:.2f} to {high:.2f}, {len(self.rates)} seeds)"


def _student(freedom: int) -> float:
    """97.5 % point of Student's t (Cornish-Fisher expansion; within 1 % from 3 degrees of freedom on)."""
    exact = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776}
    if freedom in exact:
        return exact[freedom]
    z, n = 1.959964, float(freedom)
    return z + (z**3 + z) / (4 * n) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * n**2)


def attainment(slo: SLO, share: float = 0.9) -> Accept:
    """Accept a run when at least ``share`` of its requests are good: goodput as DistServe counts it."""
    if not 0 < share <= 1:
        raise ConfigurationError(f"share is {share}; give the part of requests that must be good, such as 0.9")
    return lambda metrics: metrics.slo_attainment >= share


def simulated(simulator: Simulator, rows: Workload, requests: int = 600) -> Callable[[float, int], ServingMetrics]:
    """What :func:`capacity` runs: ``requests`` rows drawn with the seed, Poisson arrivals at the rate, simulated.

    >>> from hasten.serve import IterationCost, workload
    >>> from hasten.serve.policy import StallFree
    >>> server = Simulator(IterationCost.preset("opt-13b/a100"), StallFree(token_budget=384))
    >>> run = simulated(server, workload.sample("code", requests=500), requests=60)
    >>> 1.0 < capacity(run, SLO(tbt="100ms", queue="2s@p50"), tolerance=0.1).mean < 6.0
    True
    """

    def run(rate: float, seed: int) -> ServingMetrics:
        load = rows.resampled(requests, seed=seed).at_rate(rate, seed=seed + 1000)
        return simulator.run(load).metrics

    return run


def search(
    run: Callable[[float], ServingMetrics],
    accept: SLO | Accept,
    *,
    start: float = 1.0,
    tolerance: float = 0.02,
    lowest: float = 1e-3,
    highest: float = 1e4,
) -> tuple[float, int]:
    """The largest accepted rate (0 when even ``lowest`` is not), within ``tolerance`` of it, and the runs it took.

    ``run(rate)`` serves a workload at ``rate`` requests per second. ``accept`` is an SLO, each objective judged at
    its own percentile over the run with no request failed, or any predicate.

    >>> from hasten.serve.metrics import Distribution, summarise
    >>> from dataclasses import replace
    >>> empty = summarise([])
    >>> rate, runs = search(lambda r: replace(empty, ttft=Distribution.of([r / 10])), lambda m: m.ttft.p50 <= 0.37)
    >>> abs(rate - 3.7) < 0.08, runs < 12
    (True, True)
    """
    if not (start > 0 and 0 < tolerance < 1 and 0 < lowest <= highest):
        raise ConfigurationError(
            f"start {start}, tolerance {tolerance}, lowest {lowest}, highest {highest} make no search"
        )
    holds = (lambda m: m.meets(accept) and m.failed == 0) if isinstance(accept, SLO) else accept
    runs = 0

    def ok(rate: float) -> bool:
        nonlocal runs
        runs += 1
        return holds(run(rate))

    low, high = 0.0, start
    if ok(start):
        while True:
            low, high = high, high * 2
            if high > highest:
                return low, runs
            if not ok(high):
                break
    else:
        while True:
            low = high / 2
            if low < lowest:
                return 0.0, runs
            if ok(low):
                break
            high = low
    while high - low > tolerance * high:
        middle = (low + high) / 2
        if ok(middle):
            low = middle
        else:
            high = middle
    return low, runs


def capacity(
    run: Callable[[float, int], ServingMetrics],
    accept: SLO | Accept,
    *,
    seeds: Sequence[int] = (0,),
    start: float = 1.0,
    tolerance: float = 0.02,
    progress: Callable[[float], None] | None = None,
) -> Capacity:
    """Search once per seed; ``run(rate, seed)`` serves the seed's workload. The last result starts the next search."""
    rates: list[float] = []
    evaluations = 0
    for done, seed in enumerate(seeds):

        def at(rate: float, seed: int = seed) -> ServingMetrics:
            return run(rate, seed)

        begin = rates[-1] if rates and rates[-1] > 0 else start
        rate, runs = search(at, accept, start=begin, tolerance=tolerance)
        rates.append(rate)
        evaluations += runs
        if progress is not None:
            progress((done + 1) / len(seeds))
    return Capacity(tuple(rates), evaluations)
