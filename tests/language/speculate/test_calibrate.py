"""How likely a tested guess stands: the curve is measured by the rule of verification and never falls."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hasten.errors import ConfigurationError
from hasten.language import load
from hasten.language.speculate import DynamicTree
from hasten.language.speculate.calibrate import AcceptanceCurve, guesses_tried
from hasten.language.speculate.compare import rank_rates

CHANCES = st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1), st.floats(0.01, 1)), min_size=1, max_size=60)


@given(CHANCES)
@settings(max_examples=40, deadline=None)
def test_a_fitted_curve_rises_and_keeps_the_mean(rows):
    chances, stands, weights = map(list, zip(*rows, strict=True))
    curve = AcceptanceCurve.of(chances, stands, weights, bins=6)
    assert np.all(np.diff(curve.chances) >= 0)
    assert np.all(np.diff(curve.rates) >= -1e-12)
    assert min(curve.rates) >= 0
    assert max(curve.rates) <= 1 + 1e-12
    flat = AcceptanceCurve.of(chances, [0.3] * len(rows), weights)
    assert flat(0.0) == pytest.approx(0.3)
    assert flat(1.0) == pytest.approx(0.3)


def test_what_a_draft_is_told_about_itself():
    """With the target as its draft, drawn guesses always stand and only first ones are tested."""
    model = load("pycode-draft-0.7m", dtype="fp32")
    tokens = [list(range(5, 60))]
    found = list(guesses_tried(model, model, tokens, temperature=0.6))
    assert {g.rank for g in found} == {0}
    assert all(g.stands == pytest.approx(1.0) for g in found)
    assert rank_rates(model, model, tokens, temperature=0.6)[0] == pytest.approx(1.0)
    assert len(AcceptanceCurve.fit_ranks(model, model, tokens, temperature=0.6)) == 1  # nothing is tested second
    first, later = AcceptanceCurve.fit(model, model, tokens, temperature=0.6)
    assert first(0.01) == pytest.approx(1.0)
    assert later(0.5) == pytest.approx(1.0)


def test_siblings_have_a_curve_of_their_own():
    """First candidates that always stand leave siblings nothing, so the tree is a chain."""
    law = np.array([0.5, 0.3, 0.2])

    def grow(**knobs):
        return DynamicTree(3, **knobs).grow(lambda tree, nodes: np.stack([law] * len(nodes)), None)

    assert grow(calibrate=lambda p: 1.0).is_chain
    wide = grow(calibrate=lambda p: 0.1, calibrate_siblings=lambda p: 0.9)
    assert wide.parents[:2] == [-1, -1]
    assert wide.values[1] == pytest.approx(0.9 * 0.9)
    third = grow(calibrate=lambda p: 0.1, calibrate_siblings=(lambda p: 0.9, lambda p: 0.3))
    assert third.values[1:] == pytest.approx([0.9 * 0.9, 0.9 * 0.9 * 0.1])
    assert grow(calibrate=lambda p: 0.1, calibrate_siblings=()).parents == grow(calibrate=lambda p: 0.1).parents
    assert (
        grow(calibrate=lambda p: 0.1).parents == grow(calibrate=lambda p: 0.1, calibrate_siblings=lambda p: 0.1).parents
    )


@pytest.mark.parametrize(
    ("chances", "rates", "said"),
    [((0.1,), (), "equally many"), ((), (), "equally many"), ((0.2, 0.1), (0.1, 0.2), "must not fall")],
)
def test_a_malformed_curve_is_refused(chances, rates, said):
    with pytest.raises(ConfigurationError, match=said):
        AcceptanceCurve(chances, rates)
    with pytest.raises(ConfigurationError, match="none was given"):
        next(guesses_tried(None, None, []))
    with pytest.raises(ConfigurationError, match="nothing to fit"):
        AcceptanceCurve.of([], [], [])


def test_a_place_is_ordered_by_what_may_be_drawn_there():
    """Drawn guesses: the expected rate over the law, known before the token is."""
    curve = AcceptanceCurve((0.0, 1.0), (0.0, 1.0))
    law = np.array([0.5, 0.3, 0.2])
    assert curve.expected(law) == pytest.approx(0.38)
    for calibrate in (curve, lambda p: p):
        shape = DynamicTree(3, calibrate=calibrate)
        assert shape._worth(0.5, law, 0, lambda law: 0) == pytest.approx(0.19)
        assert shape._worth(0.5, law, 0, None) == pytest.approx(0.25)
    assert DynamicTree(3)._worth(0.5, law, 0, lambda law: 0) == 0.5
    flat = np.full(40, 1 / 40)
    assert DynamicTree(3, calibrate=lambda p: p)._worth(1.0, flat, 0, lambda law: 0) == pytest.approx(1 / 40)
