"""The part of a cache that matters, and the model that drafts over it."""

import numpy as np
import pytest
import torch

from hasten.errors import ConfigurationError
from hasten.language import DecoderConfig, load, random_model
from hasten.language.params import SamplingParams
from hasten.language.ragged import RaggedBatch
from hasten.language.speculate import PromptLookup, RetrievalProposer, Windowed
from hasten.language.speculate.proposal import Ask
from hasten.language.speculate.view import RetrievalView, draft_batch
from hasten.serve.engine import Engine
from hasten.serve.policy import FixedSpeculation, make

torch.set_num_threads(1)
SIZE = {"vocab_size": 8, "hidden_size": 8, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1, "head_dim": 4,
        "intermediate_size": 8, "max_position_embeddings": 256}  # fmt: skip


def line(half, table):
    """One layer of a paged cache as (tokens, width)."""
    return half[torch.tensor(list(table))][:, 0].flatten(0, 1)


def test_view_holds_the_chunks_that_the_query_likes():
    """A key that the query points at is found wherever it stands; the first and the last chunk are always there."""
    executor = random_model(DecoderConfig(**SIZE), name="x", dtype="fp32", weights=torch.float32).executor
    cache = executor.new_cache(8, 16)
    cache.keys.normal_(std=0.01)
    cache.values.normal_()
    cache.keys[0, 3, 0, 8:16] = torch.tensor([0.0, 5.0, 0.0, 0.0])  # tokens 56 to 64
    cache.keys[1, 5, 0, 0:8] = torch.tensor([0.0, 5.0, 0.0, 0.0])  # tokens 80 to 88
    view = RetrievalView(executor.new_cache(4, 16), [3, 1, 0, 2], 32, 8)
    query = torch.tensor([[0.0, 1.0, 0.0, 0.0], [0.0, 0.5, 0.0, 0.0]])
    view.build(cache, list(range(8)), 125, [query, query])
    for layer, wanted in ((0, 7), (1, 10)):
        assert view.kept[layer, 0].tolist() == sorted({0, wanted, 14})
        assert view.filled == 24 + 5  # three chunks, and the five tokens that fill none
        original = line(cache.values[layer], range(8))
        tokens = [*range(8), *range(8 * wanted, 8 * wanted + 8), *range(112, 125)]
        assert torch.equal(line(view.cache.values[layer], view.table)[:29], original[tokens])
    view.extend(cache, list(range(8)), 127)
    assert torch.equal(line(view.cache.keys[1], view.table)[29:31], line(cache.keys[1], range(8))[125:127])
    view.build(cache, list(range(8)), 127, [query, query])  # means of old chunks are kept
    assert view.kept[0, 0].tolist() == [0, 7, 14]
    pairs = RetrievalView(executor.new_cache(4, 16), range(4), 40, 8, follow=True)
    pairs.build(cache, list(range(8)), 125, [query, query])
    assert pairs.kept[:, 0].tolist() == [[0, 7, 8, 14], [0, 10, 11, 14]]


def test_attention_finds_the_key_that_a_mean_hides():
    """One key that the query means, among seven that point away from it: the mean of the chunk is nothing."""
    executor = random_model(DecoderConfig(**SIZE), name="x", dtype="fp32", weights=torch.float32).executor
    cache = executor.new_cache(8, 16)
    cache.keys.normal_(std=0.5, generator=torch.Generator().manual_seed(0))
    cache.keys[:, 3, 0, 8:16] = torch.tensor([0.0, -2.0, 0.0, 0.0])  # tokens 56 to 64
    cache.keys[:, 3, 0, 10] = torch.tensor([0.0, 14.0, 0.0, 0.0])
    query = torch.tensor([[0.0, 1.0, 0.0, 0.0], [0.0, 0.5, 0.0, 0.0]])
    kept = {}
    for choose in ("query", "mass"):
        view = RetrievalView(executor.new_cache(4, 16), range(4), 32, 8, choose)
        view.build(cache, list(range(8)), 125, [query, query])
        kept[choose] = view.kept[:, 0].tolist()
    assert kept["mass"] == [[0, 7, 14], [0, 7, 14]]
    assert all(7 not in chunks for chunks in kept["query"])


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_view_of_everything_gives_what_the_whole_cache_gives(dtype):
    executor = load("pycode-4m", dtype=dtype).executor
    tokens = np.random.default_rng(0).integers(0, 4096, 70).tolist()
    cache, queries = executor.new_cache(8, 16), []
    executor.step(RaggedBatch.build([(tokens[:-1], 0, range(8))]).watched(queries), cache)
    expected = executor.step(RaggedBatch.build([(tokens[-1:], 69, range(8))]), cache)[0]
    assert len(queries) == 8
    assert queries[0].shape == (69, 3, 64)
    view = RetrievalView(executor.new_cache(8, 16), range(8), 128, 8)
    view.build(cache, range(8), 69, [q[-1] for q in queries])
    found = executor.step(draft_batch([(view, tokens[-1:], 0)]), view.cache)[0]
    assert view.filled == 69
    assert torch.equal(found, expected)
    part = RetrievalView(executor.new_cache(8, 16), range(8), 48, 8)
    part.build(cache, range(8), 69, [q[-1] for q in queries])
    near = executor.step(draft_batch([(part, tokens[-1:], 0)]), part.cache)[0]
    assert not torch.equal(near, expected)
    assert torch.corrcoef(torch.stack([near, expected]))[0, 1] > 0.8  # a position off by one would not


def engine(model, proposer, **options):
    policy = make("stall-free", token_budget=512, max_num_seqs=8)
    lengths = FixedSpeculation(4) if proposer else None
    return Engine(model, policy, deterministic=True, proposer=proposer, speculation=lengths, seed=0, **options)


@pytest.mark.parametrize("blocks", [200, 26])
def test_the_engine_gives_the_tokens_of_plain_decoding(blocks):
    model = load("pycode-4m", deterministic=True)
    text = "def area(w, h):\n    return w * h\n\n\ndef volume(w, h, d):\n    return w * h * d\n\n\n" * 4
    prompt = model.tokenizer.encode(text)
    prompts = [prompt, prompt[:90], prompt[20:], prompt[:150] + [5, 6, 7], prompt[:9]]
    params = [
        SamplingParams(max_tokens=40, temperature=0.0),
        SamplingParams(max_tokens=40, temperature=0.8, top_p=0.9, seed=4),
        SamplingParams(max_tokens=30, temperature=0.7, presence_penalty=0.5),
        SamplingParams(max_tokens=40, temperature=0.0),
        SamplingParams(max_tokens=20, temperature=1.0),
    ]
    plain = engine(model, None, num_blocks=blocks).generate(prompts, params)
    published = {"choose": "query", "follow": False}
    for inner, how in ((None, {}), (PromptLookup(min_ngram=2), published)):
        proposer = RetrievalProposer(inner, budget=32, gamma=4, refresh=12, views=3, **how)
        one = engine(model, proposer, num_blocks=blocks)
        found = one.generate(prompts, params)
        assert [c.tokens for c in found] == [c.tokens for c in plain]
        one.check_integrity()
        assert one.speculation.num_accepted_tokens > 20
        assert proposer.built > 4
        assert (one.counters.num_preemptions > 0) == (blocks < 100)
        assert len(proposer._free) == 3
        assert not proposer._views


def test_what_is_retrieved_stands_more_often_when_it_is_drawn_alike():
    """At a temperature the middle level draws with the sequence's own numbers, so that it guesses the same tokens."""
    model = load("pycode-4m", deterministic=True)
    prompt = model.tokenizer.encode("class Point:\n    def __init__(self, x, y):\n        self.x = x\n" * 8)
    one = engine(model, RetrievalProposer(budget=96, gamma=4, least=0.01))
    one.generate([prompt], SamplingParams(max_tokens=80, temperature=0.9, seed=1))
    assert one.speculation.acceptance > 0.5


def test_a_window_moves_in_steps():
    seen = []

    class Sees(PromptLookup):
        def propose(self, asks):
            seen.extend(a.tokens.tolist() for a in asks)
            return super().propose(asks)

    window = Windowed(Sees(), sinks=2, window=4)
    for known in range(8, 20):
        window.propose([Ask(0, np.arange(known), 1)])
    assert seen[0] == list(range(8))
    assert seen[2] == list(range(10))
    assert seen[3] == [0, 1, 7, 8, 9, 10]
    assert seen[4] == [0, 1, 7, 8, 9, 10, 11]
    assert all(s[:2] == [0, 1] and len(s) <= 10 for s in seen)
    window.forget(0)
    assert not window._from


def test_bad_input_is_one_line():
    with pytest.raises(ConfigurationError, match="multiple"):
        RetrievalProposer(budget=100)
    with pytest.raises(ConfigurationError, match="gamma"):
        RetrievalProposer(gamma=0)
    with pytest.raises(ConfigurationError, match="choose is 'mean'; query, mass, recent and random"):
        RetrievalProposer(choose="mean")
    with pytest.raises(ConfigurationError, match="window of 0"):
        Windowed(PromptLookup(), window=0)
    config = DecoderConfig(**SIZE, sliding_window=20, sliding_layers=(True, False))
    model = random_model(config, dtype="fp32")
    with pytest.raises(ConfigurationError, match="sliding window"):
        Engine(model, make("stall-free"), proposer=RetrievalProposer(budget=32))
