"""Errors of the stages of SVDQuant, layer by layer."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hasten.compress.lowrank.stages import stages
from hasten.compress.lowrank.svdquant import SvdQuant
from hasten.errors import ConfigurationError


class Two(nn.Module):
    """Two layers read one tensor, whose outliers sit in two channels."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.out = nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(rows, 32) -> the same."""
        result: torch.Tensor = self.out(torch.tanh(self.q(x) + self.k(x)))
        return result


def test_every_stage_brings_a_layer_with_outliers_closer() -> None:
    model = Two()
    x = torch.randn(200, 32, generator=torch.Generator().manual_seed(1))
    x[:, [3, 20]] *= 30
    technique = SvdQuant(rank=4, group=16, grid=5, iterations=3, shift=False)
    found = stages(model, [x], technique)
    assert list(found.layers) == ["q+k", "out"]
    row = found.layers["q+k"]
    assert row["naive"] > row["smoothing"] > row["branch"] >= row["rounds"]
    made = technique(model, [x]).report
    assert {r.layer: r.error for r in made.layers}["q"] == pytest.approx(row["rounds"])
    assert found.median("rounds") == pytest.approx((row["rounds"] + found.layers["out"]["rounds"]) / 2)
    assert str(found).splitlines()[0].split() == ["layer", "naive", "smoothing", "branch", "rounds", "gptq"]


def test_gptq_needs_rows_and_calibration_is_asked_for() -> None:
    few = [torch.randn(20, 32, generator=torch.Generator().manual_seed(1))]
    found = stages(Two(), few, SvdQuant(rank=4, group=16, grid=3, iterations=1))
    assert all("gptq" not in row for row in found.layers.values())
    assert "–" not in str(found)
    with pytest.raises(ConfigurationError, match="no layer has a stage 'gptq'"):
        found.median("gptq")
    with pytest.raises(ConfigurationError, match="give calibration"):
        stages(Two(), [])
