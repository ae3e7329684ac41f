"""Which parts of a model become adaptive: modules, or a span of neighbours such as ``up>down``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from hasten.compress.acm.module import AdaptiveComputation
from hasten.compress.given import finite_weight
from hasten.compress.lowrank.moments import evaluating, observe
from hasten.compress.replace import replace_module
from hasten.errors import ConfigurationError

__all__ = ["Target", "find_targets", "replacement"]

_NAMES = {nn.GELU: "gelu", nn.ReLU: "relu", nn.SiLU: "silu"}


@dataclass(frozen=True)
class Target:
    """A part of a model that maps tokens to tokens of the same width."""

    names: tuple[str, ...]
    """paths of the module, or of the modules of a span in their order"""
    width: int
    """of a token"""
    macs: int
    """multiply-adds of the part for one token"""
    linear: bool
    """a single matrix, such as an attention projection: no activation, and always at least one learner"""

    @property
    def name(self) -> str:
        """``layers.0.mlp`` or ``layers.0.up``: where the new layer goes."""
        return self.names[0]

    @property
    def label(self) -> str:
        """For reports."""
        return self.names[0] if len(self.names) == 1 else f"{self.names[0]}>{self.names[-1].rpartition('.')[2]}"


def _span(model: nn.Module, first: str, last: str) -> tuple[str, ...]:
    parent = first.rpartition(".")[0]
    siblings = [n for n, _ in model.get_submodule(parent).named_children()]
    start = siblings.index(first.rpartition(".")[2])
    if last not in siblings[start:]:
        raise ConfigurationError(
            f"{parent or 'the model'} has no {last} behind {first}; its parts are {', '.join(siblings)}"
        )
    return tuple(f"{parent}.{n}" if parent else n for n in siblings[start : siblings.index(last) + 1])


def find_targets(model: nn.Module, patterns: Sequence[str], calibration: Sequence[Any]) -> list[Target]:
    """Parts whose names match. Raises :class:`ConfigurationError` with the shapes where a part does not keep them."""
    found: list[tuple[str, ...]] = []
    for name, _ in model.named_modules():
        for pattern in patterns:
            first, _, last = pattern.partition(">")
            if name and fnmatchcase(name, first):
                names = _span(model, name, last) if last else (name,)
                if names not in found:
                    found.append(names)
    if not found:
        some = ", ".join([n for n, _ in model.named_modules() if n][:12])
        raise ConfigurationError(f"no module is called {' or '.join(patterns)}; the model has {some}")
    before: dict[tuple[str, ...], Tensor] = {}
    after: dict[tuple[str, ...], Tensor] = {}
    inputs = {n[0]: (lambda given, named, n=n: before.__setitem__(n, given[0].clone())) for n in found}
    outputs = {n[-1]: (lambda given, made, n=n: after.__setitem__(n, made.clone())) for n in found}
    observe(model, calibration[:1], inputs, outputs)
    targets = []
    for names in found:
        if names not in before:
            raise ConfigurationError(f"{names[0]} did not run on the calibration; name parts that the model uses")
        shapes = [tuple(x.shape) for x in (before[names], after[names])]
        if shapes[0] != shapes[1]:
            raise ConfigurationError(
                f"{names[0]} maps {shapes[0]} to {shapes[1]}; only parts that keep the width of tokens can be adaptive"
            )
        matrices = [m for n in names for m in model.get_submodule(n).modules() if isinstance(m, nn.Linear)]
        for matrix in matrices:
            finite_weight(names[0], matrix.weight)
        macs = sum(m.weight.numel() for m in matrices)
        if not macs:
            raise ConfigurationError(f"{names[0]} holds no linear layer; nothing there is worth choosing")
        if len(names) > 1:
            _nothing_between(model, names, before[names], after[names])
        single = len(names) == 1 and isinstance(model.get_submodule(names[0]), nn.Linear)
        targets.append(Target(names, shapes[0][-1], macs, single))
    return targets


def _nothing_between(model: nn.Module, names: tuple[str, ...], before: Tensor, after: Tensor) -> None:
    """Raises :class:`ConfigurationError` where the parent's own code does more between the parts than they do."""
    parts = nn.Sequential(*(model.get_submodule(n) for n in names))
    with evaluating(parts), torch.inference_mode():
        made = parts(before)
    if made.shape != after.shape or not torch.allclose(made, after, rtol=1e-3, atol=1e-4):
        raise ConfigurationError(
            f"{names[0]} to {names[-1]} is not all that happens there (an activation called as a function, perhaps); "
            "make it a module between them, or name one module that holds all of it"
        )


def replacement(
    model: nn.Module, target: Target, learners: int, total_cost: float, by_neurons: bool
) -> AdaptiveComputation:
    """A new layer of ``total_cost`` times the part's multiply-adds.

    ``by_neurons``: where the part is two matrices with a known activation in between, learners begin as its own hidden
    units, those with the largest output first. Else they begin at random.
    """
    size = max(1, round(total_cost * target.macs / (2 * target.width * learners)))
    parts: list[Any] = [m for n in target.names for m in model.get_submodule(n).modules()]
    matrices = [m for m in parts if isinstance(m, nn.Linear)]
    kinds = [_NAMES[type(m)] for m in parts if type(m) in _NAMES]
    activation = "identity" if target.linear else kinds[0] if kinds else "gelu"
    layer = AdaptiveComputation(
        width=target.width, learners=learners, size=size, activation=activation, least=int(target.linear)
    )
    if by_neurons and not target.linear and len(matrices) == 2 and kinds:
        first, second = matrices
        units = first.out_features
        with torch.no_grad():
            weight = first.weight.norm(dim=1) * second.weight.norm(dim=0)
            order = weight.argsort(descending=True)[: learners * size]
            count = min(len(order), units)
            layer.into[:count] = first.weight[order]
            layer.bias[:count] = 0 if first.bias is None else first.bias[order]
            layer.out[:count] = second.weight[:, order].T
    return layer


def put(model: nn.Module, target: Target, layer: nn.Module) -> None:
    """The new layer in the part's place; what else the span held passes its input on."""
    replace_module(model, target.names[0], layer)
    for name in target.names[1:]:
        replace_module(model, name, nn.Identity())


def tokens_of(x: Tensor) -> Tensor:
    """(…, width) -> (tokens, width)."""
    return x.reshape(-1, x.shape[-1])
