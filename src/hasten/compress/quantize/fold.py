"""Batch normalisation folded into the layer before it: ``W' = γ W / σ``, ``b' = β + γ (b - μ) / σ``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import Tensor, nn

from hasten.compress.quantize.graph import pairs
from hasten.compress.quantize.steps import Step, Work
from hasten.compress.quantize.targets import put
from hasten.compress.values import named_value

__all__ = ["FoldBatchNorm", "fold_batch_norm"]

_LAYERS = (nn.Conv1d, nn.Conv2d, nn.Linear)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)


def fold_batch_norm(model: nn.Module) -> list[str]:
    """Fold what can be folded, in place; the paths of the normalisations, which are ``nn.Identity`` afterwards.

    The function in eval mode stays the same. The arithmetic of the fold is float64.

    >>> net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)).eval()
    >>> fold_batch_norm(net), type(net[1]).__name__
    (['1'], 'Identity')
    """
    folded = []
    for pair in pairs(model, _LAYERS, _NORMS, between=False):
        layer, norm = model.get_submodule(pair.first), model.get_submodule(pair.second)
        assert isinstance(norm, nn.modules.batchnorm._BatchNorm)
        mean, variance = norm.running_mean, norm.running_var
        if mean is None or variance is None:
            continue
        weight = cast(Tensor, layer.weight)
        factor = (variance.double() + norm.eps).rsqrt()
        if norm.weight is not None:
            factor = factor * norm.weight.detach().double()
        before = cast("Tensor | None", layer.bias)
        offset = torch.zeros_like(factor) if before is None else before.detach().double()
        bias = (offset - mean.double()) * factor
        if norm.bias is not None:
            bias = bias + norm.bias.detach().double()
        shape = (-1, *[1] * (weight.dim() - 1))
        with torch.no_grad():
            layer.weight = nn.Parameter((weight.double() * factor.view(shape)).to(weight.dtype))
            layer.bias = nn.Parameter(bias.to(weight.dtype))
        put(model, pair.second, nn.Identity())
        folded.append(pair.second)
    return folded


@named_value
@dataclass(frozen=True)
class FoldBatchNorm(Step):
    """Fold batch normalisations into the layers before them; done first by every technique of this package."""

    needs_calibration: ClassVar[bool] = False

    def rewrite(self, work: Work) -> None:
        """See :func:`fold_batch_norm`."""
        folded = fold_batch_norm(work.model)
        if folded:
            work.notes.append(f"{len(folded)} batch normalisations were folded into the layers before them")
