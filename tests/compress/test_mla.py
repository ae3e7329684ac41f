"""Latent attention: exact where it claims to be, smaller where it is asked to be."""

import copy

import pytest
import torch
from torch import nn

from hasten.compress import ToMLA
from hasten.compress.mla import _missed
from hasten.errors import ConfigurationError
from hasten.language import Decoder, DecoderConfig, RaggedBatch, latent, load
from hasten.language.kernels_paged import paged_kernel_takes
from hasten.language.latent import LatentExecutor, save
from hasten.language.loading import LanguageModel
from hasten.language.params import SamplingParams
from hasten.nn import rotary_frequencies
from hasten.nn.latent import LatentAttention
from hasten.serve.engine import Engine
from hasten.serve.policy import make
from hasten.testing.technique_kit import TechniqueKit

torch.set_num_threads(1)


def decoder(groups=2, dtype=torch.float32, **options):
    torch.manual_seed(0)
    config = DecoderConfig(
        vocab_size=60, hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=groups, head_dim=8,
        intermediate_size=48, max_position_embeddings=256, **options,
    )  # fmt: skip
    model = Decoder(config).eval().to(dtype)
    for p in model.parameters():
        p.data.mul_(5 if p.dim() > 1 else 1)
        if p.dim() == 1 and options.get("attention_bias"):
            p.data.add_(torch.randn_like(p) * 0.1)
    return model


TOKENS = torch.randint(0, 60, (2, 40), generator=torch.Generator().manual_seed(1))


def layer_error(model, other):
    """Largest difference of the attention layers in float64 (norms in between are float32, so layers are compared)."""
    x = torch.randn(2, 20, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    angle = torch.outer(torch.arange(20.0).double(), 0.3 ** torch.arange(4).double())
    worst = 0.0
    for one, two in zip(model.model.layers, other.model.layers, strict=True):
        with torch.no_grad():
            pair = [m.self_attn(x, angle.cos(), angle.sin()) for m in (one, two)]
        worst = max(worst, float((pair[0] - pair[1]).abs().max() / pair[0].abs().max()))
    return worst


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("options", [{}, {"attention_bias": True}, {"sliding_window": 9}])
def test_level_zero_is_exact(groups, options):
    model = decoder(groups, **options)
    exact = ToMLA()(model)
    with torch.no_grad():
        torch.testing.assert_close(exact(TOKENS), model(TOKENS), atol=1e-4, rtol=1e-4)
    assert exact.cache_bytes_per_token == exact.model_cache_bytes
    wide = decoder(groups, torch.float64, **options)
    assert layer_error(wide, ToMLA()(wide)) < 1e-9


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("bias", [False, True])
def test_turning_without_dropping_is_exact(groups, bias):
    """RoRoPE alone, every rotation kept: 2 g d numbers, the same outputs."""
    model = decoder(groups, torch.float64, attention_bias=bias)
    total = groups * 8
    assert layer_error(model, ToMLA(kv_rank=total, rope_dims=total)(model, [TOKENS])) < 1e-9


def test_absorbed_is_expanded():
    model = decoder(2, torch.float64)
    small = ToMLA(kv_rank=0.5, rope_dims=8)(model, [TOKENS])
    layer = small.model.layers[0].self_attn
    x = torch.randn(2, 20, 32, dtype=torch.float64)
    angle = torch.outer(torch.arange(20.0).double(), 0.3 ** torch.arange(4).double())
    cos, sin = angle.cos(), angle.sin()
    torch.testing.assert_close(layer(x, cos, sin), layer.expanded(x, cos, sin), atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize(
    "technique", [ToMLA(), ToMLA(kv_rank=0.5, rope_dims=8), ToMLA(kv_rank=10, rope_dims=4, freqfold=2)]
)
@pytest.mark.parametrize("options", [{}, {"attention_bias": True}])
def test_runtime_is_the_module_in_pieces_and_step_by_step(technique, options):
    model = technique(decoder(2, **options), [TOKENS])
    executor = LatentExecutor(model, precision="fp32")
    ids = TOKENS[0].tolist()
    with torch.no_grad():
        expected = model(TOKENS[:1])[0]
    for sizes in ([40], [33, 1, 1, 5], [1] * 40):
        cache, table, at, rows = executor.new_cache(3, 16), [2, 0, 1], 0, []
        for n in sizes:
            rows.append(executor.step(RaggedBatch.build([(ids[at : at + n], at, table)], "all"), cache))
            at += n
        torch.testing.assert_close(torch.cat(rows), expected, atol=2e-4, rtol=2e-4)
    numbers = model.model.layers[0].self_attn.cache_numbers
    assert executor.bytes_per_token == 2 * numbers * 4
    assert cache.bytes == executor.bytes_per_token * 48


@pytest.mark.skipif(not paged_kernel_takes(16, 32), reason="no vector arithmetic on bfloat16 here")
@pytest.mark.parametrize("technique", [ToMLA(), ToMLA(kv_rank=16, rope_dims=16)])
def test_whole_pages_are_attended_as_shares_of_the_context_are(technique, monkeypatch):
    """In bfloat16 few rows go through the kernel for pages of keys as wide as values; its rounding is another."""
    model = load("pycode-draft-0.7m")
    small = technique(model.decoder.float(), [TOKENS])
    rows = []
    for few in (latent._FEW_ROWS, 0):
        monkeypatch.setattr(latent, "_FEW_ROWS", few)
        executor = LatentExecutor(small, precision="bf16")
        executor._stack = None  # all layers in one call have a kernel of their own
        cache, table = executor.new_cache(9, 16), list(range(8, -1, -1))
        executor.step(RaggedBatch.build([(list(range(5, 105)), 0, table)]), cache)
        rows.append(executor.step(RaggedBatch.build([([7, 8, 9], 100, table)], "all"), cache))
    assert rows[0].isfinite().all()
    torch.testing.assert_close(rows[0], rows[1], atol=0.15, rtol=0.05)


def test_a_larger_rank_keeps_more():
    """Outputs against the original on tokens that the fit did not see."""
    model = decoder(2)
    other = torch.randint(0, 60, (2, 40), generator=torch.Generator().manual_seed(2))

    def error(technique):
        with torch.no_grad():
            return float((technique(model, [TOKENS])(other) - model(other)).square().mean())

    small, large = ToMLA(kv_rank=6, rope_dims=16), ToMLA(kv_rank=14, rope_dims=16)
    assert error(large) < error(small)
    assert error(ToMLA(kv_rank=10, rope_dims=16, by_data=False)) > 0
    found = small(model, [TOKENS])
    assert found.cache_bytes_per_token == 2 * 2 * (6 + 16) < found.model_cache_bytes
    assert "less" in found.report.notes[0]
    auto = ToMLA(kv_rank=8, rope_dims=8, freqfold="auto")(model, [TOKENS])
    assert any("freqfold" in note for note in auto.report.notes)


def test_the_rotation_stays_where_it_would_be_missed():
    """Pairs that hardly turn within the context lose it first, however strong they are."""
    model = decoder(1)
    rates, _ = rotary_frequencies(8, model.config.rope_theta, model.config.rope_scaling)
    missed = _missed(model.config, local=False, context=40)
    assert missed[3] < 0.001 < missed[2] < missed[:2].min()
    assert (rates[3] * 40) < 0.1  # the slowest pair
    for layer in model.model.layers:
        layer.self_attn.k_proj.weight.data[[3, 7]] *= 4  # the strongest as well
    small = ToMLA(kv_rank=10, rope_dims=6)(model, [TOKENS])
    assert [layer.self_attn.pairs.tolist() for layer in small.model.layers] == [[0, 1, 2]] * 2


def test_what_no_query_asks_for_loses_its_rotation_and_folds_turn_at_their_fastest():
    model = decoder(1)
    for layer in model.model.layers:
        layer.self_attn.q_proj.weight.data.view(4, 8, 32)[:, [0, 4]] = 0.0  # the fastest pair of every head
    for by_data in (True, False):
        small = ToMLA(kv_rank=10, rope_dims=2, by_data=by_data)(model, [TOKENS])
        assert [layer.self_attn.pairs.tolist() for layer in small.model.layers] == [[1]] * 2
    folded = ToMLA(kv_rank=10, rope_dims=4, freqfold=2)(decoder(1), [TOKENS])
    assert {p for layer in folded.model.layers for p in layer.self_attn.pairs.tolist()} <= {0, 2}


def test_balance_looks_at_channels():
    """Keys as large as values, channel by channel: balanced and unbalanced are the same, though keys are fewer."""
    model = decoder(1)
    for layer in model.model.layers:
        rows = torch.randn(8, 32, generator=torch.Generator().manual_seed(5))
        rows = rows / rows.norm(dim=1, keepdim=True)
        layer.self_attn.k_proj.weight.data[:] = layer.self_attn.v_proj.weight.data[:] = rows
    pair = [ToMLA(kv_rank=5, rope_dims=2, balance=b, by_data=False)(model) for b in (True, False)]
    with torch.no_grad():
        torch.testing.assert_close(pair[0](TOKENS), pair[1](TOKENS), atol=1e-4, rtol=1e-4)


def test_the_server_gives_the_same_tokens_and_says_what_a_token_takes(tmp_path):
    model = load("pycode-4m", dtype="fp32")
    exact = ToMLA()(model.decoder.float())
    save(exact, tmp_path / "mla", model.folder)
    latent = load(tmp_path / "mla", dtype="fp32")
    assert latent.tokenizer.encode("def f") == model.tokenizer.encode("def f")
    prompts = [model.tokenizer.encode(t) for t in ("def add(a, b):\n    ", "import os\n\n\nclass A:\n" * 8)]
    params = SamplingParams(max_tokens=16, temperature=0.0, ignore_eos=True)
    engines = [Engine(m, make("stall-free"), num_blocks=80) for m in (model, latent)]
    one, other = ([c.tokens for c in e.generate(prompts, params)] for e in engines)
    assert one == other
    assert latent.executor.bytes_per_token == model.executor.bytes_per_token
    gauges = engines[1].stats()["gauges"]
    assert gauges["kv_cache_bytes_per_token"] == latent.executor.bytes_per_token
    small = ToMLA(kv_rank=0.5, rope_dims=32)(model.decoder.float(), [torch.tensor([prompts[1]])])
    runs = LanguageModel("small", model.config, decoder=small, precision="fp32")
    engine = Engine(runs, make("stall-free"), num_blocks=80)
    assert len(engine.generate(prompts, params)[0].tokens) == 16
    assert engine.stats()["gauges"]["kv_cache_bytes_per_token"] == 8 * (32 + 48) * 4


def test_bad_input_is_one_line():
    model = decoder()
    with pytest.raises(ConfigurationError, match="no layer with q_proj"):
        ToMLA()(nn.Sequential(nn.Linear(4, 4)))
    with pytest.raises(ConfigurationError, match="normalises every head"):
        ToMLA()(decoder(qk_norm=True))
    with pytest.raises(ConfigurationError, match="has 24 numbers"):
        ToMLA(kv_rank=99, rope_dims=8)(model, [TOKENS])
    with pytest.raises(ConfigurationError, match="fitted to data"):
        ToMLA(kv_rank=4)(model)
    with pytest.raises(ConfigurationError, match="try it on"):
        ToMLA(kv_rank=4, freqfold="auto", by_data=False)(model)
    for knobs in ({"kv_rank": 0}, {"rope_dims": 3}, {"freqfold": 0}):
        with pytest.raises(ConfigurationError):
            ToMLA(**knobs)
    with pytest.raises(ConfigurationError, match="rope_dims"):
        ToMLA(kv_rank=4, rope_dims=40)(model, [TOKENS])


def test_a_trained_factor_is_no_grouped_query_layer():
    """With its factor trained, heads of a group part: their keys differ, which no grouped-query layer can do."""
    model = copy.deepcopy(ToMLA()(decoder(2)))
    layer = model.model.layers[0].self_attn
    assert isinstance(layer, LatentAttention)
    assert torch.equal(layer.latent_value[0], layer.latent_value[1])
    loss = model(TOKENS).square().mean()
    loss.backward()
    assert layer.rope_query.grad.abs().sum() > 0
    assert not torch.equal(layer.latent_value.grad[0], layer.latent_value.grad[1])


class TestToMLA(TechniqueKit):
    technique = ToMLA()
    keeps = {"sqnr": 60.0}

    def model(self):
        return decoder()

    def example(self):
        return TOKENS
