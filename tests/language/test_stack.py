"""All layers in one call against the executor's own operations, one by one."""

import pytest
import torch

from hasten.language.config import DecoderConfig
from hasten.language.loading import random_model
from hasten.language.ragged import RaggedBatch
from hasten.nn.product import supported

pytestmark = pytest.mark.skipif(
    not (supported("bf16") and supported("int8")), reason="this processor lacks the instructions"
)

VARIANTS = {
    "llama": {},
    "qwen2": {"attention_bias": True},
    "qwen3": {"qk_norm": True},
    "gelu": {"activation": "gelu_pytorch_tanh"},
    "window": {"sliding_window": 20, "sliding_layers": (True, False, True)},
}


def model(variant, precision):
    size = {"vocab_size": 203, "hidden_size": 96, "num_layers": 3, "num_heads": 6, "num_kv_heads": 2, "head_dim": 32}
    config = DecoderConfig(**size, intermediate_size=160, max_position_embeddings=256, **VARIANTS[variant])
    return random_model(config, dtype=precision)


def ids(count, seed):
    return torch.randint(0, 203, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def run(executor, stack):
    """Two steps: prompts of several lengths, then one token for some and a few for others."""
    executor._stack = stack
    cache = executor.new_cache(24, 16)
    tables = [list(range(6 * i, 6 * i + 6)) for i in range(4)]
    first = [(ids(length, i), 0, table) for i, (length, table) in enumerate(zip((20, 7, 30, 1), tables, strict=True))]
    out = [executor.step(RaggedBatch.build(first, logits="all"), cache)]
    second = [(ids(1, 10), 20, tables[0]), (ids(4, 11), 7, tables[1]), (ids(1, 12), 30, tables[2])]
    out.append(executor.step(RaggedBatch.build(second), cache))
    return torch.cat(out), cache


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("precision", ["bf16", "int8", "int4"])
def test_one_call_gives_what_the_operations_give(variant, precision):
    executor = model(variant, precision).executor
    stack = executor._stack
    assert stack is not None
    fused, one = run(executor, stack)
    plain, two = run(executor, None)
    error = (fused - plain).norm() / plain.norm()
    assert error < 0.02, error  # both round activations to bfloat16, at different places
    assert ((one.keys.float() - two.keys.float()).norm() / two.keys.float().norm()) < 0.02


@pytest.mark.parametrize("precision", ["bf16", "int8", "int4"])
def test_a_row_does_not_depend_on_its_neighbours(precision):
    executor = model("llama", precision).executor
    prompt, table = ids(9, 1), [5, 3]

    def last(neighbours):
        cache = executor.new_cache(16, 16)
        chunks = [(ids(1 + i % 5, 20 + i), 0, [6 + i]) for i in range(neighbours)]
        return executor.step(RaggedBatch.build([*chunks, (prompt, 0, table)]), cache)[-1]

    alone = last(0)
    for neighbours in (1, 2, 5, 9):
        assert torch.equal(alone, last(neighbours))


def test_what_the_call_does_not_cover_is_left_to_the_operations():
    size = {"vocab_size": 61, "hidden_size": 64, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1, "head_dim": 32}
    config = DecoderConfig(**size, intermediate_size=64, max_position_embeddings=64, attention_softcap=30.0)
    assert random_model(config).executor._stack is None
    assert model("llama", "fp32").executor._stack is None


def test_no_rows_wanted():
    executor = model("llama", "bf16").executor
    batch = RaggedBatch.build([(ids(4, 0), 0, [0])], logits=[False])
    assert executor.step(batch, executor.new_cache(1)).shape == (0, 203)
