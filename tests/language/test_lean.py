"""The algebra of partial attention, the balance of the shares, and the kernel against plain softmax."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hasten.errors import ConfigurationError
from hasten.language import kernels_lean, lean
from hasten.language.kernels_lean import Plan
from hasten.language.lean import State, fixed_split, partial, partition, per_head

SETTINGS = settings(max_examples=60, deadline=None, derandomize=True)


def softmax_attention(q, k, v):
    scores = (k @ q[..., None]).squeeze(-1) * q.shape[-1] ** -0.5
    return (torch.softmax(scores, -1)[..., None, :] @ v).squeeze(-2)


@SETTINGS
@given(st.integers(0, 10_000), st.integers(1, 40), st.floats(0.1, 1e4))
def test_any_split_and_any_merge_tree_is_exact(seed, time, size):
    torch.manual_seed(seed)
    q, k, v = torch.randn(2, 8).double(), torch.randn(2, time, 8).double(), torch.randn(2, time, 8).double()
    q = q * size / 8**0.5
    rng = np.random.default_rng(seed)
    cuts = np.sort(rng.integers(0, time + 1, 5))
    edges = [0, *cuts.tolist(), time]
    states = [partial(q, k[:, a:b], v[:, a:b]) for a, b in zip(edges, edges[1:], strict=False)]
    states.append(State.empty(2, 8, torch.float64))
    while len(states) > 1:
        i, j = sorted(rng.choice(len(states), 2, replace=False).tolist())
        right = states.pop(j)
        left = states.pop(i)
        states.append(left.merge(right) if rng.random() < 0.5 else right.merge(left))
    torch.testing.assert_close(states[0].output(), softmax_attention(q, k, v), atol=1e-12, rtol=1e-12)
    scores = (k @ q[..., None]).squeeze(-1) * 8**-0.5
    torch.testing.assert_close(states[0].lse[:, 0], torch.logsumexp(scores, -1), atol=1e-9, rtol=1e-12)


def test_extreme_scores_and_nothing_at_all():
    q = torch.tensor([[1.0, 0.0]])
    k = torch.tensor([[[1e4, 0.0], [-1e4, 0.0], [9999.0, 1.0]]])
    v = torch.tensor([[[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]])
    torch.testing.assert_close(partial(q, k, v).output(), softmax_attention(q, k, v))
    nothing = State.empty(1, 2).merge(State.empty(1, 2))
    assert nothing.output().tolist() == [[0.0, 0.0]]
    assert nothing.lse.item() == -np.inf
    torch.testing.assert_close(State.empty(1, 2).merge(partial(q, k, v)).output(), softmax_attention(q, k, v))


@SETTINGS
@given(st.lists(st.integers(0, 5000), min_size=1, max_size=6), st.integers(1, 8), st.integers(1, 300))
def test_balance_theorem(lengths, heads, grid):
    plan = partition(lengths, heads, 256, grid)
    assert plan.longest == -(-plan.total // grid)
    assert np.diff(plan.cuts).max(initial=0) - np.diff(plan.cuts).min() <= 1
    assert plan.cuts[0] == 0
    assert plan.cuts[-1] == plan.total
    assert plan.partials <= grid + len(lengths) * heads
    for other in (per_head(lengths, heads, 256, grid), fixed_split(lengths, heads, 256, grid)):
        assert other.total == plan.total
        assert plan.longest <= other.longest
    for splits in (1, 2, 3, 8):
        assert plan.longest <= fixed_split(lengths, heads, 256, grid, splits).longest


def test_counted_shares_of_the_card():
    assert lean.compare([512 * 256], 32) == {"lean": 63, "flash-2": 512, "flash-decoding": 64}
    found = lean.compare([2048 * 256], 56)
    assert (found["lean"], found["flash-2"]) == (435, 2048)
    ragged = lean.compare([n * 256 for n in (1024, 300, 50, 2000)], 32)
    assert ragged["lean"] == 409
    assert ragged["flash-2"] >= 2000


def random_case(seed, dtype, tree):
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    kv, group, width, size = 2, 3, 16, 4
    chunks = int(rng.integers(1, 5))
    contexts = rng.integers(0, 200, chunks).astype(np.int32)
    lengths = rng.integers(1, 5, chunks)
    blocks = [-(-int(c + n) // size) for c, n in zip(contexts, lengths, strict=True)]
    order = rng.permutation(sum(blocks)).astype(np.int32)
    tables = np.zeros((chunks, max(blocks)), np.int32)
    at = 0
    for i, n in enumerate(blocks):
        tables[i, :n] = order[at : at + n]
        at += n
    keys, values = torch.randn(2, sum(blocks), kv, size, width, dtype=torch.float32).to(dtype)
    starts = np.concatenate(([0], np.cumsum(lengths))).astype(np.int32)
    query = torch.randn(int(starts[-1]), kv * group, width).to(dtype)
    lines = []
    for context, n in zip(contexts.tolist(), lengths.tolist(), strict=True):
        for row in range(n):
            others = [j for j in range(row) if not tree or rng.random() < 0.5]
            lines.append([context + j for j in others] + [context + row])
    return query, starts, contexts, tables, lines, keys, values, size


@pytest.mark.parametrize("tree", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("whole", [False, True])
def test_kernel_is_softmax_attention_whatever_the_shares(dtype, tree, whole):
    for seed in range(12):
        query, starts, contexts, tables, lines, keys, values, size = random_case(seed, dtype, tree)
        offsets = np.concatenate(([0], np.cumsum([len(x) for x in lines]))).astype(np.int32)
        line = np.concatenate(lines).astype(np.int32)
        rng = np.random.default_rng(seed)
        lows = np.array(
            [int(rng.integers(0, c + 1)) if seed % 3 == 0 else 0 for c in np.repeat(contexts, np.diff(starts))]
        )
        form = (lambda x: x.view(torch.uint16).numpy()) if dtype == torch.bfloat16 else (lambda x: x.numpy())
        plan = Plan(contexts, 2, 16, 1 + seed % 5, whole=whole)
        out, logs = kernels_lean.attend(
            query, starts, contexts, tables, offsets, line, lows, form(keys), form(values), scale=0.25, plan=plan
        )
        for chunk in range(len(contexts)):
            for token in range(starts[chunk], starts[chunk + 1]):
                seen = [s for s in [*range(contexts[chunk]), *lines[token]] if s >= lows[token]]
                where = tables[chunk][np.array(seen) // size]
                k = keys[where, :, np.array(seen) % size].double().transpose(0, 1).repeat_interleave(3, 0)
                v = values[where, :, np.array(seen) % size].double().transpose(0, 1).repeat_interleave(3, 0)
                scores = (k @ query[token].double()[..., None]).squeeze(-1) * 0.25
                expected = (torch.softmax(scores, -1)[:, None] @ v).squeeze(1)
                tolerance = 2e-5 if dtype == torch.float32 else 2e-2
                torch.testing.assert_close(out[token].view(6, 16).double(), expected, atol=tolerance, rtol=tolerance)
                np.testing.assert_allclose(logs[token], torch.logsumexp(scores, -1).numpy(), atol=1e-3)


def test_bad_input_is_refused():
    with pytest.raises(ConfigurationError, match="grid"):
        partition([1], 1, grid=0)
    with pytest.raises(ConfigurationError, match="context"):
        partition([-1], 1)
