"""The front's side of an engine process: submits requests, hands out their news, keeps the process alive.

Everything runs on one asyncio loop. A request is a :class:`Ticket` over one or more sequences, which the handler reads.
When the engine process ends, every open ticket fails with ``EngineDeadError`` and another process is started, after a
delay that doubles with each failure.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from hasten.budget import SLO
from hasten.clock import Clock, MonotonicClock
from hasten.errors import (
    ContextLengthError,
    EngineDeadError,
    EngineStoppingError,
    HastenError,
    InvalidRequestError,
    OverloadedError,
)
from hasten.language.params import SamplingParams
from hasten.language.tokenizer import NoTokenizer, Tokenizer
from hasten.serve.balance import Load
from hasten.serve.link import Unpacker, pack
from hasten.serve.ticket import Ticket
from hasten.serve.worker import WorkerConfig

if TYPE_CHECKING:
    pass

__all__ = ["AsyncEngine", "EngineInfo", "count_refusal"]

logger = logging.getLogger("hasten.serve")

_HEALTHY = 30.0
"""seconds of life after which a process counts as sound and the delay of restarts is reset"""


class EngineInfo:
    """What the engine said of itself when it was ready."""

    def __init__(self, data: dict[str, Any]) -> None:
        self.data = data
        self.name: str = data["name"]
        self.vocab_size: int = data["vocab_size"]
        self.max_model_len: int = data["max_model_len"]
        state = data["tokenizer"]
        self.tokenizer: Tokenizer = NoTokenizer(self.vocab_size) if state is None else Tokenizer(*state)


class _Wire(asyncio.Protocol):
    """The front's end of the socket."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine
        self._unpacker = Unpacker()
        self.transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        for message in self._unpacker.feed(data):
            self._engine._take(self, message)

    def connection_lost(self, exc: Exception | None) -> None:
        self._engine._lost(self)


class AsyncEngine:
    """An engine in its own process, seen from an asyncio loop.

    >>> engine = AsyncEngine(WorkerConfig("pycode-4m"))                       # doctest: +SKIP
    >>> await engine.start()                                                  # doctest: +SKIP
    >>> ticket = engine.submit([tokens], SamplingParams(max_tokens=8))        # doctest: +SKIP
    >>> while news := await ticket.next(): ...                                # doctest: +SKIP

    All methods are called on the loop that ``start`` ran on.
    """

    def __init__(
        self,
        config: WorkerConfig,
        *,
        max_queue: int = 512,
        max_pending: int = 4096,
        restart_delay: float = 0.25,
        clock: Clock | None = None,
    ) -> None:
        """``max_queue``: sequences that may wait beyond those that run. ``max_pending``: news a reader may leave."""
        self.config = config
        self.max_queue = max_queue
        self.clock: Clock = clock or MonotonicClock()
        self.info: EngineInfo | None = None
        self.phases: list[tuple[str, float, str]] = []
        """start-up of the current process: phase, seconds, detail"""
        self.restarts = 0
        """processes that ended unexpectedly"""
        self.refused = {"overloaded": 0, "stopping": 0, "dead": 0}
        """requests that were turned away, by reason"""
        self.state = "starting"
        """starting, ready, down (a restart is under way), draining or stopped"""
        self._max_pending = max_pending
        self._restart_delay = restart_delay
        self._failures = 0
        self._tickets: dict[int, Ticket] = {}
        self._waiting: dict[int, int] = {}  # sequences without any news yet, and the prompt tokens that are theirs
        self._waiting_tokens = 0
        self._next = 0
        self._process: subprocess.Popen[bytes] | None = None
        self._wire: _Wire | None = None
        self._ready: asyncio.Future[EngineInfo] | None = None
        self._since = 0.0
        self._restarting: asyncio.Task[None] | None = None
        self._queries: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._snapshot: dict[str, Any] | None = None
        self._service = 1.0  # moving average of a request's seconds in the engine
        self._idle: asyncio.Event = asyncio.Event()
        self._idle.set()

    # ---- life -----------------------------------------------------------------------------------------------------

    async def start(self) -> EngineInfo:
        """Start the process and wait until it is ready. Raises the error with which it failed."""
        info = await self._launch()
        self.state = "ready"
        return info

    async def _launch(self) -> EngineInfo:
        ours, theirs = socket.socketpair()
        environment = dict(os.environ)
        environment["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
        if self.config.threads:  # before the libraries are loaded, which is when they read it
            for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"):
                environment[name] = str(self.config.threads)
        begin = self.clock.now()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "hasten.serve.worker", str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            env=environment,
        )
        theirs.close()
        self.phases = []
        self._snapshot = None
        self._since = begin
        loop = asyncio.get_running_loop()
        self._ready = loop.create_future()
        ours.setblocking(False)
        _, wire = await loop.create_unix_connection(lambda: _Wire(self), sock=ours)
        self._wire = wire
        self._send("config", replace(self.config, begin=begin))
        info = await self._ready
        self.info = info
        return info

    def _lost(self, wire: _Wire) -> None:
        """The process closed its end."""
        if wire is not self._wire:
            return
        self._wire = None
        process, self._process = self._process, None
        if process is not None:
            if process.poll() is None:
                process.kill()
            code = process.wait()
        else:
            code = None
        if self.state == "stopped":
            return
        error = EngineDeadError(f"the engine process ended (exit status {code}); try again in a moment")
        for future in self._queries.values():
            if not future.done():
                future.set_exception(error)
        self._queries.clear()
        tickets, self._tickets = self._tickets, {}
        self._waiting.clear()
        self._waiting_tokens = 0
        for ticket in set(tickets.values()):
            ticket.fail(error)
        self._note_idle()
        if self._ready is not None and not self._ready.done():
            self._ready.set_exception(error)
            return  # whoever started it decides
        self.restarts += 1
        if self.state != "draining":
            self.state = "down"
        self._schedule_restart()

    def _schedule_restart(self) -> None:
        if self.clock.now() - self._since > _HEALTHY:
            self._failures = 0
        if self._restarting is None or self._restarting.done():
            self._restarting = asyncio.get_running_loop().create_task(self._restart())

    async def _restart(self) -> None:
        while self.state == "down":
            delay = min(30.0, self._restart_delay * 2.0**self._failures)
            self._failures += 1
            logger.error("the engine process ended; starting another in %.2f s", delay)
            await asyncio.sleep(delay)
            if self.state != "down":
                return
            try:
                await self._launch()
            except HastenError as error:
                logger.error("the engine process could not be started again: %s", error)
                continue
            if self.state == "down":
                self.state = "ready"
                logger.info("the engine is ready again")

    async def drain(self, timeout: float | None = None) -> bool:
        """Take no more requests and wait for those that run; False if ``timeout`` seconds were not enough."""
        if self.state != "stopped":
            self.state = "draining"
        try:
            await asyncio.wait_for(self._idle.wait(), timeout)
        except TimeoutError:
            return False
        return True

    async def stop(self) -> None:
        """End the process; open tickets fail."""
        self.state = "stopped"
        if self._restarting is not None:
            self._restarting.cancel()
        for ticket in set(self._tickets.values()):
            ticket.fail(EngineStoppingError("the server stops"))
        self._tickets.clear()
        self._note_idle()
        wire, self._wire = self._wire, None
        if wire is not None and wire.transport is not None:
            wire.transport.close()
        process, self._process = self._process, None
        if process is None:
            return
        for _ in range(100):
            if process.poll() is not None:
                return
            await asyncio.sleep(0.02)
        process.kill()
        process.wait()

    def kill(self) -> None:
        """End the process at once, from anywhere; for the last moments of a program."""
        process = self._process
        if process is not None and process.poll() is None:
            process.send_signal(signal.SIGKILL)

    # ---- requests -------------------------------------------------------------------------------------------------

    @property
    def num_outstanding(self) -> int:
        """Sequences that have not ended."""
        return len(self._tickets)

    @property
    def alive(self) -> bool:
        """Whether a process runs that can finish requests."""
        return self._wire is not None and self.state in ("ready", "draining")

    @property
    def load(self) -> Load:
        """What is still to do, as far as it is known here: prompts without a token yet, one token per answer."""
        running = len(self._tickets) - len(self._waiting)
        return Load(len(self._tickets), self._waiting_tokens + running, self.alive)

    def health(self) -> dict[str, Any]:
        """State and restarts, for ``/health``."""
        return {"status": self.state, "restarts": self.restarts}

    def metrics(self) -> dict[str, Any]:
        """What is counted here rather than in the process, for ``/metrics``."""
        return {
            "gauges": {"engine_up": int(self.state in ("ready", "draining"))},
            "counters": {"engine_restarts": self.restarts},
            "refused": self.refused,
        }

    def may_retry(self) -> bool:
        """Whether a request that a dead process took along may be submitted again; one engine has no other."""
        return False

    @property
    def retry_after(self) -> float:
        """Estimated seconds until the queue has room."""
        seats = max(1, self.config.max_num_seqs)
        return max(1.0, self._service * (1 + len(self._waiting) // seats) / 2)

    def check_open(self, count: int = 1) -> None:
        """Raise what ``submit`` would raise for ``count`` more sequences, whatever they hold."""
        error = self.refusal(count)
        if error is not None:
            count_refusal(self.refused, error)
            raise error

    def refusal(self, count: int) -> HastenError | None:
        """The error that ``count`` more sequences would be refused with, None if they may come."""
        if self.state in ("draining", "stopped"):
            return EngineStoppingError("the server is stopping and takes no new requests; use another one")
        if self.state != "ready" or self._wire is None:
            return EngineDeadError("the engine is not ready; try again in a moment")
        free = max(0, self.config.max_num_seqs - (len(self._tickets) - len(self._waiting)))
        if count > self.max_queue + self.config.max_num_seqs:
            return InvalidRequestError(
                f"the request asks for {count} answers; this server holds {self.max_queue + self.config.max_num_seqs}",
                "n",
            )
        if len(self._waiting) + count > self.max_queue + free:
            return OverloadedError(
                f"{len(self._waiting)} requests wait and at most {self.max_queue} may; try again later",
                self.retry_after,
            )
        return None

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
        """Start ``copies`` sequences for each prompt; sequence ``p * copies + c`` is copy ``c`` of prompt ``p``.

        Copies share their prompt's blocks and draw from seeds of their own. ``retry``: the request was admitted before
        and is taken although the queue is full or drained. Raises ``RequestError`` for what is
        wrong with the request, ``OverloadedError``, ``EngineStoppingError`` or ``EngineDeadError`` for what is
        wrong here.
        """
        assert self.info is not None or self.state != "ready"
        if not (retry and self.alive):
            self.check_open(len(prompts) * copies)
        for prompt in prompts:
            self._check(prompt, params)
        arrival = self.clock.now() if arrival is None else arrival
        requests = []
        names = []
        for prompt in prompts:
            leader: int | None = None
            for copy in range(copies):
                name = self._next
                self._next += 1
                own = params
                if copy and params.seed is not None:
                    own = replace(params, seed=(params.seed + copy * 0x9E3779B97F4A7C15) % 2**63)
                requests.append((name, list(prompt), own, arrival, priority, slo, leader))
                names.append(name)
                self._waiting[name] = 0 if copy else len(prompt)
                leader = name if leader is None else leader
            self._waiting_tokens += len(prompt)
        ticket = Ticket(names, max(self._max_pending, 64 * len(names)), self._cancel)
        for name in names:
            self._tickets[name] = ticket
        self._idle.clear()
        self._send("add", requests)
        return ticket

    def _check(self, prompt: Sequence[int], params: SamplingParams) -> None:
        info = self.info
        assert info is not None
        length = len(prompt)
        if length == 0:
            raise InvalidRequestError("the prompt has no tokens; it needs at least one", "prompt")
        if length + max(1, params.max_tokens) > info.max_model_len:
            raise ContextLengthError(
                f"the prompt has {length} tokens and max_tokens is {params.max_tokens}; this model takes "
                f"{info.max_model_len} tokens of both together: shorten the prompt or lower max_tokens",
                "prompt" if length >= info.max_model_len else "max_tokens",
            )
        for token in (min(prompt), max(prompt)):
            if not 0 <= token < info.vocab_size:
                raise InvalidRequestError(
                    f"the prompt holds the token {token}; ids of this model are 0 to {info.vocab_size - 1}", "prompt"
                )
        params.check_vocabulary(info.vocab_size)

    def _cancel(self, names: list[int], stop: bool) -> None:
        for name in names:
            self._tickets.pop(name, None)
            self._waiting_tokens -= self._waiting.pop(name, 0)
        self._note_idle()
        if self._wire is not None:
            self._send("cancel", [(name, stop) for name in names])

    async def stats(self, timeout: float = 2.0, *, check: bool = False) -> dict[str, Any] | None:
        """The engine's counters now, or the last ones known if it does not answer in time.

        ``check`` makes the engine verify its books first; an engine whose books are wrong ends.
        """
        if self._wire is None or self.state in ("starting", "down"):
            return self._snapshot
        self._next += 1
        name = self._next
        future: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self._queries[name] = future
        self._send("check" if check else "stats", name)
        try:
            self._snapshot = await asyncio.wait_for(future, timeout)
        except (TimeoutError, EngineDeadError):
            pass  # an engine that is busy or gone has no new numbers; the last ones are what is known
        finally:
            self._queries.pop(name, None)
        return self._snapshot

    # ---- messages -------------------------------------------------------------------------------------------------

    def _send(self, *message: Any) -> None:
        wire = self._wire
        if wire is not None and wire.transport is not None:
            wire.transport.write(pack(message))

    def _take(self, wire: _Wire, message: tuple[Any, ...]) -> None:
        if wire is not self._wire:
            return
        kind = message[0]
        if kind == "out":
            self._news(message[1])
        elif kind == "stats":
            future = self._queries.get(message[1])
            if future is not None and not future.done():
                future.set_result(message[2])
        elif kind == "refused":
            _, name, error, text, param = message
            ticket = self._tickets.get(name)
            if ticket is not None:
                refusal = (
                    ContextLengthError(text, param)
                    if error == "ContextLengthError"
                    else InvalidRequestError(text, param)
                )
                ticket.fail(refusal)
                ticket.cancel()
        elif kind == "phase":
            _, name, seconds, detail = message
            self.phases.append((name, seconds, detail))
            logger.info("start-up: %-10s %6.2f s  %s", name, seconds, detail)
        elif kind == "ready":
            if self._ready is not None and not self._ready.done():
                self._ready.set_result(EngineInfo(message[1]))
        elif kind == "failed" and self._ready is not None and not self._ready.done():
            self._ready.set_exception(_error_of(message[1], message[2]))

    def _news(self, news: list[tuple[Any, ...]]) -> None:
        tickets, waiting = self._tickets, self._waiting
        for item in news:
            name = item[0]
            ticket = tickets.get(name)
            if ticket is None:
                continue
            output = item[2] if len(item) == 3 else None
            if name in waiting:
                self._waiting_tokens -= waiting.pop(name)
            if not ticket.push(name, item[1], output):
                ticket.cancel()
            elif output is not None and output.finish is not None:
                del tickets[name]
                timing = output.timing
                if timing is not None and timing.last_token is not None:
                    self._service += 0.1 * (timing.last_token - timing.arrival - self._service)
        self._note_idle()

    def _note_idle(self) -> None:
        if not self._tickets:
            self._idle.set()


def count_refusal(refused: dict[str, int], error: HastenError) -> None:
    """Count a request that was turned away; one that is wrong in itself is not."""
    if isinstance(error, EngineStoppingError):
        refused["stopping"] += 1
    elif isinstance(error, EngineDeadError):
        refused["dead"] += 1
    elif isinstance(error, OverloadedError):
        refused["overloaded"] += 1


def _error_of(name: str, text: str) -> HastenError:
    import hasten.errors as errors

    kind = getattr(errors, name, None)
    if name == "MissingExtraError" or not (isinstance(kind, type) and issubclass(kind, HastenError)):
        return EngineDeadError(f"the engine could not start: {text}")
    return kind(text)
