"""What calibration shows of a model, gathered while it runs: second moments, never the activations themselves.

A layer that sees T rows x contributes ``C = sum x xᵀ`` (width, width) in float64; T may be as large as one likes. The
model runs once over the calibration in inference mode, so nothing can be differentiated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from hasten.compress.given import run_example
from hasten.errors import ConfigurationError
from hasten.measure.counting import call

__all__ = ["Moments", "evaluating", "observe", "output_sqnr", "require_cpu"]


class Moments:
    """Streaming second moment of rows (..., width), optionally block by block.

    >>> seen = Moments(2)
    >>> seen.add(torch.tensor([[1.0, 2.0], [3.0, 0.0]]))
    >>> seen.matrix.tolist(), seen.count
    ([[10.0, 2.0], [2.0, 4.0]], 2)
    """

    def __init__(self, width: int) -> None:
        self.count = 0
        """rows seen"""
        self.matrix = torch.zeros(width, width, dtype=torch.float64)
        """(width, width): sum of x xᵀ"""

    def add(self, rows: Tensor) -> None:
        """Take rows (..., width) in."""
        wide = rows.detach().reshape(-1, rows.shape[-1]).to("cpu", torch.float64)
        self.matrix = self.matrix + wide.T @ wide
        self.count += len(wide)

    @property
    def mean(self) -> Tensor:
        """The moment of one row."""
        return self.matrix / max(self.count, 1)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode, left as it was found."""
    modes = [(m, m.training) for m in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def require_cpu(model: nn.Module) -> None:
    """Raises :class:`ConfigurationError` for a model elsewhere: decompositions are done in float64 on the CPU."""
    place = next((p.device for p in model.parameters() if p.device.type not in ("cpu", "meta")), None)
    if place is not None:
        raise ConfigurationError(f"the model is on {place}; give model.cpu() and move the result back")


class _Enough(Exception):
    """The rest of the forward pass is not needed."""


def observe(
    model: nn.Module,
    calibration: Sequence[Any],
    inputs: Mapping[str, Callable[..., object]] | None = None,
    outputs: Mapping[str, Callable[..., object]] | None = None,
    *,
    until: str | None = None,
    progress: Callable[[str, float], None] | None = None,
) -> None:
    """Run ``model`` over the calibration and tell what layers are given and give.

    ``inputs[name](arguments, named arguments)`` before a layer runs, ``outputs[name](arguments, result)`` after. With
    ``until`` a forward pass ends once that layer has run. Raises :class:`ConfigurationError` without calibration.
    """
    if not calibration:
        raise ConfigurationError("there is no calibration; give example inputs, such as token tensors (batch, time)")
    hooks = []
    try:
        for name, tell in (inputs or {}).items():
            hooks.append(
                model.get_submodule(name).register_forward_pre_hook(
                    lambda m, given, named, tell=tell: tell(given, named), with_kwargs=True
                )
            )
        for name, hear in (outputs or {}).items():
            hooks.append(
                model.get_submodule(name).register_forward_hook(lambda m, given, made, hear=hear: hear(given, made))
            )
        if until is not None:
            hooks.append(model.get_submodule(until).register_forward_hook(_stop))
        with evaluating(model), torch.inference_mode():
            for index, example in enumerate(calibration):
                with suppress(_Enough):
                    run_example(model, example, index)
                if progress is not None:
                    progress("calibrating", (index + 1) / len(calibration))
    finally:
        for hook in hooks:
            hook.remove()


def _stop(module: nn.Module, given: Any, made: Any) -> None:
    raise _Enough


def output_sqnr(model: nn.Module, other: nn.Module, calibration: Sequence[Any]) -> float:
    """Signal to noise of ``other``'s outputs against those of ``model``, in decibels; infinite where they are equal."""
    from torch.utils import _pytree as pytree

    signal = noise = 0.0
    with evaluating(model), evaluating(other), torch.inference_mode():
        for example in calibration:
            pairs = zip(*(pytree.tree_leaves(call(m, example)) for m in (model, other)), strict=False)
            for one, two in pairs:
                if isinstance(one, Tensor) and one.is_floating_point() and one.shape == two.shape:
                    signal += float(one.double().square().sum())
                    noise += float((one.double() - two.double()).square().sum())
    return float("inf") if noise == 0 else float(10 * torch.log10(torch.tensor(signal / noise)))
