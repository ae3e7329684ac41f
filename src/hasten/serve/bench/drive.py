"""Sends requests at their times, or one after another from a number of clients, and records what came back.

Open loop (``replay``): requests are sent when their time has come, whatever the server does; that is how users behave.
Closed loop (``closed_loop``): each client sends its next request when it has its answer; the load follows the server.
"""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from hasten.clock import Clock, MonotonicClock
from hasten.errors import ConfigurationError, EngineDeadError
from hasten.serve.bench.dataset import Prompt, prompts_of
from hasten.serve.bench.wire import Reply, Wire
from hasten.serve.metrics import RequestRecord
from hasten.serve.workload import RequestSpec, arrivals

__all__ = ["Target", "closed_loop", "replay", "run"]


@dataclass(frozen=True)
class Target:
    """Whom to ask and how."""

    base_url: str
    """address of the server"""
    model: str | None = None
    """model to name; None asks the server for its first"""
    endpoint: str = "/v1/completions"
    """path of the requests; one with ``chat`` in it gets messages"""
    ignore_eos: bool = True
    """whether answers go on to their whole length"""
    temperature: float = 0.0
    """0 takes the likeliest token"""
    api_key: str | None = None
    """sent as Bearer token"""
    extra: tuple[tuple[str, Any], ...] = ()
    """further fields of every request"""

    @property
    def chat(self) -> bool:
        """Whether requests are chats."""
        return "chat" in self.endpoint


class _Driver:
    def __init__(self, target: Target, clock: Clock, done: Callable[[], None] | None) -> None:
        self._target = target
        self._clock = clock
        self._done = done
        self.wire = Wire(target.base_url, clock.now, api_key=target.api_key)
        self.model = target.model

    async def prepare(self) -> None:
        """Learn the model's name. Raises ``EngineDeadError`` when nobody answers."""
        if self.model is not None:
            return
        reply = await self.wire.call("GET", "/v1/models")
        if reply.error is not None or reply.status != 200:
            raise EngineDeadError(
                f"{self._target.base_url} does not list its models "
                f"({reply.error or f'status {reply.status}'}); is the server running, and the address right?"
            )
        self.model = str(json.loads(reply.body)["data"][0]["id"])

    async def ask(self, name: str, prompt: Prompt) -> RequestRecord:
        target = self._target
        body: dict[str, Any] = {
            "model": self.model,
            "max_tokens": prompt.output_len,
            "temperature": target.temperature,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if target.chat:
            body["messages"] = [{"role": "user", "content": prompt.prompt}]
        else:
            body["prompt"] = prompt.prompt
        if target.ignore_eos:
            body["ignore_eos"] = True
        body.update(target.extra)
        begin = self._clock.now()
        reply = await self.wire.call("POST", target.endpoint, body)
        if self._done is not None:
            self._done()
        return _record(name, prompt, begin, reply)


def _record(name: str, prompt: Prompt, begin: float, reply: Reply) -> RequestRecord:
    error = reply.error
    if error is None and reply.status != 200:
        error = f"status {reply.status}: {reply.body[:200].decode(errors='replace')}"
    times = reply.events
    usage = reply.usage or {}
    tokens = int(usage.get("completion_tokens") or len(times))
    if times and len(times) < tokens:  # some tokens came together, or gave no text of their own
        times = times + [times[-1]] * (tokens - len(times))
    elif len(times) > tokens > 0:  # an event without a token, such as one with the reason of the end alone
        times = times[:tokens]
    if error is None and not times:
        error = "the server sent no token"
    queue = (reply.timings or {}).get("queue")
    return RequestRecord(
        id=name,
        arrival=begin,
        first_scheduled=None if queue is None else begin + float(queue),
        token_times=times,
        prompt_tokens=int(usage.get("prompt_tokens") or prompt.prompt_len),
        output_tokens=len(times),
        preemptions=int((reply.timings or {}).get("preemptions") or 0),
        error=error,
        finish_reason=reply.finish_reason or ("error" if error else None),
    )


async def replay(
    base_url: str,
    workload: Sequence[RequestSpec] | Sequence[Prompt],
    *,
    model: str | None = None,
    seed: int = 0,
    max_concurrency: int | None = None,
    clock: Clock | None = None,
    progress: Callable[[], None] | None = None,
    **fields: Any,
) -> list[RequestRecord]:
    """Send the requests of ``workload`` at their arrival times; their records, in their order.

    ``fields`` are those of :class:`Target`. ``max_concurrency`` holds requests back while that many are under way; a
    record then begins when its request is sent. ``progress`` is called after each answer. Nothing fails as a whole: a
    request that does is a record with an ``error``. Raises ``EngineDeadError`` when no server answers at the start.
    """
    clock = clock or MonotonicClock()
    target = Target(base_url, model, **fields)
    driver = _Driver(target, clock, progress)
    await driver.prepare()
    prompts = _prompts(workload, seed, target)
    gate = asyncio.Semaphore(max_concurrency) if max_concurrency else None
    begin = clock.now() + 0.01

    async def one(index: int, prompt: Prompt) -> RequestRecord:
        if gate is None:
            return await driver.ask(str(index), prompt)
        async with gate:
            return await driver.ask(str(index), prompt)

    tasks = []
    try:
        for index, prompt in enumerate(prompts):
            wait = begin + prompt.arrival - clock.now()
            if wait > 0:
                await asyncio.sleep(wait)
            tasks.append(asyncio.create_task(one(index, prompt)))
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
        driver.wire.close()


async def closed_loop(
    base_url: str,
    workload: Sequence[RequestSpec] | Sequence[Prompt],
    clients: int,
    *,
    model: str | None = None,
    seed: int = 0,
    clock: Clock | None = None,
    progress: Callable[[], None] | None = None,
    **fields: Any,
) -> list[RequestRecord]:
    """Let ``clients`` work through ``workload``, each sending its next request after its answer; see ``replay``."""
    if clients < 1:
        raise ConfigurationError(f"clients is {clients}; at least one must ask")
    clock = clock or MonotonicClock()
    target = Target(base_url, model, **fields)
    driver = _Driver(target, clock, progress)
    await driver.prepare()
    prompts = _prompts(workload, seed, target)
    records: list[RequestRecord | None] = [None] * len(prompts)
    left = iter(enumerate(prompts))

    async def one() -> None:
        for index, prompt in left:
            records[index] = await driver.ask(str(index), prompt)

    try:
        await asyncio.gather(*(one() for _ in range(min(clients, len(prompts)))))
    finally:
        driver.wire.close()
    return [r for r in records if r is not None]


def _prompts(workload: Sequence[Any], seed: int, target: Target) -> list[Prompt]:
    if workload and isinstance(workload[0], Prompt):
        return list(workload)
    return prompts_of(list(workload), seed=seed, as_text=target.chat)


def run(
    base_url: str,
    prompts: Sequence[Prompt],
    *,
    request_rate: float | None = None,
    burstiness: float = 1.0,
    seed: int = 0,
    clients: int | None = None,
    **options: Any,
) -> list[RequestRecord]:
    """``replay`` or (with ``clients``) ``closed_loop``, from code that has no event loop.

    ``request_rate`` (per second, may be infinite) draws new arrival times; None keeps those of the prompts.
    """
    if clients is not None:
        return asyncio.run(closed_loop(base_url, prompts, clients, seed=seed, **options))
    if request_rate is not None:
        if not request_rate > 0:
            raise ConfigurationError(f"request_rate is {request_rate}; give requests per second, or inf")
        if math.isinf(request_rate):
            times = [0.0] * len(prompts)
        else:
            rng = np.random.default_rng(seed)
            times = arrivals(len(prompts), request_rate, burstiness=burstiness, rng=rng).tolist()
        prompts = [replace(p, arrival=t) for p, t in zip(prompts, times, strict=True)]
    return asyncio.run(replay(base_url, prompts, seed=seed, **options))
