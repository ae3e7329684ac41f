"""The exact allocation against enumeration, and Q-BERT's sort as its special case."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hasten.compress.quantize.knapsack import allocate, two_levels
from hasten.errors import ConfigurationError

NUMBERS = st.floats(-5, 5, allow_nan=False).map(lambda v: round(v, 3))


@given(
    st.lists(st.lists(st.tuples(st.integers(0, 9), NUMBERS), min_size=1, max_size=4), min_size=1, max_size=6),
    st.integers(0, 40),
)
@settings(max_examples=300, deadline=None)
def test_no_enumerated_answer_is_better(table: list[list[tuple[int, float]]], budget: int) -> None:
    costs = [[c for c, _ in row] for row in table]
    losses = [[v for _, v in row] for row in table]
    least = sum(min(row) for row in costs)
    if least > budget:
        with pytest.raises(ConfigurationError, match=f"least reachable cost {least}"):
            allocate(losses, costs, budget)
        return
    chosen = allocate(losses, costs, budget)
    assert sum(c[o] for c, o in zip(costs, chosen, strict=True)) <= budget
    best = min(
        sum(v[o] for v, o in zip(losses, option, strict=True))
        for option in itertools.product(*(range(len(row)) for row in table))
        if sum(c[o] for c, o in zip(costs, option, strict=True)) <= budget
    )
    assert sum(v[o] for v, o in zip(losses, chosen, strict=True)) == pytest.approx(best, abs=1e-9)


def test_two_hundred_layers_take_no_time() -> None:
    rng = np.random.default_rng(0)
    sizes = rng.integers(1000, 100_000, 200).astype(float)
    omega = rng.exponential(size=200)
    bits = (2, 3, 4, 8)
    costs = [[s * b / 8 for b in bits] for s in sizes]
    losses = [[o * s * 4.0**-b for b in bits] for o, s in zip(omega, sizes, strict=True)]
    chosen = allocate(losses, costs, 3.1 / 8 * sizes.sum())
    spent = sum(c[o] for c, o in zip(costs, chosen, strict=True))
    assert 0.999 * 3.1 / 8 * sizes.sum() < spent <= 3.1 / 8 * sizes.sum()


def test_the_sort_is_a_special_case() -> None:
    rng = np.random.default_rng(1)
    for _ in range(50):
        omega = rng.exponential(size=8)
        budget = int(rng.integers(16, 25))
        chosen = two_levels(omega.tolist(), [(2, 3)] * 8, budget)
        assert allocate([[o * 1.0, o * 0.25] for o in omega], [[2, 3]] * 8, budget) == chosen
    with pytest.raises(ConfigurationError, match="least reachable cost 16"):
        two_levels(omega.tolist(), [(2, 3)] * 8, 15)


def test_tables_that_do_not_fit_together() -> None:
    with pytest.raises(ConfigurationError, match="must agree"):
        allocate([[1.0, 2.0]], [[1.0]], 3)
    with pytest.raises(ConfigurationError, match="not finite"):
        allocate([[float("nan")]], [[1.0]], 3)
