"""Ordered components: they order themselves, shrink, and leave plain layers behind."""

import pytest
import torch
from torch import nn

from hasten.clock import ManualClock
from hasten.compress.lowrank.layers import FactorConv2d, LowRankLinear
from hasten.compress.lowrank.maestro import Family, Maestro, Member, recalibrate
from hasten.compress.lowrank.ordered import OrderedConv2d, OrderedLinear, RankSampler, group_lasso
from hasten.errors import ConfigurationError
from hasten.testing.technique_kit import TechniqueKit

torch.set_num_threads(1)


def batches(count=4, width=16, classes=4):
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(width, classes, generator=g)
    xs = [torch.randn(64, width, generator=g) for _ in range(count)]
    return [(x, (x @ weight).argmax(1)) for x in xs]


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4))


@pytest.mark.parametrize(
    "layer",
    [
        nn.Linear(12, 7),
        nn.Linear(5, 9, bias=False),
        nn.Conv2d(3, 8, 3, padding=1),
        nn.Conv2d(4, 6, 3, stride=2, bias=False),
    ],
)
def test_full_rank_is_the_layer_and_prefixes_are_the_best(layer):
    kind = OrderedLinear if isinstance(layer, nn.Linear) else OrderedConv2d
    x = torch.randn(2, 12) if kind is OrderedLinear and layer.in_features == 12 else (
        torch.randn(2, 5) if kind is OrderedLinear else torch.randn(2, layer.in_channels, 6, 6))  # fmt: skip
    made = kind.of(layer)
    torch.testing.assert_close(made(x), layer(x), atol=1e-5, rtol=1e-5)
    made.prefix = 2
    left, right = made.factors()
    u, s, v = torch.linalg.svd(layer.weight.detach().flatten(1), full_matrices=False)
    torch.testing.assert_close(left @ right.T, (u[:, :2] * s[:2]) @ v[:2], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(made.deployed(2, False)(x), made(x), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(made.deployed(2, True)(x), made(x), atol=1e-5, rtol=1e-5)


def test_group_lasso_by_definition():
    layer = OrderedLinear.of(nn.Linear(6, 5))
    with torch.no_grad():
        expected = sum(f[:, b:].norm() for b in range(5) for f in (layer.left, layer.right))
    torch.testing.assert_close(group_lasso(nn.Sequential(layer)), expected, atol=1e-4, rtol=1e-5)
    layer.left.data[:, 3:] = 0
    layer.right.data[:, 3:] = 0
    group_lasso(nn.Sequential(layer)).backward()
    assert torch.isfinite(layer.left.grad).all()


def test_shrinking_drops_the_tail_and_keeps_the_least():
    layer = OrderedLinear(torch.eye(4), torch.diag(torch.tensor([1.0, 0.5, 1e-4, 1e-5])), None)
    assert layer.shrink(1e-2) == 2
    layer.left.data.zero_()
    assert layer.shrink(1e-2, least=1) == 1
    assert layer.shrink(1e-2) == 0
    assert layer(torch.ones(1, 4)).tolist() == [[0.0] * 4]


def test_sampler_is_uniform_over_pairs():
    layers = {"a": OrderedLinear.of(nn.Linear(3, 3)), "b": OrderedLinear.of(nn.Linear(9, 9))}
    sampler, seen = RankSampler(0), []
    for _ in range(600):
        with sampler.drawn(layers) as pair:
            seen.append(pair)
            assert layers[pair[0]].used == pair[1]
            assert all(m.used == m.rank for n, m in layers.items() if n != pair[0])
    counts = {p: seen.count(p) for p in set(seen)}
    assert len(counts) == 12
    assert max(counts.values()) < 90


def test_components_order_themselves_from_random_factors():
    """A map with singular values 4, 2, 1, 0.5 on the sphere: each prefix becomes the best one."""
    g = torch.Generator().manual_seed(0)
    a, b = (torch.linalg.qr(torch.randn(4, 4, generator=g))[0] for _ in range(2))
    s = torch.tensor([4.0, 2.0, 1.0, 0.5])
    matrix = a @ torch.diag(s) @ b
    layer = OrderedLinear(torch.randn(4, 4, generator=g) * 0.3, torch.randn(4, 4, generator=g) * 0.3, None)
    optimiser, sampler = torch.optim.Adam(layer.parameters(), lr=0.03), RankSampler(0)
    for step in range(800):
        for group in optimiser.param_groups:
            group["lr"] = 0.03 * (1 - step / 800)
        x = torch.randn(64, 4, generator=g)
        with sampler.drawn({"": layer}):
            loss = (layer(x) - x @ matrix.T).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    for k in range(1, 5):
        made = layer.left[:, :k] @ layer.right[:, :k].T
        best = (a[:, :k] * s[:k]) @ b[:k]
        assert float((made - best).detach().norm() / matrix.norm()) < 0.1


def test_training_shrinks_ranks_and_keeps_accuracy():
    model, data = mlp(), batches(8)
    small = Maestro(epochs=12, rate=5e-3, group_lasso=1e-4, shrink=2e-2)(model, data)
    fit = small.fit
    assert set(fit.ranks) == {"0", "2"}
    assert fit.ranks["2"] < 32
    assert [h["2"] for h in fit.history] == sorted((h["2"] for h in fit.history), reverse=True)
    x, y = data[0]
    with torch.no_grad():
        assert float((small(x).argmax(1) == y).float().mean()) > 0.8
        torch.testing.assert_close(small(x), fit.whole(x), atol=1e-4, rtol=1e-4)
    assert small.report.skipped == {"4": "the last layer"}
    members = fit.family((0.5, 0.2), data[:2])
    assert [m.share <= b for m, b in zip(members, (0.5, 0.2), strict=True)] == [True, True]
    assert all(members[1].ranks[n] <= members[0].ranks[n] for n in fit.ranks)  # nested
    assert isinstance(members[1].model[2], LowRankLinear)
    sizes = [sum(p.numel() for p in m.model.parameters()) for m in members]
    assert sizes[1] < sizes[0] < sum(p.numel() for p in model.parameters())


def test_convolutions_and_their_statistics():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), nn.Flatten(), nn.Linear(128, 4)
    )
    g = torch.Generator().manual_seed(0)
    data = [(torch.randn(32, 3, 8, 8, generator=g), torch.randint(0, 4, (32,), generator=g)) for _ in range(2)]
    small = Maestro(epochs=2)(model, data)
    assert small.report.skipped["3"] == "8 groups have no common factors"
    (member,) = small.fit.family((0.3,), data)
    assert isinstance(member.model[0], FactorConv2d)
    with torch.no_grad():
        made = torch.cat([member.model[0](x) for x, _ in data])
    torch.testing.assert_close(member.model[1].running_mean, made.mean((0, 2, 3)), atol=1e-4, rtol=1e-3)
    assert recalibrate(nn.Linear(2, 2), [torch.zeros(1, 2)]) is not None


def test_whether_one_matrix_is_faster_can_be_measured():
    small = Maestro(epochs=1, rows=16)(mlp(), batches(1))
    assert small(torch.zeros(2, 16)).shape == (2, 4)


def test_tied_weights_and_nothing_to_do_are_named():
    tied = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 2))
    tied[1].weight = tied[0].weight
    data = [(torch.zeros(4, 8), torch.zeros(4, dtype=torch.long))]
    with pytest.raises(ConfigurationError, match="0 and 1 share one weight"):
        Maestro(epochs=1)(tied, data)
    with pytest.raises(ConfigurationError, match="no layer is left"):
        Maestro(epochs=1)(nn.Sequential(nn.Linear(8, 2)), data)
    with pytest.raises(ConfigurationError, match="trains"):
        Maestro()(mlp())
    with pytest.raises(ConfigurationError, match="budgets"):
        Maestro(epochs=1)(mlp(), batches(1)).fit.family((0.0,), batches(1))


@pytest.mark.parametrize(
    "knobs", [{"epochs": 0}, {"rate": 0}, {"group_lasso": -1}, {"shrink": 1}, {"ignore_first": -1}]
)
def test_bad_knobs(knobs):
    with pytest.raises(ConfigurationError):
        Maestro(**knobs)


class TestKit(TechniqueKit):
    technique = Maestro(epochs=2, group_lasso=0.0, shrink=0.0)
    keeps = {"sqnr": 15.0}

    def test_same_input_same_result(self, parts):
        model, example, new = parts
        again = self.technique(model, [example])
        with torch.inference_mode():
            assert torch.equal(new(example), again(example))


def test_a_family_is_asked_for_the_best_that_is_fast_enough():
    clock = ManualClock()

    class Takes(nn.Module):
        def __init__(self, seconds):
            super().__init__()
            self.seconds = seconds

        def forward(self, x):
            clock.advance(self.seconds)
            return x

    sizes = ((1.0, 0.004, 0.2), (0.5, 0.002, 0.3), (0.25, 0.0019, 0.25), (0.1, 0.0015, 0.9))
    family = Family(Member(share, {}, loss, Takes(seconds)) for share, seconds, loss in sizes)
    x = torch.zeros(1)
    assert family.under("10ms", x, clock=clock).share == 1.0
    assert family.under(0.0021, x, clock=clock).share == 0.25  # faster than its larger sister, and better
    assert family.under("1.6ms", x, clock=clock).share == 0.1
    with pytest.raises(ConfigurationError, match="the fastest of 4 sizes takes 1.5 ms, above 500 µs"):
        family.under("0.5ms", x, clock=clock)
