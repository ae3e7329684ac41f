"""What a client, a flood, a signal or a dead engine process may do to a server, over real sockets."""

import json
import os
import signal
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

import httpx
import pytest

from hasten.clock import MonotonicClock
from hasten.errors import ConfigurationError, EngineDeadError
from hasten.serve.server import start

psutil = pytest.importorskip("psutil")
CLOCK = MonotonicClock()
LONG = {"prompt": "hello", "max_tokens": 400, "ignore_eos": True, "temperature": 0}


def until(condition, timeout=15.0):
    """Poll until ``condition`` gives something true."""
    deadline = CLOCK.now() + timeout
    while True:
        found = condition()
        if found:
            return found
        assert CLOCK.now() < deadline, "waited in vain"
        CLOCK.sleep(0.02)


def metric(url, name):
    """Sum of a metric; asking with ``check`` lets the engine verify its books first."""
    lines = httpx.get(f"{url}/metrics?check", timeout=10).text.splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(f"hasten_{name}{{"))


def idle(url):
    return (
        metric(url, "num_requests_running") + metric(url, "num_requests_waiting") + metric(url, "kv_cache_usage_perc")
        == 0
    )


def engine_of(server):
    children = psutil.Process(server.process.pid).children()
    return next((c for c in children if "hasten.serve.worker" in c.cmdline()), None)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_blocks(start_fake, stream):
    server = start_fake(delay=0.05)
    parts = urlsplit(server.url)
    body = json.dumps(LONG | {"stream": stream, "n": 2}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n".encode()
    with socket.create_connection((parts.hostname, parts.port)) as connection:
        connection.sendall(head + body)
        until(lambda: metric(server.url, "num_requests_running") == 2)
        assert metric(server.url, "kv_cache_usage_perc") > 0
    until(lambda: idle(server.url), timeout=12)  # the answers would take 20 seconds
    assert metric(server.url, "request_success_total") == 2  # counted, as aborted
    server.stop()


def test_a_flood_is_turned_away_in_time(start_fake):
    server = start_fake(delay=0.01, max_num_seqs=2, max_queue=3)
    body = {"prompt": "hello", "max_tokens": 40, "ignore_eos": True}

    def ask(_):
        return httpx.post(f"{server.url}/v1/completions", json=body, timeout=30)

    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(ask, range(16)))
    refused = [a for a in answers if a.status_code == 429]
    assert len(refused) >= 4
    assert all(int(a.headers["retry-after"]) >= 1 for a in refused)
    assert all(a.json()["error"]["code"] == "server_overloaded" for a in refused)
    good = [a for a in answers if a.status_code == 200]
    assert len(good) == 16 - len(refused) >= 2
    assert ask(0).status_code == 200  # and it goes on
    too_many = httpx.post(f"{server.url}/v1/completions", json=body | {"n": 60}, timeout=30)
    assert too_many.status_code == 400  # it could never be held
    assert idle(server.url)
    assert metric(server.url, "requests_refused_total") == len(refused)
    server.stop()


def test_a_reader_that_stops_reading_is_cancelled(start_fake):
    server = start_fake(max_pending=32)
    parts = urlsplit(server.url)
    body = json.dumps(LONG | {"max_tokens": 480, "stream": True, "logprobs": 20, "n": 8}).encode()
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        connection.connect((parts.hostname, parts.port))
        connection.sendall(
            f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n".encode() + body
        )
        until(lambda: metric(server.url, "num_requests_running") > 0)
        until(lambda: idle(server.url))
        aborted = [
            line for line in httpx.get(f"{server.url}/metrics").text.splitlines() if 'finished_reason="abort"' in line
        ]
        assert float(aborted[0].rsplit(" ", 1)[1]) > 0
        answer = httpx.post(f"{server.url}/v1/completions", json={"prompt": "x", "max_tokens": 3}, timeout=10)
        assert answer.status_code == 200  # others are served meanwhile
    server.stop()


def test_sigterm_lets_running_requests_finish(start_fake):
    server = start_fake(delay=0.02)
    with (
        httpx.Client(timeout=30) as client,
        client.stream(
            "POST",
            f"{server.url}/v1/completions",
            json=LONG | {"max_tokens": 150, "stream": True, "stream_options": {"include_usage": True}},
        ) as response,
    ):
        lines = response.iter_lines()
        next(lines)
        server.process.send_signal(signal.SIGTERM)
        refused = until(lambda: (r := httpx.get(f"{server.url}/health", timeout=10)).status_code == 503 and r)
        assert refused.json()["status"] == "draining"
        refused = httpx.post(f"{server.url}/v1/completions", json={"prompt": "x"}, timeout=10)
        assert refused.status_code == 503
        assert refused.json()["error"]["code"] == "server_stopping"
        rest = [line for line in lines if line.startswith("data: ")]
    assert rest[-1] == "data: [DONE]"
    # All tokens came, be it that a busy machine sent two of them in one event.
    assert json.loads(rest[-2].removeprefix("data: "))["usage"]["completion_tokens"] == 150
    assert 100 < len(rest) <= 151
    assert server.process.wait(30) == 0
    assert engine_gone(server)
    server.stop()


def engine_gone(server):
    return not psutil.pid_exists(server.process.pid) or engine_of(server) is None


def test_a_second_signal_ends_it_at_once(start_fake):
    server = start_fake(delay=0.2)  # so that a busy machine still sees it drain
    with (
        httpx.Client(timeout=30) as client,
        client.stream("POST", f"{server.url}/v1/completions", json=LONG | {"stream": True}) as response,
    ):
        lines = response.iter_lines()  # dropped, it would hang up
        next(lines)
        server.process.send_signal(signal.SIGTERM)
        until(lambda: httpx.get(f"{server.url}/health", timeout=10).status_code == 503)
        server.process.send_signal(signal.SIGTERM)
        server.process.wait(20)  # the answer would take 80 seconds
    assert engine_gone(server)
    server.stop()


def test_a_killed_engine_is_replaced(start_fake):
    server = start_fake(delay=0.02)
    engine = engine_of(server)
    errors = []

    def ask(stream):
        with httpx.Client(timeout=30) as client:
            if not stream:
                errors.append(client.post(f"{server.url}/v1/completions", json=LONG))
                return
            with client.stream("POST", f"{server.url}/v1/completions", json=LONG | {"stream": True}) as response:
                errors.append([line for line in response.iter_lines() if line])

    threads = [threading.Thread(target=ask, args=(stream,)) for stream in (False, True)]
    for thread in threads:
        thread.start()
    until(lambda: metric(server.url, "num_requests_running") == 2)
    os.kill(engine.pid, signal.SIGKILL)
    for thread in threads:
        thread.join(10)
    whole = next(e for e in errors if not isinstance(e, list))
    assert whole.status_code == 503
    assert whole.json()["error"]["code"] == "engine_unavailable"
    assert "retry-after" in whole.headers
    stream = next(e for e in errors if isinstance(e, list))
    assert "the engine process ended" in json.loads(stream[-2][6:])["error"]["message"]
    assert stream[-1] == "data: [DONE]"
    down = httpx.get(f"{server.url}/health", timeout=10)
    assert (down.status_code, down.json()["status"]) == (503, "down")
    assert httpx.post(f"{server.url}/v1/completions", json={"prompt": "x"}, timeout=10).status_code == 503
    until(lambda: httpx.get(f"{server.url}/health", timeout=10).status_code == 200, timeout=30)
    assert engine_of(server).pid != engine.pid
    answer = httpx.post(f"{server.url}/v1/completions", json={"prompt": "x", "max_tokens": 3}, timeout=10)
    assert answer.status_code == 200
    assert metric(server.url, "engine_restarts_total") == 1
    server.stop()


def test_the_engine_ends_with_its_front(start_fake):
    server = start_fake()
    engine = engine_of(server)
    server.process.kill()
    server.process.wait()
    assert psutil.wait_procs([engine], timeout=20)[1] == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model": "/nowhere/at/all"}, "/nowhere/at/all"),
        ({"model": "{}", "loader": "fakes:load", "policy": "no-such"}, "no-such"),
        ({"model": "{}", "loader": "fakes:load", "cache_bytes": 10.0}, "holds no block"),
        ({"model": "{}", "loader": "fakes:load", "port": 1}, "cannot listen"),
    ],
)
def test_a_server_that_cannot_start_says_why(settings, message):
    if settings.get("port") == 1 and os.geteuid() == 0:
        listener = socket.create_server(("127.0.0.1", 0))
        settings = settings | {"port": listener.getsockname()[1]}
    with pytest.raises(EngineDeadError, match=message):
        start(timeout=60, **settings)


def test_an_unknown_setting_is_refused():
    with pytest.raises(ConfigurationError, match="num_block"):
        start("x", num_block=3)
