"""Which layer feeds which, where that can be told: pairs that only an activation, a pooling or a normalisation
separates.

The model is traced symbolically, layers as nodes. A model that cannot be traced (control flow that depends on data)
gives its ``nn.Sequential`` neighbours only. Every node between two layers has one reader, so that rescaling the
channels there is seen by nobody else.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional

__all__ = ["Pair", "pairs"]

_POSITIVE = (nn.ReLU, nn.LeakyReLU, nn.Identity, nn.Dropout, nn.Dropout2d)
_POOL = (nn.MaxPool1d, nn.MaxPool2d, nn.AvgPool1d, nn.AvgPool2d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d)
_FUNCTIONS = {
    torch.relu, functional.relu, functional.leaky_relu, functional.dropout, functional.max_pool2d,
    functional.avg_pool2d, functional.adaptive_avg_pool2d, torch.relu_,
}  # fmt: skip
_METHODS = {"relu", "relu_", "contiguous"}


@dataclass(frozen=True)
class Pair:
    """Two modules, the second the only reader of the first."""

    first: str
    """path"""
    second: str
    """path"""
    flattened: bool = False
    """whether channels were laid out with their places in between"""


def pairs(
    model: nn.Module, first: tuple[type[nn.Module], ...], second: tuple[type[nn.Module], ...], *, between: bool = True
) -> list[Pair]:
    """All pairs of these kinds; with ``between`` positively homogeneous functions of a channel may lie in between."""
    try:
        graph = _Tracer().trace(model)
    except Exception:  # whatever a model's own code raises when it meets a symbol
        return list(_neighbours(model, first, second, between))
    modules = dict(model.named_modules())
    found = []
    counts: dict[str, int] = {}
    for node in graph.nodes:
        if node.op == "call_module":
            counts[str(node.target)] = counts.get(str(node.target), 0) + 1
    for node in graph.nodes:
        if node.op != "call_module" or not isinstance(modules[str(node.target)], first):
            continue
        current, flattened = node, False
        while len(current.users) == 1:
            reader = next(iter(current.users))
            kind = modules.get(str(reader.target)) if reader.op == "call_module" else None
            if isinstance(kind, second):
                if counts[str(node.target)] == counts[str(reader.target)] == 1:
                    found.append(Pair(str(node.target), str(reader.target), flattened))
                break
            flat = isinstance(kind, nn.Flatten) or (reader.op == "call_function" and reader.target is torch.flatten)
            if not between or not (flat or _homogeneous(reader, kind)):
                break
            current, flattened = reader, flattened or flat
    return found


class _Tracer(fx.Tracer):
    """Modules with weights of their own are nodes, whoever wrote them."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """torch's own, and what has no children."""
        return super().is_leaf_module(m, module_qualified_name) or not list(m.children())


def _homogeneous(node: Any, module: nn.Module | None) -> bool:
    if module is not None:
        return isinstance(module, (*_POSITIVE, *_POOL))
    if node.op == "call_function":
        return node.target in _FUNCTIONS
    return node.op == "call_method" and node.target in _METHODS


def _neighbours(
    model: nn.Module, first: tuple[type[nn.Module], ...], second: tuple[type[nn.Module], ...], between: bool
) -> Iterator[Pair]:
    for path, module in model.named_modules():
        if not isinstance(module, nn.Sequential):
            continue
        names = [(f"{path}.{name}" if path else name, child) for name, child in module.named_children()]
        for index, (name, child) in enumerate(names):
            if not isinstance(child, first):
                continue
            flattened = False
            for other, reader in names[index + 1 :]:
                if isinstance(reader, second):
                    yield Pair(name, other, flattened)
                    break
                flattened = flattened or isinstance(reader, nn.Flatten)
                if not between or not isinstance(reader, (*_POSITIVE, *_POOL, nn.Flatten)):
                    break
