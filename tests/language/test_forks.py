"""Branches on a paged cache: every node sees the very pages that its branch would fill as a text."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hasten.language import load
from hasten.language.forks import Fork
from hasten.language.ragged import RaggedBatch


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    context=st.integers(1, 19),
    size=st.sampled_from([1, 2, 4, 8]),
    shape=st.lists(st.integers(-1, 6), min_size=1, max_size=8),
    together=st.booleans(),
)
def test_a_node_reads_its_branch_and_the_kept_one_becomes_the_text(context, size, shape, together):
    """On a cache of plain numbers, with all nodes computed at once or one after the other."""
    parents = [min(p, i - 1) for i, p in enumerate(shape)]
    blocks = -(-context // size)
    table = list(range(blocks + len(parents) + 1))
    cache = np.full((200, size), -1)
    for at in range(context):
        cache[table[at // size], at % size] = at
    free = iter(range(len(table), 200))
    fork = Fork(context, table, size, lambda: next(free))
    branches = []
    for node, parent in enumerate(parents):
        assert fork.add(parent) == node
        branches.append(([] if parent < 0 else branches[parent]) + [1000 + node])

    def compute(nodes):
        for node, slot in zip(nodes, fork.contexts(nodes), strict=True):
            cache[fork.own(node)[slot // size - fork.first], slot % size] = 1000 + node
        for block, slot, to, place in fork.copies(nodes):
            cache[to, place] = cache[block, slot]

    everything = list(range(len(parents)))
    for nodes in [everything] if together else [[n] for n in everything]:
        compute(nodes)
    pages = fork.pages(everything)
    for node, slot in zip(everything, fork.contexts(everything), strict=True):
        row = [*table[: fork.first], *pages[node]]
        seen = [int(cache[row[at // size], at % size]) for at in range(slot + 1)]
        assert seen == [*range(context), *branches[node]]
    last = everything[-1]
    for block, slot, to, place in fork.kept(last, table):
        cache[to, place] = cache[block, slot]
    text = [int(cache[table[at // size], at % size]) for at in range(context + len(branches[last]))]
    assert text == [*range(context), *branches[last]]


def test_a_tree_has_the_logits_of_its_branches_to_the_last_bit():
    executor = load("pycode-4m", deterministic=True).executor
    cache = executor.new_cache(40, 16)
    prompt, tokens, parents = list(range(50, 79)), [5, 6, 7, 8, 9], [-1, 0, 0, 1, -1]
    executor.step(RaggedBatch.build([(prompt[:-1], 0, [3, 1])]), cache)
    free = iter(range(10, 40))
    table = [3, 1, 2]
    fork = Fork(len(prompt), table, 16, lambda: next(free))
    nodes = [fork.add(p) for p in parents]
    rows = [([t], s, [*table[: fork.first], *fork.own(n)])
            for t, s, n in zip(tokens, fork.contexts(nodes), nodes, strict=True)]  # fmt: skip
    batch = RaggedBatch.build([(prompt[-1:], len(prompt) - 1, table), *rows])
    found = executor.step(batch.with_copies(torch.from_numpy(fork.copies(nodes))), cache)
    other = executor.new_cache(4, 16)
    branches = [[], [5], [5, 6], [5, 7], [5, 6, 8], [9]]
    for branch, logits in zip(branches, found, strict=True):
        alone = executor.step(RaggedBatch.build([([*prompt, *branch], 0, [0, 1, 2])]), other)[0]
        assert torch.equal(logits, alone)
    executor.move(cache, fork.kept(3, table))
    more = executor.step(RaggedBatch.build([([4], len(prompt) + 3, table)]), cache)[0]
    assert torch.equal(more, executor.step(RaggedBatch.build([([*prompt, 5, 6, 8, 4], 0, [0, 1, 2])]), other)[0])
