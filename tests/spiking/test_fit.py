"""The loop: schedule, resume, refusal."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hasten.errors import ConfigurationError
from hasten.spiking.fit import Fitting, accuracy, fit

pytestmark = pytest.mark.usefixtures("one_thread")


def test_it_learns_and_the_rate_follows_the_cosine() -> None:
    torch.manual_seed(0)
    x = torch.randn(200, 4)
    y = (x[:, 0] > 0).long()
    model = nn.Linear(4, 2)
    losses = fit(model, x, y, Fitting(12, 0.05))
    assert losses[-1] < losses[0] / 2
    assert accuracy(model, x, y) > 0.95
    factors = [Fitting().factor(p / 20) for p in range(21)]
    assert factors[1] == 1.0
    assert factors[1:] == sorted(factors[1:], reverse=True)
    assert factors[-1] == pytest.approx(0.0, abs=1e-9)


def test_a_loss_that_is_no_number_stops_the_run() -> None:
    with pytest.raises(ConfigurationError, match="lower the learning rate"):
        fit(nn.Linear(2, 2), torch.full((4, 2), float("nan")), torch.zeros(4, dtype=torch.int64), Fitting(1))
    with pytest.raises(ConfigurationError, match="no run"):
        Fitting(epochs=-1)
