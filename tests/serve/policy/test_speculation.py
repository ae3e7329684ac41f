"""The allocation of guesses against brute force, and its limits."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hasten.errors import ConfigurationError
from hasten.language.speculate.verify import expected_length
from hasten.serve.cost import IterationCost
from hasten.serve.policy import FixedSpeculation, GoodputSpeculation, SpeculationObservation

COST = IterationCost(m0=4e-3, m1=1e-7, m2=1e-4, a=2e-3, b=3e-4, c=1e-8)


def goodput(lengths, alphas, contexts, cost):
    kept = sum(expected_length(a, k) for a, k in zip(alphas, lengths, strict=True))
    tokens = sum(lengths) + len(lengths)
    attention = sum((k + 1) * (2 * c + k + 1) for c, k in zip(contexts, lengths, strict=True))
    return kept / cost.seconds(sum(contexts), len(lengths), tokens, attention)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.floats(0.05, 0.98), min_size=1, max_size=5), st.floats(1e-5, 2e-3), st.integers(0, 1000))
def test_lengths_are_those_of_brute_force(alphas, per_token, context):
    cost = IterationCost(m0=4e-3, m2=1e-4, a=2e-3, b=per_token)
    contexts = [context] * len(alphas)
    found = GoodputSpeculation(max_length=4, cost=cost).decide(SpeculationObservation(alphas, contexts))
    best = max(goodput(k, alphas, contexts, cost) for k in itertools.product(range(5), repeat=len(alphas)))
    assert goodput(found, alphas, contexts, cost) == pytest.approx(best, rel=1e-9)


def test_one_length_for_all_is_the_best_such_length():
    alphas, contexts = [0.9, 0.5, 0.7], [10, 10, 10]
    found = GoodputSpeculation(max_length=6, per_request=False, cost=COST).decide(
        SpeculationObservation(alphas, contexts)
    )
    values = [goodput([k] * 3, alphas, contexts, COST) for k in range(7)]
    assert found == [int(np.argmax(values))] * 3


def test_room_and_limits_are_kept_and_survival_replaces_alpha():
    spec = GoodputSpeculation(max_length=8, cost=IterationCost(m0=1.0))
    seen = SpeculationObservation([0.9, 0.9], [5, 5], limits=[2, 8], room=6)
    assert sum(spec.decide(seen)) <= 6
    assert spec.decide(seen)[0] <= 2
    seen = SpeculationObservation([0.9, 0.9], [5, 5], survival=[(0.9, 0.8), ()])
    assert spec.decide(seen) == [2, 0]
    busy = SpeculationObservation([0.9], [5], prefill_tokens=100_000)
    assert GoodputSpeculation(cost=IterationCost(b=1e-3)).decide(busy)[0] >= 0


def test_saturated_machine_gets_no_guess():
    spec = GoodputSpeculation(cost=IterationCost(b=1e-3))
    assert spec.decide(SpeculationObservation([0.9] * 32, [10] * 32)) == [0] * 32


def test_deciding_is_pure_and_bad_knobs_are_refused():
    seen = SpeculationObservation([0.9, 0.2], [5, 5])
    spec = GoodputSpeculation(cost=COST)
    assert spec.decide(seen) == spec.decide(seen)
    with pytest.raises(ConfigurationError, match="max_length"):
        GoodputSpeculation(max_length=-1)
    with pytest.raises(ConfigurationError, match="length"):
        FixedSpeculation(-2)
