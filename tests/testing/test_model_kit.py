from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from hasten.testing.model_kit import ModelKit


@dataclasses.dataclass(frozen=True)
class _Config:
    width: int = 4


class _Model(nn.Linear):
    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(4, 4)
        self.config = _Config()


class TestModel(ModelKit):
    def model(self) -> nn.Module:
        return _Model().eval()

    def example(self) -> torch.Tensor:
        return torch.ones(1, 4)


def test_the_kit_catches_randomness() -> None:
    class Kit(TestModel):
        def model(self) -> nn.Module:
            model = _Model()
            model.forward = lambda x: x + torch.rand(4)  # type: ignore[method-assign]
            return model

    with pytest.raises(AssertionError):
        Kit().test_is_deterministic()
