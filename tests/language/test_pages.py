"""A cache of codes: attention over it is that over the numbers that it holds, whoever writes and moves its rows."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hasten.errors import ConfigurationError
from hasten.language import DecoderConfig, kernels_cpu, kernels_lean, load, random_model
from hasten.language.kernels_paged import paged_kernel_takes
from hasten.language.kvvalues import KeysValues, fingerprint, read_cache, write_cache
from hasten.language.pages import coded, row_bytes, rows_of, widened
from hasten.language.ragged import RaggedBatch

torch.set_num_threads(1)


def shape(head_dim, context=64, **more):
    return DecoderConfig(
        vocab_size=96, hidden_size=64, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=head_dim,
        intermediate_size=64, max_position_embeddings=context, **more,
    )  # fmt: skip


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.integers(0, 1000), st.integers(1, 90), st.floats(1e-20, 1e20))
def test_rows_keep_what_was_read_and_lose_half_a_bin(seed, width, size):
    x = torch.randn(5, width, generator=torch.Generator().manual_seed(seed)) * size
    x[3] = 0
    rows = coded(x)
    assert rows.shape == (5, row_bytes(width, torch.bfloat16, "int8"))
    back = widened(rows)
    assert ((back - x).abs() <= 0.51 * 1.004 * x.abs().amax(-1, keepdim=True) / 127).all()
    assert torch.equal(coded(back), rows)


def filled(model, blocks):
    """Two caches with the same numbers: of codes, and of the activations' type."""
    executor = model.executor
    executor.keep_cache_in("int8")
    ours = executor.new_cache(blocks, 16)
    executor.keep_cache_in("auto")
    plain = executor.new_cache(blocks, 16)
    draw = torch.Generator().manual_seed(0)
    for half, other in ((ours.keys, plain.keys), (ours.values, plain.values)):
        half.copy_(coded(torch.randn(*half.shape[:-1], executor.config.head_dim, generator=draw)))
        other.copy_(widened(half))
    return ours, plain


def batch(contexts, lengths, vocab, logits="all"):
    draw = torch.Generator().manual_seed(1)
    counts = [-(-(c + n) // 16) for c, n in zip(contexts, lengths, strict=True)]
    order = torch.randperm(sum(counts), generator=draw).tolist()
    chunks, at = [], 0
    for context, length, count in zip(contexts, lengths, counts, strict=True):
        tokens = torch.randint(0, vocab, (length,), generator=draw).tolist()
        chunks.append((tokens, context, order[at : at + count]))
        at += count
    return RaggedBatch.build(chunks, logits), at


@pytest.mark.parametrize(("head_dim", "dtype"), [(64, "bf16"), (24, "bf16"), (16, "fp32")])
@pytest.mark.parametrize(("window", "softcap"), [(None, None), (20, None), (None, 5.0)])
def test_attention_is_that_over_the_widened_cache(head_dim, dtype, window, softcap):
    model = random_model(shape(head_dim), dtype=dtype)
    step, blocks = batch([0, 17, 40], [1, 3, 2], 96)
    ours, plain = filled(model, blocks)
    query = torch.randn(6, 4, head_dim, generator=torch.Generator().manual_seed(2)).to(model.executor.dtype)
    found = []
    for cache in (ours, plain):
        keys, values = cache.layers(kernels_cpu.constant)[1]
        found.append(kernels_cpu.attend(query, kernels_cpu.prepare(step), keys, values, 0.3, window, softcap).float())
    # bfloat16 pages are the widened numbers, rounded; float32 ones are they themselves, in another order of products
    assert torch.allclose(*found, atol=2e-6 if dtype == "fp32" else 0.02)
    if paged_kernel_takes(16, head_dim) and softcap is None:  # pages are widened; else numbers are, one by one
        assert torch.equal(*found)


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_shares_of_a_line_read_codes_too(dtype):
    model = random_model(shape(32), dtype=dtype)
    step, blocks = batch([33, 5], [2, 1], 96)
    ours, plain = filled(model, blocks)
    query = torch.randn(3, 4, 32, generator=torch.Generator().manual_seed(2)).to(model.executor.dtype)
    given_ = (step.starts.numpy(), step.contexts.numpy(), step.block_tables.numpy(), np.array([0, 1, 3, 4], np.int32),
              np.array([33, 33, 34, 5], np.int32), np.zeros(3, np.int32))  # fmt: skip
    found = [
        kernels_lean.attend(query, *given_, *layers, scale=0.2, tile=16, grid=2)[0].float()
        for layers in (cache.layers(kernels_cpu.constant)[0] for cache in (ours, plain))
    ]
    assert torch.allclose(*found, atol=2e-6 if dtype == "fp32" else 0.02)


@pytest.mark.parametrize(
    ("contexts", "lengths"), [([1100], [1]), ([1100, 7, 1300], [1, 1, 5]), ([1050], [40]), ([3], [50]), ([0], [33])]
)
def test_a_step_is_that_over_the_widened_cache(contexts, lengths):
    """Small chunks near and far, and pieces of prompts: each has a kernel of its own where the processor has tiles."""
    model = random_model(shape(64, context=1500), dtype="bf16")
    step, blocks = batch(contexts, lengths, 96)
    found = [model.executor.step(step, cache) for cache in filled(model, blocks)]
    assert (found[0] - found[1]).abs().max() < 0.03 * found[1].abs().max()


def test_keys_and_values_are_written_as_the_plain_form_quantises_them():
    for dtype, width in (("fp32", 16), ("bf16", 64)):
        model = random_model(shape(width, partial_rotary_factor=0.5), dtype=dtype)
        step, blocks = batch([0, 0], [20, 3], 96)
        executor = model.executor
        plain = executor.new_cache(blocks, 16)
        executor.step(step, plain)
        executor.keep_cache_in("int8")
        ours = executor.new_cache(blocks, 16)
        executor.step(step, ours)
        for half, other in ((ours.keys, plain.keys), (ours.values, plain.values)):
            wanted, got = widened(coded(other[0].float())), widened(half[0])  # later layers depend on this one
            assert (wanted - got).abs().max() <= 1.1 * wanted.abs().max() / 127
            assert torch.equal(half[0][..., :-2] == 0, coded(other[0].float())[..., :-2] == 0) or dtype == "bf16"


def test_moving_rows_moves_their_scale():
    executor = random_model(shape(64), dtype="bf16").executor
    executor.keep_cache_in("int8")
    cache = executor.new_cache(4, 16)
    draw = torch.Generator().manual_seed(0)
    cache.keys.copy_(coded(torch.randn(*cache.keys.shape[:-1], 64, generator=draw)))
    before = widened(cache.keys).clone()
    executor.move(cache, [[0, 3, 2, 5]])
    assert torch.equal(widened(cache.keys)[:, 2, :, 5], before[:, 0, :, 3])
    executor.keep(cache, [0, 1, 2, 3], 10, [4, 9])
    assert torch.equal(widened(cache.keys)[:, 0, :, 10], before[:, 0, :, 14])
    step, _ = batch([17], [1], 96)
    copies = torch.tensor([[1, 2, 3, 4]], dtype=torch.int32)
    want = cache.keys[:, 1, :, 2].clone()
    executor.step(replace(step, copies=copies), cache)
    assert torch.equal(cache.keys[:, 3, :, 4], want)


def test_numbers_put_into_a_cache_come_out_again():
    executor = random_model(shape(32), dtype="bf16").executor
    executor.keep_cache_in("int8")
    cache, table = executor.new_cache(4, 16), [2, 0, 3]
    rng = np.random.default_rng(0)
    kv = KeysValues(*(rng.standard_normal((2, 21, 64)).astype(np.float32) for _ in range(2)), start=9)
    write_cache(cache, table, kv)
    back = read_cache(cache, table, 30, 9)
    assert np.abs(back.keys - kv.keys).max() < 4.5 / 127 / 1.9
    write_cache(cache, table, back)
    assert np.array_equal(read_cache(cache, table, 30, 9).values, back.values)


def test_precisions_that_a_cache_cannot_have_are_refused():
    model = load("pycode-4m")
    plain = fingerprint(model)
    assert model.executor.bytes_per_token == 2 * 8 * 64 * 2
    ours = load("pycode-4m", kv_precision="int8")
    assert ours.executor.bytes_per_token == 2 * 8 * (64 + 2)
    assert ours.executor.new_cache(2).precision == "int8"
    assert ours.executor.new_cache(2).bytes == 2 * 16 * ours.executor.bytes_per_token
    assert fingerprint(ours) != plain
    assert ours.with_precision("fp32").executor.kv_precision == "int8"
    with pytest.raises(ConfigurationError, match="cannot be 'int3'"):
        model.executor.keep_cache_in("int3")
    assert rows_of((2, 3), torch.float32, "auto", torch.device("cpu")).dtype == torch.float32
    from hasten.compress import ToMLA

    latent = ToMLA()(random_model(shape(32), dtype="fp32").decoder, None)
    from hasten.language.latent import LatentExecutor

    with pytest.raises(ConfigurationError, match="latent"):
        LatentExecutor(latent, precision="fp32").keep_cache_in("int8")


def test_a_latent_cache_is_not_written_as_one_of_heads():
    """In bfloat16 the call for all layers exists for the shapes of a latent decoder too; it must not be taken."""
    from hasten.compress import ToMLA
    from hasten.language.latent import LatentExecutor

    model = random_model(shape(64), dtype="bf16")
    latent = ToMLA(kv_rank=32, rope_dims=32)(model.decoder.float(), [torch.arange(40)[None]]).bfloat16()
    executor = LatentExecutor(latent, precision="bf16")
    tokens = list(range(3, 43))
    cache = executor.new_cache(3, 16)
    found = executor.step(RaggedBatch.build([(tokens, 0, [2, 0, 1])], "all"), cache)
    with torch.inference_mode():
        expected = latent(torch.tensor([tokens]))[0].float()
    assert (found - expected).norm() < 0.05 * expected.norm()
