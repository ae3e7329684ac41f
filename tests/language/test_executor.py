"""One ragged forward: chunks, neighbours and precision change nothing that they should not."""

import pytest
import torch

from hasten.errors import CacheError, ConfigurationError
from hasten.language.config import DecoderConfig
from hasten.language.loading import random_model
from hasten.language.ragged import RaggedBatch

CONFIG = DecoderConfig(
    vocab_size=61,
    hidden_size=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    intermediate_size=48,
    max_position_embeddings=256,
)


def tokens(count, seed=0):
    return torch.randint(0, 61, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.fixture(scope="module")
def exact():
    return random_model(CONFIG, dtype="fp32", weights=torch.float32)


@pytest.mark.parametrize("size", [1, 7, 33, 100])
def test_chunks_give_the_logits_of_the_whole(exact, size):
    ids = tokens(100)
    with torch.no_grad():
        wanted = exact.decoder(torch.tensor([ids]))[0]
    cache, table = exact.executor.new_cache(7, 16), [3, 6, 0, 1, 5, 2, 4]
    rows = [
        exact.executor.step(RaggedBatch.build([(ids[at : at + size], at, table)], logits="all"), cache)
        for at in range(0, 100, size)
    ]
    torch.testing.assert_close(torch.cat(rows), wanted, atol=1e-4, rtol=1e-4)


def test_mixed_long_and_short_chunks_in_one_step(exact):
    executor = exact.executor
    cache = executor.new_cache(32, 16)
    prompts = [tokens(90, 1), tokens(5, 2), tokens(64, 3), tokens(17, 4)]
    tables = [list(range(8 * i, 8 * i + 8)) for i in range(4)]
    executor.step(RaggedBatch.build([(p[:-1], 0, t) for p, t in zip(prompts[1::2], tables[1::2], strict=True)]), cache)
    batch = RaggedBatch.build(
        [
            (prompts[0], 0, tables[0]),
            (prompts[1][-1:], 4, tables[1]),
            (prompts[2], 0, tables[2]),
            (prompts[3][-1:], 16, tables[3]),
        ]
    )
    logits = executor.step(batch, cache)
    with torch.no_grad():
        wanted = torch.stack([exact.decoder(torch.tensor([p]))[0, -1] for p in prompts])
    torch.testing.assert_close(logits, wanted, atol=1e-4, rtol=1e-4)


def test_no_wanted_rows(exact):
    batch = RaggedBatch.build([(tokens(4), 0, [0])], logits=[False])
    assert exact.executor.step(batch, exact.executor.new_cache(1)).shape == (0, 61)


def test_plain_operations_of_other_devices_give_the_same(exact, monkeypatch):
    from hasten.language import kernels_cpu, kernels_torch

    monkeypatch.setattr(kernels_cpu, "place", kernels_torch.place)
    for name in ("norm", "add_norm", "gate", "attend", "prepare", "constant"):
        monkeypatch.setattr(kernels_cpu, name, getattr(kernels_torch, name))
    executor = random_model(CONFIG, dtype="fp32", weights=torch.float32).executor
    batch = RaggedBatch.build([(tokens(9), 0, [0, 2]), (tokens(3, 5), 0, [1])], logits="all")
    one = executor.step(batch, executor.new_cache(3, 8))
    monkeypatch.undo()
    two = exact.executor.step(batch, exact.executor.new_cache(3, 8))
    torch.testing.assert_close(one, two, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_deterministic_mode_gives_the_same_bits_whatever_else_is_in_the_batch(precision):
    executor = random_model(CONFIG, dtype=precision, deterministic=True).executor
    ids = tokens(70)

    def last_logits(cuts, neighbours):
        cache = executor.new_cache(64, 16)
        for number, (start, stop) in enumerate(zip([0, *cuts], [*cuts, 70], strict=True)):
            others = [
                (tokens(length, number * 10 + i), 0, list(range(8 + 4 * i, 12 + 4 * i)))
                for i, length in enumerate(neighbours)
            ]
            logits = executor.step(RaggedBatch.build([*others, (ids[start:stop], start, [0, 1, 2, 3, 4])]), cache)
        return logits[-1]

    alone = last_logits([], [])
    for cuts, neighbours in (([33], []), ([1, 2, 50], [5, 40, 1]), ([69], [1] * 13), ([16, 32], [64])):
        assert torch.equal(alone, last_logits(cuts, neighbours))


@pytest.mark.parametrize("precision", ["bf16", "int8", "int4"])
def test_lower_precision_stays_close(precision):
    model = random_model(DecoderConfig(61, 128, 2, 4, 2, 32, 256, max_position_embeddings=64), dtype=precision)
    batch = RaggedBatch.build([(tokens(20), 0, [0, 1])], logits="all")
    logits = model.executor.step(batch, model.executor.new_cache(2))
    with torch.no_grad():
        wanted = model.decoder.float()(torch.tensor([tokens(20)]))[0]
    error = (logits - wanted).norm() / wanted.norm()
    assert error < {"bf16": 0.02, "int8": 0.05, "int4": 0.3}[precision]


def test_unknown_precision_is_named():
    with pytest.raises(ConfigurationError, match="fp32, bf16, int8, int4"):
        random_model(CONFIG, dtype="int3").executor  # noqa: B018


def test_blocks_beyond_the_cache_are_refused(exact):
    with pytest.raises(CacheError, match="block 9, the cache has 2"):
        exact.executor.step(RaggedBatch.build([(tokens(4), 0, [9])]), exact.executor.new_cache(2))
