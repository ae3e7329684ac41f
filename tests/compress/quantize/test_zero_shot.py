"""Inputs made from statistics alone."""

from __future__ import annotations

import pytest
import torch
from quantize_models import cnn
from torch import nn

from hasten.compress.quantize import Int, Quantize, fold_batch_norm
from hasten.compress.quantize.zero_shot import statistics_gap, zero_shot_inputs
from hasten.errors import ConfigurationError

pytestmark = pytest.mark.usefixtures("one_thread")


def taught(model: nn.Module, x: torch.Tensor) -> nn.Module:
    """The normalisations remember ``x``."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None
    model.train()
    with torch.no_grad():
        model(x)
    return model.eval()


def test_the_gap_is_none_for_the_data_themselves() -> None:
    x = 3 * torch.rand(64, 1, 8, 8, generator=torch.Generator().manual_seed(0)) + 2
    model = taught(cnn(), x)
    assert statistics_gap(model, x).item() < 0.01
    one = nn.Sequential(nn.BatchNorm1d(2, eps=0.0)).eval()
    one[0].running_mean, one[0].running_var = torch.tensor([1.0, 0.0]), torch.tensor([4.0, 1.0])
    given = torch.tensor([[0.0, -2.0], [2.0, 2.0]])  # means 1 and 0, deviations 1 and 2
    assert statistics_gap(one, given).item() == pytest.approx((0.25 + 1) / 2)


def test_made_up_inputs_have_the_range_of_the_data() -> None:
    x = 3 * torch.rand(64, 1, 8, 8, generator=torch.Generator().manual_seed(0)) + 2
    model = taught(cnn(), x)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    made = zero_shot_inputs(model, (32, 1, 8, 8), steps=60, rate=0.3)
    noise = torch.randn(32, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    assert statistics_gap(model, made).item() < 0.1 * statistics_gap(model, noise).item()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert torch.equal(made, zero_shot_inputs(model, (32, 1, 8, 8), steps=60, rate=0.3))
    told: dict[str, float] = {}
    for name, given in (("data", x), ("made", made), ("noise", noise)):
        small = Quantize(Int(8), Int(8, symmetric=False), real="never")(model, [given])
        told[name] = (small(x) - model(x)).square().mean().item()
    assert told["made"] < 0.2 * told["noise"]  # noise has clipped the range of the data away


def test_what_has_no_statistics_is_named() -> None:
    folded = cnn()
    fold_batch_norm(folded)
    for model in (nn.Sequential(nn.Linear(4, 4)), folded):
        with pytest.raises(ConfigurationError, match="holds statistics"):
            zero_shot_inputs(model, (4, 1, 8, 8))
    with pytest.raises(ConfigurationError, match="two samples"):
        zero_shot_inputs(cnn(), (1, 1, 8, 8))
    with pytest.raises(ConfigurationError, match="change nothing"):
        zero_shot_inputs(cnn(), (4, 1, 8, 8), steps=0)
