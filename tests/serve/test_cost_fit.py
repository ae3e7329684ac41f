import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from hasten.serve.cost_fit import nonnegative_least_squares


@given(st.integers(0, 10_000))
def test_least_squares_satisfies_its_optimality_conditions(seed):
    rng = np.random.default_rng(seed)
    matrix, target = rng.normal(size=(20, 7)), rng.normal(size=20)
    x = nonnegative_least_squares(matrix, target)
    gradient = matrix.T @ (matrix @ x - target)
    assert (x >= 0).all()
    assert (gradient >= -1e-9).all()  # no descent into the allowed side
    assert abs(gradient @ x) < 1e-9
