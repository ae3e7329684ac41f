"""Rates of guesses: what is drawn towards the common rate, and how far."""

import numpy as np
import pytest

from hasten.serve.acceptance import Acceptance


def run(rates, sequences=60, guesses=60, seed=0):
    """``sequences`` that end one after the other, each with a rate of its own."""
    draw = np.random.default_rng(seed)
    acceptance = Acceptance()
    for seq in range(sequences):
        rate, tested = rates(draw), 0
        while tested < guesses:
            stood = 0
            while stood < 4 and draw.random() < rate:
                stood += 1
            acceptance.learn(seq, stood, 4)
            tested += min(stood + 1, 4)
        acceptance.forget(seq)
    return acceptance


def test_sequences_that_are_alike_share_one_rate():
    acceptance = run(lambda draw: 0.8)
    assert acceptance.weight > 100
    acceptance.learn(1000, 4, 4)
    acceptance.learn(1001, 0, 4)
    assert acceptance.alpha(1000) - acceptance.alpha(1001) < 0.06


@pytest.mark.parametrize("seed", range(4))
def test_the_weight_is_that_of_the_beta_distribution_the_rates_come_from(seed):
    acceptance = run(lambda draw: draw.beta(4.0, 4.0), sequences=300, seed=seed)
    assert 4 < acceptance.weight < 16  # 8, from about a hundred sequences
    for _ in range(20):
        acceptance.learn(1000, 4, 4)
    assert acceptance.alpha(1000) > 0.85


def test_few_ended_sequences_change_nothing():
    assert run(lambda draw: 0.8, sequences=7).weight == Acceptance().weight
    acceptance = Acceptance()
    for seq in range(50):  # they ended before a guess was tested
        acceptance.forget(seq)
    assert acceptance.weight == Acceptance().weight


@pytest.mark.parametrize("rate", [0.0, 1.0])
def test_guesses_that_always_or_never_stand(rate):
    acceptance = run(lambda draw: rate)
    assert 0 <= acceptance.alpha(5) <= 1
    assert acceptance.weight > 100
