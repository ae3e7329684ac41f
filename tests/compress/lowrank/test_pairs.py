"""The three decompositions as mathematics: optima, exact errors, and what cannot be beaten."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hasten.compress.lowrank import pairs

torch.set_num_threads(1)


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def moment(rows):
    return rows.T @ rows / len(rows)


def test_nystrom_is_the_least_squares_optimum():
    hidden, following = normal(300, 24).relu(), normal(10, 24, seed=1)
    c = moment(hidden)
    kept = pairs.select_greedily(c, following, 11)
    solved, error = pairs.nystrom(c, following, kept)
    residual = c[kept][:, kept] @ solved.T - c[kept] @ following.T
    assert residual.norm() <= 1e-8 * (c[kept] @ following.T).norm()
    direct = torch.linalg.lstsq(hidden[:, kept], hidden @ following.T).solution.T
    torch.testing.assert_close(solved, direct, atol=1e-8, rtol=1e-8)
    true = (hidden @ following.T - hidden[:, kept] @ solved.T).norm() / (hidden @ following.T).norm()
    assert error == pytest.approx(float(true), abs=1e-8)


@pytest.mark.parametrize("copies", [2, 3])
def test_duplicated_units_are_lossless_at_the_true_width(copies):
    hidden, following = normal(200, 8).relu().repeat(1, copies), normal(5, 8 * copies, seed=1)
    c = moment(hidden)
    kept = pairs.select_greedily(c, following, 8)
    solved, error = pairs.nystrom(c, following, kept)
    torch.testing.assert_close(hidden[:, kept] @ solved.T, hidden @ following.T, atol=1e-8, rtol=1e-8)
    assert error < 1e-6


def test_greedy_selection_beats_random_and_magnitude():
    hidden = (normal(400, 40) @ normal(40, 40, seed=3)).relu()
    following = normal(12, 40, seed=1)
    c = moment(hidden)

    def error(kept):
        return pairs.nystrom(c, following, kept)[1]

    found = error(pairs.select_greedily(c, following, 16))
    others = [error(torch.randperm(40, generator=torch.Generator().manual_seed(s))[:16]) for s in range(20)]
    assert found < min(others)
    assert found <= error(pairs.best_by(pairs.leverage(c), 16)) + 1e-9


def test_leverage_scores_by_definition():
    c = moment(normal(50, 6))
    lam = c.diagonal().mean()
    expected = (c @ torch.linalg.inv(c + lam * torch.eye(6, dtype=torch.float64))).diagonal()
    torch.testing.assert_close(pairs.leverage(c), expected)


@settings(max_examples=20, deadline=None)
@given(st.integers(2, 12), st.integers(2, 8), st.integers(1, 3), st.integers(0, 10_000))
def test_joint_svd_error_is_the_tail(inputs, width, heads, seed):
    rows, first, second = normal(40, inputs, seed=seed), normal(width, inputs, seed=seed + 1), normal(heads * 5, width)
    for keep in range(1, width + 1):
        new_first, new_second, values = pairs.joint_svd(moment(rows), first, second, keep)
        gap = rows @ first.T @ second.T - rows @ new_first.T @ new_second.T
        tail = values[keep:].square().sum().sqrt()
        scale = values.norm()
        assert abs(float(gap.norm() / len(rows) ** 0.5 - tail)) <= 1e-8 * max(1.0, float(scale))


def test_joint_svd_with_a_singular_moment():
    rows = normal(40, 3) @ normal(3, 9, seed=5)  # three directions of nine
    first, second = normal(6, 9, seed=1), normal(7, 6, seed=2)
    new_first, new_second, _ = pairs.joint_svd(moment(rows), first, second, 3)
    torch.testing.assert_close(rows @ new_first.T @ new_second.T, rows @ first.T @ second.T, atol=1e-7, rtol=1e-7)


def test_no_trained_pair_beats_the_svd():
    rows, first, second = normal(100, 10), normal(8, 10, seed=1), normal(6, 8, seed=2)
    target = rows @ first.T @ second.T
    new_first, new_second, values = pairs.joint_svd(moment(rows), first, second, 3)
    best = float(values[3:].square().sum())
    one = torch.nn.Parameter(normal(3, 10, seed=7) * 0.3)
    two = torch.nn.Parameter(normal(6, 3, seed=8) * 0.3)
    optimiser = torch.optim.Adam([one, two], lr=0.02)
    for _ in range(600):
        loss = (target - rows @ one.T @ two.T).square().sum() / len(rows)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert float(loss) >= best - 1e-6


def test_column_scores_by_definition():
    query, keys = normal(30, 2, 5), normal(30, 5, seed=1)
    grouped = torch.einsum("thi,thj->hij", query, query)
    expected = torch.stack([
        (query[:, :, i].square().sum() * keys[:, i].square().sum()).sqrt() for i in range(5)
    ])  # fmt: skip
    torch.testing.assert_close(pairs.column_scores(grouped, keys.T @ keys), expected)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=12), st.floats(0.05, 0.7), st.floats(0.01, 1.0))
def test_shares_keep_their_mean_and_their_cap(influence, average, temperature):
    shares = pairs.influence_sparsity(torch.tensor(influence, dtype=torch.float64), average, temperature)
    assert float(shares.max()) <= 0.8 + 1e-9
    assert float(shares.mean()) == pytest.approx(average, abs=1e-9)
    order = sorted(range(len(influence)), key=lambda i: influence[i])
    assert all(shares[a] >= shares[b] - 1e-9 for a, b in zip(order, order[1:], strict=False))


def test_shares_maximise_the_stated_objective():
    influence, average, temperature = torch.tensor([0.4, 0.2, 0.1], dtype=torch.float64), 0.3, 0.2

    def objective(shares):
        p = shares / shares.sum()
        return float(-(influence * p).sum() - temperature * (p * p.log()).sum())

    found = pairs.influence_sparsity(influence, average, temperature)
    for seed in range(50):
        other = torch.rand(3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        assert objective(other / other.sum() * 0.9) <= objective(found) + 1e-12
