"""What compression techniques share: the default loss, the data of an epoch, and which weights they touch."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from hasten.compress.given import run_example
from hasten.errors import ConfigurationError
from hasten.measure.counting import call

__all__ = ["Loss", "batches_of", "dropout", "match_outputs", "weights_of"]

Loss = Callable[[nn.Module, Any], Tensor]


def match_outputs(model: nn.Module) -> Loss:
    """The loss of who has no labels: squared distance to the outputs of a frozen copy of ``model``, relative.

    >>> model = nn.Linear(2, 1)
    >>> float(match_outputs(model)(model, torch.ones(3, 2)))
    0.0
    """
    teacher = copy.deepcopy(model).eval().requires_grad_(False)

    def loss(student: nn.Module, batch: Any) -> Tensor:
        with torch.no_grad():
            wanted = _first(run_example(teacher, batch))
        distance = (_first(call(student, batch)) - wanted).square().mean()
        return distance / wanted.square().mean().clamp(min=1e-12)

    return loss


@contextmanager
def dropout(model: nn.Module, acts: bool) -> Iterator[None]:
    """Inside, the model's dropout layers leave nothing out unless ``acts``; afterwards they are as they were."""
    layers: list[Any] = [m for m in model.modules() if isinstance(m, nn.modules.dropout._DropoutNd)]
    shares = [m.p for m in layers]
    try:
        for layer in layers:
            layer.p = layer.p if acts else 0.0
        yield
    finally:
        for layer, share in zip(layers, shares, strict=True):
            layer.p = share


def _first(result: Any) -> Tensor:
    if isinstance(result, Tensor):
        return result
    logits = getattr(result, "logits", None)
    return logits if isinstance(logits, Tensor) else _first(result[0])


def batches_of(given: Any, why: str) -> tuple[Callable[[int], Iterable[Any]], int]:
    """A function of the epoch, and the number of its batches, from a sequence or such a function."""
    if given is None or (hasattr(given, "__len__") and not len(given)):
        raise ConfigurationError(f"{why} needs data; give batches, or epochs=0 for one shot")
    if callable(given):
        return given, len(list(given(0)))
    listed: Sequence[Any] = given if hasattr(given, "__getitem__") else list(given)
    return (lambda epoch: listed), len(listed)


def weights_of(model: nn.Module, layers: Sequence[str], skip: Sequence[str]) -> dict[str, nn.Parameter]:
    """Parameters of two axes or more whose path matches ``layers`` and not ``skip``, shared ones once.

    Raises :class:`~hasten.errors.ConfigurationError` for NaN and infinity, with the name.
    """
    found: dict[str, nn.Parameter] = {}
    for path, parameter in model.named_parameters():
        if parameter.dim() < 2 or not parameter.is_floating_point():
            continue
        if not any(fnmatchcase(path, p) for p in layers) or any(fnmatchcase(path, p) for p in skip):
            continue
        if not bool(torch.isfinite(parameter).all()):
            raise ConfigurationError(f"{path} holds NaN or infinity; repair the model before it is compressed")
        found[path] = parameter
    return found
