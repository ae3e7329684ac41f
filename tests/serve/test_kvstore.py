"""Prefixes across restarts: found again, exact where they are to be, refused where they are not sound."""

import pytest
import torch

from hasten.errors import ConfigurationError
from hasten.language import load
from hasten.language.params import SamplingParams
from hasten.serve.engine import Engine
from hasten.serve.kvstore import PrefixStore
from hasten.serve.policy import make

torch.set_num_threads(1)
GREEDY = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)


@pytest.fixture(scope="module")
def model():
    return load("pycode-4m", deterministic=True)


@pytest.fixture(scope="module")
def prompt(model):
    text = "import os\n\n\ndef walk(top):\n    for name in os.listdir(top):\n        path = os.path.join(top, name)\n"
    return model.tokenizer.encode(text * 4)[:130]


def serve(model, folder, prompt, **options):
    store = PrefixStore.open(folder, model, contexts=lambda: [prompt * 2, prompt], **options)
    engine = Engine(model, make("stall-free"), num_blocks=40, kv_store=store)
    found = engine.generate([prompt], GREEDY)[0]
    store.flush()
    engine.check_integrity()
    engine.close()
    return found, engine.stats()["counters"], store


def test_an_exact_store_serves_the_same_tokens_after_a_restart(model, prompt, tmp_path):
    plain = Engine(model, make("stall-free"), num_blocks=40).generate([prompt], GREEDY)[0]
    first, counters, store = serve(model, tmp_path, prompt, quality=None)
    assert store.level == 0
    assert counters["kv_store_hits"] == 0
    assert counters["kv_store_written"] == 0 or store.written == 2
    assert store.written == 2  # two pieces of 64 tokens
    again, counters, _ = serve(model, tmp_path, prompt, quality=None)
    assert counters["kv_store_hits"] == 2
    assert again.timing.cached_tokens == 128
    assert first.tokens == again.tokens == plain.tokens


def test_damaged_pieces_are_refused_removed_and_computed(model, prompt, tmp_path):
    plain, _, _ = serve(model, tmp_path, prompt, quality=None)
    paths = sorted(tmp_path.glob("*.hkv"))
    for path in paths:
        path.write_bytes(path.read_bytes()[:-3])
    again, counters, store = serve(model, tmp_path, prompt, quality=None)
    assert counters["kv_store_refused"] >= 1
    assert again.timing.cached_tokens == 0
    assert again.tokens == plain.tokens
    assert store.written >= 1  # written anew
    swapped = sorted(tmp_path.glob("*.hkv"))
    if len(swapped) == 2:
        one, two = (p.read_bytes() for p in swapped)
        swapped[0].write_bytes(two)
        swapped[1].write_bytes(one)
        found, counters, _ = serve(model, tmp_path, prompt, quality=None)
        assert counters["kv_store_refused"] >= 1
        assert found.tokens == plain.tokens


def test_a_bounded_loss_is_measured_and_another_model_is_refused(model, prompt, tmp_path):
    found, _, store = serve(model, tmp_path, prompt, quality=0.05)
    assert store.level == 0 or store.codec.quality[store.level] <= 1.05
    exact = sum(2 * 2 * 8 * 64 * 64 for _ in range(store.written))
    if store.level:
        assert store.bytes_written < exact / 3
    _, counters, _ = serve(model, tmp_path, prompt, quality=0.05)
    assert counters["kv_store_hits"] == 2
    with pytest.raises(ConfigurationError, match="another model"):
        PrefixStore.open(tmp_path, load("pycode-draft-0.7m"))


def test_a_store_does_not_hurt_sharing_inside_the_engine(model, prompt, tmp_path):
    store = PrefixStore.open(tmp_path, model, quality=None, contexts=lambda: [prompt * 2])
    engine = Engine(model, make("stall-free"), num_blocks=12, kv_store=store)
    answers = engine.generate([prompt, prompt[:64] + prompt[:40], prompt], GREEDY)
    engine.check_integrity()
    assert answers[0].tokens == answers[2].tokens
    assert engine.pool.num_free == 12
    engine.close()


def test_a_cache_of_codes_serves_the_same_tokens_however_it_is_used(prompt, tmp_path):
    """Batches, shared prefixes, preemption, guesses, a restart with a store: always the tokens of one alone."""
    from hasten.language.speculate import PromptLookup

    coded = load("pycode-4m", deterministic=True, kv_precision="int8")
    prompts = [prompt, prompt[:100] + prompt[:20], prompt[30:90], prompt[:97]]
    alone = [Engine(coded, make("stall-free"), num_blocks=40).generate([p], GREEDY)[0].tokens for p in prompts]
    for blocks, proposer in ((100, None), (14, None), (100, PromptLookup()), (16, PromptLookup())):
        engine = Engine(coded, make("stall-free", token_budget=48), num_blocks=blocks, proposer=proposer)
        assert [r.tokens for r in engine.generate(prompts, GREEDY)] == alone
        assert engine.stats()["gauges"]["kv_cache_bits"] == 8
        engine.check_integrity()
    assert serve(coded, tmp_path, prompt, quality=None)[0].tokens == alone[0]
    again, counters, _ = serve(coded, tmp_path, prompt, quality=None)
    assert counters["kv_store_hits"] == 2
    assert again.tokens == alone[0]
    with pytest.raises(ConfigurationError, match="another model or precision"):
        PrefixStore.open(tmp_path, load("pycode-4m", deterministic=True))


def test_a_store_whose_tables_cannot_be_read_begins_anew(model, prompt, tmp_path):
    first, _, _ = serve(model, tmp_path, prompt, quality=None)
    (tmp_path / "codec.npz").write_bytes(b"of another version")
    for piece in tmp_path.glob("*.hkv"):
        piece.write_bytes(b"hkv1" + piece.read_bytes()[4:])
    again, counters, store = serve(model, tmp_path, prompt, quality=None)
    assert again.tokens == first.tokens
    assert counters["kv_store_refused"] == 1
    assert counters["kv_store_hits"] == 0
    assert store.written == 1  # the refused piece; the other is refused when it is asked for
