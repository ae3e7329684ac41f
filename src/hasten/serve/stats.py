"""What an engine counts, in vLLM's vocabulary.

Counters only grow, gauges are the state of the moment, histograms count values into buckets. An engine owns one
:class:`EngineStats`; ``snapshot()`` is plain data, so that another process can show it. Times are seconds.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from typing import Any

import numpy as np

__all__ = ["EngineStats", "Histogram"]

_TTFT = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0)
_ITL = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 10.0)
_E2E = (0.01, 0.05, 0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 60.0, 120.0, 240.0)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000)
_STEP = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)


class Histogram:
    """Counts of values at most each bound, as Prometheus has them.

    >>> h = Histogram((1, 10))
    >>> h.add(3); h.add(30)
    >>> h.snapshot()
    {'bounds': [1, 10], 'counts': [0, 1, 1], 'sum': 33.0}
    """

    __slots__ = ("_bounds", "_counts", "_sum")

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = list(bounds)
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def add(self, value: float) -> None:
        """Count one value."""
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def add_many(self, values: Sequence[float]) -> None:
        """Count several values."""
        bounds, counts = self._bounds, self._counts
        if len(values) < 64:
            for value in values:
                counts[bisect_left(bounds, value)] += 1
        else:
            found = np.bincount(np.searchsorted(bounds, values, side="left"), minlength=len(counts))
            for index in np.flatnonzero(found).tolist():
                counts[index] += int(found[index])
        self._sum += sum(values)

    def snapshot(self) -> dict[str, Any]:
        """Plain data: bounds, counts (not cumulative, the last for values above every bound), sum."""
        return {"bounds": list(self._bounds), "counts": list(self._counts), "sum": self._sum}


class EngineStats:
    """Counters and histograms of one engine's life.

    >>> EngineStats().snapshot()["counters"]["num_preemptions"]
    0
    """

    def __init__(self) -> None:
        self.prompt_tokens = 0
        """prompt tokens of requests that got their first token"""
        self.generation_tokens = 0
        """tokens generated"""
        self.num_preemptions = 0
        """times that blocks were taken away"""
        self.recomputed_tokens = 0
        """tokens computed again after that"""
        self.iterations = 0
        """forward passes"""
        self.finished = {"stop": 0, "length": 0, "abort": 0, "error": 0}
        """requests that ended, by reason"""
        self.iteration_tokens = Histogram(_STEP)
        """tokens of one forward pass"""
        self.ttft = Histogram(_TTFT)
        """arrival to first token"""
        self.itl = Histogram(_ITL)
        """token to token"""
        self.tpot = Histogram(_ITL)
        """(last - first token) / (tokens - 1), per request"""
        self.e2e = Histogram(_E2E)
        """arrival to last token"""
        self.queue = Histogram(_TTFT)
        """arrival to first step"""
        self.request_prompt_tokens = Histogram(_TOKENS)
        """prompt length, per request"""
        self.request_generation_tokens = Histogram(_TOKENS)
        """answer length, per request"""

    def snapshot(self) -> dict[str, Any]:
        """Counters by name, requests ended by reason, histograms by name."""
        return {
            "counters": {
                "prompt_tokens": self.prompt_tokens,
                "generation_tokens": self.generation_tokens,
                "num_preemptions": self.num_preemptions,
                "recomputed_tokens": self.recomputed_tokens,
                "engine_iterations": self.iterations,
            },
            "finished": dict(self.finished),
            "histograms": {
                "iteration_tokens_total": self.iteration_tokens.snapshot(),
                "time_to_first_token_seconds": self.ttft.snapshot(),
                "inter_token_latency_seconds": self.itl.snapshot(),
                "request_time_per_output_token_seconds": self.tpot.snapshot(),
                "e2e_request_latency_seconds": self.e2e.snapshot(),
                "request_queue_time_seconds": self.queue.snapshot(),
                "request_prompt_tokens": self.request_prompt_tokens.snapshot(),
                "request_generation_tokens": self.request_generation_tokens.snapshot(),
            },
        }
