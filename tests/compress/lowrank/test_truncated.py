"""One matrix at a time."""

import pytest
import torch
from torch import nn

from hasten.compress import Recipe
from hasten.compress.lowrank.truncated import TruncatedSvd, weighted_factors
from hasten.errors import ConfigurationError
from hasten.testing.technique_kit import TechniqueKit


def test_weighted_factors_are_the_optimum_in_the_norm_of_the_data():
    g = torch.Generator().manual_seed(0)
    rows = torch.randn(200, 8, dtype=torch.float64, generator=g) * torch.tensor([8, 4, 2, 1, 1, 1, 1, 0.5]).double()
    weight = torch.randn(6, 8, dtype=torch.float64, generator=g)
    moment = rows.T @ rows
    up, down, error = weighted_factors(weight, 3, moment)
    gap = rows @ (weight - up @ down).T
    assert error == pytest.approx(float(gap.norm() / (rows @ weight.T).norm()), abs=1e-8)
    plain_up, plain_down, _ = weighted_factors(weight, 3)
    assert gap.norm() < (rows @ (weight - plain_up @ plain_down).T).norm()


def test_conv_and_shared_weights():
    model = nn.Sequential(nn.Conv2d(8, 16, 3), nn.Conv2d(16, 16, 3, groups=16), nn.Flatten(), nn.Linear(16, 16))
    new = TruncatedSvd(ratio=0.5, convolutions=True)(model)
    assert new.report.skipped["1"] == "16 groups have no common factors"
    assert new.report.bytes_after < new.report.bytes_before
    assert new(torch.zeros(1, 8, 5, 5)).shape == (1, 16)
    tied = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    tied[1].weight = tied[0].weight
    assert not TruncatedSvd(ratio=0.5)(tied).report.touched


def test_a_plan_weighed_by_inputs_needs_them_again():
    model, x = nn.Sequential(nn.Linear(32, 32)), torch.randn(64, 32)
    made, plan = Recipe((TruncatedSvd(ratio=0.5),)).apply(model, [x])
    again, _ = (recipe := Recipe((TruncatedSvd(ratio=0.5),), plan)).apply(model, [x])
    assert torch.equal(made(x), again(x))
    with pytest.raises(ConfigurationError, match="'0' that were weighed by inputs; give calibration"):
        recipe.apply(model)
    _, plain = Recipe((TruncatedSvd(ratio=0.5),)).apply(model)
    Recipe((TruncatedSvd(ratio=0.5),), plain).apply(model)


@pytest.mark.parametrize(
    "knobs", [{"ratio": 1.5}, {"ratio": 0.5, "rank": 2}, {"ratio": None}, {"ratio": None, "rank": 0}]
)
def test_bad_knobs(knobs):
    with pytest.raises(ConfigurationError):
        TruncatedSvd(**knobs)


class TestKit(TechniqueKit):
    technique = TruncatedSvd(ratio=0.3)
    keeps = {"sqnr": 8.0}
    touches = True

    def test_same_input_same_result(self, parts):
        model, example, new = parts
        again = self.technique(model, [example])
        with torch.inference_mode():
            assert torch.equal(new(example), again(example))
