"""Throughput against latency as the number of closed-loop clients grows.

Each client sends its next request when it has its answer, so the load follows the server and every number of clients is
one point of the curve; where throughput stops growing and latency goes on, the server is full. The engine may be a
pipeline of this process or any OpenAI-compatible server.
After the benchmark of "DeepSpeed-FastGen", https://arxiv.org/abs/2401.08671, section on performance. Differs from the
paper in: prompts are random tokens, new ones at every point, so that no point profits from an earlier one's cache.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from hasten.errors import ConfigurationError
from hasten.serve.bench.dataset import Prompt, prompts_of
from hasten.serve.bench.drive import run
from hasten.serve.metrics import EffectiveThroughput, RequestRecord, ServingMetrics, summarise
from hasten.serve.workload import Normal, RequestSpec

if TYPE_CHECKING:
    from hasten.serve.engine import Engine
    from hasten.serve.local import Pipeline
    from hasten.serve.server import ServerHandle
    from hasten.serve.workload import Constant, LogNormal

    Lengths = Normal | LogNormal | Constant

__all__ = ["CurvePoint", "Sweep", "SweepPoint", "in_process", "sweep"]

Score = Callable[[Sequence[RequestRecord], float], float]
"""records of a run and its seconds, to a number of which more is better"""


class CurvePoint(NamedTuple):
    """One number of clients on the throughput-latency curve; SI units."""

    clients: int
    throughput: float
    """completed requests per second"""
    latency: float
    """mean end-to-end latency"""
    ttft: float
    """median time to first token"""
    itl_p95: float
    """95th percentile of the time between tokens"""
    score: float
    """such as effective throughput"""


@dataclass(frozen=True)
class SweepPoint:
    """What one number of clients experienced."""

    clients: int
    """clients that each had one request under way"""
    metrics: ServingMetrics
    """of all their requests"""
    score: float
    """the score of the run"""
    records: list[RequestRecord]
    """one per request"""


@dataclass(frozen=True)
class Sweep:
    """The points of a sweep, in the order of the numbers of clients that were asked for.

    >>> Sweep([]).curve()
    []
    """

    points: list[SweepPoint]
    """one per number of clients"""

    def curve(self) -> list[CurvePoint]:
        """Throughput and latencies by number of clients."""
        return [
            CurvePoint(
                point.clients,
                point.metrics.request_throughput,
                point.metrics.e2e.mean,
                point.metrics.ttft.p50,
                point.metrics.itl.p95,
                point.score,
            )
            for point in self.points
        ]

    @property
    def best(self) -> SweepPoint:
        """The point with the highest score. Raises :class:`~hasten.errors.ConfigurationError` if there is none."""
        if not self.points:
            raise ConfigurationError("the sweep has no points; give at least one number of clients")
        return max(self.points, key=lambda point: point.score)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, without the records."""
        return {
            "points": [{"clients": p.clients, "score": p.score, "metrics": p.metrics.to_dict()} for p in self.points]
        }

    def __str__(self) -> str:
        lines = [
            f"{'clients':>7} {'req/s':>9} {'latency':>9} {'TTFT p50':>9} {'ITL p95':>9} {'score':>9} {'failed':>6}"
        ]
        for (clients, *values), point in zip(self.curve(), self.points, strict=True):
            lines.append(f"{clients:>7} " + " ".join(f"{v:>9.4g}" for v in values) + f" {point.metrics.failed:>6}")
        return "\n".join(lines)


def sweep(
    target: Pipeline | Engine | ServerHandle | str,
    clients: Iterable[int] = range(1, 9),
    requests: int = 64,
    prompt: Lengths | None = None,
    output: Lengths | None = None,
    score: Score | None = None,
    *,
    seed: int = 0,
    temperature: float = 0.0,
    model: str | None = None,
    api_key: str | None = None,
    progress: bool = True,
) -> Sweep:
    """Let each number of ``clients`` work through ``requests`` requests and return the points.

    ``target``: a pipeline or engine of this process, a server that ``start`` returned, or a URL. ``prompt`` and
    ``output`` draw the lengths in tokens, by default normal with means 256 and 64 and 30 % spread; a length that leaves
    the context is cut. ``score``: by default :class:`~hasten.serve.metrics.EffectiveThroughput`. Requests that fail are
    records with an error; they count in ``metrics.failed`` and in no throughput. ``model`` and ``api_key`` are for
    URLs. Raises ``ConfigurationError`` when most lengths do not fit, ``EngineDeadError`` when no server answers.
    """
    numbers = list(clients)
    if not numbers or min(numbers) < 1:
        raise ConfigurationError(f"clients is {numbers}; give numbers of 1 or more, such as range(1, 9)")
    if requests < 1:
        raise ConfigurationError(f"requests is {requests}; ask for at least 1")
    judge: Score = score or EffectiveThroughput()
    address = target if isinstance(target, str) else getattr(target, "url", None)
    engine: Any = None if address is not None else getattr(target, "engine", target)
    limit = _context_of(str(address), api_key) if engine is None else int(engine.max_model_len)
    specs = _specs(requests, prompt or Normal(256, 0.3), output or Normal(64, 0.3), limit, seed)
    vocabulary = (16, 256) if engine is None or engine.vocab_size >= 256 else (0, engine.vocab_size)
    points = []
    with _Bar(len(numbers) * requests, progress) as advance:
        for number in numbers:
            prompts = prompts_of(specs, seed=seed + 7919 * number, vocabulary=vocabulary)
            if engine is None:
                records = run(
                    str(address),
                    prompts,
                    clients=number,
                    model=model,
                    api_key=api_key,
                    temperature=temperature,
                    progress=advance,
                )
            else:
                records = in_process(engine, prompts, number, temperature=temperature, progress=advance)
            metrics = summarise(records)
            points.append(SweepPoint(number, metrics, judge(records, metrics.duration), records))
    return Sweep(points)


def in_process(
    engine: Engine,
    prompts: Sequence[Prompt],
    clients: int,
    *,
    temperature: float = 0.0,
    progress: Callable[[], None] | None = None,
) -> list[RequestRecord]:
    """Closed loop of ``clients`` on an engine that has nothing else to do; the records in the order of ``prompts``.

    Raises :class:`~hasten.errors.ConfigurationError` for an engine with work, and what ``Engine.add`` raises.
    """
    from hasten.language.params import SamplingParams

    if engine.has_work:
        raise ConfigurationError("the engine has other requests; measure one that is idle")
    left = iter(prompts)
    order: list[str] = []
    live: set[str] = set()
    records: dict[str, RequestRecord] = {}

    def send(count: int) -> None:
        for item in islice(left, count):
            params = SamplingParams(max_tokens=item.output_len, temperature=temperature, ignore_eos=True)
            tokens = item.prompt if isinstance(item.prompt, list) else engine.tokenize(item.prompt)
            name = str(engine.add(tokens, params))
            order.append(name)
            live.add(name)

    try:
        send(clients)
        while live:
            ended = {str(news.seq) for news in engine.step() if news.finish is not None} & live
            missing = set(ended)
            for record in reversed(engine.records) if ended else ():
                if record.id in missing:
                    records[record.id] = record
                    missing.discard(record.id)
                    if not missing:
                        break
            live -= ended
            for _ in ended if progress is not None else ():
                progress()  # type: ignore[misc]
            send(len(ended))
    finally:
        for name in live:
            engine.cancel(int(name))
    return [records[name] for name in order if name in records]


def _specs(count: int, prompt: Lengths, output: Lengths, limit: int | None, seed: int) -> list[RequestSpec]:
    rng = np.random.default_rng(seed)
    prompts, outputs = prompt.draw(count, rng), output.draw(count, rng)
    if limit is not None:
        over = float(np.mean(prompts + outputs > limit))
        if over > 0.5:
            raise ConfigurationError(
                f"{over:.0%} of the requests ({prompt} and {output}) do not fit a context of {limit} tokens; "
                "give shorter lengths"
            )
        outputs = np.minimum(outputs, max(1, limit // 2))
        prompts = np.minimum(prompts, limit - outputs)
    return [RequestSpec(0.0, int(p), int(o)) for p, o in zip(prompts, outputs, strict=True)]


def _context_of(url: str, api_key: str | None) -> int | None:
    """Tokens that the server's model takes, where it says so; a server that does not answer is noticed later."""
    import httpx

    headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
    try:
        body = httpx.get(f"{url.rstrip('/')}/v1/models", headers=headers, timeout=10).json()
        return int(body["data"][0]["max_model_len"])
    except (httpx.HTTPError, httpx.InvalidURL, json.JSONDecodeError, KeyError, IndexError, TypeError, ValueError):
        return None


class _Bar:
    """A progress bar on the terminal's error stream, or none."""

    def __init__(self, total: int, shown: bool) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        console = Console(stderr=True)
        shown = shown and console.is_terminal
        self._bar = Progress(*columns, console=console, disable=not shown, refresh_per_second=2)
        self._task = self._bar.add_task("requests", total=total)

    def __enter__(self) -> Callable[[], None]:
        self._bar.start()
        return lambda: self._bar.advance(self._task)

    def __exit__(self, *_: object) -> None:
        self._bar.stop()
