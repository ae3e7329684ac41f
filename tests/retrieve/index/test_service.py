"""The HTTP service, in process: JSON and binary, batching, metrics, errors."""

import asyncio
import shutil
import signal
import socket
import struct
import subprocess
import sys

import httpx
import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

import hasten.retrieve as hr
from hasten.errors import OverloadedError
from hasten.retrieve.index.service import Batcher, IndexApp


@pytest.fixture
def app(built, tmp_path):
    shutil.copytree(built, tmp_path / "index")
    with hr.Spann.open(tmp_path / "index") as index:
        app = IndexApp(index)
        yield app
        app.batcher.close()


def call(app, *requests):
    """Answers of requests that are made at the same time."""

    async def run():
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://t") as client:
            return await asyncio.gather(*(client.request(*r[:2], **(r[2] if len(r) > 2 else {})) for r in requests))

    return asyncio.run(run())


def test_json_search(app, collection):
    _, queries = collection
    (answer,) = call(app, ("POST", "/search", {"json": {"vectors": queries[:4].tolist(), "k": 3, "lists": 8}}))
    wanted = app.index.search(queries[:4], 3, lists=8)
    assert answer.status_code == 200
    assert answer.json()["ids"] == wanted.ids.tolist()
    np.testing.assert_allclose(answer.json()["distances"], wanted.distances, rtol=1e-6)
    assert answer.json()["complete"] == [True] * 4
    (one,) = call(app, ("POST", "/search", {"json": {"vector": queries[0].tolist(), "k": 1, "lists": None}}))
    assert one.json()["ids"] == app.index.exact(queries[:1], 1).ids.tolist()


def test_binary_search(app, collection):
    _, queries = collection
    headers = {"content-type": "application/octet-stream", "accept": "application/octet-stream"}
    (answer,) = call(app, ("POST", "/search?k=5&lists=8", {"content": queries[:7].tobytes(), "headers": headers}))
    count, k = struct.unpack_from("<II", answer.content)
    ids = np.frombuffer(answer.content, "<i8", count * k, 8).reshape(count, k)
    distances = np.frombuffer(answer.content, "<f4", count * k, 8 + 8 * count * k).reshape(count, k)
    wanted = app.index.search(queries[:7], 5, lists=8)
    np.testing.assert_array_equal(ids, wanted.ids)
    np.testing.assert_array_equal(distances, wanted.distances)


def test_requests_at_one_time_share_a_batch(app, collection):
    _, queries = collection
    answers = call(app, *(("POST", "/search", {"json": {"vector": q.tolist(), "k": 2}}) for q in queries))
    wanted = app.index.search(queries, 2).ids
    assert [a.json()["ids"][0] for a in answers] == wanted.tolist()
    assert sum(app.batcher.batches.counts) < len(queries) / 4
    assert app.batcher.batches.total == len(queries)


def test_different_knobs_do_not_mix(app, collection):
    _, queries = collection
    requests = [("POST", "/search", {"json": {"vector": q.tolist(), "k": 1 + i % 3}}) for i, q in enumerate(queries)]
    for i, answer in enumerate(call(app, *requests)):
        assert len(answer.json()["ids"][0]) == 1 + i % 3


def test_one_bad_request_does_not_spoil_its_batch(app, collection):
    _, queries = collection
    good = ("POST", "/search", {"json": {"vector": queries[0].tolist(), "k": 5000}})
    answers = call(app, good, good, ("POST", "/search", {"json": {"vector": queries[1].tolist(), "k": 2}}))
    assert [a.status_code for a in answers] == [400, 400, 200]
    assert "2000 rows" in answers[0].json()["error"]["message"]


def test_rows_come_and_go(app, collection):
    _, queries = collection
    body = {"ids": [9000, 9001], "vectors": queries[:2].tolist(), "attributes": {"lang": ["en", "de"]}}
    assert call(app, ("POST", "/add", {"json": body}))[0].json() == {"rows": 2002}
    found = call(app, ("POST", "/search", {"json": {"vector": queries[0].tolist(), "k": 1, "where": {"lang": "en"}}}))[
        0
    ]
    assert found.json()["ids"] == [[9000]]
    assert call(app, ("POST", "/add", {"json": body}))[0].status_code == 400
    assert call(app, ("POST", "/upsert", {"json": body}))[0].json() == {"rows": 2002}
    assert call(app, ("POST", "/delete", {"json": {"ids": [9000, 12345]}}))[0].json() == {"deleted": 1, "rows": 2001}
    assert call(app, ("POST", "/compact"))[0].status_code == 202
    app.index.wait()
    assert call(app, ("GET", "/health"))[0].json() == {"status": "ok", "rows": 2001, "generation": 2}


@pytest.mark.parametrize(
    ("path", "given", "status", "word"),
    [
        ("/search", {"content": b"{"}, 400, "JSON"),
        ("/search", {"content": b"[1]"}, 400, "object"),
        ("/search", {"json": {}}, 400, "vectors is missing"),
        ("/search", {"json": {"vectors": [[1, 2]]}}, 400, "takes"),
        ("/search", {"json": {"vectors": [["a"] * 12]}}, 400, "numbers"),
        ("/search", {"json": {"vectors": [[0] * 12], "colour": 1}}, 400, "colour"),
        ("/search", {"json": {"vectors": [[0] * 12], "k": "many"}}, 400, "k is 'many'"),
        ("/search", {"json": {"vectors": [[0] * 12], "k": 0}}, 400, "k is 0"),
        ("/search", {"json": {"vectors": [[0] * 12], "lists": -4}}, 400, "lists is -4"),
        ("/search", {"json": {"vectors": [[0] * 12], "where": 5}}, 400, "where"),
        ("/search", {"json": {"vectors": [[0] * 12], "deadline": "soon"}}, 400, "deadline"),
        ("/search", {"content": b"123", "headers": {"content-type": "application/octet-stream"}}, 400, "48 bytes"),
        ("/add", {"json": {"ids": [1.5], "vectors": [[0] * 12]}}, 400, "whole numbers"),
        ("/add", {"json": {"ids": [4000, 4001], "vectors": [[0] * 12]}}, 400, "shape"),
        ("/delete", {"json": {"ids": "all"}}, 400, "ids"),
        ("/nowhere", {"json": {}}, 404, "/search"),
        ("/metrics", {"json": {}}, 405, "GET"),
    ],
)
def test_bad_requests(app, path, given, status, word):
    (answer,) = call(app, ("POST", path, given))
    assert answer.status_code == status
    assert word in answer.json()["error"]["message"]
    assert len(app.index) == 2000


def test_a_body_over_the_limit(built):
    with hr.Spann.open(built, read_only=True) as index:
        app = IndexApp(index, max_body=100)
        assert call(app, ("POST", "/search", {"content": b"x" * 101}))[0].status_code == 413
        app.batcher.close()


def test_a_read_only_server_refuses_changes(built):
    with hr.Spann.open(built, read_only=True) as index:
        app = IndexApp(index)
        answers = call(app, ("POST", "/compact"), ("POST", "/delete", {"json": {"ids": [1]}}))
        assert [a.status_code for a in answers] == [400, 400]
        assert all("read-only" in a.json()["error"]["message"] for a in answers)
        app.batcher.close()


@pytest.mark.slow
def test_a_server_serves_and_stops(built, tmp_path):
    shutil.copytree(built, tmp_path / "index")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = "from hasten.cli.main import run; run()"
    process = subprocess.Popen(
        [sys.executable, "-c", command, "index", "serve", str(tmp_path / "index"), "--port", str(port)]
    )
    try:
        transport = httpx.HTTPTransport(retries=8)  # it waits longer each time until the server listens
        with httpx.Client(transport=transport, base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
            assert client.get("/health").json()["rows"] == 2000
            answer = client.post("/search", json={"vector": [0.0] * 12, "k": 3})
            assert len(answer.json()["ids"][0]) == 3
            assert client.post("/delete", json={"ids": [1]}).json() == {"deleted": 1, "rows": 1999}
        process.send_signal(signal.SIGTERM)
        process.wait(30)
    finally:
        process.kill()
    with hr.Spann.open(tmp_path / "index") as index:  # the lock is free, the change is there
        assert len(index) == 1999


def test_a_full_queue_is_told(built):
    with hr.Spann.open(built, read_only=True) as index:
        batcher = Batcher(index, max_queue=3)

        async def run():
            asked = [asyncio.ensure_future(batcher.search(np.zeros((1, 12), np.float32), {"k": 1})) for _ in range(5)]
            return await asyncio.gather(*asked, return_exceptions=True)

        answers = asyncio.run(run())
        assert sum(isinstance(a, OverloadedError) for a in answers) == 2
        batcher.close()


def test_metrics_are_prometheus(app, collection):
    _, queries = collection
    call(app, ("POST", "/search", {"json": {"vectors": queries[:3].tolist(), "lists": 4}}), ("GET", "/nowhere"))
    text = call(app, ("GET", "/metrics"))[0].text
    families = {f.name: f for f in text_string_to_metric_families(text)}
    assert families["hasten_index_queries"].samples[0].value == 3
    assert families["hasten_index_lists_read"].samples[0].value == 12
    assert families["hasten_index_rows"].samples[0].value == 2000
    told = {(s.labels["path"], s.labels["status"]): s.value for s in families["hasten_index_requests"].samples}
    assert told[("/search", "200")] == 1
    assert told[("other", "404")] == 1
    count = next(s for s in families["hasten_index_search_seconds"].samples if s.name.endswith("_count"))
    assert count.value == 1
    assert call(app, ("GET", "/stats"))[0].json()["memory_parts"]["graph"] > 0
