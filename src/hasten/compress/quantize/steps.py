"""What the steps of post-training quantisation have in common, and the state that they work on.

A step may rewrite the float model so that it computes the same with weights that are easier to round (``rewrite``),
choose the rounded weight of a layer (``round``), or correct a layer afterwards (``correct``). Layers are taken in the
order in which they run, so that later ones see the inputs that earlier, rounded ones produce.
"""

from __future__ import annotations

from abc import ABC
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from hasten.compress.quantize.base import Format
from hasten.compress.quantize.passes import Calibration, Survey, patches
from hasten.errors import ConfigurationError

__all__ = ["Layer", "Step", "Work"]


@dataclass
class Work:
    """The model under work; steps change it in place (it is a copy)."""

    model: nn.Module
    """float model, in which finished layers are quantised ones"""
    layers: list[str]
    """paths to quantise"""
    weight: Format | None
    """number format of weights"""
    activation: Format | None
    """number format of inputs"""
    calibration: Calibration | None
    """example inputs, where any were given"""
    seed: int = 0
    """of every random draw"""
    notes: list[str] = field(default_factory=list)
    """sentences for the report"""
    told: Callable[[str, float], None] = lambda stage, share: None
    """progress"""
    floats: dict[str, Tensor] = field(default_factory=dict)
    """weights before rounding (out, inputs of an output), kept where a step of the recipe needs them at the end"""

    def needs_data(self, step: str) -> Calibration:
        """The calibration; raises where there is none."""
        if self.calibration is None:
            raise ConfigurationError(f"{step} looks at the inputs of layers; give calibration inputs")
        return self.calibration


@dataclass
class Layer:
    """One layer under work."""

    path: str
    """in the model"""
    module: nn.Module
    """the float layer, its weight and bias as given"""
    matrix: Tensor
    """its weight as (out, inputs of an output), float32"""
    format: Format
    """of the weight"""
    scale: Tensor
    """compact"""
    zero: Tensor | None
    """compact"""
    values: Tensor
    """rounded weight so far, (out, inputs of an output)"""
    work: Work
    """the whole"""
    survey: Survey
    """what the float model's pass told"""
    group: list[str] = field(default_factory=list)
    """layers that read the same inputs, this one among them"""
    hessians: dict[str, Tensor] = field(default_factory=dict)
    """of the group's inputs, shared by its members"""

    def inputs(self) -> Iterator[Tensor]:
        """Inputs as they are now, with earlier layers rounded."""
        calibration = self.work.needs_data("this step")
        return calibration.inputs_of(self.work.model, self.path, self.survey.calls.get(self.path, 1))

    def hessian(self) -> Tensor:
        """``2 Σ x xᵀ`` (in, in), or (groups, in, in) of a grouped convolution; layers of a group share it."""
        key = f"{self.module.__class__.__name__}{getattr(self.module, 'kernel_size', '')}"
        if key not in self.hessians:
            total: Tensor | None = None
            for x in self.inputs():
                rows = patches(self.module, x)
                product = rows.transpose(-1, -2) @ rows
                total = product if total is None else total.add_(product)
            if total is None:
                raise ConfigurationError(f"layer {self.path!r} was not reached by the calibration; add it to skip=")
            self.hessians[key] = total.mul_(2)
        return self.hessians[key]


class Step(ABC):  # noqa: B024  (a step overrides what it does)
    """One part of a post-training recipe; subclasses are frozen dataclasses."""

    needs_calibration: ClassVar[bool] = True
    """whether it looks at the inputs of layers"""
    over_examples: ClassVar[str] = ""
    """what it takes the largest or the mean of over the examples, for the sentence on too few of them"""

    @property
    def solves(self) -> bool:
        """Whether it chooses roundings by a layer's second moment, which fewer rows than inputs leave singular."""
        return type(self).round is not Step.round

    def rewrite(self, work: Work) -> None:  # noqa: B027
        """Change the float model without changing its function."""

    def round(self, layer: Layer) -> Tensor | None:
        """Values on the grid for the layer's scale, or None to leave them."""
        return None

    def correct(self, layer: Layer, rounded: nn.Module) -> None:  # noqa: B027
        """Adjust the rounded layer in place."""

    def finish(self, work: Work, original: nn.Module) -> None:  # noqa: B027
        """Work on the whole rounded model, ``original`` being the float one as it was given."""


def relative_error(layer: Layer, values: Tensor) -> float:
    """Squared error of the layer's output over its square, from the Hessian; exact for the calibration inputs."""
    hessian = layer.hessian()
    full = hessian if hessian.dim() == 3 else hessian[None]
    groups = len(full)
    error = (values - layer.matrix).reshape(groups, -1, layer.matrix.shape[1])
    weight = layer.matrix.reshape(groups, -1, layer.matrix.shape[1])
    lost = torch.einsum("goi,gij,goj->", error, full, error)
    whole = torch.einsum("goi,gij,goj->", weight, full, weight)
    return float(lost / whole.clamp(min=1e-30))
