"""The engine process: loads a model, then answers the front's messages between steps.

The loop: take what has come, one step, send its news as one message. With nothing to do it waits at the socket. It
ends when the front closes the socket; signals are the front's business. Whatever the loop raises ends the process,
and the front starts another. Start-up is reported phase by phase.
"""

from __future__ import annotations

import gc
import importlib
import os
import signal
import socket
import sys
import traceback
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from hasten.budget import SLO
from hasten.clock import Clock, MonotonicClock
from hasten.errors import (
    ConfigurationError,
    EngineDeadError,
    HastenError,
    MissingExtraError,
    ModelLoadError,
    RequestError,
)
from hasten.serve.derive import derive_budget
from hasten.serve.link import Link
from hasten.serve.request import FinishReason
from hasten.serve.resident import drop_library_pages, import_numba_alone, keep_heap_small, return_freed_memory

if TYPE_CHECKING:
    from hasten.serve.engine import Engine
    from hasten.serve.output import Output

__all__ = ["WorkerConfig", "run"]


@dataclass(frozen=True)
class WorkerConfig:
    """What an engine process is to run; plain data."""

    model: str = "pycode-4m"
    """folder or name"""
    loader: str = "hasten.language.loading:load"
    """``module:function`` that makes the model"""
    options: dict[str, Any] = field(default_factory=dict)
    """keywords of the loader, such as the precision"""
    policy: str = "stall-free"
    """name of the policy"""
    token_budget: int | None = None
    """tokens of a step; None derives it from the SLO, or takes the policy's default"""
    knobs: dict[str, Any] = field(default_factory=dict)
    """further knobs of the policy"""
    slo: str | None = None
    """objectives that the token budget is derived from"""
    calibration: str | None = None
    """file of a fitted iteration cost; it is written if it is not there"""
    calibration_seconds: float = 15.0
    """how long a calibration may take"""
    max_num_seqs: int = 128
    """sequences that may run at once"""
    num_blocks: int | None = None
    """blocks of the KV cache"""
    cache_bytes: float | None = None
    """bytes of the KV cache, where ``num_blocks`` is not given"""
    block_size: int = 16
    """tokens of a block"""
    threads: int | None = None
    """threads of the model's kernels"""
    deterministic: bool = False
    """results that do not depend on the rest of the batch"""
    prefix_sharing: bool = True
    """whether equal prefixes share blocks"""
    seed: int | None = None
    """fixes what requests without a seed draw"""
    kv_precision: str = "auto"
    """of the KV cache: auto (as the activations) or int8"""
    speculate: str = "auto"
    """who guesses tokens: auto, off, draft or ngram"""
    draft: str | None = None
    """folder or name of the model that guesses"""
    kv_store: str | None = None
    """folder in which prefixes are kept across restarts"""
    kv_quality: float | None = 0.01
    """share by which stored prefixes may raise the perplexity; None keeps exact numbers"""
    begin: float = 0.0
    """when the front started the process, on the monotonic clock that both share"""


def run(link: Link, config: WorkerConfig, clock: Clock) -> None:
    """Serve until the front is gone."""
    try:
        engine, info = _start(link, config, clock)
    except HastenError as error:
        link.send("failed", type(error).__name__, str(error))
        return
    except Exception as error:
        link.send("failed", type(error).__name__, f"{type(error).__name__}: {error}\n{traceback.format_exc()}")
        return
    gc.collect()
    gc.freeze()  # what start-up made stays; collections look at requests only
    return_freed_memory()
    drop_library_pages()
    link.send("ready", info)
    _Loop(link, engine, config.slo).run()


def _start(link: Link, config: WorkerConfig, clock: Clock) -> tuple[Engine, dict[str, Any]]:
    last = config.begin or clock.now()

    def phase(name: str, detail: str = "") -> None:
        nonlocal last
        now = clock.now()
        link.send("phase", name, now - last, detail)
        last = now

    keep_heap_small()
    import torch

    if config.loader == WorkerConfig.loader:  # others may have kernels that want scipy's BLAS
        import_numba_alone()

    from hasten.serve.engine import Engine
    from hasten.serve.policy.registry import make

    if config.threads:
        torch.set_num_threads(config.threads)
    phase("import", f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    module, _, function = config.loader.partition(":")
    options = dict(config.options)
    if config.deterministic:
        options.setdefault("deterministic", True)
    model = getattr(importlib.import_module(module), function)(config.model, **options)
    try:
        tokenizer = model.tokenizer
    except ModelLoadError:
        if getattr(model, "folder", None) is not None:
            raise
        tokenizer = None  # random weights: token ids only
    phase("load", str(model.name))
    executor = model.executor
    if config.kv_precision != "auto":
        executor.keep_cache_in(config.kv_precision)
    phase("pack", f"weights {getattr(executor, 'weight_bytes', 0) / 2**20:.1f} MiB, {executor.precision}")
    blocks = config.num_blocks
    if blocks is None and config.cache_bytes is not None:
        blocks = int(config.cache_bytes // (max(1, executor.bytes_per_token) * config.block_size))
        if blocks < 1:
            raise ConfigurationError(
                f"a KV cache of {config.cache_bytes:.0f} bytes holds no block; one block of {config.block_size} tokens "
                f"takes {executor.bytes_per_token * config.block_size} bytes"
            )
    knobs = dict(config.knobs)
    known = _knobs_of(config.policy)
    budget, why = config.token_budget, ""
    if budget is None and config.slo is not None:
        derived = derive_budget(model, config, clock, blocks, paced="pace" in known)
        budget, why = derived.token_budget, derived.why
        if derived.pace is not None:
            knobs.setdefault("pace", derived.pace)
        phase("calibrate", why)
    if "max_num_seqs" in known:
        knobs.setdefault("max_num_seqs", config.max_num_seqs)
    if budget is not None and "token_budget" in known:
        knobs["token_budget"] = budget
        if "max_num_seqs" in known:  # more sequences than tokens of a step would starve
            knobs["max_num_seqs"] = min(knobs["max_num_seqs"], budget)
    policy = make(config.policy, **knobs)
    from hasten.language.speculate.choose import choose

    proposer = choose(model, config.speculate, config.draft)
    store = None
    if config.kv_store is not None:
        from hasten.serve.kvstore import PrefixStore

        store = PrefixStore.open(config.kv_store, model, quality=config.kv_quality)
        ratio = store.codec.quality.get(store.level)
        what = "exact" if store.level == 0 else f"level {store.level}, perplexity x {ratio:.4f}"
        phase("kv-store", f"{config.kv_store}, {what}")
    engine = Engine(
        model,
        policy,
        num_blocks=blocks,
        block_size=config.block_size,
        clock=clock,
        max_num_seqs=config.max_num_seqs,
        deterministic=config.deterministic,
        seed=config.seed,
        max_records=1024,
        prefix_sharing=config.prefix_sharing,
        proposer=proposer,
        kv_store=store,
    )
    if proposer is not None:
        phase("speculate", f"{proposer.name}, as far as it pays")
    cache_bytes = getattr(executor, "bytes_per_token", 0) * engine.pool.num_blocks * config.block_size
    phase("cache", f"{engine.pool.num_blocks} blocks of {config.block_size} tokens, {cache_bytes / 2**20:.1f} MiB"
          + (f" in {config.kv_precision}" if config.kv_precision != "auto" else ""))  # fmt: skip
    _warm_up(engine)
    phase("warm-up", "")
    info = {
        "name": model.name,
        "tokenizer": None if tokenizer is None else tokenizer.state(),
        "vocab_size": engine.vocab_size,
        "max_model_len": engine.max_model_len,
        "eos_token_ids": engine.eos_token_ids,
        "policy": policy.name,
        "token_budget": getattr(policy, "token_budget", None),
        "why": why,
        "precision": str(executor.precision),
        "num_blocks": engine.pool.num_blocks,
        "block_size": config.block_size,
        "pid": os.getpid(),
    }
    if tokenizer is not None:
        tokenizer.forget()  # the front reads and writes texts; here only grammars need the vocabulary
    return engine, info


def _knobs_of(policy: str) -> set[str]:
    import inspect

    from hasten.serve.policy.registry import POLICIES, make

    factory = POLICIES.get(policy)
    return set(inspect.signature(factory if factory is not None else type(make(policy))).parameters)


def _warm_up(engine: Engine) -> None:
    """Run each kind of step once, so that no request pays for a first time; then forget it."""
    from hasten.language.params import SamplingParams

    limit = engine.max_model_len - 4
    # A prompt that attention takes as one piece and one that it takes row by row; guesses for two and for more.
    lengths = [max(1, min(length, limit)) for length in (48, 16, 48, 16)]
    room = max(1, min(3, engine.max_model_len - max(lengths)))
    prompts = [[i % engine.vocab_size for i in range(n, n + length)] for n, length in enumerate(lengths)]
    for temperature, count in ((0.0, 2), (0.0, 4), (1.0, 2)):
        params = SamplingParams(
            max_tokens=room, temperature=temperature, top_p=0.9 if temperature else 1.0, ignore_eos=True
        )
        for prompt in prompts[:count]:
            engine.add(prompt, params)
        while engine.has_work:
            engine.step()
    engine.reset()


class _Loop:
    """Requests and news between the link and the engine."""

    def __init__(self, link: Link, engine: Engine, slo: str | None = None) -> None:
        self._link = link
        self._slo = SLO.parse(slo) if slo is not None else None  # of requests that bring none
        self._engine = engine
        self._names: dict[int, int] = {}  # engine's number -> front's
        self._seqs: dict[int, int] = {}  # front's -> engine's
        self._compiling: dict[int, tuple[Future[Any], tuple[Any, ...]]] = {}
        self._pool = ThreadPoolExecutor(1, "grammar")

    def run(self) -> None:
        engine, link = self._engine, self._link
        try:
            while True:
                wait = 0.0 if engine.has_work else (0.002 if self._compiling else None)
                for message in link.receive(wait):
                    self._take(message)
                if self._compiling:
                    self._add_compiled()
                if engine.has_work:
                    news = [self._news(output) for output in engine.step()]
                    if news:
                        link.send("out", news)
        except EngineDeadError:
            return  # the front is gone, and so are the users
        finally:
            self._engine.close()
            self._pool.shutdown(wait=False, cancel_futures=True)

    def _take(self, message: tuple[Any, ...]) -> None:
        kind = message[0]
        if kind == "add":
            for request in message[1]:
                if request[2].grammar is not None:
                    future = self._pool.submit(self._engine.compile_grammar, request[2])
                    self._compiling[request[0]] = (future, request)
                else:
                    self._add(request, None)
        elif kind == "cancel":
            for name, stop in message[1]:
                waiting = self._compiling.pop(name, None)
                if waiting is not None:
                    waiting[0].cancel()
                seq = self._seqs.pop(name, None)
                if seq is not None:
                    self._names.pop(seq, None)
                    self._engine.cancel(seq, FinishReason.STOP if stop else FinishReason.ABORT)
        elif kind == "stats":
            self._link.send("stats", message[1], self._engine.stats())
        elif kind == "check":
            self._engine.check_integrity()
            self._link.send("stats", message[1], self._engine.stats())

    def _add(self, request: tuple[Any, ...], grammar: Any) -> None:
        name, tokens, params, arrival, priority, slo, leader = request
        try:
            follow = self._seqs.get(leader) if leader is not None else None
            objective = slo if slo is not None else self._slo
            seq = self._engine.add(tokens, params, arrival, priority, objective, follow=follow, grammar=grammar)
        except (RequestError, MissingExtraError) as error:
            self._link.send("refused", name, type(error).__name__, str(error), getattr(error, "param", None))
            return
        self._names[seq] = name
        self._seqs[name] = seq

    def _add_compiled(self) -> None:
        for name in [n for n, (future, _) in self._compiling.items() if future.done()]:
            future, request = self._compiling.pop(name)
            error = future.exception()
            if isinstance(error, (RequestError, MissingExtraError)):
                param = getattr(error, "param", "response_format")
                self._link.send("refused", name, type(error).__name__, str(error), param)
            elif error is not None:
                raise error
            else:
                self._add(request, future.result())

    def _news(self, output: Output) -> tuple[Any, ...]:
        name = self._names.get(output.seq)
        if output.finish is not None and name is not None:
            del self._names[output.seq]
            del self._seqs[name]
        elif output.logprobs is None and output.timing is None:  # one more token, nothing else
            return (name, output.token)
        output.seq = name if name is not None else -1
        return (name, output.token, output)


def main() -> None:
    """Entry of the process: the socket's number is the only argument, the configuration its first message."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    link = Link(socket.socket(fileno=int(sys.argv[1])))
    messages: list[tuple[Any, ...]] = []
    try:
        while not messages:
            messages = link.receive(None)
        run(link, messages[0][1], MonotonicClock())
    except EngineDeadError:
        return


if __name__ == "__main__":
    from hasten.serve.worker import main as entry  # so that WorkerConfig has one name in both processes

    entry()
