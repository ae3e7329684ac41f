"""The test kit of the Model contract: an ``nn.Module`` with a config, deterministic, saved and loaded whole."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from hasten.measure.counting import call

__all__ = ["ModelKit"]


class ModelKit:
    """Inherit in a test module; override :meth:`model` and :meth:`example`."""

    tolerance: float = 1e-5
    """largest difference between the model and its reloaded self, relative to the output's largest value"""

    def model(self) -> nn.Module:
        """A small model in eval mode, the same weights each time."""
        raise NotImplementedError("override model()")

    def example(self) -> Any:
        """A tensor, a tuple of arguments or a dict of named ones."""
        raise NotImplementedError("override example()")

    def _result(self, model: nn.Module) -> torch.Tensor:
        with torch.inference_mode():
            result = call(model, self.example())
        return result if isinstance(result, torch.Tensor) else result[0]

    def test_config_is_frozen(self) -> None:
        config = getattr(self.model(), "config", None)
        assert dataclasses.is_dataclass(config), "a model has a frozen dataclass as config"
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(config, dataclasses.fields(config)[0].name, None)

    def test_is_deterministic(self) -> None:
        model = self.model()
        first, second = self._result(model), self._result(model)
        assert torch.isfinite(first).all()
        assert torch.equal(first, second)
        assert torch.equal(first, self._result(copy.deepcopy(model)))

    def test_saves_and_loads(self, tmp_path: Path) -> None:
        model: Any = self.model()
        if not hasattr(model, "save_pretrained"):
            pytest.skip("this model has no save_pretrained")
        model.save_pretrained(tmp_path)
        again = type(model).from_pretrained(tmp_path).eval()
        expected, got = self._result(model), self._result(again)
        assert (expected - got).abs().max() <= self.tolerance * expected.abs().max()
