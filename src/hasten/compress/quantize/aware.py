"""Training with rounding in the loop, so that the weights settle where rounding hurts least.

Batch normalisations are folded first. Weights are rounded in each forward with a learned step per scale (or a fixed
one), inputs with a learned step or a learned clip (PACT); the gradient passes straight through. After training the
layers are those of post-training quantisation: codes, and real kernels where they are faster.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from hasten.clock import Clock
from hasten.compress.precision import _loss
from hasten.compress.quantize.base import Format
from hasten.compress.quantize.codebook import _Learned
from hasten.compress.quantize.fold import fold_batch_norm
from hasten.compress.quantize.granularity import PerChannel
from hasten.compress.quantize.integer import Int
from hasten.compress.quantize.layers import ActivationQuantizer, Simulated, activation_format, convolve, describe
from hasten.compress.quantize.observers import MinMax, Mse
from hasten.compress.quantize.passes import Calibration
from hasten.compress.quantize.quantizers import learned_step, pact, straight_through
from hasten.compress.quantize.steps import Work
from hasten.compress.quantize.targets import matrix, put, targets
from hasten.compress.quantize.technique import Quantize, _size, recipe_with
from hasten.compress.technique import LayerReport, TechniqueReport, register
from hasten.errors import ConfigurationError
from hasten.measure.counting import call
from hasten.train.fit import fit

__all__ = ["QuantizeAware", "TrainedLayer"]

Loss = Callable[[nn.Module, Any], Tensor]


class TrainedLayer(nn.Module):
    """A linear or convolution layer whose weight and inputs are rounded in each forward, with gradients.

    >>> layer = TrainedLayer(nn.Linear(8, 4), Int(4, PerChannel(0)), None)
    >>> layer(torch.zeros(2, 8)).shape, tuple(layer.step.shape)
    (torch.Size([2, 4]), (4, 1))
    """

    def __init__(
        self, layer: nn.Module, weight: Format | None, activation: Format | None, *, method: str = "lsq",
        limits: tuple[Tensor, Tensor | None] | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.layer = describe(layer)
        self.weight = nn.Parameter(matrix(layer).clone())
        bias = cast("Tensor | None", layer.bias)
        self.bias = None if bias is None else nn.Parameter(bias.detach().float().clone())
        self.format, self.activation, self.method = weight, activation, method
        self.zero: Tensor | None = None
        # What is learned is a factor on the first step: Adam moves every parameter alike, and steps are small.
        self.start: Tensor | None = None
        self.factor: nn.Parameter | None = None
        if weight is not None and not isinstance(weight, _Learned):
            start = weight
            if method != "ste" and isinstance(weight.observer, MinMax):
                # A learned step starts at the least error; the extremes would be far off in few bits.
                start = cast(Format, replace(cast(Any, weight), observer=Mse()))
            scale, zero = start.find(self.weight)
            self.start = scale.clone()
            self.factor = nn.Parameter(torch.ones_like(scale), requires_grad=method != "ste")
            self.zero = zero
        self.input_start: Tensor | None = None
        self.input_factor: nn.Parameter | None = None
        self.input_zero: Tensor | None = None
        if activation is not None and not activation.at_each_call and limits is not None:
            scale, zero = limits
            if method == "pact":
                assert isinstance(activation, Int)
                scale = scale.reshape(()) * (activation.highest - activation.lowest)  # the clip
            self.input_start = scale.clone()
            self.input_factor = nn.Parameter(torch.ones_like(scale))
            self.input_zero = zero

    @property
    def step(self) -> Tensor | None:
        """Learned steps of the weight, compact; None where they are found anew."""
        return None if self.start is None or self.factor is None else self.start * self.factor.abs()

    @property
    def input_step(self) -> Tensor | None:
        """Learned step (or clip) of static inputs."""
        if self.input_start is None or self.input_factor is None:
            return None
        return self.input_start * self.input_factor.abs()

    def rounded(self) -> Tensor:
        """The weight (out, in) on the grid, with gradients."""
        if self.format is None:
            return self.weight
        step = self.step
        if step is None:
            return self.weight + (self.format.fake(self.weight) - self.weight).detach()
        if self.method == "ste":
            scale, zero = self.format.find(self.weight)
            shape = tuple(self.weight.shape)
            return straight_through(
                self.weight, self.format, self.format.spread(scale, shape), self.format.spread(zero, shape)
            )
        return learned_step(self.weight, self.format, step, self.zero)

    def forward(self, x: Tensor) -> Tensor:
        """As the layer that it replaces."""
        if self.activation is not None:
            step = self.input_step
            if step is None:
                x = x + (self.activation.fake(x) - x).detach()
            elif self.method == "pact":
                assert isinstance(self.activation, Int)
                x = pact(x, step, self.activation.bits)
            else:
                x = learned_step(x, self.activation, step, self.input_zero)
        return convolve(x, self.rounded().view(self.layer["shape"]), self.bias, self.layer)

    def finished(self) -> Simulated:
        """The layer with codes, at the trained steps."""
        fmt = self.format if self.format is not None else Int(16, PerChannel(0))
        weight = self.weight.detach()
        scale, zero = (None, None)
        step, limit = self.step, self.input_step
        if step is not None and self.method != "ste":
            scale, zero = step.detach().clamp(min=1e-12), self.zero
        quantized = fmt.quantize(weight, scale, zero)
        activation = None
        if self.activation is not None:
            kept, offset = None, None
            if limit is not None:
                kept, offset = limit.detach().clamp(min=1e-12), self.input_zero
                if self.method == "pact":
                    assert isinstance(self.activation, Int)
                    kept = kept / (self.activation.highest - self.activation.lowest)
                    offset = torch.full_like(kept, float(self.activation.lowest))
            activation = ActivationQuantizer(self.activation, kept, offset)
        made = Simulated.__new__(Simulated)
        Simulated.__init__(
            made, self.layer, quantized, None if self.bias is None else self.bias.detach().clone(), activation
        )
        return made


@register
@dataclass(frozen=True)
class QuantizeAware:
    """Train a copy of the model with weights in ``weight`` and inputs in ``activation``.

    ``calibration`` is what to train on: pairs (inputs, labels) for ``loss="cross-entropy"`` and ``"mse"``, inputs or
    such pairs for ``"distil"`` (the outputs of the model given are the goal). A loss of your own goes into the call.

    >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> small = QuantizeAware(Int(4, PerChannel(0)), epochs=1)(model, [torch.randn(16, 8)])
    >>> small.report.touched
    ('0', '2')
    """

    weight: Format | None = Int(8, PerChannel(0))
    """number format of weights"""
    activation: Format | None = None
    """number format of inputs"""
    epochs: int = 3
    """passes over the calibration data"""
    rate: float = 1e-3
    """of AdamW, with a cosine"""
    method: str = "lsq"
    """``lsq`` (learned steps), ``ste`` (ranges found anew in each step) or ``pact`` (learned clip of inputs of one
    sign)"""
    loss: str = "distil"
    """``distil``, ``cross-entropy`` or ``mse``"""
    layers: tuple[str, ...] = ("*",)
    """patterns of layer names"""
    skip: tuple[str, ...] = ()
    """patterns of layer names that are left as they are"""
    real: str = "faster"
    """when to run real kernels: ``faster``, ``always`` or ``never``"""
    tokens: int = 1
    """rows that a layer sees at a time; decides whether a kernel is faster"""
    seed: int = 0
    """of every random draw"""

    name: ClassVar[str] = "quantize-aware"

    def __post_init__(self) -> None:
        if self.method not in ("lsq", "ste", "pact"):
            raise ConfigurationError(f"method {self.method!r} is not known; give lsq, ste or pact")
        if self.loss not in ("distil", "cross-entropy", "mse"):
            raise ConfigurationError(f"loss {self.loss!r} is not known; give distil, cross-entropy or mse")
        if self.epochs < 1 or self.rate <= 0:
            raise ConfigurationError(f"{self.epochs} epochs at rate {self.rate} train nothing; give at least one")
        if self.method == "pact" and not (isinstance(self.activation, Int) and not self.activation.symmetric):
            raise ConfigurationError(
                "pact learns the clip of affine inputs; give activation=Int(bits, symmetric=False)"
            )
        self._as_quantize()

    def _as_quantize(self) -> Quantize:
        return Quantize(
            self.weight, self.activation, layers=self.layers, skip=self.skip, real=self.real, tokens=self.tokens,
            seed=self.seed,
        )  # fmt: skip

    def __call__(
        self,
        model: nn.Module,
        calibration: Sequence[Any] | None = None,
        *,
        loss: Loss | None = None,
        progress: Callable[[str, float], None] | None = None,
        clock: Clock | None = None,
    ) -> nn.Module:
        """A new, trained module with a ``report``; ``loss(model, batch)`` replaces the named one."""
        if not calibration:
            raise ConfigurationError("training needs data; give batches of (inputs, labels), or inputs for distil")
        found = targets(model, self.layers, self.skip)
        other = next((p for p in found.layers if model.get_submodule(p).weight.dtype is not torch.float32), None)
        if other is not None:
            kind = model.get_submodule(other).weight.dtype
            raise ConfigurationError(f"layer {other!r} is {kind}, and training is in float32; give model.float()")
        trained = copy.deepcopy(model)
        folded = fold_batch_norm(trained)
        sizes = {path: _size(trained.get_submodule(path)) for path in found.layers}
        limits = self._limits(trained, found.layers, calibration)
        for path in found.layers:
            module = trained.get_submodule(path)
            activation = activation_format(self.activation, module) if self.activation is not None else None
            layer = TrainedLayer(module, self.weight, activation, method=self.method, limits=limits.get(path))
            trained = put(trained, path, layer)
        teacher = copy.deepcopy(model).eval().requires_grad_(False) if self.loss == "distil" and loss is None else None
        wanted = loss or (lambda m, batch: self._loss(m, batch, teacher))
        losses = fit(trained, list(calibration), wanted, self.epochs, self.rate, seed=self.seed, progress=progress)
        reports = []
        for path in found.layers:
            layer = cast(TrainedLayer, trained.get_submodule(path))
            made = layer.finished()
            action = made.format.label
            if made.activation is not None:
                action += f", inputs {made.activation.format.label}"
            bias = 0 if made.bias is None else made.bias.numel() * made.bias.element_size()
            reports.append(LayerReport(path, action, "", sizes[path], made.packed_bytes + bias))
            trained = put(trained, path, made)
        technique = self._as_quantize()
        work = Work(trained, list(found.layers), self.weight, self.activation, None, self.seed)
        reports = technique._realise(work, reports, {}, clock)
        order = {path: i for i, (path, _) in enumerate(model.named_modules())}
        layers = sorted([*reports, *found.kept], key=lambda r: order[r.layer])
        notes = [
            f"{len(reports)} layers were trained as {technique.label} for {self.epochs} epochs ({self.method}): loss "
            f"{losses[0]:.4g} in the first, {losses[-1]:.4g} in the last"
        ]
        if folded:
            notes.append(f"{len(folded)} batch normalisations were folded into the layers before them")
        inputs = [_inputs(b) for b in calibration]
        work.model.eval()
        measured = {"sqnr": _loss(model, work.model, inputs)}
        work.model.train(model.training)
        report = TechniqueReport(self.name, tuple(layers), tuple(notes), measured)
        work.model.report = report  # type: ignore[assignment]
        work.model.recipe = recipe_with(model, self, report)  # type: ignore[assignment]
        return work.model

    def _limits(
        self, model: nn.Module, layers: Sequence[str], calibration: Sequence[Any]
    ) -> Mapping[str, tuple[Tensor, Tensor | None]]:
        """Starting ranges of static inputs."""
        if self.activation is None or self.activation.at_each_call:
            return {}
        watches = {p: activation_format(self.activation, model.get_submodule(p)).watch() for p in layers}
        data = Calibration([_inputs(b) for b in calibration])
        survey = data.survey(model, layers, lambda path, x: watches[path].update(x))
        return {path: watches[path].parameters() for path in survey.order}

    def _loss(self, model: nn.Module, batch: Any, teacher: nn.Module | None) -> Tensor:
        inputs = _inputs(batch)
        result: Tensor = call(model, inputs)
        if teacher is not None:
            with torch.no_grad():
                goal: Tensor = call(teacher, inputs)
            # The squared error of the outputs in units of their power: no temperature, any kind of output.
            return functional.mse_loss(result.float(), goal.float()) / goal.float().square().mean().clamp(min=1e-12)
        if not isinstance(batch, (tuple, list)) or len(batch) != 2:
            raise ConfigurationError(
                f"loss {self.loss!r} needs batches of (inputs, labels); give those, or loss='distil'"
            )
        if self.loss == "mse":
            return functional.mse_loss(result.float(), batch[1].float())
        entropy: Tensor = functional.cross_entropy(result.flatten(0, -2).float(), batch[1].flatten())
        return entropy


def _inputs(batch: Any) -> Any:
    """Inputs of a batch that may carry labels."""
    return batch[0] if isinstance(batch, (tuple, list)) and len(batch) == 2 else batch
