"""Growth: the best places of all trees, decided before their tokens are drawn."""

import itertools
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent))
from tables import Table  # noqa: E402

from hasten.errors import ConfigurationError  # noqa: E402
from hasten.language.speculate.dyspec import DynamicTree  # noqa: E402
from hasten.language.speculate.shapes import Chain, FixedTree, KAry  # noqa: E402
from hasten.language.speculate.tree import TokenTree  # noqa: E402


def value_of(paths, draft):
    """Expected accepted tokens of a set of paths closed under prefix, when a token stands with the draft's chance."""
    return sum(np.prod([draft(p[:i])[p[i]] for i in range(len(p))]) for p in paths)


@pytest.mark.parametrize("seed", range(6))
def test_no_tree_of_that_size_is_worth_more(seed):
    """Brute force over all prefix-closed sets, vocabulary 3, at most 5 nodes; choices without chance."""
    draft, size = Table(3, seed, zeros=0), 5
    best = 0.0
    paths = [p for depth in (1, 2, 3, 4, 5) for p in itertools.product(range(3), repeat=depth)]

    def extend(chosen, rest):
        nonlocal best
        best = max(best, value_of(chosen, draft))
        if len(chosen) == size:
            return
        for i, path in enumerate(rest):
            if len(path) == 1 or path[:-1] in chosen:
                extend([*chosen, path], rest[i + 1 :])

    extend([], [p for p in paths if np.prod([draft(p[:i])[p[i]] for i in range(len(p))]) > 0.01])
    tree = DynamicTree(size).grow(draft.distributions(), None)
    assert tree.expected_length == pytest.approx(best, abs=1e-9)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(0, 10_000), st.integers(1, 12))
def test_values_fall_and_the_layered_mode_takes_the_same_places(seed, budget):
    draft = Table(4, seed, zeros=0)
    tree = DynamicTree(budget).grow(draft.distributions(), None)
    tree.check_integrity()
    for i, parent in enumerate(tree.parents):
        assert parent < 0 or tree.values[i] <= tree.values[parent] + 1e-12
    threshold = min(tree.values) - 1e-9
    if 0 < threshold < 1:
        layered = DynamicTree(budget, threshold).grow(draft.distributions(), None)
        assert sorted(layered.paths()) == sorted(tree.paths())


def test_one_call_per_level_and_as_many_nodes_as_the_budget():
    draft, calls = Table(6, 1, zeros=0, sharp=0.3), []

    def counted(tree, nodes):
        calls.append(len(nodes))
        return draft.distributions()(tree, nodes)

    tree = DynamicTree(40, 0.004).grow(counted, None)
    assert len(tree) == 40
    assert len(calls) <= int(tree.depths.max())
    assert len(DynamicTree(17).grow(draft.distributions(), None)) == 17


def test_a_sure_token_has_no_sibling_and_a_small_vocabulary_ends_the_tree():
    sure = DynamicTree(4).grow(lambda tree, nodes: np.array([[0.0, 1.0]] * len(nodes)), None)
    assert sure.paths() == [(1, 1, 1, 1)]
    calibrated = DynamicTree(3, calibrate=lambda p: 0.5 * p).grow(
        lambda tree, nodes: np.array([[0.4, 0.6]] * len(nodes)), None
    )
    assert calibrated.values[0] == pytest.approx(0.3)


def test_fixed_tree_is_the_best_by_brute_force():
    rates = [0.5, 0.2, 0.1]
    tree = FixedTree.best(rates, 4)

    def worth(parents):
        values, ranks = [], {}
        for parent in parents:
            rank = ranks.get(parent, 0)
            ranks[parent] = rank + 1
            if rank >= 3:
                return 0.0
            values.append((1.0 if parent < 0 else values[parent]) * rates[rank])
        return sum(values)

    best = max(worth(p) for p in itertools.product(*[range(-1, i) for i in range(4)]))
    assert worth(tree.parents) == pytest.approx(best)


def test_shapes_have_their_shape():
    draft = Table(5, 2, zeros=0)
    assert Chain(3).grow(draft.distributions(), None).parents == [-1, 0, 1]
    assert KAry(2, 2).grow(draft.distributions(), None).parents == [-1, -1, 0, 0, 1, 1]
    assert len(KAry(2, 3, budget=5).grow(draft.distributions(), None)) == 5
    assert FixedTree((-1, -1, 1)).grow(draft.distributions(), None).parents == [-1, -1, 1]
    for bad in (lambda: Chain(0), lambda: KAry(0, 1), lambda: FixedTree((0,)), lambda: DynamicTree(0)):
        with pytest.raises(ConfigurationError):
            bad()
    with pytest.raises(ConfigurationError, match="threshold"):
        DynamicTree(4, 1.5)


def test_depth_first_order_touches_fewer_tiles():
    draft = Table(8, 3, zeros=0, sharp=0.5)
    tree = DynamicTree(400).grow(draft.distributions(), None)
    ordered, old = tree.depth_first()
    ordered.check_integrity()
    assert sorted(ordered.paths()) == sorted(tree.paths())
    assert [tree.tokens[i] for i in old] == ordered.tokens
    assert ordered.tiles() < tree.tiles()


def test_tree_shows_itself_and_refuses_orphans():
    tree = TokenTree.chain([7, 8])
    assert tree.render().splitlines() == ["7 1.000", "  8 1.000"]
    with pytest.raises(ConfigurationError, match="node 9"):
        tree.add(1, parent=9)
