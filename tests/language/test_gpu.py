"""The GPU runtime: on a GPU where there is one, else its kernels run under Triton's interpreter."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hasten.errors import ConfigurationError
from hasten.language import executor as executors
from hasten.language import kernels_torch, kernels_triton
from hasten.language.config import DecoderConfig
from hasten.language.gpu import GpuSteps, padded_count
from hasten.language.loading import random_model
from hasten.language.ragged import RaggedBatch

if not kernels_triton.available():
    pytest.skip("Triton is not installed", allow_module_level=True)

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CONFIG = DecoderConfig(
    vocab_size=61, hidden_size=48, num_layers=1, num_heads=4, num_kv_heads=2, head_dim=16, intermediate_size=40,
    max_position_embeddings=128,
)  # fmt: skip
VARIANTS = {
    "plain": CONFIG,
    "norms, bias, odd width": replace(CONFIG, head_dim=24, qk_norm=True, attention_bias=True, tie_embeddings=True),
    "partial rotation": replace(CONFIG, partial_rotary_factor=0.5, num_kv_heads=4),
    "gemma": replace(
        CONFIG, activation="gelu_pytorch_tanh", num_layers=2, sandwich_norms=True, attention_softcap=20.0,
        logit_softcap=30.0,
        sliding_window=7, sliding_layers=(True, False), norm_offset=1.0, local_rope_theta=1000.0,
    ),
}  # fmt: skip


def on_gpu(config, monkeypatch):
    """An executor that runs the GPU's operations."""
    if DEVICE.type == "cuda":
        return random_model(config, dtype="fp32", weights=torch.float32, device="cuda").executor
    monkeypatch.setattr(executors, "_operations_of", lambda device: kernels_triton)
    made = random_model(config, dtype="fp32", weights=torch.float32).executor
    made._gpu = GpuSteps(made)
    monkeypatch.undo()
    return made


def tokens(count, seed):
    return torch.randint(0, 61, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.mark.parametrize("name", VARIANTS)
def test_equals_the_cpu_over_uneven_chunks(name, monkeypatch):
    config = VARIANTS[name]
    gpu, cpu = on_gpu(config, monkeypatch), random_model(config, dtype="fp32", weights=torch.float32).executor
    caches = gpu.new_cache(9, 8), cpu.new_cache(9, 8)
    one, two = tokens(25, 1), tokens(9, 2)
    tables = [3, 6, 0, 1], [8, 7]
    plan = [  # both kinds of chunks together, a long one behind a context, single tokens
        [(one[:3], 0, tables[0]), (two[:2], 0, tables[1])],
        [(one[3:20], 3, tables[0]), (two[2:8], 2, tables[1])],
        [(one[20:21], 20, tables[0]), (two[8:], 8, tables[1])],
    ]
    for chunks in plan:
        batch = RaggedBatch.build(chunks, logits="all")
        torch.testing.assert_close(gpu.step(batch, caches[0]), cpu.step(batch, caches[1]), atol=2e-4, rtol=2e-4)
    for mine, theirs in zip((caches[0].keys, caches[0].values), (caches[1].keys, caches[1].values), strict=True):
        torch.testing.assert_close(mine.cpu(), theirs, atol=2e-4, rtol=2e-4)


@pytest.mark.skipif(DEVICE.type != "cuda", reason="graphs need a GPU")
def test_graphs_give_what_launches_give(monkeypatch):
    executor = on_gpu(CONFIG, monkeypatch)
    cache, plain = executor.new_cache(40, 8), executor.new_cache(40, 8)
    for half in (cache.keys, cache.values, plain.keys, plain.values):
        half.normal_(generator=torch.Generator("cuda").manual_seed(5))
    for count in (1, 3, 8, 13):
        chunks = [(tokens(1, i), 7 * i % 16, [2 * i, 2 * i + 1]) for i in range(count)]
        batch = RaggedBatch.build(chunks)
        replayed = executor.step(batch, cache)
        executor._gpu.captures = False
        launched = executor.step(batch, plain)
        executor._gpu.captures = True
        torch.testing.assert_close(replayed, launched, atol=1e-4, rtol=1e-4)
        assert torch.equal(cache.keys, plain.keys)


def test_padding_and_refusals(monkeypatch):
    assert [padded_count(n) for n in (1, 17, 10_000)] == [1, 24, None]
    executor = on_gpu(CONFIG, monkeypatch)
    empty = RaggedBatch.build([([1, 2], 0, [0])], logits=[False])
    assert executor.step(empty, executor.new_cache(1)).shape == (0, 61)
    with pytest.raises(ConfigurationError, match="trees"):
        executor.step(replace(empty, placement=object()), executor.new_cache(1))


@settings(max_examples=15, deadline=None)
@given(
    width=st.integers(1, 70), rows=st.integers(1, 5), gelu=st.booleans(), seed=st.integers(0, 99)
)  # fmt: skip
def test_norms_and_gates(width, rows, gelu, seed):
    generator = torch.Generator().manual_seed(seed)
    x, residual = torch.randn(rows, width, generator=generator), torch.randn(rows, width, generator=generator)
    weight, both = torch.randn(width, generator=generator), torch.randn(rows, 2 * width, generator=generator)
    theirs, mine = residual.clone(), residual.clone().to(DEVICE)
    expected = kernels_torch.add_norm(theirs, x, weight, 1e-5, torch.float32)
    found = kernels_triton.add_norm(mine, x.to(DEVICE), weight.to(DEVICE), 1e-5, torch.float32)
    torch.testing.assert_close(found.cpu(), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(mine.cpu(), theirs)
    expected = kernels_torch.norm(x, weight, 1e-5, torch.float32)
    found = kernels_triton.norm(x.to(DEVICE), weight.to(DEVICE), 1e-5, torch.float32)
    torch.testing.assert_close(found.cpu(), expected, atol=1e-5, rtol=1e-5)
    found = kernels_triton.gate(both.to(DEVICE), gelu).cpu()
    torch.testing.assert_close(found, kernels_torch.gate(both, gelu), atol=1e-5, rtol=1e-5)
