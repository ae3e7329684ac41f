"""Outliers of activations moved into the weights that read them: ``X / s`` and ``W · s`` compute what ``X`` and ``W``
did.

``s_j = max|X_j|^α / max|W_j|^(1-α)`` over all layers that read the same tensor; the division is folded into the weight
(and bias) of the normalisation that makes the tensor. That nobody else reads it is checked by running the model.

"SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language Models"
https://arxiv.org/abs/2211.10438
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from hasten.compress.quantize.passes import evaluating
from hasten.compress.quantize.steps import Step, Work
from hasten.compress.values import named_value
from hasten.errors import ConfigurationError
from hasten.measure.counting import call

__all__ = ["SmoothQuant"]

_LEAST = 1e-5


@named_value
@dataclass(frozen=True)
class SmoothQuant(Step):
    """Smooth every group of linear layers that reads a normalisation.

    >>> SmoothQuant(0.5)
    SmoothQuant(strength=0.5)
    """

    strength: float = 0.5
    """α: 0 leaves activations as they are, 1 moves their whole range into the weights"""

    over_examples: ClassVar[str] = "SmoothQuant takes the largest inputs"

    def __post_init__(self) -> None:
        if not 0 <= self.strength <= 1:
            raise ConfigurationError(f"a strength of {self.strength} is no share; give 0 … 1")

    def rewrite(self, work: Work) -> None:
        """Rescale normalisations and their readers."""
        calibration = work.needs_data("SmoothQuant")
        groups, ranges = self._look(work)
        smoothed = 0
        reference = _outputs(work.model, calibration.inputs[0])
        for norm_path, readers in groups.items():
            norm = work.model.get_submodule(norm_path)
            layers = [work.model.get_submodule(path) for path in readers]
            top = ranges[norm_path]
            weights = torch.stack([cast(Tensor, m.weight).detach().float().abs().amax(0) for m in layers]).amax(0)
            factor = top.pow(self.strength) / weights.clamp(min=_LEAST).pow(1 - self.strength)
            factor = torch.where(top > _LEAST, factor.clamp(min=_LEAST), torch.ones_like(factor))
            undo = _scale(norm, layers, factor)
            if _differs(reference, _outputs(work.model, calibration.inputs[0])):
                undo()
                work.notes.append(f"{norm_path} has further readers; it was not smoothed")
            else:
                smoothed += 1
        work.notes.append(f"{smoothed} normalisations were smoothed (strength {self.strength:g})")

    def _look(self, work: Work) -> tuple[dict[str, list[str]], dict[str, Tensor]]:
        """Normalisation -> linear layers that read its result, and the largest magnitude of each of its channels."""
        made: dict[int, str] = {}
        alive: list[Tensor] = []
        groups: dict[str, list[str]] = {}
        ranges: dict[str, Tensor] = {}

        def after(path: str) -> Callable[..., None]:
            def hook(module: nn.Module, arguments: Any, result: Any) -> None:
                if isinstance(result, Tensor):
                    made[id(result)] = path
                    alive.append(result)
                    top = result.detach().float().reshape(-1, result.shape[-1]).abs().amax(0)
                    ranges[path] = torch.maximum(ranges[path], top) if path in ranges else top

            return hook

        def before(path: str) -> Callable[..., None]:
            def hook(module: nn.Module, arguments: Any) -> None:
                source = made.get(id(arguments[0]))
                if source is not None and path not in groups.setdefault(source, []):
                    groups[source].append(path)

            return hook

        handles: list[Any] = []
        for path, module in work.model.named_modules():
            weight = getattr(module, "weight", None)
            if (
                isinstance(weight, Tensor)
                and weight.dim() == 1
                and not isinstance(module, nn.modules.batchnorm._BatchNorm)
            ):
                handles.append(module.register_forward_hook(after(path)))
            elif isinstance(module, nn.Linear):
                handles.append(module.register_forward_pre_hook(before(path)))
        try:
            with evaluating(work.model):
                for index, example in enumerate(work.needs_data("SmoothQuant").inputs):
                    made.clear()
                    alive.clear()
                    work.needs_data("SmoothQuant").run(work.model, example, index)
        finally:
            for handle in handles:
                handle.remove()
        return groups, ranges


def _scale(norm: nn.Module, layers: list[nn.Module], factor: Tensor) -> Callable[[], None]:
    """Divide the normalisation, multiply the readers, in place; returns what undoes it."""
    weight, bias = cast(Tensor, norm.weight), cast("Tensor | None", getattr(norm, "bias", None))
    touched = [weight, *([bias] if bias is not None else []), *(cast(Tensor, m.weight) for m in layers)]
    kept = [t.detach().clone() for t in touched]
    offset = float(getattr(norm, "offset", 0.0) or 0.0)  # normalisations that multiply by (offset + weight)
    with torch.no_grad():
        weight.copy_((weight.float() + offset) / factor - offset)
        if bias is not None:
            bias.copy_(bias.float() / factor)
        for layer in layers:
            own = cast(Tensor, layer.weight)
            own.copy_(own.float() * factor)

    def undo() -> None:
        with torch.no_grad():
            for tensor, old in zip(touched, kept, strict=True):
                tensor.copy_(old)

    return undo


def _outputs(model: nn.Module, example: Any) -> list[Tensor]:
    from torch.utils import _pytree as pytree

    with evaluating(model):
        leaves = pytree.tree_leaves(call(model, example))
    return [leaf.float() for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def _differs(reference: list[Tensor], other: list[Tensor]) -> bool:
    half = any(t.dtype in (torch.bfloat16, torch.float16) for t in other)
    limit = 5e-2 if half else 1e-4
    return any(float((a - b).norm()) > limit * float(a.norm()) + 1e-12 for a, b in zip(reference, other, strict=True))
