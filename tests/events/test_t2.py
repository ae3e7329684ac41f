"""The model and its loss."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from hasten.compress.freeze import freeze
from hasten.errors import ConfigurationError
from hasten.events.t2 import T2, T2Config, class_weights, weighted_log_loss
from hasten.frozen import Frozen
from hasten.testing.model_kit import ModelKit


class TestKit(ModelKit):
    def model(self) -> nn.Module:
        torch.manual_seed(0)
        return T2(T2Config(bands=2, classes=3, width=16, heads=4, hidden=24)).eval()

    def example(self) -> Any:
        return torch.randn(2, 100, 2, generator=torch.Generator().manual_seed(0))


def test_the_loss_of_a_uniform_guess_is_the_logarithm_of_the_classes() -> None:
    torch.manual_seed(0)
    for classes in (2, 7, 14):
        labels = torch.arange(classes).repeat_interleave(torch.arange(1, classes + 1))
        assert float(weighted_log_loss(torch.zeros(len(labels), classes), labels)) == pytest.approx(math.log(classes))
    logits, labels = torch.randn(30, 4), torch.randint(0, 4, (30,))
    weights = torch.tensor([1.0, 2.0, 3.0, 0.5])
    p = torch.softmax(logits, -1)
    by_hand = sum(
        float(weights[m])
        * sum(math.log(float(p[i, m])) for i in range(30) if labels[i] == m)
        / int((labels == m).sum())
        for m in range(4)
    )
    assert float(weighted_log_loss(logits, labels, weights)) == pytest.approx(-by_hand / float(weights.sum()), rel=1e-5)
    sure = torch.tensor([[-1e4, 1e4]])
    assert float(weighted_log_loss(sure, torch.tensor([0]))) == pytest.approx(-math.log(1e-15), rel=1e-5)
    assert class_weights(torch.tensor([0, 0, 1]), 2).tolist() == [0.75, 1.5]


def test_scaling_is_robust_and_part_of_the_model() -> None:
    model = T2(T2Config(bands=2))
    grid = torch.randn(50, 100, 2) * torch.tensor([1.0, 100.0]) + 5
    grid[0, 0] = 1e9
    model.scale_by(grid)
    assert model.centre.tolist() == pytest.approx([5, 5], abs=10)
    assert float(model.spread[1] / model.spread[0]) == pytest.approx(100, rel=0.2)
    assert "centre" in model.state_dict()


def test_features_lengthen_the_series_and_the_program_is_the_model() -> None:
    torch.manual_seed(0)
    model = T2(T2Config(bands=6, features=2)).eval()
    x, z = torch.randn(3, 100, 6), torch.randn(3, 2)
    with torch.no_grad():
        assert not torch.allclose(model(x), model(x, z))
        program = freeze(model, (x, z))
        arrays = {slot: program.tensors[name].numpy() for slot, name in program.slots}
        run = Frozen(program.steps, arrays, program.inputs, program.outputs)
        assert np.allclose(run(x.numpy(), z.numpy()), model(x, z).numpy(), atol=1e-5)
        assert program.batch is None
    for wrong in ({"heads": 5}, {"bands": 0}, {"dropout": 1.0}):
        with pytest.raises(ConfigurationError):
            T2Config(**wrong)
