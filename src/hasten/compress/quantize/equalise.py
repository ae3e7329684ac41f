"""Ranges of channels made alike across two layers: ``s_i = sqrt(r1_i r2_i) / r2_i`` moves from one to the other.

``W1 row i / s_i``, ``W2 column i · s_i``: where only a positively homogeneous function (ReLU, pooling) lies between
them, the model computes the same. ``r`` are the largest magnitudes of the row and the column; rounds repeat until
they agree.

"Data-Free Quantization Through Weight Equalization and Bias Correction" https://arxiv.org/abs/1906.04721
Differs from the paper in: no absorption of high biases.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import Tensor, nn

from hasten.compress.quantize.graph import Pair, pairs
from hasten.compress.quantize.steps import Step, Work
from hasten.compress.values import named_value
from hasten.errors import ConfigurationError

__all__ = ["Equalise"]

_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d)


@named_value
@dataclass(frozen=True)
class Equalise(Step):
    """Cross-layer equalisation of all pairs that the graph of the model shows.

    >>> Equalise(rounds=5)
    Equalise(rounds=5, tolerance=0.001)
    """

    rounds: int = 20
    """at most, over all pairs"""
    tolerance: float = 1e-3
    """stop when no factor is further from 1"""

    needs_calibration: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.rounds < 1:
            raise ConfigurationError(f"{self.rounds} rounds equalise nothing; give at least one")

    def rewrite(self, work: Work) -> None:
        """Change the weights of all pairs."""
        found = [p for p in pairs(work.model, _LAYERS, _LAYERS) if _fits(work.model, p)]
        if not found:
            work.notes.append("no two layers stand alone around a ReLU or pooling: nothing was equalised")
            return
        for _ in range(self.rounds):
            furthest = max(_equalise(work.model, p) for p in found)
            if furthest <= self.tolerance:
                break
        work.notes.append(f"{len(found)} pairs of layers were equalised")


def _channels(layer: nn.Module) -> int:
    return int(cast(Tensor, layer.weight).shape[0])


def _columns(model: nn.Module, pair: Pair) -> tuple[nn.Module, nn.Module, int]:
    """Both layers and how many inputs of the second belong to a channel; 0 where they do not match."""
    first, second = model.get_submodule(pair.first), model.get_submodule(pair.second)
    count = _channels(first)
    if isinstance(second, nn.Linear):
        places, rest = divmod(second.in_features, count)
        image = isinstance(first, (nn.Conv1d, nn.Conv2d))
        return first, second, places if rest == 0 and (places == 1 or (image and pair.flattened)) else 0
    assert isinstance(second, (nn.Conv1d, nn.Conv2d))
    same = second.in_channels == count and second.groups in (1, count) and type(first) is type(second)
    return first, second, int(same)


def _fits(model: nn.Module, pair: Pair) -> bool:
    return _columns(model, pair)[2] > 0


def _equalise(model: nn.Module, pair: Pair) -> float:
    """One round for one pair, in place; the distance of the furthest factor from 1."""
    first, second, places = _columns(model, pair)
    w1, w2 = cast(Tensor, first.weight), cast(Tensor, second.weight)
    r1 = w1.detach().flatten(1).abs().amax(1).double()
    depthwise = isinstance(second, (nn.Conv1d, nn.Conv2d)) and second.groups > 1
    magnitude = w2.detach().abs()
    if depthwise:
        per = magnitude.shape[0] // _channels(first)
        r2 = magnitude.reshape(_channels(first), -1).amax(1).double()
    else:
        per = 1
        columns = magnitude.movedim(1, 0).flatten(1).amax(1)
        r2 = columns.reshape(-1, places).amax(1).double()
    usable = (r1 > 0) & (r2 > 0)
    factor = torch.where(usable, (r1 / r2.clamp(min=1e-30)).sqrt(), torch.ones_like(r1))
    with torch.no_grad():
        w1.div_(factor.to(w1.dtype).view(-1, *[1] * (w1.dim() - 1)))
        bias = cast("Tensor | None", first.bias)
        if bias is not None:
            bias.div_(factor.to(bias.dtype))
        if depthwise:
            w2.mul_(factor.repeat_interleave(per).to(w2.dtype).view(-1, *[1] * (w2.dim() - 1)))
        else:
            spread = factor.repeat_interleave(places).to(w2.dtype)
            w2.mul_(spread.view(1, -1, *[1] * (w2.dim() - 2)))
    return float((factor - 1).abs().max())
