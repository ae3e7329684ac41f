"""What each layer of a tuned model costs alone: its new self in the place of the old one, everything else unchanged.

Only where the recipe changed layers one by one. A technique that moves factors between layers (smoothing,
decompositions) leaves parts that mean nothing on their own; then there are no figures. Of a network that runs whole in
another form, each layer takes its rounded weight in the model as it was.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import nn

from hasten.compress.replace import spelled_out

__all__ = ["replaced", "rounded", "sensitivities"]

_MOST = 200
"""Layers, at most; each costs one evaluation."""


def replaced(model: nn.Module, new: nn.Module) -> list[str]:
    """Paths of the outermost modules of ``new`` whose class is another one, where all else is as it was.

    >>> old = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
    >>> replaced(old, nn.Sequential(nn.Identity(), old[1], old[2]))
    ['0']
    """
    before = dict(model.named_modules())
    found: list[str] = []
    for path, module in new.named_modules():
        if any(path.startswith(f"{p}.") for p in found):
            continue
        if path not in before or (not path and type(module) is not type(model)):
            return []
        if type(module) is not type(before[path]):
            found.append(path)
    inside = tuple(f"{p}." for p in found)
    mine = {n: t for n, t in model.state_dict().items() if not n.startswith(inside)}
    theirs = {n: t for n, t in new.state_dict().items() if not n.startswith(inside)}
    if mine.keys() != theirs.keys() or not all(torch.equal(t, theirs[n]) for n, t in mine.items()):
        return []
    return found


def rounded(model: nn.Module, new: nn.Module) -> dict[str, torch.Tensor]:
    """Layer -> its weight in ``new``, a network in another form that says what it computes (``plain()``), for layers
    with another weight; none where more than weights changed."""
    tell = getattr(new, "plain", None)
    if type(new) is type(model) or not callable(tell):
        return {}
    before, after = model.state_dict(), tell().state_dict()
    if before.keys() != after.keys() or any(t.shape != after[n].shape for n, t in before.items()):
        return {}
    names = [n for n, t in before.items() if not torch.equal(t, after[n])]
    return {n.removesuffix(".weight"): after[n] for n in names} if all(n.endswith(".weight") for n in names) else {}


def sensitivities(model: nn.Module, new: nn.Module | None, kept: Callable[[nn.Module], float]) -> dict[str, float]:
    """Layer -> share of the quality that it loses alone; ``kept`` is the share that a model keeps. ``model`` is copied.

    >>> old = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
    >>> new = nn.Sequential(nn.Identity(), old[1], old[2])
    >>> sensitivities(old, new, lambda m: 0.75 if isinstance(m[0], nn.Identity) else 1.0)
    {'0': 0.25}
    """
    if new is None:
        return {}
    paths, weights = replaced(model, new), rounded(model, new)
    if not paths and 0 < len(weights) <= _MOST:
        return _of_weights(model, weights, kept)
    if not 0 < len(paths) <= _MOST or "" in paths:
        return {}
    work, found = copy.deepcopy(model), {}
    for path in paths:
        parent, _, leaf = path.rpartition(".")
        place, old = work.get_submodule(parent), work.get_submodule(path)
        setattr(place, leaf, new.get_submodule(path))
        spelled_out(work, path)
        found[path] = 1.0 - kept(work)
        setattr(place, leaf, old)
    return found


def _of_weights(
    model: nn.Module, weights: dict[str, torch.Tensor], kept: Callable[[nn.Module], float]
) -> dict[str, float]:
    work, found = copy.deepcopy(model), {}
    for path, weight in weights.items():
        held = work.get_parameter(f"{path}.weight")
        before = held.data
        held.data = weight.to(before.dtype)
        found[path] = 1.0 - kept(work)
        held.data = before
    return found
