"""Served goodput at one SLO: our server, transformers' continuous batching, llama.cpp's server.

The same requests (lengths in the proportions of a conversation trace, Poisson arrivals) are replayed over a socket
against each server in turn, rate by rate, with all servers loaded and the waiting ones idle. A request is good when it
met every objective; goodput is good requests per second. Each server is scored by its best goodput over the rates.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
from harness import HERE, MODEL, Absent, Row, options, report
from random_model import ensure, gguf_path

from hasten.budget import SLO
from hasten.clock import MonotonicClock
from hasten.errors import HastenError
from hasten.serve.bench.drive import replay
from hasten.serve.metrics import ServingMetrics, summarise
from hasten.serve.server import ServerHandle, start
from hasten.serve.workload import Workload, load, sample

OURS, TORCH, LLAMA = "hasten", "transformers continuous batching", "llama.cpp server"
_TRACE = "llm_traces/azure_conv.csv.gz"
_clock = MonotonicClock()


def conversation(data: Path | None, requests: int, max_prompt: int, max_output: int, seed: int) -> Workload:
    """Requests of the conversation trace, shrunk to the model; the built-in sample where there is no trace."""
    trace = None if data is None else data / _TRACE
    if trace is not None and trace.is_file():
        whole = load(trace).scaled(max_prompt=max_prompt, max_output=max_output)
    else:
        whole = sample("conversation", requests=5000, seed=seed).scaled(max_prompt=max_prompt, max_output=max_output)
    return whole.resampled(requests, seed=seed)


@dataclass
class Peer:
    """A server under test."""

    name: str
    url: str
    pid: int
    end: Any
    extra: tuple[tuple[str, Any], ...] = ()
    runs: list[ServingMetrics] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)

    def cpu_time(self) -> float:
        """Seconds of processor time of the process and its children."""
        whole = 0.0
        root = psutil.Process(self.pid)
        for process in [root, *root.children(recursive=True)]:
            times = process.cpu_times()
            whole += times.user + times.system
        return whole

    @property
    def best(self) -> float:
        """Best goodput so far (requests per second)."""
        return max((run.goodput for run in self.runs), default=0.0)

    @property
    def saturated(self) -> bool:
        """Whether goodput has fallen under half of its best: higher rates would only waste time."""
        return bool(self.runs) and self.runs[-1].goodput < 0.5 * self.best or len(self.runs) > 1 and self.best == 0

    @property
    def unsaturated(self) -> bool:
        """Whether the highest rate was still served well, so that the best goodput may lie beyond."""
        return bool(self.runs) and self.runs[-1].slo_attainment >= 0.9


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def launch(name: str, command: Sequence[str], port: int, threads: int, timeout: float = 180.0, **extra: Any) -> Peer:
    """Start a peer's server and wait until it lists its model. Raises :class:`Absent`."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    log = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the server
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment)

    def end() -> None:
        process.terminate()
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        log.close()

    import httpx

    deadline = _clock.now() + timeout
    while True:
        try:
            if httpx.get(f"http://127.0.0.1:{port}/v1/models", timeout=2.0).status_code == 200:
                return Peer(name, f"http://127.0.0.1:{port}", process.pid, end, tuple(extra.items()))
        except httpx.HTTPError:
            pass  # it does not listen yet; the lines below decide how long that is all right
        if process.poll() is not None or _clock.now() > deadline:
            log.seek(0)
            lines = log.read().decode(errors="replace").strip().splitlines()[-1:]
            end()
            raise Absent(f"did not start: {lines[0][:200] if lines else 'it wrote nothing'}")
        _clock.sleep(0.25)


def ours(chosen: Any) -> Peer:
    """Our server, with the token budget derived from the SLO on this machine."""
    handle: ServerHandle = start(
        chosen.model,
        threads=chosen.threads,
        slo=chosen.slo,
        token_budget=chosen.token_budget,
        max_num_seqs=chosen.sequences,
        num_blocks=chosen.cache_tokens // 16,
        max_queue=4096,
        dtype="bf16",
    )
    return Peer(OURS, handle.url, handle.process.pid, handle.stop)


def transformers_server(chosen: Any) -> Peer:
    """transformers behind front_transformers.py."""
    if find_spec("transformers") is None:
        raise Absent("not installed")
    port = free_port()
    command = [sys.executable, str(HERE / "front_transformers.py"), str(chosen.model), "--port", str(port)]
    command += ["--threads", str(chosen.threads), "--tokens", str(chosen.cache_tokens)]
    command += ["--batch-tokens", str(chosen.peer_batch)]
    return launch(TORCH, command, port, chosen.threads)


def llama_server(chosen: Any) -> Peer:
    """llama-server if there is a binary, else the server inside xllamacpp."""
    binary = chosen.llama_server or shutil.which("llama-server")
    model, port = gguf_path(chosen.model, "f16"), free_port()
    if binary is None and find_spec("xllamacpp") is None:
        raise Absent("not installed")
    if not model.is_file():
        raise Absent(f"{model.name} is missing; install gguf and run random_model.py")
    threads, slots, tokens = str(chosen.threads), str(chosen.sequences), str(chosen.cache_tokens)
    if binary is not None:
        command = [str(binary), "-m", str(model), "--port", str(port), "--host", "127.0.0.1", "-t", threads]
        command += ["-tb", threads, "-np", slots, "-c", tokens, "--kv-unified", "--no-cache-prompt"]
        return launch(LLAMA, command, port, chosen.threads, cache_prompt=False)
    command = [sys.executable, str(HERE / "front_llama.py"), str(model), "--port", str(port)]
    command += ["--threads", threads, "--slots", slots, "--tokens", tokens]
    return launch(LLAMA, command, port, chosen.threads, cache_prompt=False)


def run(peers: dict[str, Peer], workload: Workload, rates: Sequence[float], slo: SLO, seed: int) -> float:
    """Replay every rate against every server in turn; the largest share of a core that waiting servers used."""
    idle = 0.0
    warm = workload.head(4)
    for peer in peers.values():
        asyncio.run(replay(peer.url, warm, seed=seed + 99, extra=peer.extra))
    for turn, rate in enumerate(rates):
        order = list(peers.values())
        for peer in order if turn % 2 == 0 else order[::-1]:
            if peer.saturated:
                print(f"{rate:g}/s {peer.name}: skipped, its goodput has passed its best")
                continue
            _clock.sleep(0.5)
            others = [p for p in order if p is not peer]
            before, begin = sum(p.cpu_time() for p in others), _clock.now()
            asked = workload.at_rate(rate, seed=seed + turn)
            # New prompts at each rate, the same ones for everybody, so that no prefix cache helps.
            records = asyncio.run(replay(peer.url, asked, seed=seed + turn, extra=peer.extra))
            idle = max(idle, (sum(p.cpu_time() for p in others) - before) / (_clock.now() - begin))
            metrics = summarise(records, slo)
            peer.runs.append(metrics)
            peer.rates.append(rate)
            error = next((r.error for r in records if r.error), "")
            print(
                f"{rate:g}/s {peer.name}: goodput {metrics.goodput:.2f}/s ({metrics.slo_attainment:.0%}), "
                f"ttft p50 {metrics.ttft.p50:.2f} p99 {metrics.ttft.p99:.2f} s, "
                f"tpot p50 {metrics.tpot.p50 * 1e3:.0f} p99 {metrics.tpot.p99 * 1e3:.0f} ms, "
                f"{metrics.output_throughput:.0f} tokens/s, {metrics.failed} failed {error}",
                flush=True,
            )
    return idle


def rows_of(peers: dict[str, Peer], absent: dict[str, str]) -> list[Row]:
    """One row per peer. There is no ratio while the peer could take more; ours is then a lower bound at best."""
    rows = []
    for name in (TORCH, LLAMA):
        row = Row("served goodput, best of the rates", name, unit="req/s", at_least=2.0, aim=3.0)
        if name not in peers:
            rows.append(replace(row, note=absent[name]))
            continue
        mine, theirs = peers[OURS], peers[name]
        row = replace(row, ours=mine.best, theirs=theirs.best)
        if theirs.best == 0:
            row = replace(row, note="no ratio: the peer has no goodput at any of these rates; lower --rates")
        elif theirs.unsaturated:
            row = replace(row, note="no ratio: the peer keeps up with the highest rate; raise --rates")
        else:
            bound = "a lower bound: ours keeps up with the highest rate; raise --rates" if mine.unsaturated else ""
            row = replace(row, score=mine.best / theirs.best, note=bound)
        rows.append(row)
    return rows


def main() -> None:
    """Run and print."""
    parser = options(__doc__)
    parser.add_argument("--model", type=Path, default=MODEL, help=f"folder of random_model.py (default {MODEL})")
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("HASTEN_DATA", "../shared/data")))
    parser.add_argument("--rates", type=float, nargs="+", default=[0.5, 1, 2, 3, 4, 6, 8], help="requests per second")
    parser.add_argument("--requests", type=int, default=60, help="requests per run (default 60)")
    parser.add_argument("--slo", default="ttft<1s, tpot<100ms, p99", help="objectives (default %(default)s)")
    parser.add_argument("--max-prompt", type=int, default=1024, help="tokens that long prompts shrink to")
    parser.add_argument("--max-output", type=int, default=128, help="tokens that long answers shrink to")
    parser.add_argument("--sequences", type=int, default=32, help="sequences at once, for servers that need a bound")
    parser.add_argument("--cache-tokens", type=int, default=32768, help="tokens of every server's KV cache")
    parser.add_argument("--token-budget", type=int, help="ours; without it, it is derived from the SLO")
    parser.add_argument("--peer-batch", type=int, default=512, help="tokens of a step of transformers' manager")
    parser.add_argument("--llama-server", type=Path, help="binary; else the one on the path, else xllamacpp's")
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    slo = SLO.parse(chosen.slo)
    ensure(chosen.model, chosen.threads)
    workload = conversation(chosen.data, chosen.requests, chosen.max_prompt, chosen.max_output, chosen.seed)
    print(f"{workload.describe()}; SLO {slo}")
    peers: dict[str, Peer] = {}
    absent: dict[str, str] = {}
    try:
        peers[OURS] = ours(chosen)
        for name, make in ((TORCH, transformers_server), (LLAMA, llama_server)):
            try:
                peers[name] = make(chosen)
            except Absent as reason:
                absent[name] = str(reason)
                print(f"{name}: {reason}")
        idle = run(peers, workload, chosen.rates, slo, chosen.seed)
    except HastenError as error:
        raise SystemExit(f"{type(error).__name__}: {error}") from None
    finally:
        for peer in peers.values():
            peer.end()
    runs = {
        name: [{"rate": r, **m.to_dict()} for r, m in zip(peer.rates, peer.runs, strict=True)]
        for name, peer in peers.items()
    }
    details = {"slo": str(slo), "workload": workload.describe(), "runs": runs, "idle_share": idle, "absent": absent}
    details["llama_server"] = str(chosen.llama_server or shutil.which("llama-server") or "xllamacpp")
    report(f"serving, {chosen.model.name}, SLO {slo}", rows_of(peers, absent), chosen.json, **details)


if __name__ == "__main__":
    main()
