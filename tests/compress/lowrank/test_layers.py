"""Factors and branches."""

import pytest
import torch
from torch import nn

from hasten.compress.lowrank.layers import FactorConv2d, LowRankLinear, truncate
from hasten.errors import ConfigurationError


def test_truncation_error_is_the_tail():
    weight = torch.randn(12, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for rank in (1, 5, 12):
        up, down, values = truncate(weight, rank)
        tail = values[rank:].square().sum().sqrt()
        assert abs(float((weight - up @ down).norm() - tail)) < 1e-12


def test_full_rank_is_exact():
    layer = nn.Linear(9, 6)
    x = torch.randn(4, 9)
    torch.testing.assert_close(LowRankLinear.of(layer, 6)(x), layer(x), atol=1e-5, rtol=1e-5)


def test_branch_adds_to_its_base_and_merges():
    base, x = nn.Linear(9, 6), torch.randn(2, 3, 9)
    layer = LowRankLinear(torch.randn(2, 9), torch.randn(6, 2), base=base, bias=torch.randn(6))
    expected = base(x) + x @ layer.down.T @ layer.up.T + layer.bias
    torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(layer.dense()(x), expected, atol=1e-5, rtol=1e-5)


def test_widening_is_exact():
    layer, x = LowRankLinear.of(nn.Linear(9, 6), 3), torch.randn(4, 9)
    down, up = torch.randn(2, 9), torch.randn(6, 2)
    wide = layer.widened(down, up)
    assert wide.rank == 5
    torch.testing.assert_close(wide(x), layer(x) + x @ down.T @ up.T, atol=1e-6, rtol=1e-6)
    with pytest.raises(ConfigurationError, match="does not fit"):
        layer.widened(torch.randn(2, 8), up)
    with pytest.raises(ConfigurationError, match="as many rows"):
        LowRankLinear(torch.randn(2, 4), torch.randn(3, 3))


@pytest.mark.parametrize("options", [{}, {"stride": 2, "padding": 1}, {"dilation": 2, "bias": False}])
def test_convolution_factors(options):
    layer, x = nn.Conv2d(4, 6, 3, **options), torch.randn(2, 4, 9, 9)
    torch.testing.assert_close(FactorConv2d.of(layer, 6)(x), layer(x), atol=1e-5, rtol=1e-5)
    assert FactorConv2d.of(layer, 2).rank == 2


def test_grouped_convolutions_are_refused():
    with pytest.raises(ConfigurationError, match="4 groups"):
        FactorConv2d.of(nn.Conv2d(4, 4, 3, groups=4), 2)


def test_a_branch_beside_something_else_cannot_merge():
    layer = LowRankLinear(torch.randn(2, 9), torch.randn(9, 2), base=nn.Identity())
    with pytest.raises(ConfigurationError, match="Identity"):
        layer.dense()
