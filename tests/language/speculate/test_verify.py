"""The output law, by enumeration of every draw of the real code, and by counting."""

import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent))
from tables import Table, first_two, law_of_two, same_law, target_rows  # noqa: E402

from hasten.errors import ConfigurationError  # noqa: E402
from hasten.language.speculate.calibrate import AcceptanceCurve  # noqa: E402
from hasten.language.speculate.dyspec import DynamicTree  # noqa: E402
from hasten.language.speculate.law import Dice, chance, outcomes  # noqa: E402
from hasten.language.speculate.shapes import Chain, FixedTree, KAry  # noqa: E402
from hasten.language.speculate.tree import TokenTree  # noqa: E402
from hasten.language.speculate.verify import (  # noqa: E402
    accept,
    accept_chain,
    expected_accepted,
    expected_length,
    probabilities,
    verify_chain,
    verify_tree,
)

CURVE = AcceptanceCurve((0.0, 0.4, 0.9), (0.3, 0.5, 0.9))
LOW = AcceptanceCurve((0.0, 1.0), (0.05, 0.3))
SHAPES = [
    Chain(1),
    Chain(2),
    KAry(2, 1),
    KAry(2, 2, budget=4),
    FixedTree((-1, -1, 0)),
    DynamicTree(1),
    DynamicTree(3),
    DynamicTree(4),
    DynamicTree(3, threshold=0.2),
    DynamicTree(4, threshold=0.1),
    DynamicTree(4, calibrate=CURVE, calibrate_siblings=LOW),
    DynamicTree(4, threshold=0.1, calibrate=LOW, calibrate_siblings=CURVE),
]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: s.name)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_output_has_the_law_of_the_target(shape, seed):
    """Vocabulary 3, arbitrary target and draft with zeros: the law of the first two tokens to 1e-10."""
    target, draft = Table(3, seed), Table(3, 100 + seed)

    def run(head, draw):
        tree = shape.grow(draft.distributions(head), draw)
        path, token = verify_tree(tree, target_rows(target, tree, head), draw)
        return [*(tree.tokens[i] for i in path), token]

    found = outcomes(lambda draw: first_two(run, draw, target))
    assert same_law(found, law_of_two(target))


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: s.name)
def test_guesses_expected_to_stand_are_those_that_stand(shape):
    """Enumerated over the draws of the verification, the tree given; drawn and chosen guesses."""
    target, draft = Table(4, 7), Table(4, 8)
    for draw in (Dice(3), None):
        tree = shape.grow(draft.distributions(), draw)
        rows = target_rows(target, tree)
        found = outcomes(lambda dice, tree=tree, rows=rows: len(verify_tree(tree, rows, dice)[0]))
        assert expected_accepted(tree, rows) == pytest.approx(sum(k * p for k, p in found.items()))


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: s.name)
def test_chosen_guesses_are_exact_too(shape):
    """Guesses taken without chance (draw None) against a sampled target: accepted with the target's probability."""
    target, draft = Table(4, 5), Table(4, 6)

    def run(head, draw):
        tree = shape.grow(draft.distributions(head), None)
        path, token = verify_tree(tree, target_rows(target, tree, head), draw)
        return [*(tree.tokens[i] for i in path), token]

    assert same_law(outcomes(lambda draw: first_two(run, draw, target)), law_of_two(target))


def test_a_choice_that_looks_at_the_drawn_token_is_caught():
    """Negative control: dropping drawn tokens whose own probability is low biases the output."""
    target, draft = Table(3, 1), Table(3, 101)

    def run(head, draw):
        tree = KAry(2, 1).grow(draft.distributions(head), draw)
        kept = TokenTree()
        for i in range(len(tree)):
            if tree.values[i] > 0.4:
                kept.add(tree.tokens[i], -1, tree.residuals[i], tree.values[i])
        path, token = verify_tree(kept, target_rows(target, kept, head), draw)
        return [*(kept.tokens[i] for i in path), token]

    assert not same_law(outcomes(lambda draw: first_two(run, draw, target)), law_of_two(target), 1e-3)


def test_a_draft_law_in_place_of_the_residual_is_caught():
    """Negative control: storing the draft's law for later siblings, not what was left of it."""

    def biased(seed):
        target, draft = Table(3, seed, zeros=0), Table(3, 100 + seed, zeros=0)

        def run(head, draw):
            tree = KAry(2, 1).grow(draft.distributions(head), draw)
            tree.residuals = [draft(head)] * len(tree)
            path, token = verify_tree(tree, target_rows(target, tree, head), draw)
            return [*(tree.tokens[i] for i in path), token]

        return not same_law(outcomes(lambda draw: first_two(run, draw, target)), law_of_two(target), 1e-3)

    assert any(biased(seed) for seed in range(6))


def test_chi_square_of_the_real_code_at_temperature_one():
    from scipy.stats import chisquare

    target, draft, dice = Table(5, 3, zeros=0), Table(5, 4, zeros=0), Dice(7)
    shape, counts = DynamicTree(4), np.zeros(25)

    def run(head, draw):
        tree = shape.grow(draft.distributions(head), draw)
        path, token = verify_tree(tree, target_rows(target, tree, head), draw)
        return [*(tree.tokens[i] for i in path), token]

    for _ in range(4000):
        a, b = first_two(run, dice, target)
        counts[5 * a + b] += 1
    expected = np.array([target(())[a] * target((a,))[b] for a in range(5) for b in range(5)]) * counts.sum()
    keep = expected > 5
    statistic = chisquare(
        np.append(counts[keep], counts[~keep].sum() + 1e-9), np.append(expected[keep], expected[~keep].sum() + 1e-9)
    )
    assert statistic.pvalue > 0.01


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(0, 10_000), st.integers(0, 3))
def test_greedy_targets_accept_by_equality(seed, depth):
    """With all mass on one token the rejection rule and the coupled rule say the same, without a draw."""
    draft = Table(4, seed)
    tree = KAry(2, depth or 1).grow(draft.distributions(), None)
    rows = target_rows(Table(4, seed + 1), tree)
    sharp = probabilities(np.log(rows + 1e-9), temperature=0.0)

    def never(law):
        assert law.max() == 1.0
        return int(law.argmax())

    assert verify_tree(tree, sharp, never) == accept(tree, rows.argmax(-1).tolist())


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 3), max_size=6), st.lists(st.integers(0, 3), min_size=7, max_size=7))
def test_chain_is_a_tree(proposed, chosen):
    chosen = chosen[: len(proposed) + 1]
    stood = accept_chain(proposed, chosen)
    assert accept(TokenTree.chain(proposed), chosen) == (list(range(stood)), chosen[stood])


def test_expected_length_is_what_the_rule_gives():
    """Independent acceptance: the formula of goodput against the real rule, counted."""
    rng = np.random.default_rng(0)
    alpha, count, total, runs = 0.7, 4, 0, 60_000
    for guesses in rng.random((runs, count)) < alpha:
        total += accept_chain([1] * count, [1 if g else 0 for g in guesses] + [0]) + 1
    assert total / runs == pytest.approx(expected_length(alpha, count), rel=0.01)


def test_law_cuts_and_bad_input():
    law = probabilities(np.array([[2.0, 1.0, 0.0]]), temperature=1.0, top_k=2)[0]
    assert law[2] == 0
    assert law.sum() == pytest.approx(1.0)
    law = probabilities(np.array([[5.0, 1.0, 0.0]]), temperature=1.0, top_p=0.5)[0]
    assert law.tolist() == [1.0, 0.0, 0.0]
    with pytest.raises(ConfigurationError, match="distributions"):
        verify_tree(TokenTree.chain([1]), np.ones((1, 2)) / 2, Dice(0))
    with pytest.raises(ConfigurationError, match="choices"):
        accept(TokenTree.chain([1]), [1])
    assert verify_chain([1], [None], np.array([[0.0, 1.0], [1.0, 0.0]]), Dice(0)) == (1, 0)


def test_enumeration_adds_up_and_counts_each_branch_once():
    law = outcomes(lambda draw: (draw(np.array([0.5, 0.5])), chance(draw, 0.25)))
    assert law == {(0, True): 0.125, (0, False): 0.375, (1, True): 0.125, (1, False): 0.375}
    with pytest.raises(ConfigurationError, match="branches"):
        outcomes(lambda draw: tuple(draw(np.ones(4) / 4) for _ in range(5)), most=100)
