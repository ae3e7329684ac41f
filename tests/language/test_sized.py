"""Decoders whose layers differ in size: the runtime gives the plain module's logits, folders load again."""

import json
from dataclasses import replace

import pytest
import torch
from torch import nn

from hasten.compress.lowrank.modular import ModularDecomposition
from hasten.errors import ConfigurationError, ModelLoadError
from hasten.language import Decoder, DecoderConfig, RaggedBatch, load
from hasten.language.executor import Executor
from hasten.language.loading import LanguageModel
from hasten.language.params import SamplingParams
from hasten.language.placement import Placement, tree_placement
from hasten.language.sized import SizedExecutor, executor_of, is_sized
from hasten.language.sized_files import save
from hasten.serve.engine import Engine
from hasten.serve.policy import make

torch.set_num_threads(1)

TOKENS = torch.randint(0, 60, (2, 80), generator=torch.Generator().manual_seed(1))
FAMILIES = [
    {},
    {"num_kv_heads": 4, "attention_bias": True, "attention_out_bias": True},
    {"qk_norm": True},
    {"partial_rotary_factor": 0.5},
    {"sandwich_norms": True, "attention_softcap": 20.0, "sliding_window": 16, "sliding_layers": (True, False)},
]


def decoder(**options):
    config = {
        "vocab_size": 60, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "head_dim": 16,
        "intermediate_size": 64, "max_position_embeddings": 256, **options,
    }  # fmt: skip
    torch.manual_seed(0)
    model = Decoder(DecoderConfig(**config)).eval()
    for p in model.parameters():
        nn.init.normal_(p, std=0.15) if p.dim() > 1 else p.data.add_(torch.randn_like(p) * 0.1)
    return model


def small(**options):
    return ModularDecomposition(ratio=0.3, temperature=0.3)(decoder(**options), [TOKENS])


@pytest.mark.parametrize("options", FAMILIES, ids=["llama", "biases", "norms", "partial", "gemma"])
@pytest.mark.parametrize("deterministic", [False, True])
def test_executor_has_the_plain_logits(options, deterministic):
    model = small(**options)
    executor = executor_of(model, precision="fp32", deterministic=deterministic)
    assert isinstance(executor, SizedExecutor)
    cache = executor.new_cache(12)
    one, two = TOKENS[0].tolist(), TOKENS[1].tolist()
    tables = list(range(6)), list(range(6, 12))
    with torch.no_grad():
        whole = model(TOKENS)
    # A long chunk (flash kernel) beside a short one, then the other way round, then single tokens.
    steps = [((0, 50), (0, 10)), ((50, 60), (10, 70)), ((60, 61), (70, 71))]
    for (a, b), (c, d) in steps:
        batch = RaggedBatch.build([(one[a:b], a, tables[0]), (two[c:d], c, tables[1])], logits="all")
        found = executor.step(batch, cache)
        expected = torch.cat([whole[0, a:b], whole[1, c:d]])
        torch.testing.assert_close(found, expected, atol=5e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("options", "modules"),
    [
        ({}, ("mlp", "qk", "vo")),
        ({"qk_norm": True}, ("mlp", "qk", "vo")),
        ({"attention_bias": True, "attention_out_bias": True}, ("vo", "mlp")),
        ({"partial_rotary_factor": 0.5, "sliding_window": 16}, ("qk", "mlp")),
        ({"head_dim": 32}, ("mlp",)),
    ],
)
def test_one_call_for_few_rows_is_the_layer_by_layer_step(options, modules):
    model = ModularDecomposition(ratio=0.2, temperature=0.3, modules=modules)(decoder(**options), [TOKENS])
    executor = SizedExecutor(model, precision="bf16")
    if executor._few is None:
        pytest.skip("this processor has no instructions of the packed kernels")
    one, two = TOKENS[0].tolist(), TOKENS[1].tolist()
    tables = list(range(6)), list(range(6, 12))
    found = []
    for few in (executor._few, None):
        executor._few = few
        cache, rows = executor.new_cache(12), []
        for (a, b), (c, d) in [((0, 9), (0, 20)), ((9, 10), (20, 21)), ((10, 12), (21, 24))]:
            batch = RaggedBatch.build([(one[a:b], a, tables[0]), (two[c:d], c, tables[1])], logits="all")
            rows.append(executor.step(batch, cache))
        found.append(torch.cat(rows))
    torch.testing.assert_close(found[0], found[1], atol=0.06, rtol=0.02)
    with torch.no_grad():
        whole = model(TOKENS)
    expected = torch.cat(
        [whole[0, :9], whole[1, :20], whole[0, 9:10], whole[1, 20:21], whole[0, 10:12], whole[1, 21:24]]
    )
    assert float((found[0] - expected).norm() / expected.norm()) < 0.03


@pytest.mark.parametrize("precision", ["fp32", "auto"])
def test_deterministic_rows_do_not_depend_on_the_batch(precision):
    executor = executor_of(small(), precision=precision, deterministic=True)
    one, two = TOKENS[0].tolist(), TOKENS[1].tolist()
    tables = list(range(6)), list(range(6, 12))
    rows = []
    for chunks in ([(one[:40], 0, tables[0])], [(two[:70], 0, tables[1]), (one[:40], 0, tables[0])]):
        rows.append(executor.step(RaggedBatch.build(chunks), executor.new_cache(12))[-1])
    assert torch.equal(rows[0], rows[1])


def test_trees_of_guesses_see_their_own_line():
    """Two guesses side by side behind a context: each has the logits of its own sequence."""
    model = small()
    executor = executor_of(model, precision="fp32")
    ids, table = TOKENS[0, :20].tolist(), list(range(4))
    cache = executor.new_cache(4)
    executor.step(RaggedBatch.build([(ids, 0, table)]), cache)
    positions, slots, lines = tree_placement(20, [-1, -1, 0])
    guesses = [7, 9, 11]
    batch = RaggedBatch.build([(guesses, 20, table)], logits="all")
    batch = replace(batch, positions=torch.tensor(positions, dtype=torch.int32), placement=Placement.of(slots, lines))
    found = executor.step(batch, cache)
    with torch.no_grad():
        expected = [model(torch.tensor([ids + tail]))[0, -1] for tail in ([7], [9], [7, 11])]
    torch.testing.assert_close(found, torch.stack(expected), atol=5e-5, rtol=1e-4)


def test_feed_forwards_alone_are_an_ordinary_model(tmp_path):
    model = ModularDecomposition(ratio=0.2, modules=("mlp",), allocation="uniform")(decoder(), [TOKENS])
    assert is_sized(model)
    assert type(executor_of(model, precision="fp32")) is Executor
    save(model, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert "hasten_sizes" not in config
    assert config["intermediate_size"] == model.model.layers[0].mlp.down_proj.in_features < 64
    with torch.no_grad():
        assert torch.equal(load(tmp_path).decoder(TOKENS), model(TOKENS))
    transformers = pytest.importorskip("transformers")
    foreign = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    with torch.no_grad():
        torch.testing.assert_close(foreign(TOKENS).logits, model(TOKENS), atol=1e-4, rtol=1e-4)


def test_folder_loads_without_the_technique(tmp_path):
    model = small()
    save(model, tmp_path)
    sizes = json.loads((tmp_path / "config.json").read_text())["hasten_sizes"]
    assert len(sizes) == 2
    assert sizes[1]["key_width"] == 2 * len(sizes[1]["rotary_pairs"][0])
    again = load(tmp_path)
    with torch.no_grad():
        assert torch.equal(again.decoder(TOKENS), model(TOKENS))
    assert isinstance(again.with_precision("fp32").executor, SizedExecutor)


def test_damaged_folders_are_named(tmp_path):
    save(small(), tmp_path)
    path = tmp_path / "config.json"
    content = json.loads(path.read_text())
    for change, words in (
        (lambda s: s.pop(), "names 1 layers"),
        (lambda s: s[0].pop("value_width"), "layer 0 cannot be read"),
        (lambda s: s[0].update(intermediate_size=8), "do not fit"),
    ):
        sizes = json.loads(json.dumps(content["hasten_sizes"]))
        change(sizes)
        path.write_text(json.dumps({**content, "hasten_sizes": sizes}))
        with pytest.raises(ModelLoadError, match=words):
            load(tmp_path)


def test_generation_and_the_engine_agree():
    model = LanguageModel("small", small().config, decoder=small(), precision="fp32")
    prompts = [TOKENS[0, :20].tolist(), TOKENS[1, :33].tolist()]
    alone = [model.generate(p, max_tokens=8, ignore_eos=True).tokens for p in prompts]
    engine = Engine(model, make("stall-free"), num_blocks=80)
    params = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)
    assert [c.tokens for c in engine.generate(prompts, params)] == alone
    assert engine.stats()["gauges"]["kv_cache_bytes_per_token"] == model.executor.bytes_per_token


def test_other_devices_are_refused():
    with pytest.raises(ConfigurationError, match="run on the CPU"):
        SizedExecutor(small(), device="cuda")
