"""What a served request experienced, and what a run of many requests achieved.

One :class:`RequestRecord` per request, filled by the engine, the simulator or the benchmark client alike; the events
that start and stop each quantity are in the docstrings. Times are seconds on one monotonic clock. The names are those
of the field: TTFT, TPOT, ITL (= TBT), end-to-end latency, goodput.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from hasten.budget import SLO

__all__ = ["Distribution", "EffectiveThroughput", "RequestRecord", "ServingMetrics", "summarise"]


@dataclass(slots=True)
class RequestRecord:
    """One request, finished, failed or cancelled.

    >>> record = RequestRecord(id="0", arrival=1.0, first_scheduled=1.1, token_times=[1.5, 1.7, 1.8],
    ...                        prompt_tokens=10, output_tokens=3, finish_reason="stop")
    >>> round(record.ttft, 3), round(record.tpot, 3), [round(g, 3) for g in record.itls], round(record.queue, 3)
    (0.5, 0.15, [0.2, 0.1], 0.1)
    """

    id: str
    """name of the request"""
    arrival: float
    """when the request came in: an engine stamps ``add``, a client the moment it begins to send"""
    first_scheduled: float | None = None
    """when the step that computed its first token began; ``None`` if it never ran or the client cannot know"""
    token_times: list[float] = field(default_factory=list)
    """when each token of the answer was ready (engine) or received (client); tokens that came together share a time"""
    prompt_tokens: int = 0
    """tokens of the prompt"""
    output_tokens: int = 0
    """tokens of the answer"""
    preemptions: int = 0
    """how often its blocks were taken away and recomputed"""
    error: str | None = None
    """one line when the request failed; a failed request counts in no latency and no throughput"""
    finish_reason: str | None = None
    """stop, length, abort (cancelled by the client) or error"""
    recomputed_tokens: int = 0
    """tokens that had to be computed again after preemptions"""

    @property
    def ok(self) -> bool:
        """Completed: it has an answer, no error, and was not cancelled."""
        return self.error is None and self.finish_reason not in ("abort", "error") and bool(self.token_times)

    @property
    def ttft(self) -> float:
        """Time to first token: starts at arrival (queueing counts), stops when the first token is ready.

        A preemption before the first token counts in it; one after it does not. Not a number when no token came.
        """
        return self.token_times[0] - self.arrival if self.token_times else math.nan

    @property
    def tpot(self) -> float:
        """Time per output token: (last token - first token) / (tokens - 1), one value per request.

        Starts at the first token, stops at the last one received; a preemption in between counts. Not a number for
        answers of one token.
        """
        count = len(self.token_times)
        return (self.token_times[-1] - self.token_times[0]) / (count - 1) if count > 1 else math.nan

    @property
    def itls(self) -> list[float]:
        """Inter-token latencies (time between tokens): every gap between two tokens, preemptions included.

        Tokens that arrive together (accepted proposals, merged stream events) give gaps of 0.
        """
        times = self.token_times
        return [b - a for a, b in zip(times, times[1:], strict=False)]

    @property
    def e2e(self) -> float:
        """End to end: starts at arrival, stops at the last token. Of a cancelled request: the last token it got."""
        return self.token_times[-1] - self.arrival if self.token_times else math.nan

    @property
    def queue(self) -> float:
        """Scheduling delay: starts at arrival, stops when the step with its first token begins.

        A later preemption does not restart it. Not a number when it never ran.
        """
        return self.first_scheduled - self.arrival if self.first_scheduled is not None else math.nan

    @property
    def worst_itl(self) -> float:
        """The longest gap between two tokens; 0 for answers of one token."""
        return max(self.itls, default=0.0)

    def meets(self, slo: SLO) -> bool:
        """Whether this request is good: completed, and every objective that can be judged is within its limit.

        The limit on inter-token latency must hold for every gap of the request.
        """
        if not self.ok:
            return False
        latencies = {"ttft": self.ttft, "e2e": self.e2e, "itl": self.worst_itl}
        if len(self.token_times) > 1:
            latencies["tpot"] = self.tpot
        if self.first_scheduled is not None:
            latencies["queue"] = self.queue
        return slo.met_by(latencies)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Distribution:
    """Summary of one latency over a run; seconds, not a number when there was nothing to count."""

    mean: float = math.nan
    std: float = math.nan
    p50: float = math.nan
    p90: float = math.nan
    p95: float = math.nan
    p99: float = math.nan
    max: float = math.nan
    count: int = 0

    @classmethod
    def of(cls, values: Iterable[float] | np.ndarray[Any, np.dtype[np.float64]]) -> Distribution:
        """Summarise ``values``; those that are not numbers are left out. Percentiles interpolate linearly.

        >>> Distribution.of([1.0, 2.0, 3.0]).p50
        2.0
        """
        data = np.asarray(values if isinstance(values, (np.ndarray, list)) else list(values), dtype=np.float64)
        data = data[~np.isnan(data)]
        if data.size == 0:
            return cls()
        p50, p90, p95, p99 = np.percentile(data, (50, 90, 95, 99)).tolist()
        return cls(
            mean=float(data.mean()),
            std=float(data.std()),
            p50=p50,
            p90=p90,
            p95=p95,
            p99=p99,
            max=float(data.max()),
            count=int(data.size),
        )


@dataclass(frozen=True)
class ServingMetrics:
    """What a run achieved. Latencies are over completed requests only; throughputs count completed work only."""

    duration: float
    """seconds from the first arrival to the last event of the run"""
    completed: int
    """requests with a whole answer"""
    failed: int
    """requests that failed or were refused"""
    cancelled: int
    """requests that the client gave up"""
    prompt_tokens: int
    """prompt tokens of completed requests"""
    output_tokens: int
    """answer tokens of completed requests"""
    request_throughput: float
    """completed requests per second"""
    output_throughput: float
    """answer tokens per second"""
    total_token_throughput: float
    """prompt and answer tokens per second"""
    goodput: float
    """good requests per second: completed with every objective met; equals the throughput when no SLO is given"""
    slo_attainment: float
    """good requests as a share of all but the cancelled ones, 0 to 1"""
    preemptions: int
    """preemptions in all"""
    recomputed_tokens: int
    """tokens computed again after preemptions"""
    ttft: Distribution
    """time to first token, one value per request"""
    tpot: Distribution
    """time per output token, one value per request of at least two tokens"""
    itl: Distribution
    """inter-token latency, one value per gap"""
    e2e: Distribution
    """end to end, one value per request"""
    queue: Distribution
    """scheduling delay, one value per request"""

    @property
    def tbt(self) -> Distribution:
        """Time between tokens: another name of ``itl``."""
        return self.itl

    def meets(self, slo: SLO) -> bool:
        """Whether the run as a whole holds the SLO: each objective at its own percentile.

        Percentiles other than those kept here are judged by the next higher one that is kept.
        """
        for name, target in slo.targets().items():
            spread: Distribution = getattr(self, name)
            if spread.count == 0:
                if name in ("tpot", "itl") and self.completed:
                    continue  # answers of one token have no gaps
                return False
            kept = ((50, spread.p50), (90, spread.p90), (95, spread.p95), (99, spread.p99), (100, spread.max))
            value = next(value for percentile, value in kept if target.percentile <= percentile)
            if not value <= target.limit:
                return False
        return True

    def to_dict(self) -> dict[str, Any]:
        """Plain values in SI units, for JSON (not-a-number becomes ``None``)."""
        return {name: _plain(value) for name, value in asdict(self).items()}

    def to_vllm_json(self) -> dict[str, Any]:
        """The result keys of ``vllm bench serve``: milliseconds, as that tool writes them."""
        out: dict[str, Any] = {
            "duration": self.duration,
            "completed": self.completed,
            "failed": self.failed,
            "total_input_tokens": self.prompt_tokens,
            "total_output_tokens": self.output_tokens,
            "request_throughput": self.request_throughput,
            "request_goodput": self.goodput,
            "output_throughput": self.output_throughput,
            "total_token_throughput": self.total_token_throughput,
        }
        for key, spread in (("ttft", self.ttft), ("tpot", self.tpot), ("itl", self.itl), ("e2el", self.e2e)):
            for label, value in (
                ("mean", spread.mean),
                ("median", spread.p50),
                ("std", spread.std),
                ("p50", spread.p50),
                ("p90", spread.p90),
                ("p95", spread.p95),
                ("p99", spread.p99),
            ):
                out[f"{label}_{key}_ms"] = 0.0 if math.isnan(value) else value * 1e3
        return out


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, float) and math.isnan(value):
        return None
    return value


def summarise(
    records: Sequence[RequestRecord], slo: SLO | None = None, duration: float | None = None
) -> ServingMetrics:
    """Turn the records of a run into its metrics.

    ``duration`` (seconds) is the length of the run; by default from the first arrival to the last token.

    >>> good = RequestRecord("a", 0.0, 0.0, [0.1, 0.2], 8, 2, finish_reason="length")
    >>> late = RequestRecord("b", 0.0, 0.5, [0.9, 1.0], 8, 2, finish_reason="length")
    >>> metrics = summarise([good, late], SLO(ttft="200ms"))
    >>> metrics.goodput, metrics.slo_attainment, metrics.request_throughput
    (1.0, 0.5, 2.0)
    """
    done = [r for r in records if r.ok]
    cancelled = sum(1 for r in records if r.error is None and r.finish_reason == "abort")
    failed = len(records) - len(done) - cancelled
    if duration is None:
        begin = min((r.arrival for r in records), default=0.0)
        end = max((r.token_times[-1] for r in records if r.token_times), default=begin)
        duration = end - begin
    span = duration if duration > 0 else math.nan
    good = len(done) if slo is None else sum(1 for r in done if r.meets(slo))
    judged = len(done) + failed
    prompt_tokens = sum(r.prompt_tokens for r in done)
    output_tokens = sum(r.output_tokens for r in done)
    gaps = [np.diff(r.token_times) for r in done if len(r.token_times) > 1]
    return ServingMetrics(
        duration=duration,
        completed=len(done),
        failed=failed,
        cancelled=cancelled,
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        request_throughput=len(done) / span,
        output_throughput=output_tokens / span,
        total_token_throughput=(prompt_tokens + output_tokens) / span,
        goodput=good / span,
        slo_attainment=good / judged if judged else math.nan,
        preemptions=sum(r.preemptions for r in records),
        recomputed_tokens=sum(r.recomputed_tokens for r in records),
        ttft=Distribution.of([r.ttft for r in done]),
        tpot=Distribution.of([r.tpot for r in done]),
        itl=Distribution.of(np.concatenate(gaps)) if gaps else Distribution(),
        e2e=Distribution.of([r.e2e for r in done]),
        queue=Distribution.of([r.queue for r in done]),
    )


@dataclass(frozen=True)
class EffectiveThroughput:
    """Successful requests per second, as DeepSpeed-FastGen scores a server (arXiv:2401.08671, section on results).

    A request succeeds when its first token comes within ``prompt_tokens / prompt_rate`` seconds and the exponential
    moving average of its gaps never exceeds ``1 / generation_rate``. Failed and cancelled requests are no
    successes and still take their time.
    Differs from the paper in: the averaging factor, which it does not state; ours is 0.2.

    >>> quick = RequestRecord("a", 0.0, 0.0, [0.5, 0.6, 0.7], prompt_tokens=512, output_tokens=3, finish_reason="stop")
    >>> slow = RequestRecord("b", 0.0, 0.0, [0.5, 1.6, 2.7], prompt_tokens=512, output_tokens=3, finish_reason="stop")
    >>> score = EffectiveThroughput(generation_rate=4)
    >>> score.succeeds(quick), score.succeeds(slow), score([quick, slow], duration=4.0)
    (True, False, 0.25)
    """

    prompt_rate: float = 512.0
    """prompt tokens per second that the first token's latency must not fall behind"""
    generation_rate: float = 4.0
    """tokens per second that the average generation rate must not fall below (the paper uses 2, 4 and 6)"""
    smoothing: float = 0.2
    """weight of the newest gap in the moving average, 0 to 1"""

    def __post_init__(self) -> None:
        if not (self.prompt_rate > 0 and self.generation_rate > 0 and 0 < self.smoothing <= 1):
            raise ValueError(f"rates must be positive and smoothing within (0, 1], got {self}")

    def succeeds(self, record: RequestRecord) -> bool:
        """Whether the request met both limits."""
        if not record.ok or record.ttft > record.prompt_tokens / self.prompt_rate:
            return False
        average: float | None = None
        limit = 1.0 / self.generation_rate
        for gap in record.itls:
            average = gap if average is None else average + self.smoothing * (gap - average)
            if average > limit * (1 + 1e-12):
                return False
        return True

    def __call__(self, records: Sequence[RequestRecord], duration: float | None = None) -> float:
        """Successes per second over the run (``duration`` in seconds, by default from first arrival to last token)."""
        if duration is None:
            duration = summarise(records).duration
        return sum(1 for r in records if self.succeeds(r)) / duration if duration > 0 else math.nan
