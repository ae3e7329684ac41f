"""Pooling by two in one pass, against the library's."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from hasten.spiking import LIF, SpikingNetwork
from hasten.spiking.pool import max_pool, mean_pool, pools

pytestmark = pytest.mark.usefixtures("one_thread")


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 3), st.integers(2, 9), st.integers(2, 40), st.integers(0, 99))
def test_same_as_the_library(planes: int, height: int, width: int, seed: int) -> None:
    x = torch.randn(2, planes, height, width, generator=torch.Generator().manual_seed(seed))
    x[0, 0, 0, 0] = float("nan")
    expected = nn.functional.max_pool2d(x, 2)
    assert torch.equal(max_pool(x).nan_to_num(7.0), expected.nan_to_num(7.0))
    assert torch.equal(max_pool(x, 0.3), (expected > 0.3).float())
    assert torch.equal(mean_pool(x).nan_to_num(7.0), nn.functional.avg_pool2d(x, 2).nan_to_num(7.0))


def test_it_knows_what_it_can_do() -> None:
    x = torch.rand(1, 1, 4, 4)
    assert not pools(nn.MaxPool2d(2), x)  # a gradient may be asked for
    with torch.no_grad():
        assert pools(nn.MaxPool2d(2), x)
        assert pools(nn.AvgPool2d(2), x)
        others = [
            nn.MaxPool2d(3),
            nn.AvgPool2d(3),
            nn.AvgPool2d(2, divisor_override=3),
            nn.MaxPool2d(2, 1),
            nn.MaxPool2d(2, padding=1),
            nn.MaxPool2d(2, ceil_mode=True),
        ]
        assert not any(pools(layer, x) for layer in [*others, nn.MaxPool2d(2, return_indices=True)])
        assert not pools(nn.MaxPool2d(2), x.double())


def test_networks_use_it_and_give_the_same_bits() -> None:
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 4, 3, bias=False), nn.MaxPool2d(2), LIF(0.9, 0.2), nn.Conv2d(4, 4, 3, bias=False),
              LIF(0.9, 0.3), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(4, 3)]  # fmt: skip
    net, x = SpikingNetwork(layers, 3).eval(), torch.rand(5, 1, 12, 12)
    one = net.with_timesteps(1).one_step()
    with torch.no_grad():
        fast = net(x), one(x)
    assert torch.equal(fast[1], one.layers(x))
    torch.testing.assert_close(fast[0], net(x))
