"""Ordered components are cut where the loss minds least, until their layers take a share of the multiply-adds.

Greedy: of every layer a step of its last components is tried, and the one goes whose absence costs the least loss per
multiply-add that it saves. Used while Maestro trains towards one size, and for the family of sizes after it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hasten.compress.lowrank.moments import evaluating
from hasten.compress.lowrank.ordered import OrderedLayer, ordered_layers

__all__ = ["batch_loss", "cut_to", "recalibrate", "share_of", "uses_of"]


def share_of(layers: dict[str, OrderedLayer], uses: dict[str, int]) -> float:
    """Multiply-adds of the layers at their present ranks over those of the dense ones."""
    full = sum(uses[n] * layer.dense_size for n, layer in layers.items())
    return sum(uses[n] * layer.size() for n, layer in layers.items()) / full


def cut_to(
    layers: dict[str, OrderedLayer],
    share: float,
    uses: dict[str, int],
    loss: Callable[[], float],
    *,
    step: float = 0.1,
    tell: Callable[[float], None] | None = None,
) -> float:
    """Lower ranks in place until the layers take at most ``share``; returns what they take. Rank 1 is the least.

    ``loss``: of the model that holds the layers, as they are. ``step``: share of a layer's components tried at once.
    """
    while share_of(layers, uses) > share:
        best: tuple[float, str, int] | None = None
        now = loss()
        for name, layer in layers.items():
            if layer.rank <= 1:
                continue
            held = layer.rank
            limit = -(-layer.dense_size // layer.macs_of_rank) - 1  # the first rank that saves anything
            smaller = max(1, min(held - max(1, round(step * held)), limit))
            saved = uses[name] * (layer.size(held) - layer.size(smaller))
            if saved <= 0:
                continue
            layer.rank = smaller
            price = (loss() - now) / saved
            layer.rank = held
            if best is None or price < best[0]:
                best = (price, name, smaller)
        if best is None:
            break
        layers[best[1]].rank = best[2]
        if tell is not None:
            tell(share_of(layers, uses))
    return share_of(layers, uses)


def batch_loss(model: nn.Module, judge: Callable[[Any, Any], Tensor], batches: Sequence[Any]) -> float:
    """Mean loss in evaluation mode; statistics of each batch itself stand for recalibrated ones."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    with evaluating(model), torch.no_grad():
        kept = [(m, m.running_mean, m.running_var) for m in norms]
        for m in norms:
            m.running_mean = m.running_var = None
        try:
            return float(sum(float(judge(model(x), y)) for x, y in batches) / len(batches))
        finally:
            for m, mean, var in kept:
                m.running_mean, m.running_var = mean, var


def recalibrate(model: nn.Module, inputs: Sequence[Any]) -> nn.Module:
    """Running statistics of batch normalisation anew, in place, as plain averages over these inputs."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    if not norms:
        return model
    modes = [(m, m.training) for m in model.modules()]
    momenta = [m.momentum for m in norms]
    model.eval()
    for m in norms:
        m.reset_running_stats()
        m.momentum = None
        m.train()
    try:
        with torch.no_grad():
            for x in inputs:
                model(x)
    finally:
        for m, momentum in zip(norms, momenta, strict=True):
            m.momentum = momentum
        for module, training in modes:
            module.training = training
    return model


def uses_of(model: nn.Module, x: Any) -> dict[str, int]:
    """How often each weight of a layer is used for one example: 1 in a linear layer over vectors, pixels in a
    convolution."""
    counts: dict[str, int] = {}
    hooks = []
    for name, layer in ordered_layers(model).items():

        def hear(m: Any, given: Any, made: Tensor, name: str = name) -> None:
            counts[name] = max(1, made.numel() // int(m.left.shape[0]) // len(given[0]))

        hooks.append(layer.register_forward_hook(hear))
    try:
        with evaluating(model), torch.no_grad():
            model(x)
    finally:
        for hook in hooks:
            hook.remove()
    return counts
