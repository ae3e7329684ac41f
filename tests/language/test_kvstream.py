"""The controller, the simulated link, the store on disk and over HTTP, and loading for real."""

import http.server
import threading
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hasten.clock import ManualClock
from hasten.errors import ConfigurationError, DataError
from hasten.language import load as load_model
from hasten.language.kvfit import fit
from hasten.language.kvstream import (
    ChunkSizes,
    Controller,
    FixedLevel,
    Loaded,
    LoadObservation,
    RemoteStore,
    Store,
    load,
    simulate,
    violations,
)
from hasten.language.kvvalues import capture
from hasten.language.speculate.session import Session
from hasten.network import Trace

torch.set_num_threads(1)
CHUNKS = [ChunkSizes({0: 8e6, 1: 1e6, 2: 2e6, 3: 3e6}, 1000, prefill=0.5 + 0.1 * i, decode=0.02) for i in range(4)]


def test_controller_takes_the_finest_that_fits():
    def choice(slo, bandwidth, now=0.0):
        return Controller(slo).decide(LoadObservation(now, CHUNKS, bandwidth))

    assert choice(100.0, 1e3) == "text"
    assert choice(2.0, 100e6) == 0
    assert choice(2.0, 10e6) == 3
    assert choice(2.0, 5e6) == 2
    assert choice(2.0, 1e4) == 1  # and computed meanwhile
    assert Controller(2.0, hedge=False).decide(LoadObservation(0.0, CHUNKS, 1e4)) == "text"
    assert choice(1.0, 4e6) == 1
    assert Controller(1.0).decide(LoadObservation(0.0, CHUNKS, None)) == 2
    assert Controller(1.0, prior=100e6).decide(LoadObservation(0.0, CHUNKS, None)) == 0
    with pytest.raises(ConfigurationError, match="objective"):
        Controller(0.0)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.floats(1e4, 1e9), st.floats(0.2, 5.0))
def test_with_a_steady_link_it_keeps_what_can_be_kept(bandwidth, slo):
    """Where a fixed choice meets the objective with room to spare, so does the controller."""
    link = Trace.constant(bandwidth)
    best = min(simulate(CHUNKS, link, FixedLevel(c))[-1].ready for c in (0, 1, 2, 3, "text"))
    found = simulate(CHUNKS, link, Controller(slo, prior=bandwidth))[-1].ready
    if best < 0.85 * slo:
        assert found <= slo
    assert found <= max(slo, 1.1 * best + 0.1)


def test_a_link_that_fades_is_answered():
    link = Trace.of([0.0, 0.3, 30.0], [20e6, 1e6, 1e6])
    adaptive = [e.choice for e in simulate(CHUNKS, link, Controller(2.5))]
    assert adaptive[0] == "text"  # level 0 was under way when the link faded
    assert adaptive[-1] in (1, "text")
    events = simulate(CHUNKS, link, FixedLevel(3))
    assert events[-1].ready > simulate(CHUNKS, link, Controller(2.5))[-1].ready
    assert all(b.began == a.arrived for a, b in zip(events, events[1:], strict=False))
    late = violations(CHUNKS, [link], FixedLevel(3), 2.5, [0.0, 5.0])
    assert late == 1.0


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.floats(1e2, 1e9), st.floats(1e-3, 1.0), st.floats(0.5, 5.0))
def test_a_link_that_breaks_down_costs_no_more_than_computing(bandwidth, after, slo):
    """Whatever the controller believes, a model that waits computes: the text's own time is never exceeded."""
    link = Trace.of([0.0, after, 1000.0], [bandwidth, 1e3, 1e3])
    text = simulate(CHUNKS, link, FixedLevel("text"))[-1].ready
    assert simulate(CHUNKS, link, Controller(slo))[-1].ready <= text + 1e-9
    assert simulate(CHUNKS, link, Controller(slo, hedge=False))[-1].ready > 0


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    model = load_model("pycode-4m")
    text = "def add(a, b):\n    return a + b\n\n\nclass Point:\n    def __init__(self, x):\n        self.x = x\n" * 6
    tokens = model.tokenizer.encode(text)[:150]
    codec = fit(model, [tokens], levels=(1, 3), measure=False)
    store = Store(tmp_path_factory.mktemp("kv"))
    store.put("doc-17", codec, capture(model, tokens), tokens, chunk=40, levels=(0, 1, 3))
    return model, codec, store, tokens


def finish(events):
    *rest, last = list(events)
    assert isinstance(last, Loaded)
    return rest, last


def test_loading_exactly_is_computing(stored):
    model, codec, store, tokens = stored
    events, loaded = finish(load(store, "doc-17", codec, model, FixedLevel(0), ManualClock()))
    assert [e.choice for e in events] == [0, 0, 0, 0]
    session = Session(model.executor, 200)
    session.feed(tokens)
    assert torch.equal(loaded.session.feed([7]), session.feed([7]))


def test_a_chunk_that_does_not_come_is_computed_meanwhile(stored):
    model, codec, store, tokens = stored
    waited = threading.Event()

    class Stuck(Store):
        def get(self, name, chunk, level):
            if chunk == 1:
                waited.wait(20)
            return super().get(name, chunk, level)

    class Hedged(FixedLevel):
        hedge = True

        def decide(self, observation):
            if len(observation.remaining) == 2:  # chunk 1 was given up
                waited.set()
            return self.choice

    events, loaded = finish(load(Stuck(store.folder), "doc-17", codec, model, Hedged(3), ManualClock()))
    assert events[1].choice == "text"
    assert loaded.session.done == len(tokens)
    exact = Session(model.executor, 200)
    exact.feed(tokens)
    assert torch.allclose(loaded.session.feed([7]), exact.feed([7]), atol=2.0)


def test_text_in_the_middle_and_a_slow_link(stored):
    model, codec, store, tokens = stored

    class Mixed:
        def decide(self, observation):
            return "text" if len(observation.remaining) % 2 else 3

    clock = ManualClock()
    link = Trace.constant(1e5)
    events, loaded = finish(load(store, "doc-17", codec, model, Mixed(), clock, link=link))
    assert [e.choice for e in events] == [3, "text", 3, "text"]
    assert events[0].arrived == pytest.approx((4 * len(tokens) + events[0].bytes) / 1e5)
    assert loaded.session.done == len(tokens)
    assert loaded.tokens == tokens


@pytest.mark.parametrize("damage", ["flip", "cut", "gone", "other"])
def test_damaged_chunks_are_computed(stored, tmp_path, damage):
    import shutil

    model, codec, store, tokens = stored
    copy = tmp_path / "kv"
    shutil.copytree(store.folder, copy)
    path = copy / "doc-17" / "1.3.hkv"
    if damage == "flip":
        raw = bytearray(path.read_bytes())
        raw[-5] ^= 4
        path.write_bytes(raw)
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[:100])
    elif damage == "gone":
        path.unlink()
    else:
        shutil.copy(copy / "doc-17" / "0.3.hkv", path)
    events, loaded = finish(load(Store(copy), "doc-17", codec, model, FixedLevel(3), ManualClock()))
    assert [e.choice for e in events] == [3, "text", 3, 3]
    assert loaded.session.done == len(tokens)


def test_over_http_it_is_the_same_store(stored):
    model, codec, store, tokens = stored

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(store.folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        remote = RemoteStore(f"http://127.0.0.1:{server.server_port}")
        assert remote.get("doc-17", 1, 1) == store.get("doc-17", 1, 1)
        events, loaded = finish(load(remote, "doc-17", codec, model, FixedLevel(1), ManualClock()))
        assert loaded.tokens == tokens
        assert [e.choice for e in events] == [1] * 4
        with pytest.raises(DataError, match="cannot be fetched"):
            remote.get("doc-17", 99, 1)
        with pytest.raises(ConfigurationError, match="read only"):
            remote.put()
    finally:
        server.shutdown()
        server.server_close()


def test_names_and_foreign_contexts_are_refused(stored, tmp_path):
    model, codec, store, tokens = stored
    with pytest.raises(ConfigurationError, match="called"):
        store.index("../etc")
    with pytest.raises(DataError, match="not in the store"):
        store.index("nothing")
    (store.folder / "bad").mkdir(exist_ok=True)
    (store.folder / "bad" / "index.json").write_text("{")
    with pytest.raises(DataError, match="corrupt"):
        store.index("bad")
    (store.folder / "other").mkdir(exist_ok=True)
    (store.folder / "other" / "index.json").write_text('{"model": "x", "chunk": 1, "text": [], "chunks": []}')
    with pytest.raises(DataError, match="put it again"):
        next(load(store, "other", codec, model, FixedLevel(0), ManualClock()))
    with pytest.raises(ConfigurationError):
        store.put("short", codec, capture(model, tokens[:4]), tokens[:5])
    assert np.isfinite(codec.spread).all()


def test_a_context_that_is_not_there_is_named_with_those_that_are(tmp_path):
    store = Store(tmp_path)
    with pytest.raises(DataError, match="encode one first"):
        store.index("doc")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "index.json").write_text("{}")
    with pytest.raises(DataError, match="contexts that it has: other"):
        store.index("doc")
