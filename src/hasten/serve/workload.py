"""What is asked of a server: when requests arrive, how long their prompts and answers are.

A :class:`Workload` is an ordered list of :class:`RequestSpec`. It comes from a production trace (Azure's CSV,
Mooncake's JSON lines), from distributions, or from the built-in samples; arrivals are the trace's own, or a Poisson
or Gamma process at a chosen rate. Times are seconds from the start, lengths are tokens. Everything is drawn from one
seed.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from hasten.budget import SLO
from hasten.errors import ConfigurationError, DataError

__all__ = ["Constant", "Lengths", "LogNormal", "Normal", "RequestSpec", "Workload", "arrivals", "load", "sample"]

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class RequestSpec:
    """One request to come."""

    arrival: float
    """seconds from the start of the workload"""
    prompt_len: int
    """tokens of the prompt"""
    output_len: int
    """tokens of the answer"""
    prefix: tuple[int, ...] = ()
    """names of the prompt's leading blocks; equal leading names mean a shared prefix (Mooncake: 512 tokens each)"""
    priority: int = 0
    """lower is served first"""
    slo: SLO | None = None
    """objective of this request"""


class Lengths(Protocol):
    """A distribution of lengths in tokens."""

    def draw(self, count: int, rng: np.random.Generator) -> Ints:
        """(count,) lengths of at least 1."""
        ...


@dataclass(frozen=True)
class Normal:
    """Normal lengths, cut off at 1: ``Normal(2600, 0.3)`` has a standard deviation of 30 % of its mean."""

    mean: float
    """tokens"""
    spread: float = 0.3
    """standard deviation as a share of the mean"""

    def __post_init__(self) -> None:
        _check(self.mean >= 1 and self.spread >= 0, f"{self}: the mean is at least 1 token, the spread at least 0")

    def draw(self, count: int, rng: np.random.Generator) -> Ints:
        return _whole(rng.normal(self.mean, self.mean * self.spread, count))


@dataclass(frozen=True)
class LogNormal:
    """Lengths whose logarithm is normal: many short ones and a long tail."""

    median: float
    """tokens"""
    sigma: float
    """standard deviation of the natural logarithm"""
    low: int = 1
    """shorter lengths are raised to this"""
    high: int = 2**31 - 1
    """longer lengths are lowered to this"""

    def __post_init__(self) -> None:
        ok = self.median > 0 and self.sigma >= 0 and 1 <= self.low <= self.high
        _check(ok, f"{self}: give a positive median, sigma ≥ 0 and 1 ≤ low ≤ high")

    def draw(self, count: int, rng: np.random.Generator) -> Ints:
        return np.clip(_whole(self.median * np.exp(rng.normal(0.0, self.sigma, count))), self.low, self.high)


@dataclass(frozen=True)
class Constant:
    """Every length the same."""

    value: int
    """tokens"""

    def __post_init__(self) -> None:
        _check(self.value >= 1, f"{self}: a length is at least 1 token")

    def draw(self, count: int, rng: np.random.Generator) -> Ints:
        return np.full(count, self.value, dtype=np.int64)


def _whole(values: Floats) -> Ints:
    return np.maximum(1, np.rint(values)).astype(np.int64)


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigurationError(message)


def arrivals(count: int, rate: float, *, burstiness: float = 1.0, rng: np.random.Generator) -> Floats:
    """(count,) arrival times in seconds, at ``rate`` requests per second on average; an infinite rate means all at
    once.

    The gaps are Gamma distributed with shape ``burstiness``: 1 is a Poisson process, below 1 comes in bursts, above 1
    is more regular (the convention of ``vllm bench serve``).
    """
    _check(rate > 0, f"rate is {rate} requests/s; give a positive rate, or inf to send all at once")
    _check(burstiness > 0, f"burstiness is {burstiness}; give a positive shape, 1 for a Poisson process")
    if math.isinf(rate):
        return np.zeros(count)
    return np.cumsum(rng.gamma(burstiness, 1.0 / (rate * burstiness), count))


@dataclass(frozen=True)
class Workload(Sequence[RequestSpec]):
    """Requests in order of arrival.

    >>> load = Workload.random(requests=100, rate=2.0, prompt=Normal(256), output=Constant(16), seed=0)
    >>> len(load), load[0].output_len, 1.5 < load.rate < 2.7
    (100, 16, True)
    >>> [r.output_len for r in load.scaled(max_prompt=64, max_output=8).requests[:2]]
    [8, 8]
    """

    requests: tuple[RequestSpec, ...]
    """in order of arrival"""
    name: str = "workload"
    """where it comes from"""

    def __len__(self) -> int:
        return len(self.requests)

    def __getitem__(self, index: Any) -> Any:
        return self.requests[index]

    def __iter__(self) -> Iterator[RequestSpec]:
        return iter(self.requests)

    @property
    def duration(self) -> float:
        """Seconds from the first arrival to the last."""
        return self.requests[-1].arrival - self.requests[0].arrival if self.requests else 0.0

    @property
    def rate(self) -> float:
        """Mean arrival rate in requests per second; infinite when all arrive at once."""
        return (len(self) - 1) / self.duration if self.duration > 0 else math.inf

    @property
    def prompt_lens(self) -> Ints:
        """(requests,)"""
        return np.array([r.prompt_len for r in self.requests], dtype=np.int64)

    @property
    def output_lens(self) -> Ints:
        """(requests,)"""
        return np.array([r.output_len for r in self.requests], dtype=np.int64)

    @classmethod
    def random(
        cls,
        *,
        requests: int,
        prompt: Lengths,
        output: Lengths,
        rate: float = math.inf,
        burstiness: float = 1.0,
        seed: int = 0,
        name: str = "random",
    ) -> Workload:
        """Independent lengths and arrivals."""
        _check(requests >= 1, f"requests is {requests}; ask for at least 1")
        rng = np.random.default_rng(seed)
        prompts, outputs = prompt.draw(requests, rng), output.draw(requests, rng)
        times = arrivals(requests, rate, burstiness=burstiness, rng=rng)
        rows = zip(times.tolist(), prompts.tolist(), outputs.tolist(), strict=True)
        return cls(tuple(RequestSpec(*row) for row in rows), name)

    def at_rate(self, rate: float, *, burstiness: float | None = 1.0, seed: int = 0) -> Workload:
        """The same requests at another rate: new Gamma arrivals, or (``burstiness=None``) the own ones stretched."""
        if burstiness is None:
            _check(rate > 0 and not math.isinf(rate), f"rate is {rate}; stretching needs a positive, finite rate")
            factor = self.rate / rate
            first = self.requests[0].arrival if self.requests else 0.0
            return self._with_times([(r.arrival - first) * factor for r in self.requests])
        rng = np.random.default_rng(seed)
        return self._with_times(arrivals(len(self), rate, burstiness=burstiness, rng=rng).tolist())

    def _with_times(self, times: Sequence[float]) -> Workload:
        return replace(self, requests=tuple(replace(r, arrival=t) for r, t in zip(self.requests, times, strict=True)))

    def resampled(self, requests: int, *, seed: int = 0) -> Workload:
        """``requests`` rows drawn with replacement, keeping prompt and answer together; arrivals all 0, set a rate
        next."""
        _check(requests >= 1 and len(self) > 0, f"cannot draw {requests} requests from a workload of {len(self)}")
        picks = np.random.default_rng(seed).integers(0, len(self), requests).tolist()
        return replace(self, requests=tuple(replace(self.requests[i], arrival=0.0) for i in picks))

    def head(self, requests: int) -> Workload:
        """The first ``requests`` rows, starting at time 0."""
        rows = self.requests[:requests]
        first = rows[0].arrival if rows else 0.0
        return replace(self, requests=tuple(replace(r, arrival=r.arrival - first) for r in rows))

    def scaled(self, *, max_prompt: int, max_output: int, quantile: float = 0.99) -> Workload:
        """Shrink the lengths in proportion so that they fit a small model; arrivals stay.

        Prompts are multiplied by one factor that brings their ``quantile`` to ``max_prompt`` (answers likewise), what
        is still longer is cut there, and lengths never grow. The shape of the distribution stays, shared prefixes do
        not.
        """
        _check(max_prompt >= 1 and max_output >= 1, f"max_prompt {max_prompt} and max_output {max_output} must be ≥ 1")
        if not self.requests:
            return self

        def shrink(lengths: Ints, limit: int) -> list[int]:
            factor = min(1.0, limit / max(1.0, float(np.quantile(lengths, quantile))))
            return [int(n) for n in np.clip(np.rint(lengths * factor), 1, limit)]

        prompts, outputs = shrink(self.prompt_lens, max_prompt), shrink(self.output_lens, max_output)
        return replace(
            self,
            requests=tuple(
                replace(r, prompt_len=p, output_len=o, prefix=())
                for r, p, o in zip(self.requests, prompts, outputs, strict=True)
            ),
        )

    def clipped(self, *, max_prompt: int, max_output: int) -> Workload:
        """Cut lengths at the limits and leave the others as they are."""
        return replace(
            self,
            requests=tuple(
                replace(r, prompt_len=min(r.prompt_len, max_prompt), output_len=min(r.output_len, max_output))
                for r in self.requests
            ),
        )

    def fitting(self, max_len: int) -> Workload:
        """Only the requests whose prompt and answer together have at most ``max_len`` tokens."""
        return replace(self, requests=tuple(r for r in self.requests if r.prompt_len + r.output_len <= max_len))

    def describe(self) -> dict[str, float | int | str]:
        """Counts and percentiles, for reports."""
        if not self.requests:
            return {"name": self.name, "requests": 0}
        prompts, outputs = self.prompt_lens, self.output_lens
        return {
            "name": self.name,
            "requests": len(self),
            "rate": self.rate,
            "prompt_p50": float(np.median(prompts)),
            "prompt_p99": float(np.quantile(prompts, 0.99)),
            "output_p50": float(np.median(outputs)),
            "output_p99": float(np.quantile(outputs, 0.99)),
        }


def load(
    path: str | os.PathLike[str],
    *,
    rate: float | None = None,
    requests: int | None = None,
    seed: int = 0,
    burstiness: float | None = 1.0,
    resample: bool | None = None,
    speed: float = 1.0,
) -> Workload:
    """Read a trace, or build a sample when ``path`` is ``"conversation"`` or ``"code"``.

    Files: Azure's CSV (``TIMESTAMP, ContextTokens, GeneratedTokens``), Mooncake's JSON lines (``timestamp`` in
    milliseconds, ``input_length``, ``output_length``, ``hash_ids``), either plain or ``.gz``, recognised by content.

    Without ``rate`` the arrivals are the trace's own, ``speed`` times as fast. With ``rate`` (requests per second) they
    are drawn anew (``burstiness`` 1: Poisson) or, with ``burstiness=None``, stretched. ``requests`` rows are taken:
    drawn with replacement when a rate is given (or ``resample`` says so), else the first ones.
    Raises :class:`~hasten.errors.DataError` when the file cannot be used.
    """
    _check(speed > 0, f"speed is {speed}; give a positive factor, 2 replays twice as fast")
    if str(path) in _SAMPLES:
        return sample(str(path), rate=rate or 1.0, requests=requests or 1000, seed=seed, burstiness=burstiness or 1.0)
    trace = Workload(tuple(_read(Path(path))), Path(path).name.split(".")[0])
    if resample is None:
        resample = rate is not None and burstiness is not None and requests is not None
    if requests is not None:
        trace = trace.resampled(requests, seed=seed) if resample else trace.head(requests)
    if rate is not None:
        trace = trace.at_rate(rate, burstiness=burstiness, seed=seed + 1)
    if speed != 1.0:
        trace = trace._with_times([r.arrival / speed for r in trace.requests])
    return trace


def _read(path: Path) -> list[RequestSpec]:
    try:
        raw = path.read_bytes()
        text = (gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw).decode("utf-8")
    except FileNotFoundError:
        known = ", ".join(_SAMPLES)
        raise DataError(f"no trace at {str(path)!r}; give an existing file, or one of the samples: {known}") from None
    except (OSError, EOFError, UnicodeDecodeError, ValueError) as error:
        raise DataError(f"cannot read the trace {str(path)!r}: {error}; is the download complete?") from None
    try:
        rows = _mooncake(text) if text.lstrip()[:1] == "{" else _azure(text)
    except (KeyError, ValueError, TypeError) as error:
        raise DataError(
            f"{str(path)!r} is no trace that can be read ({type(error).__name__}: {error}); expected a CSV with "
            "TIMESTAMP, ContextTokens, GeneratedTokens or JSON lines with timestamp, input_length, output_length"
        ) from None
    if not rows:
        raise DataError(f"the trace {str(path)!r} holds no request")
    rows.sort(key=lambda r: r.arrival)
    first = rows[0].arrival
    return [replace(r, arrival=r.arrival - first) for r in rows]


def _azure(text: str) -> list[RequestSpec]:
    rows = []
    for row in csv.DictReader(io.StringIO(text)):
        when = datetime.fromisoformat(row["TIMESTAMP"].strip()[:26].rstrip("Z")).timestamp()
        prompt, output = int(row["ContextTokens"]), int(row["GeneratedTokens"])
        rows.append(RequestSpec(when, max(1, prompt), max(1, output)))
    return rows


def _mooncake(text: str) -> list[RequestSpec]:
    rows = []
    for line in text.splitlines():
        if line.strip():
            row = json.loads(line)
            when, prefix = float(row["timestamp"]) / 1e3, tuple(int(h) for h in row.get("hash_ids", ()))
            rows.append(RequestSpec(when, max(1, int(row["input_length"])), max(1, int(row["output_length"])), prefix))
    return rows


_SAMPLES: dict[str, tuple[Lengths, Lengths]] = {
    "conversation": (LogNormal(1020, 0.8, 4, 4_200), LogNormal(129, 0.85, 1, 1_000)),
    "code": (LogNormal(1500, 1.0, 4, 7_500), LogNormal(13, 1.0, 1, 1_900)),
}


def sample(
    name: Literal["conversation", "code"] | str = "conversation",
    *,
    rate: float = 1.0,
    requests: int = 1000,
    seed: int = 0,
    burstiness: float = 1.0,
) -> Workload:
    """A small workload in the proportions of a production service; generated, no row of any trace is in it.

    Log-normal lengths around the medians published for the Azure LLM inference traces of 2023 ("Splitwise: Efficient
    Generative LLM Inference Using Phase Splitting", Patel et al., ISCA 2024, arXiv:2311.18677, figure 3):
    conversation has a median prompt of 1,020 and answer of 129 tokens, code 1,500 and 13. The spread of the logarithm
    and the cuts are ours, chosen for tails like theirs. Prompt and answer are independent, arrivals a Gamma process.

    >>> sample("code", requests=500).describe()["requests"]
    500
    """
    if name not in _SAMPLES:
        raise ConfigurationError(f"sample {name!r} is not known; choose one of {', '.join(_SAMPLES)}")
    prompt, output = _SAMPLES[name]
    return Workload.random(
        requests=requests, prompt=prompt, output=output, rate=rate, burstiness=burstiness, seed=seed, name=name
    )


Rated = Callable[[float], Workload]
"""A workload at a chosen rate, for searches"""
