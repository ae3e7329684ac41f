"""From a ReLU network to a spiking one.

``to_spiking`` copies the layers, puts integrate-and-fire neurons where activations were, and sets thresholds layer by
layer. After :class:`QuantisedClip` (a clipped activation of L levels with a learned ceiling; Bu et al., "Optimal
ANN-SNN Conversion for High-accuracy and Ultra-low-latency Spiking Neural Networks", ICLR 2022) the threshold is the
ceiling and the potential starts at half of it, so that the mean of L steps is the activation itself. After ReLU the
threshold is a high percentile of what the layer receives while the layers before it spike already.
Differs from the paper in: the ceiling is one number per layer and starts from the data's 99th percentile.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn

from hasten.errors import ConfigurationError, UnsupportedModelError
from hasten.spiking.layers import LIF
from hasten.spiking.network import SpikingNetwork, has_state
from hasten.spiking.surrogate import Surrogate

__all__ = ["QuantisedClip", "quantised", "to_spiking"]


class ConversionError(UnsupportedModelError, ValueError):
    """A layer that has no spiking counterpart; the message names it."""


class _Levels(torch.autograd.Function):
    """``ceiling / L * round(L clip(x / ceiling, 0, 1))`` with a straight-through gradient inside the range."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, ceiling: Tensor, levels: int) -> Tensor:
        share = x / ceiling
        rounded = (share * levels + 0.5).floor().clamp(0, levels) / levels
        ctx.save_for_backward(share, rounded)
        return rounded * ceiling

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        share, rounded = ctx.saved_tensors
        inside = (share > 0) & (share < 1)
        g = gradients[0]
        # d(ceiling * q(x / ceiling)) / d ceiling = q - x/ceiling inside, q outside, with dq/dshare = 1 inside
        gceiling = (g * (rounded - torch.where(inside, share, torch.zeros_like(share)))).sum()
        return g * inside, gceiling, None


class QuantisedClip(nn.Module):
    """A ReLU with a ceiling and ``levels`` steps, to be converted without loss.

    >>> QuantisedClip(levels=4, ceiling=1.0)(torch.tensor([-1.0, 0.3, 0.4, 2.0]))
    tensor([0.0000, 0.2500, 0.5000, 1.0000], grad_fn=<_LevelsBackward>)
    """

    def __init__(self, levels: int = 4, ceiling: float = 2.0) -> None:
        super().__init__()
        self.levels = levels
        self.ceiling = nn.Parameter(torch.tensor(float(ceiling)))

    def constrain(self) -> None:
        """Keep the ceiling positive."""
        self.ceiling.data.clamp_(min=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        """Any shape."""
        result: Tensor = _Levels.apply(x, self.ceiling.to(x.dtype), self.levels)  # type: ignore[no-untyped-call]
        return result


def quantised(model: nn.Module, calibration: Tensor, levels: int = 4, percentile: float = 99.0) -> nn.Sequential:
    """A copy of a ReLU network with :class:`QuantisedClip` for each ReLU, its ceiling set from ``calibration``
    inputs."""
    layers = []
    x = calibration
    with torch.no_grad():
        for name, layer in _walk(model):
            new: nn.Module = copy.deepcopy(layer).eval()
            if isinstance(layer, nn.ReLU):
                new = QuantisedClip(levels, max(1e-3, _percentile(x.clamp_min(0), percentile)))
            elif not _known(layer):
                raise ConversionError(f"layer {name!r} ({type(layer).__name__}) has no spiking counterpart")
            x = new(x)
            layers.append(new)
    return nn.Sequential(*layers).train(model.training)


def _walk(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Layers of nested Sequentials in order, or of a module whose only child is one."""
    children = list(model.named_children())
    wraps = len(children) == 1 and isinstance(children[0][1], nn.Sequential)
    if not isinstance(model, nn.Sequential) and not wraps:
        raise ConversionError(
            f"{prefix or 'the model'} is a {type(model).__name__}; only nn.Sequential of layers can be converted"
        )
    for name, child in children:
        path = f"{prefix}{name}"
        if isinstance(child, nn.Sequential):
            yield from _walk(child, f"{path}.")
        else:
            yield path, child


_WEIGHTED = (nn.Linear, nn.Conv1d, nn.Conv2d)
_SHAPING = (nn.Flatten, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.Dropout, nn.Dropout2d, nn.Identity)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)
_ACTIVATIONS = (nn.ReLU, QuantisedClip)


def _known(layer: nn.Module) -> bool:
    return isinstance(layer, (*_WEIGHTED, *_SHAPING, *_NORMS, *_ACTIVATIONS))


def _fold(layer: Any, norm: Any) -> Any:
    """The weighted layer that equals ``layer`` followed by the batch norm in eval mode."""
    new = copy.deepcopy(layer)
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    new.weight = nn.Parameter((layer.weight * scale.reshape(-1, *[1] * (layer.weight.dim() - 1))).detach())
    bias = layer.bias if layer.bias is not None else torch.zeros_like(norm.running_mean)
    new.bias = nn.Parameter(((bias - norm.running_mean) * scale + norm.bias).detach())
    return new


def _percentile(x: Tensor, percentile: float) -> float:
    """Of all elements, by the k-th value (no limit on the size)."""
    flat = x.detach().flatten().float()
    rank = min(flat.numel(), max(1, round(flat.numel() * percentile / 100)))
    return float(flat.kthvalue(rank).values)


def to_spiking(
    model: nn.Module,
    calibration: Tensor,
    timesteps: int = 5,
    percentile: float = 99.7,
    *,
    bias: Literal["refuse", "keep"] = "refuse",
    decay: float = 1.0,
    surrogate: Surrogate | str = "triangle",
) -> SpikingNetwork:
    """The spiking network of a ReLU or :class:`QuantisedClip` network; ``model`` is not changed.

    calibration (batch, …) sets the thresholds after ReLU (card of the iterative reduction: the percentile of the
    current over neurons, samples and steps, with earlier layers spiking). Decays and thresholds of the result are
    trainable. A bias, also one that comes from batch norm, is refused unless ``bias="keep"``: then it is a current at
    every step. Raises ``ValueError`` (:class:`~hasten.errors.UnsupportedModelError`) that names the layer for anything
    else.
    """
    if not 0 < percentile <= 100:
        raise ConfigurationError(f"percentile {percentile} is no share of the currents; give 0 to 100, such as 99.7")
    if not len(calibration):
        raise ConfigurationError("no calibration samples were given; thresholds are set from the currents of some")
    layers = _plain_layers(model, bias)
    result: list[nn.Module] = []
    x = calibration.unsqueeze(0)
    amplitude, waiting = 1.0, True
    with torch.no_grad():
        for _, layer in layers:
            new: nn.Module
            if isinstance(layer, _ACTIVATIONS):
                if waiting:
                    x, waiting = x.expand(timesteps, *x.shape[1:]), False
                if isinstance(layer, QuantisedClip):
                    theta, start = float(layer.ceiling), 0.5
                else:
                    theta, start = max(1e-6, _percentile(x, percentile)), 0.0
                new = LIF(decay, theta, "subtract", surrogate, learn=("decay", "threshold"), start=start)
                amplitude = theta if _needs_amplitude(layers) else 1.0
                x = new(x)
            else:
                new = copy.deepcopy(layer).eval()
                if isinstance(layer, _WEIGHTED):
                    new.weight.data.mul_(amplitude)  # type: ignore[union-attr, operator]
                    amplitude = 1.0
                x = new(x.flatten(0, 1)).unflatten(0, x.shape[:2])
            result.append(new)
    if not any(has_state(layer) for layer in result):
        raise ConversionError("the model has no ReLU, so nothing of it would spike; convert a ReLU network")
    return SpikingNetwork(result, timesteps)


def _plain_layers(model: nn.Module, bias: str) -> list[tuple[str, nn.Module]]:
    """The layers with batch norm folded in; refuses what has no spiking counterpart."""
    layers: list[tuple[str, nn.Module]] = []
    for name, layer in _walk(model):
        if not _known(layer):
            raise ConversionError(
                f"layer {name!r} ({type(layer).__name__}) has no spiking counterpart; "
                "use convolution, linear, ReLU, pooling"
            )
        if isinstance(layer, _NORMS):
            if not layers or not isinstance(layers[-1][1], _WEIGHTED):
                raise ConversionError(f"batch norm {name!r} does not follow a convolution or linear layer")
            layers[-1] = (layers[-1][0], _fold(layers[-1][1], layer))
        else:
            layers.append((name, layer))
    for name, layer in layers:
        if isinstance(layer, _WEIGHTED) and layer.bias is not None and bias == "refuse":
            raise ConversionError(
                f"layer {name!r} has a bias after conversion; train without bias, or give bias='keep' "
                "for a constant current"
            )
    return layers


def _needs_amplitude(layers: list[tuple[str, nn.Module]]) -> bool:
    """Whether a spike must weigh as much as the threshold: with biases or quantised activations the scale matters."""
    return any(isinstance(m, QuantisedClip) or (isinstance(m, _WEIGHTED) and m.bias is not None) for _, m in layers)
