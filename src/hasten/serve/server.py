"""The server process: an HTTP front on one asyncio loop, an engine (or several) in a process of its own.

SIGTERM (or the first SIGINT) drains: requests that run finish, new ones get 503, then the process ends with status 0. A
second signal ends it at once. It listens on 127.0.0.1 unless told otherwise.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hasten.budget import SLO
from hasten.clock import Clock, MonotonicClock
from hasten.errors import ConfigurationError, EngineDeadError, HastenError
from hasten.files import write_text
from hasten.serve.balance import make_balancer
from hasten.serve.resident import drop_library_pages
from hasten.serve.worker import WorkerConfig

__all__ = ["ServerConfig", "ServerHandle", "run", "start"]

logger = logging.getLogger("hasten.serve")


@dataclass(frozen=True)
class ServerConfig:
    """What a server is to run; plain data."""

    worker: WorkerConfig = field(default_factory=WorkerConfig)
    """the engine; with several replicas, each of them"""
    replicas: int = 1
    """engine processes; requests are shared among them, and a dead one's are retried once on another"""
    balancer: str = "least-tokens"
    """how a request is placed on a replica: least-tokens or round-robin"""
    host: str = "127.0.0.1"
    """address to listen on"""
    port: int = 8000
    """port to listen on; 0 takes a free one"""
    api_key: str | None = None
    """what requests must bear"""
    metrics_prefix: str = "hasten_"
    """before every metric's name"""
    served_name: str | None = None
    """name of the model towards clients"""
    chat_template: str | None = None
    """a chat template instead of the model's own"""
    max_queue: int = 512
    """sequences that may wait at each engine; beyond that requests get 429"""
    max_pending: int = 4096
    """tokens that a client may be behind before its request is cancelled"""
    drain_timeout: float = 120.0
    """seconds that running requests get to finish after SIGTERM"""
    ready_file: str | None = None
    """file that is written (as JSON) when the server listens"""
    defaults: dict[str, Any] = field(default_factory=dict)
    """sampling knobs for requests that leave them open"""

    def __post_init__(self) -> None:
        if self.replicas < 1:
            raise ConfigurationError(f"replicas is {self.replicas}; at least 1 engine must serve")
        make_balancer(self.balancer)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> ServerConfig:
        """The inverse of ``dataclasses.asdict``."""
        return cls(**{**data, "worker": WorkerConfig(**data["worker"])})


def _listen(config: ServerConfig) -> socket.socket:
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)  # asyncio sets TCP_NODELAY by proto
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 17)  # a client that does not read is noticed
    try:
        listener.bind((config.host, config.port))
    except OSError as error:
        listener.close()
        raise ConfigurationError(
            f"cannot listen on {config.host}:{config.port} ({error.strerror}); choose another --port, or 0"
        ) from error
    listener.listen(2048)
    return listener


def run(config: ServerConfig, clock: Clock | None = None) -> None:
    """Serve until a signal ends it. Raises what the engine could not start with."""
    asyncio.run(_serve(config, clock or MonotonicClock()))


async def _serve(config: ServerConfig, clock: Clock) -> None:
    import uvicorn

    from hasten.serve.front import AsyncEngine
    from hasten.serve.http.app import App
    from hasten.serve.http.state import ServerState
    from hasten.serve.replicas import Replicas

    begin = clock.now()
    listener = _listen(config)
    limits: dict[str, Any] = {"max_queue": config.max_queue, "max_pending": config.max_pending, "clock": clock}
    engine: AsyncEngine | Replicas
    if config.replicas == 1:
        engine = AsyncEngine(config.worker, **limits)
    else:
        engine = Replicas(config.worker, config.replicas, balancer=make_balancer(config.balancer), **limits)
    state = ServerState(
        engine,
        wall_clock=time.time,
        strftime=time.strftime,
        api_key=config.api_key,
        metrics_prefix=config.metrics_prefix,
        chat_template=config.chat_template,
        served_name=config.served_name,
        defaults=config.defaults,
        begun=int(time.time()),
    )

    class Server(uvicorn.Server):
        @contextlib.contextmanager
        def capture_signals(self) -> Iterator[None]:  # signals are handled below
            yield

    settings = uvicorn.Config(
        App(state),
        log_config=None,
        access_log=False,
        lifespan="off",
        backlog=2048,
        timeout_graceful_shutdown=10,
        timeout_keep_alive=75,
        h11_max_incomplete_event_size=1 << 16,
    )
    server = Server(settings)
    serving: asyncio.Task[None] | None = None
    ending: asyncio.Task[None] | None = None

    async def end() -> None:
        logger.info("stopping: %d sequences are running, new requests get 503", engine.num_outstanding)
        if not await engine.drain(config.drain_timeout):
            logger.warning("%d sequences did not finish within %.0f s", engine.num_outstanding, config.drain_timeout)
        await asyncio.sleep(0.05)  # let the last bytes go out
        server.should_exit = True
        await engine.stop()

    loop = asyncio.get_running_loop()
    main = asyncio.current_task()
    assert main is not None

    def on_signal() -> None:
        nonlocal ending
        if ending is None and serving is not None:
            ending = loop.create_task(end())
        else:
            engine.kill()
            server.should_exit = server.force_exit = True
            main.cancel()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)
    try:
        info = await engine.start()
        data = info.data
        port = listener.getsockname()[1]
        url = f"http://{'[' + config.host + ']' if ':' in config.host else config.host}:{port}"
        if data["why"]:
            logger.info("chosen from the SLO: %s", data["why"])
        logger.info(
            "%s (%s), policy %s, token budget %s, %d cache blocks of %d tokens",
            state.name,
            data["precision"],
            data["policy"],
            data["token_budget"],
            data["num_blocks"],
            data["block_size"],
        )
        if config.replicas > 1:
            logger.info("%d replicas, balancer %s", config.replicas, config.balancer)
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        while not server.started and not serving.done():
            await asyncio.sleep(0.005)
        drop_library_pages()
        logger.info("ready on %s after %.2f s", url, clock.now() - begin)
        if config.ready_file:
            phases = [{"phase": n, "seconds": t, "detail": d} for n, t, d in engine.phases]
            write_text(
                config.ready_file, json.dumps({"url": url, "pid": os.getpid(), "engine": data["pid"], "phases": phases})
            )
        await serving
        if ending is not None:
            await ending
    except asyncio.CancelledError:
        if ending is None and serving is not None:
            raise
    finally:
        await engine.stop()
        listener.close()


class ServerHandle:
    """A server in a process of its own.

    >>> with start("pycode-4m") as server:            # doctest: +SKIP
    ...     server.url
    'http://127.0.0.1:40913'
    """

    def __init__(self, process: subprocess.Popen[bytes], info: dict[str, Any], log: Path, clock: Clock) -> None:
        self.process = process
        self.url: str = info["url"]
        """where it listens, without /v1"""
        self.phases: list[dict[str, Any]] = info["phases"]
        """start-up of the engine: phase, seconds, detail"""
        self.log = log
        """what it wrote so far"""
        self._clock = clock

    def stop(self, timeout: float = 30.0) -> int:
        """Drain and end it; the exit status. It is killed if ``timeout`` seconds do not suffice."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(timeout)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        self.log.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self.log.parent.rmdir()
        return int(self.process.returncode)

    def __enter__(self) -> ServerHandle:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


_SERVER_FIELDS = {name for name in ServerConfig.__dataclass_fields__ if name not in ("worker", "ready_file")}
_WORKER_FIELDS = {name for name in WorkerConfig.__dataclass_fields__ if name not in ("model", "begin")}


def start(
    model: str | os.PathLike[str] = "pycode-4m",
    port: int = 0,
    *,
    dtype: str | None = None,
    device: str | None = None,
    timeout: float = 300.0,
    clock: Clock | None = None,
    **settings: Any,
) -> ServerHandle:
    """Start a server for ``model`` in a process of its own and return when it is ready.

    ``settings`` are the fields of :class:`ServerConfig` and :class:`~hasten.serve.worker.WorkerConfig`: ``replicas``,
    ``policy``, ``token_budget``, ``slo``, ``max_num_seqs``, ``num_blocks``, ``threads``, ``max_queue``, ``api_key`` …
    ``port`` 0 takes a free one. Raises :class:`~hasten.errors.EngineDeadError` with the end of its log if it ends or
    is not ready within ``timeout`` seconds, ``ConfigurationError`` for an unknown setting.
    """
    clock = clock or MonotonicClock()
    unknown = sorted(set(settings) - _SERVER_FIELDS - _WORKER_FIELDS)
    if unknown:
        known = ", ".join(sorted(_SERVER_FIELDS | _WORKER_FIELDS))
        raise ConfigurationError(f"a server has no setting {', '.join(unknown)}; it has {known}")
    worker = {k: v for k, v in settings.items() if k in _WORKER_FIELDS}
    if isinstance(worker.get("slo"), SLO):
        worker["slo"] = str(worker["slo"])
    options = dict(worker.pop("options", {}))
    if dtype is not None:
        options["dtype"] = dtype
    if device is not None:
        options["device"] = device
    folder = Path(tempfile.mkdtemp(prefix="hasten-server-"))
    ready = folder / "ready.json"
    log = folder / "server.log"
    config = ServerConfig(
        worker=WorkerConfig(model=os.fspath(model), options=options, **worker),
        port=port,
        ready_file=str(ready),
        **{k: v for k, v in settings.items() if k in _SERVER_FIELDS},
    )
    file = folder / "config.json"
    file.write_text(json.dumps(asdict(config)))
    environment = dict(os.environ)
    environment["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
    with log.open("wb") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "hasten.serve.server", str(file)],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            env=environment,
        )
    deadline = clock.now() + timeout
    while not ready.is_file():
        late = clock.now() > deadline
        if process.poll() is not None or late:
            process.kill()
            process.wait()
            lines = log.read_text(errors="replace").strip().splitlines()
            why = f"was not ready within {timeout:.0f} s" if late else f"ended with status {process.returncode}"
            raise EngineDeadError(f"the server {why}: {lines[-1] if lines else 'it wrote nothing'} (log: {log})")
        clock.sleep(0.02)
    info = json.loads(ready.read_text())
    file.unlink()
    ready.unlink()
    return ServerHandle(process, info, log, clock)


def main() -> int:
    """Entry of a server started by :func:`start`: the only argument is the file of its configuration."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    config = ServerConfig.from_dict(json.loads(Path(sys.argv[1]).read_text()))
    try:
        run(config)
    except HastenError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    from hasten.serve.server import main as entry

    sys.exit(entry())
