"""Every supported family gives the logits of transformers, from a folder that transformers wrote."""

import pytest
import torch

from hasten.compress.lowrank.modular import ModularDecomposition
from hasten.language.loading import load
from hasten.language.ragged import RaggedBatch
from hasten.language.sized_files import save

transformers = pytest.importorskip("transformers")

SMALL = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": 1,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.1],
    "long_factor": [1.5, 2.0],
    "partial_rotary_factor": 0.5,
    "original_max_position_embeddings": 64,
    "factor": 2.0,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}
FAMILIES = {
    "llama": ("Llama", {}),
    "llama-tied-llama3": ("Llama", {"tie_word_embeddings": True, "rope_parameters": LLAMA3}),
    "llama-yarn": ("Llama", {"rope_parameters": YARN}),
    "llama-bias": ("Llama", {"attention_bias": True}),
    "mistral-window": ("Mistral", {"sliding_window": 8}),
    "qwen2": ("Qwen2", {}),
    "qwen2-window": ("Qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "phi3": ("Phi3", {}),
    "phi3-longrope": ("Phi3", {"rope_parameters": LONG, "original_max_position_embeddings": 64}),
    "gemma2": ("Gemma2", {"head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 24}),
    "gemma3": ("Gemma3", {"head_dim": 16, "sliding_window": 8, "num_hidden_layers": 7}),
    "mixtral": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2-moe": ("Qwen2Moe", {**EXPERTS, "shared_expert_intermediate_size": 40, "mlp_only_layers": [1]}),
    "qwen3-moe": ("Qwen3Moe", {**EXPERTS, "norm_topk_prob": True, "head_dim": 16}),
}


def reference(name, folder):
    """A random tiny model of the family, written to ``folder``; biases and norms random too."""
    kind, extra = FAMILIES[name]
    suffix = "TextConfig" if kind == "Gemma3" else "Config"
    config = getattr(transformers, kind + suffix)(**{**SMALL, **extra})
    torch.manual_seed(0)
    model = getattr(transformers, kind + "ForCausalLM")._from_config(config, attn_implementation="eager").float().eval()
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            parameter.add_(torch.randn_like(parameter) * (0.2 if parameter.dim() == 1 else 0.05))
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_equal_transformers(name, tmp_path):
    model = reference(name, tmp_path)
    tokens = torch.randint(2, 97, (1, 45), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        wanted = model(tokens).logits[0]
    lm = load(tmp_path, dtype="fp32", context=64 if name == "phi3-longrope" else None)
    with torch.no_grad():
        torch.testing.assert_close(lm.decoder(tokens)[0].float(), wanted, atol=1e-4, rtol=1e-4)
    # The runtime, in uneven chunks through the paged cache.
    executor = lm.executor
    cache, ids, table = executor.new_cache(8, 8), tokens[0].tolist(), [5, 2, 7, 1, 0, 3]
    rows = []
    for start, stop in ((0, 33), (33, 34), (34, 41), (41, 45)):
        rows.append(executor.step(RaggedBatch.build([(ids[start:stop], start, table)], logits="all"), cache))
    torch.testing.assert_close(torch.cat(rows), wanted, atol=1e-4, rtol=1e-4)


def test_longrope_beyond_the_original_context(tmp_path):
    model = reference("phi3-longrope", tmp_path)
    tokens = torch.randint(2, 97, (1, 100), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        wanted = model(tokens).logits[0]
    executor = load(tmp_path, dtype="fp32").executor
    batch = RaggedBatch.build([(tokens[0].tolist(), 0, list(range(13)))], logits="all")
    torch.testing.assert_close(executor.step(batch, executor.new_cache(13, 8)), wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["mistral-window", "phi3", "gemma3", "qwen2-moe", "qwen3-moe"])
def test_a_narrower_folder_of_a_family_loads_again(name, tmp_path):
    """A fifth of its layers' parameters gone, written beside its own config: the runtime gives the module's logits."""
    source, out = tmp_path / "source", tmp_path / "narrower"
    reference(name, source)
    tokens = torch.randint(2, 97, (1, 45), generator=torch.Generator().manual_seed(1))
    made = ModularDecomposition(ratio=0.2, allocation="uniform")(load(source, dtype="fp32").decoder, [tokens])
    save(made, out, source)
    again = load(out, dtype="fp32")
    assert sum(p.numel() for p in again.decoder.parameters()) == sum(p.numel() for p in made.parameters())
    with torch.no_grad():
        wanted = made(tokens)[0].float()
        torch.testing.assert_close(again.decoder(tokens)[0].float(), wanted, atol=1e-5, rtol=1e-5)
    executor = again.executor
    cache, ids = executor.new_cache(8, 8), tokens[0].tolist()
    rows = [
        executor.step(RaggedBatch.build([(ids[a:b], a, [5, 2, 7, 1, 0, 3])], logits="all"), cache)
        for a, b in ((0, 40), (40, 45))
    ]
    torch.testing.assert_close(torch.cat(rows), wanted, atol=1e-4, rtol=1e-4)
