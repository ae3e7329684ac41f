"""The benchmark client: lengths and times are right, failures are records, any chunking of a stream reads the same."""

import asyncio
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hasten.clock import ManualClock
from hasten.errors import ConfigurationError, DataError, EngineDeadError
from hasten.serve.bench import closed_loop, goodput_slo, prompts_of, replay, result_json, run, table
from hasten.serve.bench.dataset import custom, random_specs
from hasten.serve.bench.wire import Reply, _Connection
from hasten.serve.metrics import RequestRecord
from hasten.serve.workload import RequestSpec

SPECS = [RequestSpec(0.01 * i, 5 + i, 4 + i % 3) for i in range(12)]


@pytest.mark.parametrize("endpoint", ["/v1/completions", "/v1/chat/completions"])
def test_replay_records_every_request(server, endpoint):
    records = asyncio.run(replay(server.url, SPECS, endpoint=endpoint))
    assert [r.id for r in records] == [str(i) for i in range(12)]
    assert [r.output_tokens for r in records] == [s.output_len for s in SPECS]
    assert all(r.ok and r.finish_reason == "length" for r in records)
    assert all(len(r.token_times) == r.output_tokens for r in records)
    assert all(r.arrival < r.token_times[0] <= r.token_times[-1] for r in records)
    assert all(0 <= r.queue <= r.ttft for r in records)
    if endpoint == "/v1/completions":
        assert [r.prompt_tokens for r in records] == [s.prompt_len for s in SPECS]
    arrivals = [r.arrival for r in records]
    assert arrivals == sorted(arrivals)


def test_closed_loop_keeps_its_number_of_clients(start_fake):
    server = start_fake(delay=0.002)
    records = asyncio.run(closed_loop(server.url, SPECS, 3))
    events = sorted([(r.arrival, 1) for r in records] + [(r.token_times[-1], -1) for r in records])
    running, most = 0, 0
    for _, change in events:
        running += change
        most = max(most, running)
    assert len(records) == 12
    assert most == 3
    server.stop()


def test_concurrency_is_bounded_and_progress_is_told(server):
    done = []
    records = run(
        server.url, prompts_of(SPECS), request_rate=float("inf"), max_concurrency=1, progress=lambda: done.append(1)
    )
    ordered = sorted(records, key=lambda r: r.arrival)
    assert all(a.token_times[-1] <= b.arrival for a, b in zip(ordered, ordered[1:], strict=False))
    assert len(done) == 12


def test_failures_are_records(server):
    records = asyncio.run(replay(server.url, [RequestSpec(0.0, 5000, 3), RequestSpec(0.0, 5, 3)]))
    assert "status 400" in records[0].error
    assert records[1].ok
    summary = result_json(records)
    assert (summary["completed"], summary["failed"]) == (1, 1)


def test_nobody_there():
    with pytest.raises(EngineDeadError, match="is the server running"):
        asyncio.run(replay("http://127.0.0.1:9", SPECS))
    with pytest.raises(ConfigurationError, match="no address"):
        asyncio.run(replay("ftp://x", SPECS))


def sse(*events):
    return b"".join(b"data: " + (e if isinstance(e, bytes) else json.dumps(e).encode()) + b"\n\n" for e in events)


def choice(**fields):
    return {"choices": [{"index": 0, "finish_reason": None} | fields]}


STREAMS = {
    "ours": (
        sse(choice(text="a"), choice(text="b"), choice(text="c", finish_reason="stop"), b"[DONE]"),
        3,
        "stop",
    ),
    "a last event without a token": (
        sse(
            choice(text="a"),
            choice(text="", finish_reason="length"),
            {"choices": [], "usage": {"completion_tokens": 1}},
            b"[DONE]",
        ),
        2,
        "length",
    ),
    "a chat that begins with a role": (
        sse(
            choice(delta={"role": "assistant", "content": ""}),
            choice(delta={"content": "a"}),
            choice(delta={"content": "b"}, finish_reason="stop"),
            b"[DONE]",
        ),
        2,
        "stop",
    ),
}


@pytest.mark.parametrize("name", STREAMS)
@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_any_cut_of_the_bytes_reads_the_same(name, data):
    body, tokens, finish = STREAMS[name]
    wire, at = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n", 0
    while at < len(body):
        size = data.draw(st.integers(1, 60))
        part = body[at : at + size]
        wire += f"{len(part):x}\r\n".encode() + part + b"\r\n"
        at += size
    wire += b"0\r\n\r\n"
    clock = ManualClock()
    connection = _Connection(clock.now)
    reply = connection._reply = Reply()
    connection._head, connection._chunked, connection._stream, connection._left = True, False, False, None
    connection._events = bytearray()
    at = 0
    while at < len(wire):
        size = data.draw(st.integers(1, 200))
        clock.advance(1.0)
        connection.data_received(wire[at : at + size])
        at += size
    assert reply.error is None
    assert len(reply.events) == tokens
    assert reply.events == sorted(reply.events)
    assert reply.finish_reason == finish
    assert connection._reply is None  # the end was seen
    assert connection.reusable


def test_random_lengths_stay_in_their_range():
    specs = random_specs(300, 100, 20, 0.5, seed=1)
    assert {s.prompt_len for s in specs} <= set(range(50, 151))
    assert len({s.output_len for s in specs}) > 10
    assert {s.prompt_len for s in random_specs(5, 100, 20, 0.0, seed=1)} == {100}
    assert random_specs(300, 100, 20, 0.5, seed=1) == specs
    assert random_specs(300, 100, 20, 0.5, seed=2) != specs


def test_prompts_share_the_prefixes_that_their_specs_name():
    a, b, c = prompts_of(
        [
            RequestSpec(0, 1100, 1, prefix=(7, 8, 1)),
            RequestSpec(0, 1100, 1, prefix=(7, 8, 2)),
            RequestSpec(0, 1100, 1, prefix=(7, 9, 3)),
        ]
    )
    assert a.prompt[:1024] == b.prompt[:1024]
    assert a.prompt[1024:] != b.prompt[1024:]
    assert a.prompt[:512] == c.prompt[:512]
    assert a.prompt[512:1024] != c.prompt[512:1024]
    assert len(a.prompt) == a.prompt_len == 1100


def test_custom_datasets(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"prompt": "a", "output_tokens": 3}\n\n{"prompt": "b"}\n')
    assert [(p.prompt, p.output_len) for p in custom(path, 3, 9)] == [("a", 3), ("b", 9), ("a", 3)]
    for text in ("", "{", '{"text": 1}'):
        path.write_text(text)
        with pytest.raises(DataError):
            custom(path, 1, 1)


def record(ttft, tpot, tokens=3):
    times = [ttft + tpot * i for i in range(tokens)]
    return RequestRecord("0", 0.0, 0.0, times, 4, tokens, finish_reason="length")


def test_the_result_has_vllms_keys_and_units():
    slo = goodput_slo(["ttft:200", "tpot:50"])
    out = result_json(
        [record(0.1, 0.01), record(0.5, 0.01)], duration=2.0, slo=slo, percentiles=(50, 99), detailed=True
    )
    assert out["request_goodput"] == 0.5
    assert out["request_throughput"] == 1.0
    assert out["mean_ttft_ms"] == pytest.approx(300)
    assert out["p50_tpot_ms"] == pytest.approx(10)
    assert out["p99_e2el_ms"] == pytest.approx(518, abs=3)
    assert out["itls"][0] == pytest.approx([0.01, 0.01])
    assert out["total_output_tokens"] == 6
    json.dumps(out, allow_nan=False)
    text = table(out | {"request_rate": 2.0}, ["ttft", "tpot", "itl"], [50, 99])
    assert "Mean TTFT (ms):                          300.00" in text
    assert "Request goodput (req/s):                 0.50" in text


def test_nothing_at_all_still_gives_a_result():
    out = result_json([], duration=1.0)
    json.dumps(out, allow_nan=False)
    assert out["completed"] == 0
    assert table(out, ["ttft"], [99])


@pytest.mark.parametrize("bad", ["ttft", "ttft:x", "ttft:-3", "ttft:0", "speed:3", "ttft:nan"])
def test_goodput_is_read_with_care(bad):
    assert goodput_slo([]) is None
    assert goodput_slo(["ttft:200 tpot:50,e2el:900"]).e2e.limit == 0.9
    with pytest.raises(ConfigurationError, match="milliseconds"):
        goodput_slo([bad])
