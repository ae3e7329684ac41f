"""Decoding attention with a lane per key, against the sums written out, and the bits of a row against its company."""

import ctypes

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hasten.language import kernels_decode_keys
from hasten.language.config import DecoderConfig
from hasten.language.loading import random_model
from hasten.language.pages import coded
from hasten.language.ragged import RaggedBatch

pytestmark = pytest.mark.skipif(
    not (kernels_decode_keys.takes(16, 64, 4, True) and kernels_decode_keys.takes(16, 64, 4, False)),
    reason="this processor lacks the instructions",
)
BLOCKS, KV_HEADS = 24, 2


def bits(x):
    """bfloat16 of a tensor as uint16."""
    return x.to(torch.bfloat16).view(torch.uint16).numpy()


def numbers(x):
    return torch.from_numpy(x).view(torch.bfloat16).float().numpy().astype(np.float64)


class Case:
    """Rows over one cache, and what the kernel makes of them."""

    def __init__(self, group, width, codes, places, window=0, seed=0):
        draw = torch.Generator().manual_seed(seed)
        count = len(places)
        shape = (2, BLOCKS, KV_HEADS, 16, width)
        # Rows of quite different sizes, so that a scale in the wrong place shows.
        cache = torch.randn(shape, generator=draw) * torch.randn(*shape[:-1], 1, generator=draw).exp()
        self.cache = coded(cache).numpy() if codes else bits(cache)
        scales = self.cache[..., -2:].copy().view(np.uint16) if codes else None
        self.rows = self.cache[..., :-2] * numbers(scales) if codes else numbers(self.cache)
        self.query = bits(torch.randn(count, KV_HEADS * group, width, generator=draw) * 2)
        self.places, self.chunk_of = np.array(places, np.int32), np.arange(count, dtype=np.int32)
        deepest = max(places) // 16 + 1
        tables = [torch.randperm(BLOCKS - 1, generator=draw)[:deepest].numpy() for _ in places]
        self.tables = np.stack(tables).astype(np.int32)
        self.group, self.width, self.codes, self.window = group, width, codes, window
        self.scale = np.float32(width**-0.5)

    def run(self, cuts=None):
        """Output (rows, heads, width) as uint16; ``cuts``: where one call ends and the next begins."""
        count, heads = self.query.shape[:2]
        out = np.zeros((count, heads * self.width), np.uint16)
        job = np.array(
            [count, heads, self.width, KV_HEADS, self.tables.shape[1], self.query.ctypes.data, self.places.ctypes.data,
             self.tables.ctypes.data, count, self.cache[0].ctypes.data, self.cache[1].ctypes.data, self.window,
             out.ctypes.data, self.chunk_of.ctypes.data, 0, 0, 0, int(self.scale.view(np.uint32)), int(self.codes)],
            np.int64,
        )  # fmt: skip
        code = kernels_decode_keys.code_for(self.group, self.codes)
        call = ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * 3)(code.address)
        cuts = cuts or [0, count * KV_HEADS]
        for first, last in zip(cuts, cuts[1:], strict=False):
            call(job.ctypes.data, first, last)
        return out.reshape(count, heads, self.width)

    def expected(self, row):
        """The same in double precision: (heads, width)."""
        place = self.places[row]
        first = max(0, place - self.window + 1) if self.window else 0
        out = []
        for head, query in enumerate(numbers(self.query[row])):
            keys, values = (
                np.concatenate([half[block, head // self.group] for block in self.tables[row]])[first : place + 1]
                for half in self.rows
            )
            scores = keys @ query * self.scale
            weights = np.exp(scores - scores.max())
            out.append(weights @ values / weights.sum())
        return np.array(out)


@pytest.mark.slow  # a kernel for each group and kind of cache is compiled once
@pytest.mark.parametrize(("group", "width", "codes"), [(4, 64, True), (4, 64, False), (5, 128, True), (1, 128, False)])
def test_the_sums_written_out(group, width, codes):
    for window, seed in ((0, 0), (40, 1)):
        case = Case(group, width, codes, [0, 15, -1, 16, 255, 256, 350], window, seed)
        found = numbers(case.run())
        assert (found[2] == 0).all()  # a row that is left out
        for row in (0, 1, 3, 4, 5, 6):
            expected = case.expected(row)
            gap = np.abs(found[row] - expected).max(-1) / np.abs(expected).max(-1)
            assert gap.max() < 0.006  # the output has eight bits


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 350), min_size=1, max_size=6), st.sampled_from([0, 1, 33, 300]), st.integers(0, 99))
def test_a_row_has_the_same_bits_in_any_company(places, window, seed):
    case = Case(4, 64, True, places, window, seed)
    whole = case.run()
    cuts = sorted({0, len(places) * KV_HEADS, *np.random.default_rng(seed).integers(0, len(places) * KV_HEADS, 3)})
    assert np.array_equal(case.run([int(cut) for cut in cuts]), whole)
    query, tables = case.query, case.tables
    for row in range(len(places)):
        case.query, case.tables = query[row : row + 1].copy(), tables[row : row + 1].copy()
        case.places, case.chunk_of = np.array(places[row : row + 1], np.int32), np.zeros(1, np.int32)
        assert np.array_equal(case.run()[0], whole[row])


@pytest.mark.parametrize("codes", [True, False])
def test_what_nobody_sees_changes_nothing(codes):
    case = Case(4, 64, codes, [20, 300], 64)
    expected = case.run()
    seen = set()
    for row, place in enumerate(case.places):
        seen |= {(case.tables[row, slot // 16], slot % 16) for slot in range(max(0, place - 63), place + 1)}
    hidden = [(block, slot) for block in range(BLOCKS) for slot in range(16) if (block, slot) not in seen]
    for block, slot in hidden:
        case.cache[:, block, :, slot] = np.array(127, np.int8) if codes else np.uint16(0x7FC0)  # NaN scales, NaN
    assert len(hidden) > 100
    assert np.array_equal(case.run(), expected)


@pytest.mark.parametrize("precision", ["auto", "int8"])
def test_the_engine_takes_it_and_agrees_with_the_kernel_for_pages(precision, monkeypatch):
    config = DecoderConfig(
        vocab_size=67, hidden_size=64, num_layers=2, num_heads=8, num_kv_heads=2, head_dim=64, intermediate_size=64,
        max_position_embeddings=512,
    )  # fmt: skip
    executor = random_model(config, dtype="bf16").executor
    executor.keep_cache_in(precision)
    stack = executor._stack
    if precision == "auto":
        monkeypatch.setattr(stack, "_attend", 0)  # as where there are no matrix tiles
    cache = executor.new_cache(40, 16)
    for half in (cache.keys, cache.values):
        draw = torch.randn(*half.shape[:-1], 64, generator=torch.Generator().manual_seed(0)) * 2
        half.copy_(draw if precision == "auto" else coded(draw))
    batch = RaggedBatch.build([([3], 60, list(range(4))), ([5], 9, [9])])
    found = executor.step(batch, cache)
    assert stack._singles[precision == "int8"] == kernels_decode_keys.code_for(4, precision == "int8").address
    monkeypatch.setattr(stack, "_singles", {False: 0, True: 0})
    expected = executor.step(batch, cache)
    if precision == "int8":  # queries are bytes there; in bfloat16 both ways round to the same bits nearly always
        assert not torch.equal(found, expected)
    assert (found - expected).norm() / expected.norm() < 0.02


@pytest.mark.parametrize(("page", "width", "group"), [(8, 64, 4), (16, 32, 4), (16, 64, 17), (16, 96, 1)])
def test_other_shapes_are_left_to_the_other_kernel(page, width, group):
    assert not kernels_decode_keys.takes(page, width, group, True)
    assert not kernels_decode_keys.takes(page, width, group, False)
