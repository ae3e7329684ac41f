"""Post-training quantisation: number formats for weights and inputs, and the steps that keep the model's quality.

Formats say what is stored; steps say how the rounded weights are found. Layers are rounded in the order in which they
run, each on the inputs that the rounded layers before it give. A linear layer whose formats a kernel of this machine
runs, and faster, gets that kernel; everything else is simulated: codes are stored, the product is in float.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any, ClassVar, cast

import torch
from torch import nn

from hasten.clock import Clock
from hasten.compress.given import planned_for
from hasten.compress.precision import _loss
from hasten.compress.quantize import realise as real
from hasten.compress.quantize.base import Format
from hasten.compress.quantize.blocks import MXFP4, NVFP4
from hasten.compress.quantize.codebook import NF4
from hasten.compress.quantize.fold import FoldBatchNorm
from hasten.compress.quantize.granularity import PerChannel, PerGroup, PerToken
from hasten.compress.quantize.integer import Int
from hasten.compress.quantize.layers import ActivationQuantizer, QuantizedLayer, Simulated, activation_format
from hasten.compress.quantize.minifloat import FP8_E4M3
from hasten.compress.quantize.observers import Mse, Watch
from hasten.compress.quantize.passes import Calibration, Survey
from hasten.compress.quantize.rounding import Gptq
from hasten.compress.quantize.steps import Layer, Step, Work, relative_error
from hasten.compress.quantize.targets import KINDS, matrix, put, targets
from hasten.compress.recipe import Plan, Recipe
from hasten.compress.scarce import Scarcity, count_examples
from hasten.compress.technique import LayerReport, TechniqueReport, register
from hasten.errors import ConfigurationError, DataError

__all__ = ["SCHEMES", "Quantize", "recipe_with"]

Progress = Callable[[str, float], None]

_TOKEN = Int(8, PerToken(), dynamic=True)
_FP8_TOKEN = replace(FP8_E4M3, granularity=PerToken(), dynamic=True)
# Few levels are worth a search of the range: 20 factors come within 2 % of the squared error that 80 reach.
_SEARCHED = Mse(steps=20)
_FOUR = Int(4, PerGroup(1, 32), full_range=True, observer=_SEARCHED)
SCHEMES: dict[str, tuple[Format, Format | None]] = {
    "W8A8": (Int(8, PerChannel(0)), _TOKEN),
    "W8A16": (Int(8, PerChannel(0)), None),
    "W4A16": (_FOUR, None),
    "W4A8": (_FOUR, _TOKEN),
    "W3A16": (Int(3, PerGroup(1, 32), symmetric=False, observer=_SEARCHED), None),
    "W2A16": (Int(2, PerGroup(1, 32), symmetric=False, observer=_SEARCHED), None),
    "FP8": (FP8_E4M3.per_channel(), FP8_E4M3),
    "FP8_DYNAMIC": (FP8_E4M3.per_channel(), _FP8_TOKEN),
    "NF4": (NF4, None),
    "NVFP4": (NVFP4, replace(NVFP4, granularity=PerGroup(-1, 16), dynamic=True)),
    "MXFP4": (MXFP4, replace(MXFP4, granularity=PerGroup(-1, 32), dynamic=True)),
    "NVFP4A16": (NVFP4, None),
    "MXFP4A16": (MXFP4, None),
}
"""Names that people know: weight and input formats."""


@register
@dataclass(frozen=True)
class Quantize:
    """Weights in ``weight``, inputs of the same layers in ``activation``, rounded by ``steps``.

    >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    >>> small = Quantize.scheme("W4A16", real="never")(model)
    >>> small.report.touched, round(small.report.bytes_after / small.report.bytes_before, 3)
    (('0', '2'), 0.154)
    """

    weight: Format | None = Int(8, PerChannel(0))
    """number format of weights; None keeps them"""
    activation: Format | None = None
    """number format of inputs; None keeps them. Without ``dynamic`` the calibration gives their range"""
    steps: Sequence[Step] = ()
    """in order: those that rewrite the model, then for each layer those that round and those that correct"""
    layers: tuple[str, ...] = ("*",)
    """patterns of layer names, as in a shell"""
    skip: tuple[str, ...] = ()
    """patterns of layer names that are left as they are"""
    kinds: tuple[str, ...] = tuple(KINDS)
    """classes of layers: Linear, Conv1d, Conv2d"""
    overrides: tuple[tuple[str, Format], ...] = ()
    """(pattern, weight format) for layers that differ; the first that matches counts. A list of lists in YAML"""
    real: str = "faster"
    """when to run real kernels: ``faster``, ``always`` where one exists, or ``never``"""
    tokens: int = 1
    """rows that a layer sees at a time; decides whether a kernel is faster"""
    strict: bool = False
    """refuse a group that does not divide the inputs, instead of a short last group"""
    seed: int = 0
    """of every random draw"""

    name: ClassVar[str] = "quantize"

    def __post_init__(self) -> None:
        object.__setattr__(self, "steps", tuple(self.steps))
        for knob in ("layers", "skip", "kinds"):
            given = getattr(self, knob)
            object.__setattr__(self, knob, (given,) if isinstance(given, str) else tuple(given))
        object.__setattr__(self, "overrides", tuple((str(p), f) for p, f in self.overrides))
        if self.weight is None and self.activation is None:
            raise ConfigurationError("weight=None and activation=None quantise nothing; give one of them a format")
        for what, fmt in (("weight", self.weight), ("activation", self.activation), *self.overrides):
            if fmt is not None and not isinstance(fmt, Format):
                raise ConfigurationError(f"{what}={fmt!r} is no number format; give Int(8), MiniFloat(2, 1), NF4, …")
        if self.weight is not None and self.weight.at_each_call:
            raise ConfigurationError("a weight does not change between calls; give its format without dynamic=True")
        for step in self.steps:
            if not isinstance(step, Step):
                raise ConfigurationError(f"{step!r} is no step; give SmoothQuant(), Gptq(), BiasCorrection(), …")
        unknown = [k for k in self.kinds if k not in KINDS]
        if unknown:
            raise ConfigurationError(f"layers of kind {', '.join(unknown)} are not known; give {', '.join(KINDS)}")
        if self.real not in ("faster", "always", "never"):
            raise ConfigurationError(f"real={self.real!r} is not known; give faster, always or never")
        if self.tokens < 1:
            raise ConfigurationError(f"a layer sees at least one row, got {self.tokens}")

    @classmethod
    def scheme(cls, name: str, **knobs: Any) -> Quantize:
        """A preset by the name that people know; further knobs as usual.

        >>> Quantize.scheme("W8A8").label
        'int8 channel, inputs int8 token'
        """
        wanted = {key.lower(): key for key in SCHEMES}.get(name.lower())
        if wanted is None:
            raise ConfigurationError(f"there is no scheme {name!r}; known are {', '.join(SCHEMES)}")
        weight, activation = SCHEMES[wanted]
        return cls(**{"weight": weight, "activation": activation, **knobs})

    @property
    def label(self) -> str:
        """A short name for tables."""
        parts = [self.weight.label if self.weight is not None else "weights kept"]
        if self.activation is not None:
            parts.append(f"inputs {self.activation.label}")
        return ", ".join([*parts, *(type(s).__name__ for s in self.steps)])

    def __call__(
        self,
        model: nn.Module,
        calibration: Sequence[Any] | None = None,
        *,
        progress: Progress | None = None,
        clock: Clock | None = None,
    ) -> nn.Module:
        """A new module with a ``report``; ``calibration`` is example inputs, where a step or a static range needs
        them."""
        return self.apply(model, {}, calibration, progress=progress, clock=clock)

    def apply(
        self,
        model: nn.Module,
        plan: Mapping[str, str],
        calibration: Sequence[Any] | None = None,
        *,
        progress: Progress | None = None,
        clock: Clock | None = None,
    ) -> nn.Module:
        """As a call; layers that ``plan`` names (layer -> action of a report) take that kernel without measuring."""
        told = progress or (lambda stage, share: None)
        planned_for(model, plan)
        found = targets(model, self.layers, self.skip, self.kinds)
        paths = [path for path, _ in model.named_modules()]
        idle = next((p for p, _ in self.overrides if not any(fnmatchcase(path, p) for path in paths)), None)
        if idle is not None:
            raise ConfigurationError(f"overrides= names {idle!r}, which is no layer; the first are {paths[1:6]}")
        data = Calibration(calibration) if calibration else None
        self._check(data)
        work = Work(copy.deepcopy(model), list(found.layers), self.weight, self.activation, data, self.seed, told=told)
        torch.manual_seed(self.seed)
        FoldBatchNorm().rewrite(work)
        for step in self.steps:
            step.rewrite(work)
        watches = self._watches(work)
        survey = Survey()
        if data is not None:
            told("survey", 0.0)
            survey = data.survey(work.model, work.layers, lambda p, x: watches[p].update(x) if p in watches else None)
            self._look_for_scarce(work, survey, watches, count_examples(data.inputs))
        with data.in_order(work.model) if data is not None else nullcontext():
            reports = self._round_all(work, survey, watches)
        for step in self.steps:
            step.finish(work, model)
        reports = self._realise(work, reports, plan, clock)
        order = {path: i for i, (path, _) in enumerate(model.named_modules())}
        layers = sorted([*reports, *found.kept], key=lambda r: order[r.layer])
        measured = {"sqnr": _loss(model, work.model, data.inputs)} if data is not None else {}
        notes = [*_summary(self, reports, len(found.kept)), *work.notes]
        work.model.train(model.training)
        for new, old in zip_modes(work.model, model):
            new.training = old
        report = TechniqueReport(self.name, tuple(layers), tuple(notes), measured)
        work.model.report = report  # type: ignore[assignment]
        work.model.recipe = recipe_with(model, self, report)  # type: ignore[assignment]
        told("done", 1.0)
        return work.model

    def format_of(self, path: str) -> Format | None:
        """Weight format of the layer at ``path``."""
        return next((f for pattern, f in self.overrides if fnmatchcase(path, pattern)), self.weight)

    def _check(self, data: Calibration | None) -> None:
        if self.activation is not None and not self.activation.at_each_call and data is None:
            raise ConfigurationError(
                f"static inputs ({self.activation.label}) need calibration inputs for their range; give some, or "
                "dynamic=True"
            )
        for step in self.steps:
            if step.needs_calibration and data is None:
                raise ConfigurationError(
                    f"{type(step).__name__} looks at the inputs of layers; give calibration inputs"
                )

    def _look_for_scarce(self, work: Work, survey: Survey, watches: Mapping[str, Watch], examples: int) -> None:
        """Say what is too little of the calibration, on one line."""
        scarce = Scarcity()
        inputs = {p: matrix(work.model.get_submodule(p)).shape[1] for p in survey.order}
        solving = [s for s in self.steps if s.solves]
        if any(isinstance(s, Gptq) and s.damp == 0 for s in solving):
            scarce.refuse("Gptq(damp=0) meets a singular second moment", survey.rows, inputs, "Gptq(damp=0.01)")
        if solving:
            names = "+".join(type(s).__name__ for s in solving)
            scarce.rows(names, survey.rows, inputs)
        for step in self.steps:
            if step.over_examples:
                scarce.examples(step.over_examples, examples)
        if watches:
            observers_see(scarce, watches, survey.order)
            scarce.examples("static inputs take ranges", examples)
        scarce.tell(work.notes)

    def _watches(self, work: Work) -> dict[str, Watch]:
        if self.activation is None or self.activation.at_each_call:
            return {}
        made = {p: activation_format(self.activation, work.model.get_submodule(p)).watch() for p in work.layers}
        return made

    def _round_all(self, work: Work, survey: Survey, watches: dict[str, Watch]) -> list[LayerReport]:
        """Round the layers in the order in which they run, replacing each by a simulated one."""
        reports: list[LayerReport] = []
        groups = survey.groups or [[path] for path in work.layers]
        done = 0
        for group in groups:
            hessians: dict[str, torch.Tensor] = {}
            finished: list[tuple[str, Simulated]] = []
            for path in group:
                work.told("round", done / len(work.layers))
                done += 1
                report, rounded = self._round(work, survey, watches.get(path), path, group, hessians)
                reports.append(report)
                if rounded is not None:
                    finished.append((path, rounded))
            for path, rounded in finished:  # after the whole group: its members read the same inputs
                work.model = put(work.model, path, rounded)
        for path in work.layers:
            if survey.order and path not in survey.calls:
                size = _size(work.model.get_submodule(path))
                reports.append(LayerReport(path, "kept", "the calibration did not reach it", size, size))
        return reports

    def _round(
        self, work: Work, survey: Survey, watch: Watch | None, path: str, group: list[str],
        hessians: dict[str, torch.Tensor],
    ) -> tuple[LayerReport, Simulated | None]:  # fmt: skip
        module = work.model.get_submodule(path)
        size = _size(module)
        fmt = self.format_of(path)
        weight = matrix(module)
        if not bool(torch.isfinite(weight).all()):
            raise ConfigurationError(f"layer {path!r}: its weight became NaN or infinite while rewriting; drop a step")
        if isinstance(getattr(fmt, "granularity", None), PerGroup) and self.strict:
            group_size = cast(Any, fmt).granularity.size
            if weight.shape[1] % group_size:
                raise ConfigurationError(
                    f"layer {path!r}: groups of {group_size} do not divide its {weight.shape[1]} inputs; give another "
                    "size or strict=False"
                )
        kept = fmt is None
        used: Format = fmt if fmt is not None else Int(16, PerChannel(0))
        try:
            scale, zero = used.find(weight)
        except DataError as reason:
            raise ConfigurationError(f"layer {path!r}: {reason}") from reason
        values = used.fake(weight, scale, zero)
        layer = Layer(path, module, weight, used, scale, zero, values, work, survey, group, hessians)
        if not kept:
            for step in self.steps:
                chosen = step.round(layer)
                if chosen is not None:
                    layer.values = chosen
        activation = None
        if self.activation is not None:
            try:
                limits = watch.parameters() if watch is not None else (None, None)
            except DataError as reason:
                raise ConfigurationError(f"layer {path!r}: {reason}") from reason
            activation = ActivationQuantizer(activation_format(self.activation, module), *limits)
        rounded = Simulated.of(module, used.quantize(layer.values, layer.scale, layer.zero), activation)
        if any(type(step).finish is not Step.finish for step in self.steps):
            work.floats[path] = weight
        for step in self.steps:
            step.correct(layer, rounded)
        error = relative_error(layer, layer.values) if hessians else None
        name = _action(fmt, activation)
        after = rounded.packed_bytes + _bias_bytes(rounded)
        return LayerReport(path, name, "", size, after, error=error), rounded

    def _realise(
        self, work: Work, reports: list[LayerReport], plan: Mapping[str, str], clock: Clock | None
    ) -> list[LayerReport]:
        result = []
        for report in reports:
            layer = work.model.get_submodule(report.layer)
            if not isinstance(layer, Simulated):
                result.append(report)
                continue
            planned = plan.get(report.layer)
            if planned is not None:
                kernel = planned.rpartition(" on ")[2] if " on " in planned else None
                reason, speedup = "as planned", None
            elif self.real == "never":
                kernel, reason, speedup = None, "simulated, as asked", None
            else:
                kernel, reason, speedup = real.decide(layer, self.tokens, self.real == "faster", clock)
            if kernel is None:
                action = report.action
                result.append(replace(report, action=action, reason=f"simulated: {reason}", speedup=speedup))
                continue
            inputs = layer.activation.format if layer.activation is not None else None
            shape = (layer.matrix[0], layer.matrix[1])
            possible = real.candidates(layer.format, inputs, shape, next(layer.buffers()).device)
            if kernel not in possible:
                raise ConfigurationError(
                    f"the plan has {kernel!r} for layer {report.layer!r} of {shape[0]} x {shape[1]}, which "
                    f"{', '.join(possible) or 'no kernel'} runs here; apply the recipe without its plan"
                )
            made: QuantizedLayer = real.realise(layer, kernel)
            work.model = put(work.model, report.layer, made)
            size = made.packed_bytes + _bias_bytes(made)
            action = f"{report.action} on {kernel}"
            result.append(replace(report, action=action, reason=reason, bytes_after=size, speedup=speedup))
        return result


def observers_see(scarce: Scarcity, watches: Mapping[str, Watch], order: Sequence[str]) -> None:
    """Whether observers of static inputs saw the values that they need; refuses a range that would mean nothing."""
    found = {p: w for p, w in watches.items() if p in order and w.observer.needs_points}
    seen = {p: w.fewest for p, w in found.items()}
    for least, what in enumerate(("cannot choose a range", "chooses a loose range")):
        for kind in {type(w.observer) for w in found.values()}:
            needed = {p: w.observer.values_needed[least] for p, w in found.items() if type(w.observer) is kind}
            if least:
                scarce.rows(kind.__name__, seen, needed, what, "values")
            else:
                scarce.refuse(f"{kind.__name__} {what}", seen, needed, "observer=MinMax()", "values")


def recipe_with(model: nn.Module, technique: Any, report: TechniqueReport) -> Recipe:
    """The recipe that led to ``model``, with one technique more, and what came out."""
    before = getattr(model, "recipe", None)
    old = before if isinstance(before, Recipe) else Recipe()
    steps = old.plan.steps if old.plan is not None else ({},) * len(old.techniques)
    return Recipe((*old.techniques, technique), Plan((*steps, *Plan.of([report]).steps)))


def zip_modes(new: nn.Module, old: nn.Module) -> list[tuple[nn.Module, bool]]:
    """Modules of the new model with the training flag that their place had."""
    flags = {path: module.training for path, module in old.named_modules()}
    return [(m, flags[p]) for p, m in new.named_modules() if p in flags]


def _action(fmt: Format | None, activation: ActivationQuantizer | None) -> str:
    name = fmt.label if fmt is not None else "int16 channel"
    return name if activation is None else f"{name}, inputs {activation.format.label}"


def _size(layer: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in layer.parameters(recurse=False))


def _bias_bytes(layer: QuantizedLayer) -> int:
    return 0 if layer.bias is None else layer.bias.numel() * layer.bias.element_size()


def _summary(technique: Quantize, reports: list[LayerReport], kept: int) -> list[str]:
    real_ones = [r for r in reports if " on " in r.action]
    changed = [r for r in reports if r.touched]
    simulated, left = len(changed) - len(real_ones), kept + len(reports) - len(changed)
    notes = [
        f"{len(changed)} layers are {technique.label}: {len(real_ones)} run real kernels, {simulated} are simulated "
        f"(codes are stored, the product is in float: smaller, not faster); {left} layers were kept",
        "embeddings, normalisations, additions and products of two activations (attention) stay in float",
    ]
    return notes
