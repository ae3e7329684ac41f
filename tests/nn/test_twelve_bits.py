"""bfloat16 in 12 bits: nothing is lost, and products have the bits of those with 16."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hasten.language.config import DecoderConfig
from hasten.language.linear import pack
from hasten.language.loading import random_model
from hasten.language.ragged import RaggedBatch
from hasten.nn.product import bfloat16, supported, tiles, twelve_bits, twelve_bits_panels

pytestmark = pytest.mark.skipif(not supported("bf16"), reason="this processor has no bfloat16 dot product")
NONE = np.empty(0, np.float32)


def words(array):
    """float32 as the upper halves of its words."""
    return (np.ascontiguousarray(array, np.float32).view(np.uint32) >> 16).astype(np.uint16)


def weight(outs, ins, seed, rare=0.0):
    """Normal weights, some of which have upper bytes that the others do not have."""
    rng = np.random.default_rng(seed)
    found = words(rng.standard_normal((outs, ins)) * 0.02)
    strange = words(np.float32([0.0, -0.0, 1e-30, 3e38, -7e20, np.inf, np.nan, 1e-42]))
    chosen = rng.random(found.shape) < rare
    found[chosen] = rng.choice(strange, chosen.sum())
    return found


@settings(max_examples=25, deadline=None)
@given(
    outs=st.integers(1, 140),
    blocks=st.integers(1, 5),
    rare=st.sampled_from([0.0, 0.001, 0.3]),
    seed=st.integers(0, 999),
)
def test_every_bit_comes_back(outs, blocks, rare, seed):
    given_ = weight(outs, 32 * blocks, seed, rare)
    packed = twelve_bits.pack(given_, limit=1.0)
    back = twelve_bits.unpack(packed, *given_.shape)
    assert np.array_equal(words(back), given_)
    tokens = np.random.default_rng(seed).integers(0, outs, 9)
    assert np.array_equal(twelve_bits.rows_of(packed, tokens, given_.shape[1]), given_[tokens])


def test_any_bits_at_all_come_back():
    given_ = np.arange(1 << 16, dtype=np.uint16).reshape(128, 512)
    packed = twelve_bits.pack(given_, limit=1.0)
    back = (twelve_bits.unpack(packed, 128, 512).view(np.uint32) >> 16).astype(np.uint16)
    assert np.array_equal(back, given_)


def test_normal_weights_take_twelve_bits_and_a_little():
    given_ = weight(1024, 1024, 0)
    assert 0.75 <= twelve_bits.pack(given_).nbytes / given_.nbytes < 0.755


def test_weights_without_a_common_size_stay_as_they_are():
    assert twelve_bits.pack(np.arange(1 << 16, dtype=np.uint16).reshape(128, 512)) is None
    assert not twelve_bits.takes(64, 64)
    assert not twelve_bits.takes(1 << 20, 48)
    assert twelve_bits.takes(1024, 1024)


@pytest.mark.parametrize(("outs", "ins", "rare"), [(130, 96, 0.002), (64, 1056, 0.0), (192, 2048, 0.01)])
@pytest.mark.parametrize("rows", [1, 2, 5, 6, 7, 15, 16, 17, 33, 64, 96, 97, 210])
def test_products_have_the_same_bits(rows, outs, ins, rare):
    given_ = weight(outs, ins, rows)
    finite = np.random.default_rng(1).random(given_.shape) < rare
    given_[finite] = words(np.float32([1e-20]))[0]
    long, short = bfloat16.pack(given_), twelve_bits.pack(given_, limit=1.0)
    x = words(np.random.default_rng(2).standard_normal((rows, ins)))
    bias = np.random.default_rng(3).standard_normal(outs).astype(np.float32)
    pairs = [(bfloat16.multiply, twelve_bits_panels.multiply)]
    if rows in (1, 16, 33, 97):  # of use from 16 rows on, right for any
        pairs.append((bfloat16.multiply_floats, twelve_bits_panels.multiply_floats))
    if tiles.granted() and rows >= tiles.FEWEST:
        pairs.append((tiles.multiply, twelve_bits_panels.multiply_tiles))
    for plain, ours in pairs:
        for kind, added in ((np.float32, NONE), (np.uint16, bias)):
            expected, out = np.zeros((rows, outs), kind), np.ones((rows, outs), kind)
            plain(x, long, added, expected)
            ours(x, short, added, out)
            assert np.array_equal(out, expected)


def test_a_large_matrix_is_laid_out_so(monkeypatch):
    found = torch.randn(512, 1024, generator=torch.Generator().manual_seed(0)) * 0.02
    x = torch.randn(3, 1024, generator=torch.Generator().manual_seed(1)).bfloat16()
    short = pack(found, "bf16")
    monkeypatch.setattr(twelve_bits, "LEAST_BYTES", 1 << 40)
    long = pack(found, "bf16")
    assert short.packed[0].startswith("bf12")
    assert long.packed[0].startswith("bf16")
    assert short.num_bytes < 0.76 * long.num_bytes
    assert torch.equal(short(x), long(x))


@pytest.mark.parametrize("tied", [False, True])
def test_a_decoder_has_the_same_logits(monkeypatch, tied):
    size = {"vocab_size": 203, "hidden_size": 96, "num_layers": 2, "num_heads": 6, "num_kv_heads": 2, "head_dim": 32}
    config = DecoderConfig(**size, intermediate_size=160, max_position_embeddings=256, tie_embeddings=tied)
    logits = []
    for least in (0, 1 << 40):
        monkeypatch.setattr(twelve_bits, "LEAST_BYTES", least)
        executor = random_model(config, dtype="bf16").executor
        assert executor._head.packed[0].startswith("bf16" if least else "bf12")
        cache = executor.new_cache(24, 16)
        tables = [list(range(6 * i, 6 * i + 6)) for i in range(4)]
        steps = [
            [(list(range(3, 3 + length)), 0, table) for length, table in zip((40, 7, 60, 1), tables, strict=True)],
            [([5], 40, tables[0]), ([6, 7, 8], 7, tables[1])],
        ]
        logits.append([executor.step(RaggedBatch.build(chunks, logits="all"), cache) for chunks in steps])
    for short, long in zip(*logits, strict=True):
        assert torch.equal(short, long)
