"""A plan carried out: the kit, rounding, inputs, and fine-tuning through the rounding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hasten.compress.quantize.allocate import BitPlan
from hasten.compress.quantize.granularity import PerChannel
from hasten.compress.quantize.integer import Int
from hasten.compress.quantize.mixed import MixedQuantize, RoundedInput
from hasten.errors import ConfigurationError
from hasten.testing.technique_kit import TechniqueKit


class TestKit(TechniqueKit):
    technique = MixedQuantize(
        (("first.weight", Int(8, PerChannel(0))), ("second.weight", Int(4, PerChannel(0)))),
        (("second", Int(8)),),
    )
    keeps = {"sqnr": 20.0}

    def test_same_input_same_result(self, parts: Any) -> None:
        model, example, new = parts
        again = self.technique(model, [example])
        with torch.inference_mode():
            assert torch.equal(new(example), again(example))


def data() -> tuple[nn.Module, list[Any]]:
    torch.manual_seed(0)
    x = torch.randn(256, 8)
    y = (x[:, 0] * x[:, 1] > 0).long()
    model = nn.Sequential(nn.Linear(8, 24), nn.Tanh(), nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 2))
    return model, [(x, y)]


def loss(model: nn.Module, batch: Any) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def test_fine_tuning_ends_on_the_grid_and_helps() -> None:
    from hasten.train.fit import fit

    model, batches = data()
    fit(model, batches, loss, epochs=150, rate=2e-2)
    model.eval()
    formats = tuple((f"{n}.weight", Int(2, PerChannel(0), full_range=True)) for n in ("0", "2"))
    shot = MixedQuantize(formats)(model)
    tuned = MixedQuantize(formats, (("2", Int(8)),), epochs=60, rate=5e-3)(model, batches, loss=loss)
    assert isinstance(tuned[2], RoundedInput)
    assert all(len(row.unique()) <= 4 for row in tuned[2].layer.weight)
    with torch.no_grad():
        float_loss, one, two = (float(loss(m, batches[0])) for m in (model, shot, tuned))
    assert float_loss < two < one
    again = MixedQuantize(formats, (("2", Int(8)),), epochs=60, rate=5e-3)(model, batches, loss=loss)
    with torch.no_grad():
        assert torch.equal(again(batches[0][0]), tuned(batches[0][0]))
    assert not tuned.training
    assert not any(m.training for m in tuned.modules())


def test_ranges_of_inputs_are_those_of_the_float_model() -> None:
    model, batches = data()
    x = batches[0][0] * 0.1  # a scale of one would round this away
    new = MixedQuantize((), (("0", Int(8)), ("2", Int(8)), ("4", Int(8))))(model, [x])
    with torch.no_grad():
        inside = model[:4](x)
        assert float(new[4].scale) == pytest.approx(float(inside.abs().max()) / 127, rel=1e-3)
        assert new.report.measured["sqnr"] > 30
    assert "0.layer.weight" in new.state_dict()
    assert not any("forward" in name for name, _ in new.named_modules())


def test_a_plan_becomes_the_technique() -> None:
    plan = BitPlan((("0.weight", Int(4)), ("2.weight", None)), 1.0, 2.0, 0.0)
    technique = MixedQuantize.of(plan, activation=Int(8), embedding=({"e.weight": None}, Int(8)))
    assert technique.formats == (("0.weight", Int(4)), ("e.weight", Int(8)))
    assert technique.inputs == (("0", Int(8)),)


def test_what_is_wrong_is_named() -> None:
    model, batches = data()
    with pytest.raises(ConfigurationError, match="no parameter '9.weight'"):
        MixedQuantize((("9.weight", Int(4)),))(model)
    with pytest.raises(ConfigurationError, match="need data"):
        MixedQuantize((), (("0", Int(8)),))(model)
    with pytest.raises(ConfigurationError, match="needs a loss"):
        MixedQuantize((("0.weight", Int(4)),), epochs=1)(model, batches)
    with pytest.raises(ConfigurationError, match="pairs of a path"):
        MixedQuantize((("0.weight", 4),))  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="rate"):
        MixedQuantize(rate=0.0)
    model[0].weight.data[0, 0] = float("nan")
    with pytest.raises(ConfigurationError, match=r"0\.weight holds NaN"):
        MixedQuantize((("0.weight", Int(4)),))(model)
