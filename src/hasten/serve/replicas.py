"""Several engine processes behind one front, each with its own interpreter, model and KV cache.

A balancer picks the process for each request. A process that dies is restarted by its own :class:`AsyncEngine`; the
requests it took along of which the client has seen nothing are submitted once more, to another process. Invariant: the
counters of ``stats`` never fall, since those of a process that died are kept.
After "DeepSpeed-FastGen", https://arxiv.org/abs/2401.08671. Differs from the paper in: least tokens by default, retry.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from hasten.budget import SLO
from hasten.clock import Clock, MonotonicClock
from hasten.errors import ConfigurationError, EngineDeadError, EngineStoppingError, OverloadedError
from hasten.language.params import SamplingParams
from hasten.serve.balance import Balancer, LeastTokens
from hasten.serve.front import AsyncEngine, EngineInfo, count_refusal
from hasten.serve.ticket import Ticket
from hasten.serve.worker import WorkerConfig

if TYPE_CHECKING:
    from hasten.errors import HastenError

__all__ = ["Replicas", "add_counts", "share_threads"]


class Replicas:
    """``count`` engines that look like one :class:`~hasten.serve.front.AsyncEngine`.

    >>> engine = Replicas(WorkerConfig("pycode-4m"), 2)                       # doctest: +SKIP
    >>> await engine.start()                                                  # doctest: +SKIP
    >>> ticket = engine.submit([tokens], SamplingParams(max_tokens=8))        # doctest: +SKIP

    All methods are called on the loop that ``start`` ran on.
    """

    def __init__(
        self,
        config: WorkerConfig,
        count: int,
        *,
        balancer: Balancer | None = None,
        max_queue: int = 512,
        max_pending: int = 4096,
        restart_delay: float = 0.25,
        clock: Clock | None = None,
    ) -> None:
        """``max_queue`` and the KV cache of ``config`` are each engine's; the rest as for ``AsyncEngine``.

        Where ``config`` names no number of threads, the engines share the cores that this process may use.
        Raises :class:`~hasten.errors.ConfigurationError` for a count below 1.
        """
        if count < 1:
            raise ConfigurationError(f"replicas is {count}; at least 1 engine must serve")
        self.config = config
        self.clock: Clock = clock or MonotonicClock()
        self.balancer: Balancer = balancer or LeastTokens()
        self.retries = 0
        """requests that were submitted again after their engine had died"""
        self.refused = {"overloaded": 0, "stopping": 0, "dead": 0}
        """requests that were turned away, by reason"""
        threads = config.threads or share_threads(count)
        self.engines = [
            AsyncEngine(
                replace(config, threads=threads, seed=None if config.seed is None else config.seed + index),
                max_queue=max_queue,
                max_pending=max_pending,
                restart_delay=restart_delay,
                clock=self.clock,
            )
            for index in range(count)
        ]
        """the engines, in the order of their labels in ``/metrics``"""
        self._ended: str | None = None  # draining or stopped, once it is so
        self._placed = 0
        self._kept: dict[str, Any] = {}  # counters of processes that have died
        self._last: list[dict[str, Any] | None] = [None] * count
        self._deaths = [0] * count

    # ---- life -----------------------------------------------------------------------------------------------------

    async def start(self) -> EngineInfo:
        """Start every process and wait until all are ready. Raises the first error; then none is left running.

        Where the token budget is to be calibrated, the first engine does it alone and the others read its result.
        """
        first, left = self.engines[0], self.engines
        starting: list[asyncio.Task[EngineInfo]] = []
        try:
            if self.config.slo is not None and self.config.token_budget is None:
                await first.start()
                left = self.engines[1:]
            starting = [asyncio.ensure_future(engine.start()) for engine in left]
            await asyncio.gather(*starting)
        except BaseException:
            for task in starting:
                task.cancel()
            await self.stop()
            raise
        assert first.info is not None
        return first.info

    async def drain(self, timeout: float | None = None) -> bool:
        """Take no more requests and wait for those that run; False if ``timeout`` seconds were not enough."""
        if self._ended is None:
            self._ended = "draining"
        deadline = None if timeout is None else self.clock.now() + timeout
        while True:
            left = None if deadline is None else max(0.0, deadline - self.clock.now())
            done = await asyncio.gather(*(engine.drain(left) for engine in self.engines))
            if not all(done):
                return False
            await asyncio.sleep(0.02)  # requests of an engine that died just now move to another one
            if self.num_outstanding == 0:
                return True

    async def stop(self) -> None:
        """End every process; open tickets fail."""
        self._ended = "stopped"
        await asyncio.gather(*(engine.stop() for engine in self.engines))

    def kill(self) -> None:
        """End every process at once, from anywhere; for the last moments of a program."""
        for engine in self.engines:
            engine.kill()

    # ---- what there is --------------------------------------------------------------------------------------------

    @property
    def state(self) -> str:
        """starting, ready (at least one engine is), down, draining or stopped."""
        if self._ended is not None:
            return self._ended
        states = [engine.state for engine in self.engines]
        return next((s for s in ("ready", "starting") if s in states), "down")

    @property
    def info(self) -> EngineInfo | None:
        """What the engines said of themselves; they are alike."""
        return next((engine.info for engine in self.engines if engine.info is not None), None)

    @property
    def phases(self) -> list[tuple[str, float, str]]:
        """Start-up of the slowest engine: phase, seconds, detail."""
        return max((engine.phases for engine in self.engines), key=lambda phases: sum(p[1] for p in phases))

    @property
    def restarts(self) -> int:
        """Processes that ended unexpectedly."""
        return sum(engine.restarts for engine in self.engines)

    @property
    def num_outstanding(self) -> int:
        """Sequences that have not ended."""
        return sum(engine.num_outstanding for engine in self.engines)

    def health(self) -> dict[str, Any]:
        """State, restarts, and how many engines of how many serve."""
        alive = sum(engine.alive for engine in self.engines)
        return {"status": self.state, "restarts": self.restarts, "replicas": len(self.engines), "alive": alive}

    def metrics(self) -> dict[str, Any]:
        """What is counted here rather than in the processes."""
        return {
            "gauges": {"engine_up": {str(i): int(engine.alive) for i, engine in enumerate(self.engines)}},
            "counters": {"engine_restarts": self.restarts, "request_retries": self.retries},
            "refused": self.refused,
        }

    async def stats(self, timeout: float = 2.0, *, check: bool = False) -> dict[str, Any]:
        """Counters and histograms of all engines together; gauges as mappings of replica to value."""
        found = await asyncio.gather(*(engine.stats(timeout, check=check) for engine in self.engines))
        gauges: dict[str, dict[str, Any]] = {}
        for index, (engine, snapshot) in enumerate(zip(self.engines, found, strict=True)):
            last = self._last[index]
            if engine.restarts != self._deaths[index]:
                self._deaths[index] = engine.restarts
                self._kept = add_counts(self._kept, last or {})
                last = None
            if engine.alive and snapshot is not None:
                last = snapshot
                for name, value in snapshot["gauges"].items():
                    gauges.setdefault(name, {})[str(index)] = value
            self._last[index] = last
        total = self._kept
        for last in self._last:
            total = add_counts(total, last or {})
        return {**total, "gauges": gauges}

    # ---- requests -------------------------------------------------------------------------------------------------

    def check_open(self, count: int = 1) -> None:
        """Raise what ``submit`` would raise for ``count`` more sequences, whatever they hold."""
        errors = [self._refusal(engine, count) for engine in self.engines]
        if None in errors:
            return
        waits = [e for e in errors if isinstance(e, OverloadedError)]
        others = [e for e in errors if e is not None and not isinstance(e, EngineDeadError)]
        error = min(waits, key=lambda e: e.retry_after) if waits else (others or errors)[0]
        assert error is not None
        count_refusal(self.refused, error)
        raise error

    def _refusal(self, engine: AsyncEngine, count: int) -> HastenError | None:
        if self._ended is not None:
            return EngineStoppingError("the server is stopping and takes no new requests; use another one")
        return engine.refusal(count)

    def may_retry(self) -> bool:
        """Whether some engine can take a request over whose engine has died; counted if so."""
        if not any(engine.alive for engine in self.engines):
            return False
        self.retries += 1
        return True

    def submit(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams,
        *,
        copies: int = 1,
        arrival: float | None = None,
        priority: int = 0,
        slo: SLO | None = None,
        retry: bool = False,
    ) -> Ticket:
        """Start a request on the engine that the balancer picks; see ``AsyncEngine.submit``, which says what is raised.

        Engines that are down or full are passed over. ``retry`` takes any that is alive.
        """
        count = len(prompts) * copies
        if not retry:
            self.check_open(count)
        loads = []
        for engine in self.engines:
            load = engine.load
            fit = load.alive and (retry or self._refusal(engine, count) is None)
            loads.append(replace(load, alive=fit))
        if not any(load.alive for load in loads):
            raise EngineDeadError("no engine is ready; try again in a moment")
        index = self.balancer.choose(self._placed, sum(len(p) for p in prompts), loads)
        ticket = self.engines[index].submit(
            prompts, params, copies=copies, arrival=arrival, priority=priority, slo=slo, retry=retry
        )
        self._placed += 1
        return ticket


def share_threads(count: int) -> int:
    """Threads of each of ``count`` engines, so that together they use the cores that this process may use."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // count)


def add_counts(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Sum of two engines' counters, ends of requests and histograms (of equal bounds); gauges are left out.

    >>> add_counts({"counters": {"a": 1}}, {"counters": {"a": 2, "b": 3}, "gauges": {"c": 1}})
    {'counters': {'a': 3, 'b': 3}}
    """
    out: dict[str, Any] = {}
    for part in ("counters", "finished"):
        left, right = one.get(part, {}), other.get(part, {})
        if left or right:
            out[part] = {name: left.get(name, 0) + right.get(name, 0) for name in {**left, **right}}
    left, right = one.get("histograms", {}), other.get("histograms", {})
    if left or right:
        out["histograms"] = {name: _add_histograms(left.get(name), right.get(name)) for name in {**left, **right}}
    return out


def _add_histograms(one: dict[str, Any] | None, other: dict[str, Any] | None) -> dict[str, Any]:
    if one is None or other is None:
        found = one or other
        assert found is not None
        return found
    counts = [a + b for a, b in zip(one["counts"], other["counts"], strict=True)]
    return {"bounds": one["bounds"], "counts": counts, "sum": one["sum"] + other["sum"]}
