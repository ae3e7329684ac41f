"""What the serving studies rest on: the plain loop, the replay, the watched policy, the checkpoint reader."""

import os
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from hasten.clock import ProcessorClock
from hasten.errors import DataError
from hasten.language.config import DecoderConfig
from hasten.language.loading import random_model
from hasten.language.params import SamplingParams
from hasten.serve import Chunk, Observation, RequestSpec, Sequence, StepPlan
from hasten.serve.engine import Engine
from hasten.serve.policy import StallFree
from hasten.studies._serving import (
    Watched,
    answer_alone,
    closed_loop,
    halves,
    one_thread,
    read_llama2c,
    replay,
    token_prompts,
    trace,
)
from hasten.studies.study import Scale

DATA = Path(os.environ.get("HASTEN_DATA", "../shared/data"))
TINY = DecoderConfig(
    vocab_size=64,
    hidden_size=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    intermediate_size=48,
    max_position_embeddings=128,
    tie_embeddings=True,
)


@pytest.fixture(scope="module")
def model():
    with one_thread():
        yield random_model(TINY, dtype="fp32", weights=torch.float32, deterministic=True)


def test_the_plain_loop_and_the_engine_agree(model):
    prompts = token_prompts(model, (4, 20), seed=1)
    assert [len(p) for p in prompts] == [4, 20]
    asked = [
        SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True),
        SamplingParams(max_tokens=6, temperature=0.9, seed=5, ignore_eos=True),
    ]
    engine = Engine(model, policy=StallFree(token_budget=8, max_num_seqs=4), num_blocks=20, deterministic=True)
    got = [c.tokens for c in engine.generate(prompts, asked)]
    assert got == [answer_alone(model, p, a) for p, a in zip(prompts, asked, strict=True)]


def test_replay_and_closed_loop_serve_everything_in_order(model):
    load = [RequestSpec(0.001 * i, 5 + i, 3 + i % 2) for i in range(6)]
    prompts = [[(i + j) % 60 + 1 for j in range(r.prompt_len)] for i, r in enumerate(load)]
    clock = ProcessorClock()
    engine = Engine(model, num_blocks=40, clock=clock, max_num_seqs=4)
    records = replay(engine, load, prompts, clock)
    assert sorted(r.output_tokens for r in records) == sorted(r.output_len for r in load)
    assert all(r.ttft > 0 for r in records)
    records, answers = closed_loop(engine, load, prompts, clients=2)
    assert [r.prompt_tokens for r in records] == [r.prompt_len for r in load]
    assert [len(a) for a in answers] == [r.output_len for r in load]
    alone = SamplingParams(max_tokens=load[0].output_len, temperature=0.0, ignore_eos=True)
    assert answers[0] == answer_alone(model, prompts[0], alone)


def checkpoint(path, generator, shared=True):
    """A llama2.c file of random weights, and the tensors in it."""
    dim, hidden, layers, heads, kv, vocab, context = 16, 24, 1, 2, 1, 11, 32
    head = dim // heads
    shapes = {
        "emb": (vocab, dim),
        "n1": (layers, dim),
        "wq": (layers, dim, dim),
        "wk": (layers, kv * head, dim),
        "wv": (layers, kv * head, dim),
        "wo": (layers, dim, dim),
        "n2": (layers, dim),
        "w1": (layers, hidden, dim),
        "w2": (layers, dim, hidden),
        "w3": (layers, hidden, dim),
        "nf": (dim,),
        "re": (context, head // 2),
        "im": (context, head // 2),
    }
    if not shared:
        shapes["cls"] = (vocab, dim)
    weights = {k: generator.normal(size=s).astype("<f4") for k, s in shapes.items()}
    header = struct.pack("<7i", dim, hidden, layers, heads, kv, vocab if shared else -vocab, context)
    path.write_bytes(header + b"".join(w.tobytes() for w in weights.values()))
    return {k: torch.from_numpy(w).double() for k, w in weights.items()}


def reference(w, tokens, shared=True):
    """llama2.c's forward, by hand: neighbouring pairs of a head are rotated."""

    def norm(x, g):
        return x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-5) * g

    x = w["emb"][tokens]
    time, heads, head = len(tokens), 2, 8
    angle = torch.arange(time)[:, None].double() * 10_000.0 ** (-torch.arange(0, head, 2).double() / head)
    turn = torch.polar(torch.ones_like(angle), angle)

    def rotate(v):  # (time, count, head)
        pairs = torch.view_as_complex(v.reshape(time, -1, head // 2, 2).contiguous())
        return torch.view_as_real(pairs * turn[:, None]).reshape(time, -1, head)

    h = norm(x, w["n1"][0])
    q = rotate((h @ w["wq"][0].T).reshape(time, heads, head))
    k = rotate((h @ w["wk"][0].T).reshape(time, 1, head)).expand(-1, heads, -1)
    v = (h @ w["wv"][0].T).reshape(time, 1, head).expand(-1, heads, -1)
    scores = torch.einsum("qhd,khd->hqk", q, k) / head**0.5
    scores = scores.masked_fill(torch.triu(torch.ones(time, time, dtype=torch.bool), 1), -torch.inf)
    x = x + torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).reshape(time, -1) @ w["wo"][0].T
    h = norm(x, w["n2"][0])
    gate = h @ w["w1"][0].T
    x = x + (gate * torch.sigmoid(gate) * (h @ w["w3"][0].T)) @ w["w2"][0].T
    return norm(x, w["nf"]) @ (w["emb"] if shared else w["cls"]).T


@pytest.mark.parametrize("shared", [True, False])
def test_a_llama2c_checkpoint_computes_what_its_own_formula_says(tmp_path, shared):
    path = tmp_path / "tiny.bin"
    weights = checkpoint(path, np.random.default_rng(0), shared)
    tokens = torch.tensor([1, 7, 3, 3, 10])
    with torch.inference_mode():
        logits = read_llama2c(path).decoder(tokens[None])[0]
    expected = reference(weights, tokens, shared)
    assert torch.allclose(logits.double(), expected, atol=1e-4, rtol=1e-4)


def test_a_truncated_checkpoint_is_refused(tmp_path):
    path = tmp_path / "tiny.bin"
    checkpoint(path, np.random.default_rng(0))
    path.write_bytes(path.read_bytes()[:-400])
    with pytest.raises(DataError, match="truncated"):
        read_llama2c(path)
    path.write_bytes(b"abc")
    with pytest.raises(DataError, match="header"):
        read_llama2c(path)


def test_the_watched_policy_counts_what_must_not_happen():
    class Lazy:
        name = "lazy"

        def decide(self, observation):
            return StepPlan((Chunk(3, 0, 50),))

    running = [Sequence(0, 0.0, 4, 9, known=5, computed=4, blocks=1)]
    waiting = [Sequence(2, 2.0, 50, 4), Sequence(3, 3.0, 50, 4)]
    watched = Watched(Lazy(), token_budget=40)
    watched.decide(Observation(0.0, waiting, running, 9, 10, 16))
    assert (watched.stalls, watched.over_budget, watched.overtakes, watched.steps) == (1, 1, 1, 1)


def test_without_data_the_built_in_sample_stands_in():
    load, source = trace(Scale(), "conv")
    assert "sample" in source
    chosen, judged = halves(load)
    assert len(chosen) + len(judged) == len(load)


@pytest.mark.skipif(not (DATA / "weights/stories260K.bin").exists(), reason="the checkpoint is not here")
def test_the_real_checkpoint_tells_a_story():
    raw, at, words = (DATA / "weights/tok512.bin").read_bytes(), 4, []
    while at < len(raw):
        (length,) = struct.unpack("<i", raw[at + 4 : at + 8])
        words.append(raw[at + 8 : at + 8 + length].decode("utf-8", "replace"))
        at += 8 + length
    model = read_llama2c(DATA / "weights/stories260K.bin")
    once = answer_alone(model, [1], SamplingParams(max_tokens=16, temperature=0.0))
    assert "".join(words[t] for t in once).startswith(" Once upon a time, there was a little")
