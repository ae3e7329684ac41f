"""Attention over pages of latents against the plain formula, and all layers in one call against one by one."""

import ctypes

import numpy as np
import pytest
import torch

from hasten.compress import ToMLA
from hasten.language import Decoder, DecoderConfig, RaggedBatch
from hasten.language import kernels_latent as kernel
from hasten.language.kernels_latent_stack import LatentStack
from hasten.language.kernels_paged import PAGE
from hasten.language.kernels_tiles import takes
from hasten.language.kernels_tiles_plan import begin_of
from hasten.language.latent import LatentExecutor

torch.set_num_threads(1)
pytestmark = pytest.mark.skipif(not takes(PAGE, 32), reason="no matrix tiles here")
TOKENS = torch.randint(0, 60, (2, 60), generator=torch.Generator().manual_seed(1))


def words(x):
    return x.bfloat16().contiguous().view(torch.uint16).numpy()


def floats(x):
    return torch.from_numpy(x).view(torch.bfloat16).double()


def attended(heads, rope, rank, places, *, window=0, plain=True, size=1.0, threads=1, room=1 << 20):
    """The kernel's answer and the formula's, for a chunk of rows that see slots up to ``places``."""
    generator = torch.Generator().manual_seed(heads + rope)
    width, rows = rope + rank if plain else rope, len(places)
    value_width, blocks = (width if plain else rank), max(places) // PAGE + 1
    keys = words(torch.randn(blocks, PAGE, width, generator=generator))
    values = keys if plain else words(torch.randn(blocks, PAGE, rank, generator=generator))
    query = words(torch.randn(rows, heads, width, generator=generator) * size)
    tables = np.random.default_rng(0).permutation(blocks).astype(np.int32)[None]
    places, chunk_of = np.array(places, np.int32), np.zeros(rows, np.int32)
    starts = np.array([0, rows], np.int32)
    items, merges, cuts, ends, count = kernel.plan_rows(starts, places, 1 << 30, threads, room)
    shift = rope if plain else 0
    column = shift // kernel.STEP * kernel.STEP
    states = np.empty((count, heads, value_width - column + 2), np.float32)
    out = np.zeros((rows, heads * rank), np.uint16)
    bits = int(np.float32(width**-0.5).view(np.uint32))
    job = np.array(
        [rows, heads, width, value_width, column, shift, rank, blocks, query.ctypes.data, tables.ctypes.data,
         keys.ctypes.data, values.ctypes.data, out.ctypes.data, items.ctypes.data, states.ctypes.data, count, 1, window,
         bits, chunk_of.ctypes.data], np.int64,
    )  # fmt: skip
    assert len(job) == kernel.FIELDS
    code = ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * 3)(kernel.code_for(kernel.lanes_for(heads)).address)
    for wave, line in enumerate(cuts):
        for begin, end in zip(line[:-1], line[1:], strict=True):
            code(job.ctypes.data, int(begin), int(end))
        kernel.merge(merges, states, shift - column, rank, out, ends[wave], ends[wave + 1])
    order = tables[0].astype(np.int64)
    k, v = (floats(x[order]).reshape(blocks * PAGE, -1) for x in (keys, values))
    expected = []
    for row, last in enumerate(places.tolist()):
        first = max(0, last - window + 1) if window else 0
        scores = floats(query[row]) @ k[first : last + 1].T * width**-0.5
        expected.append((torch.softmax(scores, -1) @ v[first : last + 1, shift : shift + rank]).flatten())
    return floats(out), torch.stack(expected)


@pytest.mark.parametrize(
    ("heads", "rope", "rank", "options"),
    [
        (3, 16, 16, {}),
        (3, 24, 40, {"window": 700}),
        (1, 32, 32, {"window": 40}),
        (20, 32, 96, {"threads": 3, "room": 4}),
        (5, 64, 64, {"plain": False}),
    ],
)
def test_rows_attend_as_the_formula_says(heads, rope, rank, options):
    """Within a page, behind its end, in one state and in several; a window that begins inside a later state."""
    assert begin_of(1) == 512
    places = [0, 14, 15, 16, 255, 256, 511, 512, 1300]
    found, expected = attended(heads, rope, rank, places, **options)
    torch.testing.assert_close(found, expected, atol=2e-2, rtol=2e-2)


def test_weights_that_vanish_are_nothing_and_the_rest_of_the_process_keeps_small_numbers():
    """Scores hundreds apart have weights below the normal numbers, which would cost a hundred cycles each."""
    tiny = np.array([1e-40], np.float32)
    found, expected = attended(3, 16, 16, [700], size=60.0)
    torch.testing.assert_close(found, expected, atol=4e-2, rtol=4e-2)
    assert (tiny * np.float32(0.5))[0] > 0


def test_threads_share_the_keys():
    starts, places = np.array([0, 1, 4, 5], np.int32), np.array([5000, 10, 11, 12, 3000], np.int32)
    items, merges, cuts, ends, count = kernel.plan_rows(starts, places, 2, 2, 100)
    assert sorted(set(items[:, 0].tolist())) == [0, 4]  # the chunk of three rows is left to another kernel
    assert merges[:, 2].tolist() == [9, 6]
    assert count == 15
    length = [min(last + 1, begin_of(piece + 1)) - begin_of(piece) for _, piece, last, _ in items.tolist()]
    assert sum(length) == 8002
    assert abs(sum(length[: cuts[0, 1]]) - 4001) < 1024
    assert ends.tolist() == [0, 2]
    waves = kernel.plan_rows(starts, places, 2, 2, 10)  # room for the states of one row at a time
    assert waves[2][:, [0, -1]].tolist() == [[0, 9], [9, 15]]
    assert waves[3].tolist() == [0, 1, 2]
    assert waves[4] == 9
    alone = kernel.plan_rows(np.array([0, 1], np.int32), np.array([100], np.int32), 2, 1, 100)
    assert alone[0].tolist() == [[0, 0, 100, -1]]
    assert len(alone[1]) == 0


def decoder(**options):
    torch.manual_seed(0)
    config = DecoderConfig(
        vocab_size=60, hidden_size=64, num_layers=2, num_heads=3, num_kv_heads=1, head_dim=32, intermediate_size=96,
        max_position_embeddings=4096, **options,
    )  # fmt: skip
    model = Decoder(config).eval()
    for p in model.parameters():
        p.data.mul_(5 if p.dim() > 1 else 1)
        if p.dim() == 1 and options.get("attention_bias"):
            p.data.add_(torch.randn_like(p) * 0.1)
    return model


def fed(executor, sizes, ids, blocks=12):
    cache, table, at, rows = executor.new_cache(blocks, 16), list(range(blocks - 1, -1, -1)), 0, []
    for n in sizes:
        rows.append(executor.step(RaggedBatch.build([(ids[at : at + n], at, table)], "all"), cache))
        at += n
    return torch.cat(rows)


@pytest.mark.parametrize("technique", [ToMLA(), ToMLA(kv_rank=16, rope_dims=16), ToMLA(kv_rank=40, rope_dims=24)])
@pytest.mark.parametrize("options", [{}, {"attention_bias": True, "sliding_window": 50}])
def test_all_layers_in_one_call_are_the_layers_one_by_one(technique, options):
    """Rows, a few rows and pieces of a prompt, within the rounding of bfloat16; and the module in float32."""
    small = technique(decoder(**options), [TOKENS])
    ids = torch.randint(0, 60, (150,), generator=torch.Generator().manual_seed(2)).tolist()
    with torch.no_grad():
        expected = small(torch.tensor([ids]))[0]
    fused, plain = (LatentExecutor(small, precision="bf16") for _ in range(2))
    assert isinstance(fused._stack, LatentStack)
    plain._stack = None
    for sizes in ([150], [40, 1, 1, 9, 64, 35]):
        rows = [fed(executor, sizes, ids) for executor in (fused, plain)]
        errors = [float((r - expected).norm() / expected.norm()) for r in rows]
        assert errors[0] < 1.2 * errors[1] + 1e-3
        assert errors[0] < 0.03


def test_a_row_has_the_same_bits_alone_and_among_others():
    small = ToMLA(kv_rank=16, rope_dims=16)(decoder(), [TOKENS])
    executor = LatentExecutor(small, precision="bf16", deterministic=True)
    ids = torch.randint(0, 60, (90,), generator=torch.Generator().manual_seed(3)).tolist()
    rows = fed(executor, [1] * 90, ids)
    for sizes in ([90], [50, 40], [7, 83]):
        assert torch.equal(fed(executor, sizes, ids), rows)
    cache = executor.new_cache(12, 16)
    chunks = [(ids[:45], 0, [3, 0, 4]), (ids[:20], 0, [1, 5])]
    both = executor.step(RaggedBatch.build(chunks, "all"), cache)
    assert torch.equal(both[:45], rows[:45])
    assert torch.equal(both[45:], rows[:20])


def test_far_rows_are_cut_into_states():
    """Contexts of more than one state, a piece of a prompt beside rows that decode."""
    small = ToMLA(kv_rank=16, rope_dims=16)(decoder(), [TOKENS])
    ids = torch.randint(0, 60, (1300,), generator=torch.Generator().manual_seed(4)).tolist()
    with torch.no_grad():
        expected = small(torch.tensor([ids]))[0]
    executor, blocks = LatentExecutor(small, precision="bf16"), 90
    cache, one, other = executor.new_cache(2 * blocks, 16), list(range(blocks)), list(range(blocks, 2 * blocks))
    executor.step(RaggedBatch.build([(ids[:1290], 0, one), (ids[:1100], 0, other)]), cache)
    mixed = [(ids[1290:1291], 1290, one), (ids[1100:1300], 1100, other)]
    rows = executor.step(RaggedBatch.build(mixed, "all"), cache)
    torch.testing.assert_close(rows[0], expected[1290], atol=0.05 * float(expected.std()), rtol=0.05)
    assert float((rows[1:] - expected[1100:1300]).norm() / expected[1100:1300].norm()) < 0.02


def test_queries_are_handed_out_and_what_does_not_fit_goes_layer_by_layer():
    small = ToMLA(kv_rank=16, rope_dims=16)(decoder(), [TOKENS])
    executor = LatentExecutor(small, precision="bf16")
    batch, queries = RaggedBatch.build([([5, 6, 7], 0, [1])]), []
    batch = type(batch)(**{**vars(batch), "queries": queries})
    executor.step(batch, executor.new_cache(2, 16))
    assert [tuple(q.shape) for q in queries] == [(3, 3, 32)] * 2
    assert all(bool(q.any()) for q in queries)
    assert not executor._stack.takes(executor.new_cache(2, 8))
    assert LatentExecutor(small, precision="fp32")._stack is None
    odd = ToMLA(kv_rank=18, rope_dims=16)(decoder(), [TOKENS])
    assert LatentExecutor(odd, precision="bf16")._stack is None
