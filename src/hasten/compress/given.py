"""Checks of what a user gives: weights and examples that are numbers, and examples that fit the model.

Each error is one line that names the layer or the example and what to do about it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from hasten.errors import ConfigurationError, DataError, HastenError
from hasten.measure.counting import call

__all__ = [
    "answers",
    "finite_example",
    "finite_examples",
    "finite_parameters",
    "finite_weight",
    "fitting",
    "planned_for",
    "run_example",
    "unfit",
]


def finite_weight(path: str, weight: Tensor) -> None:
    """Raises :class:`~hasten.errors.ConfigurationError` for a layer's weight with NaN or infinity.

    >>> finite_weight("0", torch.tensor([float("nan")]))
    Traceback (most recent call last):
    ...
    hasten.errors.ConfigurationError: layer '0': its weight holds NaN or infinity; repair it or add it to skip=
    """
    if not bool(torch.isfinite(weight).all()):
        raise ConfigurationError(f"layer {path!r}: its weight holds NaN or infinity; repair it or add it to skip=")


def finite_parameters(model: nn.Module, purpose: str) -> None:
    """As :func:`finite_weight` for every parameter and running statistic; ``purpose`` such as ``tuned`` ends the
    sentence. Buffers may hold infinity (masks do), but no NaN."""
    for path, parameter in model.named_parameters():
        if parameter.device.type != "meta" and not bool(torch.isfinite(parameter).all()):
            raise ConfigurationError(f"{path} holds NaN or infinity; repair the model before it is {purpose}")
    for path, buffer in model.named_buffers():
        if buffer.device.type != "meta" and buffer.is_floating_point() and bool(buffer.isnan().any()):
            raise ConfigurationError(f"{path} holds NaN; repair the model before it is {purpose}")


def finite_example(example: Any, which: str = "a calibration input") -> None:
    """Raises :class:`~hasten.errors.DataError` where an example holds NaN or infinity.

    >>> finite_example(torch.tensor([1.0, float("inf")]), "calibration input 3")
    Traceback (most recent call last):
    ...
    hasten.errors.DataError: calibration input 3 holds NaN or infinity; remove or repair it
    """
    for leaf in pytree.tree_leaves(example):
        if isinstance(leaf, Tensor) and leaf.is_floating_point() and not bool(torch.isfinite(leaf).all()):
            raise DataError(f"{which} holds NaN or infinity; remove or repair it")


def finite_examples(examples: Sequence[Any], name: str) -> None:
    """As :func:`finite_example` for each; raises :class:`~hasten.errors.ConfigurationError` where there is none."""
    if not len(examples):
        raise ConfigurationError(f"{name} holds no input; give at least one, or leave it out")
    for index, example in enumerate(examples):
        finite_example(example, f"{name}[{index}]")


def run_example(model: nn.Module, example: Any, index: int | None = None, *, which: str = "") -> Any:
    """One forward pass in the modes that are set, ``index`` being the example's (or ``which`` its name).

    Raises :class:`~hasten.errors.DataError` where the example holds NaN or infinity, or the model does not take it.
    """
    which = which or ("a calibration input" if index is None else f"calibration input {index}")
    finite_example(example, which)
    try:
        return call(model, example)
    except HastenError:
        raise
    except (RuntimeError, TypeError, ValueError, IndexError, AttributeError, KeyError) as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(
            f"{which} {_described(example)} does not fit the model ({first}); give inputs as the model is called with"
        ) from error


def answers(model: nn.Module, example: Any) -> None:
    """Raises one line where the model does not take the first example, or gives NaN for it."""
    with torch.inference_mode():
        made = run_example(model, example, which="data[0]")
    for leaf in pytree.tree_leaves(made):
        if isinstance(leaf, Tensor) and leaf.is_floating_point() and bool(leaf.isnan().any()):
            raise ConfigurationError(
                "the unchanged model answers data[0] with NaN, so no quality can be kept; repair the model or the data"
            )


def _described(example: Any) -> str:
    tensors = any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(example))
    return f"of shape {_shapes(example)}" if tensors else f"({_shapes(example)})"


def _shapes(example: Any) -> str:
    leaves = [leaf for leaf in pytree.tree_leaves(example) if isinstance(leaf, Tensor)]
    return ", ".join(str(tuple(t.shape)) for t in leaves) or type(example).__name__


def fitting(technique: str, model: Any, calibration: Any, name: str = "calibration") -> None:
    """What every technique asks of its arguments before it begins; an error of one line that says what to give.

    Raises :class:`~hasten.errors.ConfigurationError` for something that is no module, or one without numbers, and for
    a calibration (or what ``name`` calls it) that is no list; :class:`~hasten.errors.DataError` for an example that is
    empty, NaN or infinite.

    >>> fitting("quantize", nn.Linear(2, 2), torch.zeros(8, 2))
    Traceback (most recent call last):
    ...
    hasten.errors.ConfigurationError: calibration is a Tensor; give quantize a list of inputs, such as [x]
    """
    if not isinstance(model, nn.Module):
        raise ConfigurationError(f"{technique} was given a {type(model).__name__} as the model; give an nn.Module")
    empty = next((n for n, t in (*model.named_parameters(), *model.named_buffers()) if t.device.type == "meta"), None)
    if empty is not None:
        raise ConfigurationError(
            f"{empty} is on the meta device, where there are no numbers; load the model's weights before {technique}"
        )
    if calibration is None or (callable(calibration) and not hasattr(calibration, "__len__")):
        return
    listed = hasattr(calibration, "__len__") and hasattr(calibration, "__iter__")
    if not listed or isinstance(calibration, (Tensor, str, bytes, Mapping)) or hasattr(calibration, "__array__"):
        raise ConfigurationError(
            f"{name} is a {type(calibration).__name__}; give {technique} a list of inputs, such as [x]"
        )
    if isinstance(calibration, (list, tuple)):
        for index, example in enumerate(calibration):
            which = f"calibration input {index}" if name == "calibration" else f"{name}[{index}]"
            tensors = [leaf for leaf in pytree.tree_leaves(example) if isinstance(leaf, Tensor)]
            if tensors and all(t.numel() == 0 for t in tensors):
                raise DataError(f"{which} of shape {_shapes(example)} holds no sample; remove it")
            finite_example(example, which)


def planned_for(model: nn.Module, plan: Mapping[str, str]) -> None:
    """Raises :class:`~hasten.errors.ConfigurationError` for a plan that names a layer which the model does not have."""
    paths = {path for path, _ in model.named_modules()}
    strange = sorted(set(plan) - paths)
    if strange:
        raise ConfigurationError(
            f"the plan names layer {strange[0]!r}, and {type(model).__name__} has none; give the model that it was "
            "made for, or apply the recipe without its plan"
        )


def unfit(model: nn.Module, calibration: Any, error: Exception) -> None:
    """After ``error``: raises :class:`~hasten.errors.DataError` where the model does not take an example, alone or as
    the first of a pair, :class:`~hasten.errors.ConfigurationError` for NaN in the model; nothing otherwise."""
    finite_parameters(model, "compressed")
    modes = [(m, m.training) for m in model.modules()]
    model.eval()
    try:
        with torch.inference_mode():
            for index, example in enumerate(calibration if isinstance(calibration, (list, tuple)) else ()):
                paired = isinstance(example, (list, tuple)) and len(example) == 2
                try:
                    run_example(model, example, index)
                except DataError as reason:
                    if paired:
                        run_example(model, example[0], index)
                        continue
                    raise reason from error
    finally:
        for module, training in modes:
            module.training = training
