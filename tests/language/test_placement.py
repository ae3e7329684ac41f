"""Trees of guesses and gapped caches through the executor, against the plain decoder on every path."""

import numpy as np
import pytest
import torch

from hasten.language import Decoder, DecoderConfig, Executor, RaggedBatch
from hasten.language.placement import Placement, chain_placement, tree_placement
from hasten.language.speculate.tree import TokenTree

torch.set_num_threads(1)
SHAPE = {"vocab_size": 50, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "head_dim": 8}
SHAPE["intermediate_size"] = 48


def pair(**options):
    torch.manual_seed(0)
    decoder = Decoder(DecoderConfig(**SHAPE, **options)).eval()
    for p in decoder.parameters():
        p.data.mul_(4)
    state = decoder.state_dict()
    return decoder, Executor(decoder.config, lambda name, shape: state[name], precision="fp32")


@pytest.mark.parametrize("options", [{}, {"qk_norm": True}, {"sliding_window": 12}, {"attention_softcap": 5.0}])
def test_every_path_of_a_tree_sees_its_own_line_only(options):
    decoder, executor = pair(**options)
    rng = np.random.default_rng(0)
    prompt = rng.integers(0, 50, 21).tolist()
    tree = TokenTree()
    for parent in (-1, -1, 0, 0, 1, 2, 5, 3, -1):
        tree.add(int(rng.integers(0, 50)), parent)
    cache, table = executor.new_cache(4, 16), [2, 0, 3, 1]
    executor.step(RaggedBatch.build([(prompt[:-1], 0, table)]), cache)
    context = len(prompt) - 1
    parents = [-1] + [p + 1 for p in tree.parents]  # node 0 is the last known token
    positions, slots, lines = tree_placement(context, parents)
    batch = RaggedBatch.build([([prompt[-1], *tree.tokens], context, table)], "all")
    batch = RaggedBatch(
        batch.tokens,
        torch.tensor(positions, dtype=torch.int32),
        batch.starts,
        batch.contexts,
        batch.block_tables,
        batch.logit_rows,
        Placement.of(slots, lines),
    )
    logits = executor.step(batch, cache)
    with torch.no_grad():
        for node in range(-1, len(tree)):
            path = prompt + [tree.tokens[i] for i in tree.path(node)]
            expected = decoder(torch.tensor([path]))[0, -1]
            torch.testing.assert_close(logits[node + 1], expected, atol=2e-4, rtol=1e-4)
        # the accepted path moves behind the context, and decoding goes on from there
        path = tree.path(6)
        executor.keep(cache, table, context, [0] + [i + 1 for i in path])
        known = prompt + [tree.tokens[i] for i in path]
        after = executor.step(RaggedBatch.build([([7], len(known), table)]), cache)
        expected = decoder(torch.tensor([[*known, 7]]))[0, -1]
        torch.testing.assert_close(after[0], expected, atol=2e-4, rtol=1e-4)


def test_plain_chunks_placed_row_by_row_give_what_they_gave():
    _, executor = pair()
    cache, other = executor.new_cache(8, 4), executor.new_cache(8, 4)
    chunks = [([1, 2, 3, 4, 5], 0, [0, 1]), ([9], 0, [2]), ([6, 7], 0, [3])]
    batch = RaggedBatch.build(chunks, "all")
    placed = RaggedBatch(
        batch.tokens,
        batch.positions,
        batch.starts,
        batch.contexts,
        batch.block_tables,
        batch.logit_rows,
        chain_placement([0, 0, 0], [5, 1, 2]),
    )
    torch.testing.assert_close(executor.step(batch, cache), executor.step(placed, other), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(cache.keys, other.keys, atol=1e-6, rtol=1e-6)


def test_a_long_context_is_cut_between_threads_and_stays_the_same():
    torch.manual_seed(0)
    config = DecoderConfig(**SHAPE, max_position_embeddings=4096)
    decoder = Decoder(config).eval()
    state = decoder.state_dict()
    executor = Executor(config, lambda name, shape: state[name], precision="fp32")
    ids = torch.randint(0, 50, (1500,)).tolist()
    blocks = 96
    cache, table = executor.new_cache(blocks, 16), list(range(blocks))
    executor.step(RaggedBatch.build([(ids[:1400], 0, table)]), cache)
    assert executor._placed(RaggedBatch.build([([1], 1400, table)])) is not None
    found = executor.step(RaggedBatch.build([(ids[1400:1410], 1400, table)], "all"), cache)
    with torch.no_grad():
        expected = decoder(torch.tensor([ids[:1410]]))[0, 1400:1410]
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)
