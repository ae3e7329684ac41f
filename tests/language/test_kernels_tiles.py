"""Attention through matrix tiles against the row-wise kernel, and the bits of a row against its company."""

import numpy as np
import pytest
import torch

from hasten.language import kernels_tiles, kernels_tiles_plan
from hasten.language.config import DecoderConfig
from hasten.language.loading import random_model
from hasten.language.ragged import RaggedBatch

pytestmark = pytest.mark.skipif(not kernels_tiles.takes(16, 64), reason="this processor has no matrix tiles")
BLOCKS = 200


def executor_of(group=3, width=64, window=None, deterministic=True):
    config = DecoderConfig(
        vocab_size=67, hidden_size=64, num_layers=2, num_heads=2 * group, num_kv_heads=2, head_dim=width,
        intermediate_size=64, max_position_embeddings=4096, sliding_window=window,
        sliding_layers=() if window is None else (True, False),
    )  # fmt: skip
    return random_model(config, dtype="bf16", deterministic=deterministic).executor


def filled(executor, seed=0):
    cache = executor.new_cache(BLOCKS, 16)
    draw = torch.Generator().manual_seed(seed)
    for half in (cache.keys, cache.values):
        half.copy_(torch.randn(half.shape, generator=draw) * 2)
    cache.keys[:, -1] = cache.values[:, -1] = torch.nan  # nobody's
    return cache, torch.randperm(BLOCKS - 1, generator=draw).tolist()


def chunks(table, seed=0):
    draw = np.random.default_rng(seed)
    lengths = ((1, 1023), (1, 1024), (5, 1021), (7, 2500), (60, 1500), (9, 10))
    return [(draw.integers(0, 67, rows).tolist(), context, table) for rows, context in lengths]


@pytest.mark.parametrize(("group", "width", "window"), [(3, 64, None), (1, 32, None), (2, 96, 700), (8, 128, None)])
def test_tiles_and_rows_agree(group, width, window, monkeypatch):
    executor = executor_of(group, width, window)
    cache, table = filled(executor)
    differ = False
    for chunk in chunks(table):
        found = executor.step(RaggedBatch.build([chunk], "all"), cache)
        with monkeypatch.context() as without:
            for name in ("_attend", "_merge"):
                without.setattr(executor._stack, name, 0)
            without.setattr(executor._stack, "_singles", {False: 0, True: 0})
            expected = executor.step(RaggedBatch.build([chunk], "all"), cache)
        differ |= not torch.equal(found, expected)
        assert torch.isfinite(found).all()
        assert (found - expected).norm() / expected.norm() < 0.02
    assert differ  # both ways were taken


@pytest.mark.parametrize("window", [None, 700])
def test_a_row_has_the_same_bits_in_any_company(window):
    """Alone, in a piece, beside others, and with other threads; also across the edges of blocks and segments."""
    executor = executor_of(window=window)
    cache, table = filled(executor)
    draw = np.random.default_rng(1)
    for context in (1000, 1150, 1535, 4000 // 16 * 8 + 47):
        tokens = draw.integers(0, 67, 40).tolist()
        whole = executor.step(RaggedBatch.build([(tokens, context, table)], "all"), cache)
        apart = table[140:] * 2  # blocks that nobody else writes
        company = [([3, 5], 800, apart), (tokens[:25], context, table), ([9], 20, apart)]
        some = executor.step(RaggedBatch.build(company, "all"), cache)[2:27]
        assert torch.equal(whole[:25], some)
        for row in (0, 7, 24, 39):
            one = executor.step(RaggedBatch.build([(tokens[row : row + 1], context + row, table)]), cache)[0]
            assert torch.equal(whole[row], one)


def test_a_piece_of_a_prompt_goes_through_tiles_from_its_first_row_where_bits_may_differ():
    exact, free = executor_of(), executor_of(deterministic=False)
    tokens = np.random.default_rng(2).integers(0, 67, 64).tolist()
    batch = RaggedBatch.build([(tokens, 0, list(range(9)))], "all")
    one, other = exact.step(batch, exact.new_cache(9, 16)), free.step(batch, free.new_cache(9, 16))
    assert (one - other).norm() / one.norm() < 0.02
    assert not torch.equal(one, other)


def test_what_lies_behind_the_end_is_never_read():
    executor = executor_of()
    cache, table = filled(executor)
    cache.values[:, table[64], :, 9:] = torch.nan
    cache.keys[:, table[64], :, 9:] = torch.nan
    context = 64 * 16 + 3
    found = executor.step(RaggedBatch.build([([1, 2, 3, 4, 5, 6], context, table[:65])], "all"), cache)
    assert torch.isfinite(found).all()


def test_the_plan_covers_every_key_once():
    starts, places = np.array([0, 1, 61], np.int32), np.array([5000, *range(1000, 1060)], np.int32)
    begins, near = kernels_tiles_plan.split(starts, places, 1 << 30)
    assert begins.tolist() == [0, 1 + 24]
    assert (near >= 0).sum() == 24
    items, merges, cuts, states, tiles = kernels_tiles_plan.plan(starts, begins, places, 2, 3, 2)
    assert sorted(set(items[:, 0].tolist())) == [0, 1]
    assert cuts[0] == 0
    assert cuts[-1] == len(items)
    seen = {tuple(i) for i in items[:, [1, 3, 4]].tolist()}
    assert len(seen) == len(items)
    assert states == sum(i[5] >= 0 for i in items.tolist())
    assert len(merges) == 2 * (1 + 36)
    assert tiles == -(-36 * 3 // 16)
