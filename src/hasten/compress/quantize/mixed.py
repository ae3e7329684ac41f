"""A plan carried out: each named weight in its own format, inputs too, and fine-tuned through the rounding if asked.

Fine-tuning rounds in the forward pass and lets gradients through unchanged (straight-through); ranges of weights follow
the weights at every step, ranges of inputs are a moving average while training and fixed afterwards. The result holds
rounded weights in float and is plain torch, so it exports; :func:`hasten.compress.container.save` stores the codes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from hasten.compress.precision import _loss as output_loss
from hasten.compress.quantize.allocate import BitPlan
from hasten.compress.quantize.base import Format, Quantized
from hasten.compress.quantize.observers import Watch
from hasten.compress.replace import spelled_out
from hasten.compress.technique import LayerReport, TechniqueReport, register
from hasten.errors import ConfigurationError
from hasten.measure.counting import call
from hasten.train.fit import fit

__all__ = ["MixedQuantize", "RoundedInput", "straight_through", "wrap_input"]


def straight_through(x: Tensor, rounded: Tensor) -> Tensor:
    """The value of ``rounded`` with the gradient of ``x``."""
    return x + (rounded - x).detach()


class _RoundedWeight(nn.Module):
    def __init__(self, form: Format) -> None:
        super().__init__()
        self.form = form

    def forward(self, weight: Tensor) -> Tensor:
        """The weight on its grid."""
        return straight_through(weight, self.form.fake(weight.detach()))


class RoundedInput(nn.Module):
    """A layer whose first input is rounded; the range is observed in training mode and fixed in eval mode.

    >>> from hasten.compress.quantize import Int, MovingAverage
    >>> layer = RoundedInput(nn.Linear(2, 2), Int(8, observer=MovingAverage(0.1)))
    >>> _ = layer(torch.tensor([[1.0, -1.0]]))
    >>> layer.eval()(torch.zeros(1, 2)).shape
    torch.Size([1, 2])
    """

    scale: Tensor
    zero: Tensor | None

    def __init__(self, layer: nn.Module, form: Format) -> None:
        super().__init__()
        self.layer, self.form = layer, form
        self._watch: Watch | None = form.watch()
        self.calibrating = False
        """observe and round nothing"""
        self.register_buffer("scale", torch.ones(()))
        self.register_buffer("zero", None)

    def observe(self, x: Tensor) -> None:
        """Take one batch into the range."""
        self._watch = self._watch or self.form.watch()
        self._watch.update(x.detach())
        scale, zero = self.form.parameters(*self._watch.range())
        self.scale, self.zero = scale, zero

    def fix(self, scale: Tensor, zero: Tensor | None) -> None:
        """Use this range from now on."""
        self.scale, self.zero, self._watch = scale, zero, None
        self.eval()

    def forward(self, x: Tensor, *rest: Any, **named: Any) -> Any:
        """The layer on the rounded input."""
        if self.calibrating:
            self.observe(x)
            return self.layer(x, *rest, **named)
        if self.training:
            self.observe(x)
            rounded = straight_through(x, self.form.fake(x.detach(), self.scale, self.zero))
        else:
            rounded = self.form.fake(x, self.scale, self.zero)
        return self.layer(rounded, *rest, **named)


@register
@dataclass(frozen=True)
class MixedQuantize:
    """Put weights into the formats of a plan.

    >>> from hasten.compress.quantize import Int
    >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    >>> small = MixedQuantize((("0.weight", Int(2)), ("2.weight", Int(4))))(model)
    >>> len(small[0].weight.unique()) <= 3, small.report.bytes_before, small.report.bytes_after
    (True, 512, 56)
    """

    formats: tuple[tuple[str, Format], ...] = ()
    """(path of a weight, its format)"""
    inputs: tuple[tuple[str, Format], ...] = ()
    """(path of a module, format of its input); needs calibration or training batches"""
    epochs: int = 0
    """of fine-tuning through the rounding; needs batches and a loss"""
    rate: float = 1e-3
    """peak learning rate of it"""
    seed: int = 0
    """of it"""

    name: ClassVar[str] = "mixed-precision"

    def __post_init__(self) -> None:
        if self.epochs < 0 or self.rate <= 0:
            raise ConfigurationError(f"epochs ({self.epochs}) must not be negative and rate ({self.rate}) positive")
        for label, entries in (("formats", self.formats), ("inputs", self.inputs)):
            for entry in entries:
                if len(entry) != 2 or not isinstance(entry[0], str) or not isinstance(entry[1], Format):
                    raise ConfigurationError(f"{label} holds {entry!r}; give pairs of a path and a format")

    @classmethod
    def of(
        cls,
        plan: BitPlan,
        *,
        activation: Format | None = None,
        embedding: tuple[Mapping[str, Any], Format] | None = None,
        epochs: int = 0,
        rate: float = 1e-3,
        seed: int = 0,
    ) -> MixedQuantize:
        """From a plan; ``activation`` rounds the inputs of its layers, ``embedding`` = (names, format) adds weights."""
        formats = [(p, f) for p, f in plan.formats if f is not None]
        layers = dict.fromkeys(p.rpartition(".")[0] for p, _ in formats)
        if embedding is not None:
            formats += [(p, embedding[1]) for p in embedding[0]]
        inputs = tuple((p, activation) for p in layers) if activation is not None else ()
        return cls(tuple(formats), inputs, epochs, rate, seed)

    def __call__(
        self,
        model: nn.Module,
        calibration: Any = None,
        *,
        loss: Callable[[nn.Module, Any], Tensor] | None = None,
        progress: Callable[[str, float], None] | None = None,
    ) -> nn.Module:
        """The new module. ``calibration`` is example inputs, or training batches where ``loss(model, batch)`` is given;
        batches may be a function of the epoch."""
        clone = copy.deepcopy(model)
        modes = [(m, m.training) for m in clone.modules()]
        parameters = dict(clone.named_parameters())
        reports = [self._report(parameters, p, f) for p, f in self.formats]
        if (self.inputs or self.epochs) and not calibration:
            raise ConfigurationError("ranges of inputs and fine-tuning need data; give calibration or training batches")
        if self.epochs and loss is None:
            raise ConfigurationError("fine-tuning needs a loss; give loss=… that takes (model, batch)")
        for path, form in self.formats:
            owner, _, leaf = path.rpartition(".")
            parametrize.register_parametrization(clone.get_submodule(owner), leaf, _RoundedWeight(form))
        for path, form in self.inputs:
            clone = wrap_input(clone, path, form)
        listed: Sequence[Any] = []
        if calibration:
            listed = list(calibration(0)) if callable(calibration) else list(calibration)
        if self.inputs:
            self._observe(clone, listed, loss)
        if self.epochs and loss is not None:
            batches = calibration if callable(calibration) else listed
            fit(clone, batches, loss, epochs=self.epochs, rate=self.rate, seed=self.seed, progress=progress)
        codes: dict[str, Quantized] = {}
        for path, form in self.formats:
            holder, leaf = _inner(clone, path)
            found = form.quantize(getattr(holder.parametrizations, leaf).original.detach())
            parametrize.remove_parametrizations(holder, leaf)
            with torch.no_grad():
                getattr(holder, leaf).copy_(found.dequantize())
            codes[path] = found
        for module, training in modes:
            module.training = training
        for module in clone.modules():
            if isinstance(module, RoundedInput):
                module.eval()
                module._watch = None
        if not model.training:
            clone.eval()
        measured: dict[str, float] = {}
        if listed and loss is None:
            measured["sqnr"] = output_loss(model, clone, listed)
        widths = sorted({f.bits for _, f in self.formats})
        notes = [
            f"{len(reports)} weights in {', '.join(map(str, widths)) or 'no'} bits, {len(self.inputs)} inputs rounded"
        ]
        names = {id(p): n for n, p in clone.named_parameters()}
        clone.quantized = {  # type: ignore[assignment]
            names[id(getattr(*_inner(clone, path)))]: found for path, found in codes.items()
        }
        clone.report = TechniqueReport(self.name, tuple(reports), tuple(notes), measured)  # type: ignore[assignment]
        return clone

    def _report(self, parameters: Mapping[str, nn.Parameter], path: str, form: Format) -> LayerReport:
        if path not in parameters:
            raise ConfigurationError(f"the model has no parameter {path!r}; make the plan for this model")
        weight = parameters[path].detach()
        if not bool(torch.isfinite(weight).all()):
            raise ConfigurationError(f"{path} holds NaN or infinity; repair the model before it is quantised")
        rounded = form.fake(weight)
        size = weight.norm()
        error = float((rounded - weight).norm() / size) if size > 0 else 0.0
        before = weight.numel() * weight.element_size()
        after = round(form.stored_bits(tuple(weight.shape)) / 8)
        return LayerReport(path, form.label, "as planned", before, after, error=error)

    def _observe(self, clone: nn.Module, batches: Sequence[Any], loss: Callable[..., Any] | None) -> None:
        """Ranges of the inputs, of the float model: nothing is rounded meanwhile."""
        wrapped = [m for m in clone.modules() if isinstance(m, RoundedInput)]
        for m in wrapped:
            m.calibrating = True
        clone.eval()
        with torch.no_grad():
            for batch in batches:
                loss(clone, batch) if loss is not None else call(clone, batch)
        for m in wrapped:
            m.calibrating = False


def wrap_input(model: nn.Module, path: str, form: Format) -> nn.Module:
    """``model`` with the module at ``path`` inside a :class:`RoundedInput`; changed in place."""
    if not path:
        return RoundedInput(model, form)
    parent, _, leaf = path.rpartition(".")
    owner = model.get_submodule(parent)
    setattr(owner, leaf, RoundedInput(owner.get_submodule(leaf), form))
    return spelled_out(model, path)


def _inner(model: nn.Module, path: str) -> tuple[nn.Module, str]:
    """Owner of a weight, through the wrappers on the way."""
    owner, _, leaf = path.rpartition(".")
    module = model
    for part in owner.split(".") if owner else []:
        module = module.layer if isinstance(module, RoundedInput) else module
        module = module.get_submodule(part)
    return (module.layer if isinstance(module, RoundedInput) else module), leaf
