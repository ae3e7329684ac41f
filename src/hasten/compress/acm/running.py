"""A converted model at run time: how many learners ran, how many may, and from how many tokens on gates pay.

A gate, a sort and a gather cost a call of few tokens more than learners left out save it. What the layer takes as a
whole and with its gate is timed for some counts of tokens; calls below the first that pays run a fixed number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hasten.clock import Clock
from hasten.compress.acm.module import AdaptiveComputation
from hasten.compress.lowrank.moments import evaluating
from hasten.errors import ConfigurationError
from hasten.measure import Protocol, compare
from hasten.measure.counting import call

__all__ = ["adaptive_layers", "executed_share", "load_map", "measure_gates", "set_budget", "set_fixed"]


def adaptive_layers(model: nn.Module) -> dict[str, AdaptiveComputation]:
    """Adaptive layers by name."""
    return {n: m for n, m in model.named_modules() if isinstance(m, AdaptiveComputation)}


def set_fixed(model: nn.Module, count: int | None) -> nn.Module:
    """``count`` learners for every token, in place; None asks the gates. Returns the model."""
    for name, layer in adaptive_layers(model).items():
        if count is not None and not layer.least <= count <= layer.learners:
            raise ConfigurationError(f"{name} has {layer.least} to {layer.learners} learners, not {count}")
        layer.fixed = count
    return model


def executed_share(model: nn.Module) -> float:
    """Multiply-adds of the adaptive layers in the last call over those with all learners; gates count on both sides."""
    spent = full = 0.0
    for layer in adaptive_layers(model).values():
        if layer.last is None:
            raise ConfigurationError(
                "no gated call was made yet; run the model in evaluation mode with set_fixed(model, None)"
            )
        spent += float(layer.last.double().mean()) * (layer.cost_of(1) - layer.gate_cost)
        spent += layer.gate_cost if layer.asked else 0.0
        full += layer.cost_of(layer.learners)
    return spent / full


def lean_choices(model: nn.Module, inputs: Sequence[Any], budget: float, *, tolerance: float = 0.002) -> nn.Module:
    """As :func:`set_budget`, for choices by lot as in training: the share that they cost in the mean.

    A gate's choice by lot is k with the probability that its logits give, so the mean is known without drawing.
    """
    if not 0 < budget <= 1:
        raise ConfigurationError(f"budget is {budget}; give a share of the multiply-adds in (0, 1]")
    set_fixed(model, None)
    layers = list(adaptive_layers(model).values())
    biases = [layer.gate_bias.detach().clone() for layer in layers]
    seen: dict[int, Tensor] = {}
    hooks = [m.register_forward_pre_hook(lambda m, given: seen.__setitem__(id(m), given[0])) for m in layers]
    full = sum(layer.cost_of(layer.learners) for layer in layers)

    def share(lean: float) -> float:
        total = 0.0
        for layer, bias in zip(layers, biases, strict=True):
            layer.gate_bias.copy_(bias + lean * torch.arange(len(bias), dtype=bias.dtype))
        for example in inputs:
            call(model, example)
            for layer in layers:
                odds = layer.scores(seen[id(layer)]).softmax(-1)
                steps = torch.arange(layer.least, layer.learners + 1, dtype=odds.dtype)
                total += layer.cost_of(float((odds * steps).sum(-1).mean()))
        return total / full / len(inputs)

    try:
        with evaluating(model), torch.no_grad():
            _lean(share, budget, tolerance)
    finally:
        for hook in hooks:
            hook.remove()
    return model


def _lean(share: Callable[[float], float], budget: float, tolerance: float) -> None:
    """Bisection for the number at which ``share``, which sets it, is the budget."""
    low, high = -30.0, 30.0
    for _ in range(24):
        middle = (low + high) / 2
        found = share(middle)
        if abs(found - budget) <= tolerance:
            break
        low, high = (middle, high) if found < budget else (low, middle)


def set_budget(model: nn.Module, inputs: Sequence[Any], budget: float, *, tolerance: float = 0.002) -> nn.Module:
    """Lean all gates towards fewer or more learners, in place, until this share runs on ``inputs``; returns the model.

    Logit k gains ``c k`` with one c for all layers, found by bisection: a knob at run time, no training. A share
    below what the gates and the least numbers of learners cost cannot be reached; the nearest is taken. Calls of fewer
    than ``min_tokens`` take the number nearest to each layer's mean.
    """
    if not 0 < budget <= 1:
        raise ConfigurationError(f"budget is {budget}; give a share of the multiply-adds in (0, 1]")
    set_fixed(model, None)
    layers = list(adaptive_layers(model).values())
    biases = [layer.gate_bias.detach().clone() for layer in layers]
    least = [layer.min_tokens for layer in layers]
    for layer in layers:
        layer.min_tokens = 0  # the gates are what is set

    def share(lean: float) -> float:
        with evaluating(model), torch.no_grad():
            for layer, bias in zip(layers, biases, strict=True):
                layer.gate_bias.copy_(bias + lean * torch.arange(len(bias), dtype=bias.dtype))
            total = 0.0
            for example in inputs:
                call(model, example)
                total += executed_share(model)
            return total / len(inputs)

    _lean(share, budget, tolerance)
    for layer, tokens in zip(layers, least, strict=True):
        layer.min_tokens = tokens
        if layer.last is not None:
            layer.typical = max(layer.least, min(layer.learners, round(float(layer.last.double().mean()))))
    return model


def load_map(model: nn.Module, example: Any) -> dict[str, Tensor]:
    """Learners of every token, layer by layer, for one example: (batch, tokens) int64."""
    with evaluating(model), torch.no_grad():
        model(example)
    return {n: m.last for n, m in adaptive_layers(model).items() if m.last is not None}


def measure_gates(
    model: nn.Module, tokens: Sequence[int] = (4, 16, 64, 256, 1024, 4096), *, clock: Clock | None = None
) -> dict[str, int]:
    """From how many tokens on each layer is faster with its gate than the layer that it replaced; sets ``min_tokens``.

    What it replaced took as long as all learners without a gate. Timed on random tokens, with choices as often as in
    the last gated call; equal layers are timed once. The first count counts whose next one is faster too; twice the
    largest where there is none. Fewer tokens take ``typical`` learners, a narrower layer without a gate.
    """
    found: dict[str, int] = {}
    known: dict[tuple[Any, ...], int] = {}
    for name, layer in adaptive_layers(model).items():
        key = (layer.width, layer.learners, layer.size, layer.activation, layer.least, layer.typical, layer.into.dtype)
        if key not in known:
            faster = (count for count in sorted(tokens) if _gate_is_faster(layer, count, clock))
            known[key] = _first_of_two(sorted(tokens), faster)
        found[name] = layer.min_tokens = known[key]
    return found


def _first_of_two(tokens: Sequence[int], faster: Iterator[int]) -> int:
    """The first count that is faster and whose follower is, as the last one need not have."""
    before: int | None = None
    for count in faster:
        place = tokens.index(count)
        if before is not None and tokens.index(before) == place - 1:
            return before
        if place == len(tokens) - 1:
            return count
        before = count
    return 2 * tokens[-1]


def _gate_is_faster(layer: AdaptiveComputation, count: int, clock: Clock | None) -> bool:
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(count, layer.width, generator=generator).to(layer.into.dtype)
    with torch.inference_mode():
        seen = layer.scores(z).argmax(-1) + layer.least if layer.last is None else layer.last.flatten()
        choice = seen[torch.randint(len(seen), (count,), generator=generator)]
        rules = Protocol(warmup=2, warmup_time=0.0, min_samples=9, max_samples=400, min_time=0.01)
        times = compare(
            {"all": partial(layer.prefix, z, layer.learners), "gated": partial(layer.gated, z, choice)},
            rules,
            clock=clock,
        ).samples
    return times["gated"].median <= times["all"].median
