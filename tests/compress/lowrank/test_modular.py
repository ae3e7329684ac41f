"""MoDeGPT on decoders: exact at full width, smaller in fact, in every family."""

import pytest
import torch
from torch import nn

from hasten.compress.lowrank.modular import ModularDecomposition, Pair, decompose_pair
from hasten.compress.lowrank.moments import Moments, observe
from hasten.errors import ConfigurationError
from hasten.language import Decoder, DecoderConfig
from hasten.testing.technique_kit import TechniqueKit

torch.set_num_threads(1)

FAMILIES = {
    "gqa": {},
    "one key head": {"num_kv_heads": 1},
    "biases": {"num_kv_heads": 4, "attention_bias": True, "attention_out_bias": True},
    "norms on heads": {"qk_norm": True},
    "half rotated": {"partial_rotary_factor": 0.5},
    "gemma": {"sandwich_norms": True, "attention_softcap": 20.0, "sliding_window": 16, "sliding_layers": (True, False)},
}
TOKENS = torch.randint(0, 60, (4, 40), generator=torch.Generator().manual_seed(1))


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


@pytest.mark.parametrize("family", FAMILIES)
def test_keeping_all_changes_nothing(family):
    model = decoder(**FAMILIES[family])
    same = ModularDecomposition(ratio=1e-9)(model, [TOKENS])
    with torch.no_grad():
        torch.testing.assert_close(same(TOKENS), model(TOKENS), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_third_less(family):
    model = decoder(**FAMILIES[family])
    small = ModularDecomposition(ratio=0.3, temperature=0.3)(model, [TOKENS])
    removed = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in small.parameters())
    assert small.report.measured["removed_of_blocks"] == pytest.approx(0.3, abs=0.02)
    assert removed > 0  # shapes shrink; nothing is masked
    assert small.report.measured["sqnr"] > 6
    assert all(0 <= x.error < 1 for x in small.report.layers if x.touched)
    assert ("approximate" in " ".join(small.report.notes)) == (family == "norms on heads")
    attention = small.model.layers[0].self_attn
    assert attention.scale == model.config.attention_scale  # of the original head


@pytest.mark.parametrize("kind", ["mlp", "qk", "vo"])
def test_one_kind_alone(kind):
    model = decoder()
    small = ModularDecomposition(ratio=0.1, modules=(kind,), allocation="uniform")(model, [TOKENS])
    layer = small.model.layers[0]
    assert (layer.mlp.down_proj.in_features < 64) == (kind == "mlp")
    if kind != "mlp":
        assert (layer.self_attn.key_width < 16) == (kind == "qk")
        assert (layer.self_attn.value_width < 16) == (kind == "vo")
    assert small.report.measured["sqnr"] > 6


def test_rotary_pairs_stay_together_and_turn_by_their_own_frequency():
    model = decoder()
    small = ModularDecomposition(ratio=0.3, modules=("qk",), allocation="uniform", most=0.8)
    with pytest.raises(ConfigurationError, match="hold"):
        ModularDecomposition(ratio=0.5, modules=("qk",))(model, [TOKENS])
    found = ModularDecomposition(ratio=0.1, modules=("qk",), allocation="uniform")(model, [TOKENS])
    old, new = model.model.layers[1].self_attn, found.model.layers[1].self_attn
    kept = new.pairs.shape[1]
    assert new.key_width == 2 * kept
    for head in range(2):
        rows = torch.cat([new.pairs[head], new.pairs[head] + 8]) + head * 16
        assert torch.equal(new.k_proj.weight[head * 2 * kept : (head + 1) * 2 * kept], old.k_proj.weight[rows])
    assert small.modules == ("qk",)


def test_stated_error_of_values_is_measured_error():
    """The report's figure for values and output is what the pair makes of the calibration's inputs."""
    model = decoder(num_layers=1)
    small = ModularDecomposition(ratio=0.1, modules=("vo",))(model, [TOKENS])
    rows = []
    observe(model, [TOKENS], {"model.layers.0.self_attn.v_proj": lambda given, named: rows.append(given[0])})
    x = rows[0].reshape(-1, 32).double()
    old, new = model.model.layers[0].self_attn, small.model.layers[0].self_attn
    lost = total = 0.0
    for head in range(4):
        group, w, k = head // 2, 16, new.value_width
        one = x @ old.v_proj.weight[group * w : (group + 1) * w].double().T
        one = one @ old.o_proj.weight[:, head * w : (head + 1) * w].double().T
        two = x @ new.v_proj.weight[group * k : (group + 1) * k].double().T
        two = two @ new.o_proj.weight[:, head * k : (head + 1) * k].double().T
        lost, total = lost + (one - two).square().sum(), total + one.square().sum()
    (report,) = small.report.layers
    assert report.error == pytest.approx(float((lost / total).sqrt()), rel=1e-4)


def test_better_than_its_baselines():
    model = decoder()
    quality = {}
    for selection in ("greedy", "leverage", "magnitude", "random"):
        knobs = {"ratio": 0.3, "allocation": "uniform", "selection": selection}
        quality[selection] = ModularDecomposition(**knobs)(model, [TOKENS]).report.measured["sqnr"]
    assert min(quality["greedy"], quality["leverage"]) > max(quality["magnitude"], quality["random"])


def test_sequential_statistics_are_no_worse():
    model = decoder()
    one, two = (
        ModularDecomposition(ratio=0.3, sequential=s, allocation="uniform")(model, [TOKENS]) for s in (False, True)
    )
    assert two.report.measured["sqnr"] > one.report.measured["sqnr"] - 0.5
    assert "compressed prefix" in two.report.notes[0]


def test_nothing_is_differentiated():
    model = decoder()
    seen = []
    with torch.inference_mode(False):
        hook = model.model.layers[0].mlp.down_proj.register_forward_hook(
            lambda m, given, made: seen.append(made.requires_grad)
        )
        ModularDecomposition(ratio=0.3)(model, [TOKENS])
        hook.remove()
    assert seen
    assert not any(seen)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    "knobs",
    [{"ratio": 0}, {"ratio": 0.9}, {"allocation": "x"}, {"temperature": 0}, {"modules": ("x",)}, {"selection": "x"}],
)
def test_bad_knobs(knobs):
    with pytest.raises(ConfigurationError):
        ModularDecomposition(**knobs)


def test_bad_models_and_calibration():
    with pytest.raises(ConfigurationError, match="calibration"):
        ModularDecomposition()(decoder())
    with pytest.raises(ConfigurationError, match="seen are Linear, Sequential"):
        ModularDecomposition()(nn.Sequential(nn.Linear(2, 2)), [torch.zeros(1, 2)])


@pytest.mark.parametrize("family", ["Llama", "Qwen2", "Qwen3", "OPT"])
def test_models_of_transformers(family):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    if family == "OPT":
        sizes |= {"ffn_dim": 64, "word_embed_proj_dim": 32, "max_position_embeddings": 128}
    else:
        sizes |= {"num_key_value_heads": 2, "intermediate_size": 64, "head_dim": 8}
    config = getattr(transformers, f"{family}Config")(**sizes)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    for p in model.parameters():
        nn.init.normal_(p, std=0.15) if p.dim() > 1 else p.data.add_(torch.randn_like(p) * 0.1)
    same = ModularDecomposition(ratio=1e-9)(model, [TOKENS])
    with torch.no_grad():
        torch.testing.assert_close(same(TOKENS).logits, model(TOKENS).logits, atol=1e-5, rtol=1e-5)
    small = ModularDecomposition(ratio=0.3, allocation="uniform")(model, [TOKENS])
    assert small.report.measured["sqnr"] > 4
    with torch.no_grad():
        whole = small(TOKENS).logits
        first = small(TOKENS[:, :30], use_cache=True)
        rest = small(TOKENS[:, 30:], past_key_values=first.past_key_values, use_cache=True).logits
    torch.testing.assert_close(rest, whole[:, 30:], atol=1e-4, rtol=1e-4)


def test_a_users_own_pair():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4))
    x = torch.randn(300, 8)
    whole = decompose_pair(model, Pair(("0",), "2"), [x], keep=32)
    torch.testing.assert_close(whole(x), model(x), atol=1e-5, rtol=1e-5)
    errors = [
        float((decompose_pair(model, Pair(("0",), "2"), [x], keep=k, selection=s)(x) - model(x)).norm())
        for k, s in ((24, "greedy"), (12, "greedy"), (12, "leverage"))
    ]
    assert errors[0] < errors[1] < float(model(x).norm()) * 0.7
    plain = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 4))
    exact = decompose_pair(plain, Pair(("0",), "1", "svd"), [x], keep=4)
    torch.testing.assert_close(exact(x), plain(x), atol=1e-5, rtol=1e-5)
    with pytest.raises(ConfigurationError, match="32 hidden units"):
        decompose_pair(model, Pair(("0",), "2"), [x], keep=33)
    with pytest.raises(ConfigurationError, match="name a pair"):
        decompose_pair(nn.Sequential(nn.Linear(8, 6), nn.Linear(7, 2)), Pair(("0",), "1"), [x], keep=2)


def test_models_elsewhere_are_refused():
    """A device that is not the CPU, without having one."""

    class Elsewhere(nn.Module):
        def parameters(self, recurse=True):
            class Parameter:
                device = torch.device("cuda:0")

            return iter([Parameter()])

    with pytest.raises(ConfigurationError, match="cuda:0; give model.cpu"):
        ModularDecomposition()(Elsewhere(), [TOKENS])


def test_half_precision_stays_half():
    model = decoder().bfloat16()
    found = ModularDecomposition(ratio=0.2)(model, [TOKENS])
    assert {p.dtype for p in found.parameters()} == {torch.bfloat16}
    assert found.report.measured["sqnr"] > 5


def test_moments_stream():
    x = torch.randn(10, 3, dtype=torch.float64)
    parts = Moments(3)
    for chunk in x.split(4):
        parts.add(chunk)
    torch.testing.assert_close(parts.mean, x.T @ x / 10)


class TestKit(TechniqueKit):
    technique = ModularDecomposition(ratio=0.2, allocation="uniform")
    keeps = {"sqnr": 6.0}

    def model(self):
        return decoder()

    def example(self):
        return TOKENS

    def test_same_input_same_result(self, parts):
        model, example, new = parts
        again = self.technique(model, [example])
        with torch.inference_mode():
            assert torch.equal(new(example), again(example))
