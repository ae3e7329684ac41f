"""Trees for an engine: the best nodes of all, and what becomes of guesses is learnt."""

import numpy as np
import pytest
import torch

from hasten.errors import ConfigurationError
from hasten.language import load
from hasten.language.ragged import RaggedBatch
from hasten.language.speculate import TreeProposer
from hasten.language.speculate.proposal import Ask, Host, Proposal

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def draft():
    return load("pycode-draft-0.7m", dtype="fp32")


def brute(executor, prompt, depth, width):
    """Values of all nodes down to ``depth``, by computing every branch from the start."""
    cache, out = executor.new_cache(8, 16), []
    level = [((), 1.0)]
    for _ in range(depth):
        below = []
        for branch, value in level:
            logits = executor.step(RaggedBatch.build([([*prompt, *branch], 0, range(8))]), cache)[0]
            top = torch.softmax(logits, -1).topk(width)
            below += [((*branch, t), value * c) for c, t in zip(top.values.tolist(), top.indices.tolist(), strict=True)]
        out += below
        level = sorted(below, key=lambda x: -x[1])[:12]
    return sorted(out, key=lambda x: -x[1])


def test_the_tree_has_the_likeliest_branches(draft):
    trees = TreeProposer(draft, budget=10, branches=4, depth=4)
    trees._calibration.chance = lambda mark: (mark + 0.5) / 20  # as at first
    prompt = draft.tokenizer.encode("def area(w, h):\n    return ")
    asks = [Ask(i, np.array(p), 10) for i, p in enumerate((prompt, prompt[:-3], prompt + [9] * 17))]
    for ask, found in zip(asks, trees.propose(asks), strict=True):
        assert len(found.tokens) == 10
        assert list(found.survival) == sorted(found.survival, reverse=True)
        assert all(p < i for i, p in enumerate(found.parents))
        mine = {found.branch(i) for i in range(10)}
        assert len(mine) == 10
        best = {branch for branch, _ in brute(draft.executor, ask.tokens.tolist(), 4, 4)[:30]}
        assert len(mine & best) >= 8  # classes of probability are coarser than probabilities
    again = trees.propose([asks[0]])[0]  # from the cache
    assert again == trees.propose([Ask(7, np.array(prompt), 10)])[0]
    assert trees.propose([Ask(9, np.array(prompt), 3)])[0].tokens == again.tokens[:3]


def test_the_cache_is_small_and_sequences_come_and_go(draft):
    trees = TreeProposer(draft, budget=4, num_blocks=30)
    rng = np.random.default_rng(0)
    for seq in range(12):
        found = trees.propose([Ask(seq, rng.integers(0, 4096, 150), 4), Ask(100 + seq, rng.integers(0, 4096, 40), 4)])
        assert any(p.tokens for p in found)
        trees._pool.check_integrity()
    for seq in list(trees._done):
        trees.forget(seq)
    assert trees._pool.num_free == 30


def test_what_stood_is_learnt():
    trees = TreeProposer(load("pycode-draft-0.7m"), budget=4)
    tree = Proposal((1, 2, 3, 4), (0.6, 0.3, 0.3, 0.1), (-1, -1, 0, 2), "tree", (12, 6, 10, 6))
    before = [trees._calibration.chance(m) for m in (12, 6, 10)]
    for _ in range(50):
        trees.learn_path(tree, [1])
    after = [trees._calibration.chance(m) for m in (12, 6, 10)]
    assert after[0] < before[0]
    assert after[1] > before[1]
    assert after[2] == before[2]  # nobody got there
    assert tree.depth == 3
    assert tree.branch(3) == (1, 3, 4)
    assert tree.cut(2).parents == (-1, -1)


def test_bad_input_is_one_line(draft):
    with pytest.raises(ConfigurationError, match="at least 1"):
        TreeProposer(draft, budget=0)
    with pytest.raises(ConfigurationError, match="64 guesses takes up to 128 blocks .* the cache has 100"):
        TreeProposer(draft, budget=64).attach(Host(None, None, lambda seq: [], 16, 100))
