"""Several engines behind one front: placement, sums of counters, and what the death of one costs its requests."""

import asyncio
import json
import os
import signal
import threading
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from test_faults import LONG, metric, until

from hasten.errors import ConfigurationError, EngineDeadError
from hasten.language.params import SamplingParams
from hasten.serve.replicas import Replicas, add_counts, share_threads
from hasten.serve.server import ServerConfig
from hasten.serve.worker import WorkerConfig

psutil = pytest.importorskip("psutil")
FAKE = WorkerConfig("{}", loader="fakes:load", max_num_seqs=4, num_blocks=64, threads=1, seed=0)


def workers(server):
    found = [c for c in psutil.Process(server.process.pid).children() if c.is_running()]
    return [c for c in found if "hasten.serve.worker" in c.cmdline()]


def by_replica(url, name):
    """A gauge, by replica."""
    out = {}
    for line in httpx.get(f"{url}/metrics", timeout=10).text.splitlines():
        if line.startswith(f"hasten_{name}{{"):
            out[line.partition('engine="')[2].partition('"')[0]] = float(line.rsplit(" ", 1)[1])
    return out


def ask(url, **fields):
    return httpx.post(f"{url}/v1/completions", json=LONG | fields, timeout=60)


class Calls:
    """Requests in threads of their own; ``answers`` in their order."""

    def __init__(self, url, count, **fields):
        self._pool = ThreadPoolExecutor(count)
        self._futures = [self._pool.submit(ask, url, prompt=f"hello {i}", **fields) for i in range(count)]

    def answers(self):
        out = [f.result(60) for f in self._futures]
        self._pool.shutdown()
        return out


def test_both_replicas_serve(start_fake):
    server = start_fake(delay=0.02, replicas=2)
    assert len(workers(server)) == 2
    health = httpx.get(f"{server.url}/health", timeout=10)
    assert health.json() == {"status": "ready", "restarts": 0, "replicas": 2, "alive": 2}
    calls = Calls(server.url, 4, max_tokens=60)
    until(lambda: by_replica(server.url, "num_requests_running") == {"0": 2, "1": 2})
    answers = calls.answers()
    alone = ask(server.url, prompt="hello 2", max_tokens=60)
    assert [a.status_code for a in answers] == [200] * 4
    assert answers[2].json()["choices"][0]["text"] == alone.json()["choices"][0]["text"]
    assert metric(server.url, "generation_tokens_total") == 5 * 60
    assert metric(server.url, "request_success_total") == 5
    assert by_replica(server.url, "engine_up") == {"0": 1, "1": 1}
    assert server.stop(20) == 0


def test_a_killed_replica_costs_only_the_streams_that_had_begun(start_fake):
    server = start_fake(delay=0.02, replicas=2)
    victim = workers(server)[0]
    body = LONG | {"stream": True, "max_tokens": 200}
    streams = [[], []]

    def stream(lines):
        with (
            httpx.Client(timeout=30) as client,
            client.stream("POST", f"{server.url}/v1/completions", json=body) as response,
        ):
            lines.extend(line for line in response.iter_lines() if line)

    threads = [threading.Thread(target=stream, args=(lines,)) for lines in streams]
    for thread in threads:
        thread.start()
    until(lambda: by_replica(server.url, "num_requests_running") == {"0": 1, "1": 1})
    until(lambda: all(streams))  # both have begun
    whole = Calls(server.url, 4, max_tokens=100)
    until(lambda: by_replica(server.url, "num_requests_running") == {"0": 3, "1": 3})
    os.kill(victim.pid, signal.SIGKILL)
    until(lambda: metric(server.url, "engine_restarts_total") == 1)
    health = httpx.get(f"{server.url}/health", timeout=10)
    assert (health.status_code, health.json()["alive"]) == (200, 1)
    answers = whole.answers()
    assert [a.status_code for a in answers] == [200] * 4
    assert all(a.json()["usage"]["completion_tokens"] == 100 for a in answers)
    for thread in threads:
        thread.join(30)
    ends = [json.loads(lines[-2][6:]).get("error", {}).get("message", "") for lines in streams]
    assert sum("the engine process ended" in end for end in ends) == 1  # its text was half out already
    assert metric(server.url, "request_retries_total") == 2  # the answers that nobody had seen a part of
    until(lambda: httpx.get(f"{server.url}/health", timeout=10).json()["alive"] == 2, timeout=30)
    assert ask(server.url, max_tokens=3).status_code == 200
    server.stop()


def test_retried_once_only(start_fake):
    server = start_fake(delay=0.02, replicas=2)
    calls = Calls(server.url, 1, max_tokens=400)
    until(lambda: metric(server.url, "num_requests_running") == 1)
    for times in (1, 2):
        at = until(lambda: [k for k, v in by_replica(server.url, "num_requests_running").items() if v])[0]
        os.kill(until(lambda label=at: running_on(server, label)).pid, signal.SIGKILL)
        until(lambda n=times: metric(server.url, "engine_restarts_total") == n)
    (answer,) = calls.answers()
    assert answer.status_code == 503
    assert answer.json()["error"]["code"] == "engine_unavailable"
    assert metric(server.url, "request_retries_total") == 1
    server.stop()


def running_on(server, label):
    """The process of a replica: the front starts them in order, and restarted ones come behind."""
    found = sorted(workers(server), key=lambda c: (c.create_time(), c.pid))
    if len(found) == 2 and metric(server.url, "engine_restarts_total") == 0:
        return found[int(label)]
    return found[0] if found else None  # the one that is not new


def test_sigterm_drains_all(start_fake):
    server = start_fake(delay=0.01, replicas=2)
    calls = Calls(server.url, 4, max_tokens=150)
    until(lambda: by_replica(server.url, "num_requests_running") == {"0": 2, "1": 2})
    server.process.send_signal(signal.SIGTERM)
    refused = until(lambda: (r := httpx.get(f"{server.url}/health", timeout=10)).status_code == 503 and r)
    assert refused.json()["status"] == "draining"
    assert ask(server.url).json()["error"]["code"] == "server_stopping"
    os.kill(workers(server)[1].pid, signal.SIGKILL)  # what runs there moves even now
    answers = calls.answers()
    assert [a.json()["usage"]["completion_tokens"] for a in answers] == [150] * 4
    assert server.process.wait(15) == 0
    server.stop()


def test_a_full_replica_is_passed_over_and_all_full_is_429():
    async def check():
        engine = Replicas(FAKE, 2, max_queue=0)
        assert engine.state == "starting"
        with pytest.raises(EngineDeadError):
            engine.check_open()
        await engine.start()
        try:
            params = SamplingParams(max_tokens=400, temperature=0.0, ignore_eos=True)
            tickets = [engine.submit([[1] * 8], params, copies=4), engine.submit([[2] * 8], params, copies=4)]
            loads = [e.load for e in engine.engines]
            assert [load.requests for load in loads] == [4, 4]
            assert all(load.tokens >= 8 for load in loads)
            with pytest.raises(Exception, match="at most 0 may"):
                engine.submit([[3]], params)
            assert engine.refused["overloaded"] == 1
            for ticket in tickets:
                ticket.cancel()
            assert [e.load.tokens for e in engine.engines] == [0, 0]
            assert await engine.drain(5)
            assert engine.state == "draining"
        finally:
            await engine.stop()

    asyncio.run(check())


def runs_an_engine(process):
    try:
        return "hasten.serve.worker" in process.cmdline()
    except psutil.NoSuchProcess:  # ended, perhaps not yet waited for
        return False


def test_one_that_cannot_start_ends_all():
    async def check():
        engine = Replicas(WorkerConfig("{}", loader="fakes:load", policy="no-such", threads=1), 2)
        with pytest.raises(ConfigurationError, match="no-such"):
            await engine.start()
        assert engine.state == "stopped"

    asyncio.run(check())
    assert not any(runs_an_engine(child) for child in psutil.Process().children())


def test_histograms_and_counters_add_up():
    histogram = {"bounds": [1, 2], "counts": [1, 2, 3], "sum": 4.0}
    one = {"counters": {"a": 1}, "finished": {"stop": 2}, "histograms": {"h": histogram}, "gauges": {"g": 1}}
    twice = add_counts(one, one)
    assert twice == {
        "counters": {"a": 2},
        "finished": {"stop": 4},
        "histograms": {"h": {"bounds": [1, 2], "counts": [2, 4, 6], "sum": 8.0}},
    }
    assert add_counts({}, one) == {k: v for k, v in one.items() if k != "gauges"}


def test_settings_are_checked():
    with pytest.raises(ConfigurationError, match="replicas is 0"):
        ServerConfig(replicas=0)
    with pytest.raises(ConfigurationError, match="balancer 'luck'"):
        ServerConfig(balancer="luck")
    with pytest.raises(ConfigurationError, match="replicas is 0"):
        Replicas(FAKE, 0)
    assert share_threads(10_000) == 1


class FakeEngine:
    """Answers ``stats`` with what the test says."""

    def __init__(self):
        self.restarts, self.alive, self.tokens = 0, True, 0

    async def stats(self, timeout=2.0, *, check=False):
        return {"counters": {"generation_tokens": self.tokens}, "finished": {}, "gauges": {"num_requests_running": 1}}


def test_counters_never_fall_when_processes_die():
    engine = Replicas(FAKE, 2)
    one, two = engine.engines = [FakeEngine(), FakeEngine()]

    def seen():
        stats = asyncio.run(engine.stats())
        return stats["counters"]["generation_tokens"], sorted(stats["gauges"].get("num_requests_running", {}))

    one.tokens, two.tokens = 10, 5
    assert seen() == (15, ["0", "1"])
    one.restarts, one.alive = 1, False  # its last answer is stale and must not count twice
    assert seen() == (15, ["1"])
    assert seen() == (15, ["1"])
    one.alive, one.tokens = True, 2
    assert seen() == (17, ["0", "1"])
    one.restarts, one.tokens = 2, 1  # died and came back between two looks
    assert seen() == (18, ["0", "1"])
