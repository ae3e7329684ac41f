"""The fused CPU kernels against the plain operations, over random ragged batches."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hasten.errors import InvalidRequestError
from hasten.language import kernels_cpu, kernels_torch
from hasten.language.ragged import RaggedBatch

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2}


def ragged(draw_lengths, contexts, size=4):
    chunks, used = [], 0
    for length, context in zip(draw_lengths, contexts, strict=True):
        blocks = -(-(length + context) // size)
        chunks.append(([1] * length, context, list(range(used, used + blocks))[::-1]))
        used += blocks
    return RaggedBatch.build(chunks), used


@st.composite
def batches(draw):
    count = draw(st.integers(1, 4))
    lengths = draw(st.lists(st.integers(1, 9), min_size=count, max_size=count))
    contexts = draw(st.lists(st.integers(0, 11), min_size=count, max_size=count))
    return ragged(lengths, contexts)


@settings(max_examples=25, deadline=None)
@given(
    batch_and_blocks=batches(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    heads=st.sampled_from([(4, 2), (3, 1), (2, 2)]),
    window=st.sampled_from([None, 1, 5]),
    softcap=st.sampled_from([None, 20.0]),
    normed=st.booleans(),
    seed=st.integers(0, 99),
)
def test_place_and_attend(batch_and_blocks, dtype, heads, window, softcap, normed, seed):
    batch, blocks = batch_and_blocks
    generator = torch.Generator().manual_seed(seed)
    (num_heads, kv_heads), width, pairs = heads, 8, 3
    qkv = torch.randn(batch.num_tokens, (num_heads + 2 * kv_heads) * width, generator=generator).to(dtype)
    cos, sin = torch.randn(32, pairs, generator=generator), torch.randn(32, pairs, generator=generator)
    weight = torch.rand(width, generator=generator) + 0.5 if normed else None
    keys = torch.randn(blocks, kv_heads, 4, width, generator=generator).to(dtype)
    values = torch.randn(blocks, kv_heads, 4, width, generator=generator).to(dtype)
    results = []
    for ops in (kernels_torch, kernels_cpu):
        k, v = keys.clone(), values.clone()
        step, form = ops.prepare(batch), ops.constant
        scales = None if weight is None else form(weight)
        q = ops.place(qkv, step, form(cos), form(sin), form(k), form(v), num_heads, scales, scales, 1e-5)
        out = ops.attend(q, step, form(k), form(v), 0.3, window, softcap)
        results.append((q, k, v, out))
    for plain, fused in zip(*results, strict=True):
        torch.testing.assert_close(fused.float(), plain.float(), atol=TOLERANCE[dtype] * 4, rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms_and_gates(dtype):
    x = torch.randn(7, 48, generator=torch.Generator().manual_seed(0)).to(dtype)
    weight, residual = torch.rand(48) + 0.5, torch.randn(7, 48)
    close = {"atol": TOLERANCE[dtype] * 2, "rtol": TOLERANCE[dtype]}
    torch.testing.assert_close(
        kernels_cpu.norm(x, weight.numpy(), 1e-5, dtype), kernels_torch.norm(x, weight, 1e-5, dtype), **close
    )
    one, two = residual.clone(), residual.clone()
    torch.testing.assert_close(
        kernels_cpu.add_norm(one, x, weight.numpy(), 1e-5, dtype),
        kernels_torch.add_norm(two, x, weight, 1e-5, dtype),
        **close,
    )
    torch.testing.assert_close(one, two)
    for gelu in (True, False):
        torch.testing.assert_close(kernels_cpu.gate(x, gelu), kernels_torch.gate(x, gelu), **close)


def test_gates_in_parallel_equal_gates_in_one_thread():
    x = torch.randn(64, 2048, generator=torch.Generator().manual_seed(0))
    whole = kernels_cpu.gate(x, False)
    rows = torch.cat([kernels_cpu.gate(x[i : i + 1], False) for i in range(64)])
    assert torch.equal(whole, rows)


def test_attention_of_a_row_does_not_depend_on_the_batch():
    generator = torch.Generator().manual_seed(3)
    keys, values = (torch.randn(64, 2, 16, 32, generator=generator) for _ in range(2))
    batch = RaggedBatch.build([([1], 200 + 3 * i, list(range(i, i + 16))) for i in range(12)])
    query = torch.randn(12, 4, 32, generator=generator)
    pages = kernels_cpu.constant(keys), kernels_cpu.constant(values)
    together = kernels_cpu.attend(query, kernels_cpu.prepare(batch), *pages, 0.2, None, None)
    for i in range(12):
        alone = kernels_cpu.prepare(RaggedBatch.build([([1], 200 + 3 * i, list(range(i, i + 16)))]))
        assert torch.equal(kernels_cpu.attend(query[i : i + 1], alone, *pages, 0.2, None, None)[0], together[i])


def test_exponential_is_accurate_to_two_units():
    import numba
    import numpy as np

    from hasten.nn.bfloat import exp

    @numba.njit
    def over(x, out):
        for i in range(len(x)):
            out[i] = exp(x[i])

    x = np.linspace(-86, 87, 200_001).astype(np.float32)
    out = np.empty_like(x)
    over(x, out)
    exact = np.exp(x.astype(np.float64))
    assert np.max(np.abs(out - exact) / exact) < 1e-5  # the argument's own rounding, times 87, dominates
    near = np.abs(x) < 1
    assert np.max(np.abs(out[near] - exact[near]) / exact[near]) < 3e-7


@pytest.mark.skipif(not kernels_cpu.paged_kernel_takes(16, 64), reason="this processor lacks the instructions")
@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.tuples(st.integers(1, 5), st.integers(0, 90)), min_size=1, max_size=4),
    heads=st.sampled_from([(4, 2), (3, 1), (2, 2), (10, 2), (8, 1)]),
    width=st.sampled_from([32, 64, 96, 128]),
    window=st.sampled_from([None, 1, 5, 40]),
    seed=st.integers(0, 99),
)
def test_attention_over_pages_of_sixteen(lengths, heads, width, window, seed):
    batch, blocks = ragged(*zip(*lengths, strict=True), size=16)
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(batch.num_tokens, heads[0], width, generator=generator).bfloat16()
    keys, values = (torch.randn(blocks, heads[1], 16, width, generator=generator).bfloat16() for _ in range(2))
    # What lies behind the last token of a sequence was never written and may be anything.
    starts = batch.starts.tolist()
    for chunk, table in enumerate(batch.block_tables.tolist()):
        total = int(batch.contexts[chunk]) + starts[chunk + 1] - starts[chunk]
        keys[table[(total - 1) // 16], :, total - 16 * ((total - 1) // 16) :] = float("nan")
        values[table[(total - 1) // 16], :, total - 16 * ((total - 1) // 16) :] = float("nan")
    results = []
    for ops, k, v in ((kernels_torch, keys.nan_to_num(), values.nan_to_num()), (kernels_cpu, keys, values)):
        results.append(ops.attend(query, ops.prepare(batch), ops.constant(k), ops.constant(v), 0.2, window, None))
    torch.testing.assert_close(results[1].float(), results[0].float(), atol=2e-2, rtol=2e-2)


def test_an_embedding_is_looked_up_and_a_token_outside_it_named():
    weight = torch.randn(7, 24).bfloat16()
    tokens = torch.tensor([3, 0, 6, 3])
    assert torch.equal(kernels_cpu.look_up(weight, tokens), weight[tokens].float())
    with pytest.raises(InvalidRequestError, match="token 7; token ids of this model are 0 to 6"):
        kernels_cpu.look_up(weight, torch.tensor([1, 7]))
    with pytest.raises(InvalidRequestError, match="token -1"):
        kernels_cpu.look_up(weight, torch.tensor([-1]))
