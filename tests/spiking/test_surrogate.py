"""Bumps: their area, their gradient, their registry."""

from __future__ import annotations

import pytest
import torch

from hasten.errors import ConfigurationError
from hasten.spiking.surrogate import SURROGATES, Surrogate, spike


@pytest.mark.parametrize("name", ["arctan", "boxcar", "sigmoid", "gaussian"])
def test_the_area_is_one(name: str) -> None:
    x = torch.linspace(-200, 200, 400_001, dtype=torch.float64)
    area = torch.trapezoid(Surrogate(name).derivative(x, 1.0), x)
    assert area.item() == pytest.approx(1.0, abs=5e-3)


def test_the_triangle_is_that_of_the_publication() -> None:
    u, v = torch.tensor([0.0, 1.0, 2.0, 3.0, 4.5]), 2.0
    z = u / v - 1
    expected = 0.3 * (1 - z.abs()).clamp_min(0) / v  # dS/dz dz/du
    torch.testing.assert_close(Surrogate("triangle").derivative(u - v, v), expected)


@pytest.mark.parametrize("name", sorted(SURROGATES))
def test_forward_is_a_step_and_backward_the_bump(name: str) -> None:
    u = torch.tensor([-0.5, 0.9, 1.0, 1.1], requires_grad=True)
    theta = torch.tensor(1.0, requires_grad=True)
    s = spike(u, theta, Surrogate(name))
    assert s.tolist() == [0.0, 0.0, 0.0, 1.0]
    s.sum().backward()
    bump = Surrogate(name).derivative(u.detach() - 1.0, 1.0)
    torch.testing.assert_close(u.grad, bump)
    torch.testing.assert_close(theta.grad, -bump.sum())


def test_unknown_names_and_widths_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="arctan"):
        Surrogate("step")
    with pytest.raises(ConfigurationError, match="positive"):
        Surrogate("arctan", -1.0)
