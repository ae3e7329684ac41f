"""The test kit of the Technique contract: inherit, name a technique, and every rule is tested.

>>> from hasten.compress import WeightPrecision
>>> class TestInt8(TechniqueKit):
...     technique = WeightPrecision("int8", only_faster=False)
...     keeps = {"sqnr": 25.0}
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

from hasten.compress import Recipe, TechniqueReport, exportable, sqnr
from hasten.compress.technique import from_dict, to_dict

__all__ = ["TechniqueKit"]


class TechniqueKit:
    """Inherit in a test module; set ``technique`` and, where it applies, ``keeps`` and ``touches``."""

    technique: ClassVar[Any]
    """the technique under test"""
    keeps: ClassVar[Mapping[str, float]] = {}
    """least quality of the result on the kit's model: ``sqnr`` in dB"""
    touches: ClassVar[bool] = True
    """whether it is expected to change a layer of the kit's model"""

    def model(self) -> nn.Module:
        """A small network with a residual, a shared width and a head of an odd size; override for another domain."""
        torch.manual_seed(0)
        return _Small().eval()

    def example(self) -> Any:
        """Input of the model, (batch, time, channels)."""
        return torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(1))

    @pytest.fixture
    def parts(self) -> tuple[nn.Module, Any, nn.Module]:
        """The model, an example, and the new model."""
        model, example = self.model(), self.example()
        return model, example, self.technique(model, [example])

    def test_is_frozen(self) -> None:
        knobs = dataclasses.fields(self.technique)
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(self.technique, knobs[0].name if knobs else "anything", None)
        assert hash(self.technique) == hash(copy.deepcopy(self.technique))

    def test_input_is_untouched(self) -> None:
        model, example = self.model(), self.example()
        names = [n for n, _ in model.named_modules()]
        kinds = [type(m) for m in model.modules()]
        state = {k: v.clone() for k, v in model.state_dict().items()}
        model.train()
        self.technique(model, [example])
        assert [n for n, _ in model.named_modules()] == names
        assert [type(m) for m in model.modules()] == kinds
        assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
        assert all(m.training for m in model.modules())
        assert not hasattr(model, "report")

    def test_report_is_whole(self, parts: tuple[nn.Module, Any, nn.Module]) -> None:
        _, _, new = parts
        report = new.report
        assert isinstance(report, TechniqueReport)
        assert report.technique == self.technique.name
        assert all(x.reason for x in report.layers if not x.touched), "a layer was kept without a reason"
        assert bool(report.touched) == self.touches
        assert report.notes, "a report holds at least one plain sentence"
        assert len({x.layer for x in report.layers}) == len(report.layers)

    def test_keeps_its_quality(self, parts: tuple[nn.Module, Any, nn.Module]) -> None:
        model, example, new = parts
        with torch.inference_mode():
            quality = sqnr(model(example), new(example))
        for name, least in self.keeps.items():
            assert name == "sqnr", f"the kit measures sqnr, not {name}"
            assert quality >= least
            assert new.report.measured["sqnr"] == pytest.approx(quality, abs=0.1)  # type: ignore[union-attr,index]

    def test_same_input_same_result(self, parts: tuple[nn.Module, Any, nn.Module]) -> None:
        model, example, new = parts
        again, _ = Recipe((self.technique,), _plan(new)).apply(model)
        with torch.inference_mode():
            assert torch.equal(new(example), again(example))

    def test_recipe_round_trip(self) -> None:
        assert from_dict(to_dict(self.technique)) == self.technique
        recipe = Recipe((self.technique,))
        assert Recipe.from_yaml(recipe.to_yaml()) == recipe

    def test_exports(self, parts: tuple[nn.Module, Any, nn.Module]) -> None:
        _, example, new = parts
        plain = exportable(new)
        program = torch.export.export(plain, (example,))
        with torch.inference_mode():
            assert torch.equal(program.module()(example), plain(example))
            assert sqnr(plain(example), new(example)) > 25

    def test_result_copies(self, parts: tuple[nn.Module, Any, nn.Module]) -> None:
        _, example, new = parts
        with torch.inference_mode():
            assert torch.equal(copy.deepcopy(new)(example), new(example))


def _plan(model: Any) -> Any:
    from hasten.compress import Plan

    return Plan.of([model.report])


class _Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(64, 128)
        self.second = nn.Linear(128, 64, bias=False)
        self.norm = nn.LayerNorm(64)
        self.head = nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = x + self.second(torch.relu(self.first(x)))
        logits: torch.Tensor = self.head(self.norm(hidden))
        return logits
