"""Which layers of a model are put into fewer bits, and what is refused or left, by name and with the reason."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, cast

from torch import Tensor, nn

from hasten.compress.given import finite_weight
from hasten.compress.replace import spelled_out
from hasten.compress.technique import LayerReport
from hasten.errors import ConfigurationError

__all__ = ["KINDS", "Targets", "put", "targets"]

KINDS: dict[str, type[nn.Module]] = {"Linear": nn.Linear, "Conv1d": nn.Conv1d, "Conv2d": nn.Conv2d}
_SCALARS = (nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._BatchNorm, nn.RMSNorm)


@dataclass(frozen=True)
class Targets:
    """Layers to quantise, in the order of the model, and the report of the others."""

    layers: tuple[str, ...]
    """paths"""
    kept: tuple[LayerReport, ...]
    """what stays, and why"""


def targets(
    model: nn.Module, patterns: Sequence[str], skip: Sequence[str], kinds: Sequence[str] = tuple(KINDS)
) -> Targets:
    """The linear and convolution layers whose paths match ``patterns`` and not ``skip``.

    Raises :class:`~hasten.errors.ConfigurationError` for a pattern that matches no layer, for NaN or infinity in a
    weight, and for a model without a layer to quantise.
    """
    owners = _shared(model)
    considered: list[str] = []
    layers: list[str] = []
    kept: list[LayerReport] = []
    for path, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if not isinstance(weight, Tensor) or weight.dim() < 2 or isinstance(module, _SCALARS):
            continue
        size = weight.numel() * weight.element_size()
        kind = next((name for name, cls in KINDS.items() if type(module) is cls), None)
        if kind is None:
            reason = f"a {type(module).__name__} is not quantised here; only {', '.join(KINDS)} are"
            kept.append(LayerReport(path, "kept", reason, size, size))
            continue
        considered.append(path)
        if not _matches(path, patterns) or _matches(path, skip) or kind not in kinds:
            kept.append(LayerReport(path, "kept", "left out by layers=, skip= or kinds=", size, size))
            continue
        finite_weight(path, weight)
        if owners[id(weight)] > 1:
            kept.append(LayerReport(path, "kept", "its weight is shared with another layer", size, size))
        elif bool((weight == weight.flatten()[0]).all()):
            only = float(weight.detach().flatten()[0])
            kept.append(LayerReport(path, "kept", f"all its weights are {only:g}: zero variance", size, size))
        else:
            layers.append(path)
    _check_patterns(model, patterns, skip, considered)
    if not layers:
        why = "; ".join(f"{r.layer or 'the model'}: {r.reason}" for r in kept[:3]) or "it has no weights of two axes"
        raise ConfigurationError(f"nothing to quantise in {type(model).__name__} ({why}); name other layers")
    return Targets(tuple(layers), tuple(kept))


def _matches(path: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(path, p) for p in patterns)


def _check_patterns(model: nn.Module, patterns: Sequence[str], skip: Sequence[str], considered: list[str]) -> None:
    everything = [name for name, _ in model.named_modules()]
    for pattern in (*patterns, *skip):
        if not any(fnmatchcase(path, pattern) for path in everything):
            known = ", ".join(considered[:5]) or "none"
            raise ConfigurationError(f"no layer is called {pattern!r}; layers that can be quantised: {known}, …")


def _shared(model: nn.Module) -> dict[int, int]:
    owners: dict[int, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    return owners


def put(model: nn.Module, path: str, layer: nn.Module) -> nn.Module:
    """Replace the layer at ``path`` wherever the model holds it; the model itself where the path is empty."""
    if not path:
        return layer
    old = model.get_submodule(path)
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):  # named_children() tells a shared child once
            if child is old:
                setattr(parent, name, layer)
    parent_path, _, leaf = path.rpartition(".")
    setattr(model.get_submodule(parent_path), leaf, layer)
    return spelled_out(model, path)


def matrix(layer: nn.Module) -> Tensor:
    """The weight as (out, inputs of an output), float32."""
    return cast(Any, layer.weight).detach().float().flatten(1)  # type: ignore[no-any-return]
