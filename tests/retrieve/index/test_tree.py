"""The balanced tree is a partition, even, deterministic, and survives rows that are all equal."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import hasten.retrieve as hr
from hasten.retrieve.index.cluster import cluster, workspace
from hasten.retrieve.index.heads import make_seeds, select_heads, threshold_heads
from hasten.retrieve.index.tree import best_factor, split_rows


def check(tree, n, leaf):
    assert sorted(tree.order.tolist()) == list(range(n))
    assert (tree.begin[0], tree.end[0], tree.parent[0]) == (0, n, -1)
    children = [[] for _ in tree.begin]
    for node in range(1, len(tree.begin)):
        assert tree.parent[node] < node
        children[tree.parent[node]].append(node)
    for node, below in enumerate(children):
        size = tree.end[node] - tree.begin[node]
        assert size > 0
        assert tree.centre[node] in tree.order[tree.begin[node] : tree.end[node]] or size > leaf
        if below:  # the children tile their parent
            spans = sorted((tree.begin[c], tree.end[c]) for c in below)
            assert spans[0][0] == tree.begin[node]
            assert spans[-1][1] == tree.end[node]
            assert all(a[1] == b[0] for a, b in zip(spans, spans[1:], strict=False))
        else:
            assert size <= leaf


@settings(max_examples=20, deadline=None)
@given(
    n=st.integers(1, 600),
    k=st.integers(2, 9),
    leaf=st.integers(1, 12),
    copies=st.integers(1, 40),
    seed=st.integers(0, 99),
)
def test_nodes_tile_the_rows(n, k, leaf, copies, seed):
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(-(-n // copies), 5)).astype(np.float32).repeat(copies, axis=0)[:n]  # many equal rows
    check(split_rows(n, lambda r: rows[r], k=k, leaf=leaf, seed=seed, threads=1), n, leaf)


def test_rows_that_are_all_equal_are_cut_into_equal_chunks():
    rows = np.ones((5000, 4), np.float32)
    tree = split_rows(5000, lambda r: rows[r], k=8, leaf=8)
    check(tree, 5000, 8)


def test_the_result_depends_on_the_seed_only():
    rows, _ = hr.clustered(12_000, 8)

    def grown(**knobs):
        return split_rows(len(rows), lambda r: rows[r], **knobs)

    one, again, other = grown(seed=3, threads=1), grown(seed=3, threads=3), grown(seed=4)
    np.testing.assert_array_equal(one.order, again.order)
    np.testing.assert_array_equal(one.centre, again.centre)
    assert not np.array_equal(one.order, other.order)


def test_a_small_buffer_streams_and_gives_a_tree_too():
    rows, _ = hr.clustered(30_000, 8)
    taken = []

    def take(numbers):
        taken.append(len(numbers))
        return rows[numbers]

    tree = split_rows(len(rows), take, buffer_rows=2048, threads=2)
    check(tree, len(rows), 8)
    assert max(taken) <= 20_000  # the sample of the largest node; nothing takes all rows


def test_the_penalty_makes_clusters_more_even():
    rows, _ = hr.clustered(4000, 16)

    def tried(factor, balanced):
        out = []
        for seed in range(1, 6):
            centres = np.empty((32, 16), np.float32)
            state = np.array([seed], np.uint64)
            out.append(
                cluster(rows, np.arange(4000), 0, 4000, 32, factor, balanced, state, centres, workspace(32, 16, 4000))
            )
        return np.mean(out, axis=0)

    factor = best_factor(rows, 32, 0)
    assert factor > 0
    even, plain = tried(factor, True), tried(1.0, False)
    assert even[0] < 0.9 * plain[0]
    assert even[1] < 1.1 * plain[1]  # at little cost in distance


@pytest.mark.parametrize("ratio", [0.04, 0.12, 0.2])
def test_the_number_of_heads_is_near_the_ratio(ratio):
    rows, _ = hr.clustered(10_000, 8)
    tree = split_rows(len(rows), lambda r: rows[r])
    heads, _, _ = select_heads(tree, ratio)
    assert len(np.unique(heads)) == len(heads)
    assert abs(len(heads) / len(rows) - ratio) < 0.02


def test_selection_by_hand():
    """Thresholds on a tree that fits on paper: the root has two leaves of 6 and 2 rows."""
    from hasten.retrieve.index.tree import Tree

    tree = Tree(
        order=np.array([4, 5, 6, 7, 0, 1, 2, 3], np.uint32), begin=np.array([0, 0, 6]), end=np.array([8, 6, 8]),
        centre=np.array([5, 6, 3]), parent=np.array([-1, 0, 0]),
    )  # fmt: skip
    assert threshold_heads(tree, 6, 100).tolist() == [6]  # the leaf of six; the other two rows stay unrepresented
    assert threshold_heads(tree, 2, 100).tolist() == [6, 3]  # both leaves
    assert threshold_heads(tree, 8, 100).tolist() == [5]  # only the root has eight
    assert threshold_heads(tree, 6, 5, 3).tolist() == [4, 5, 6]  # six are crowded: ceil(6 / 3) of its rows as well
    assert threshold_heads(tree, 8, 7, 8).tolist() == [5, 6]  # the root and its largest child


def test_seeds_are_heads_in_groups():
    rows, _ = hr.clustered(3000, 8)
    groups, seeds, begins = make_seeds(rows)
    assert len(begins) == len(groups) + 1
    assert begins[-1] == len(seeds)
    assert len(np.unique(seeds)) == len(seeds)
    assert len(make_seeds(rows[:30])[0]) == 0  # few heads need none
