"""Weights in fewer bits, layer by layer, only where that is measured to be faster.

Each ``nn.Linear`` is given the fastest of the kernels that store its weight in the wanted format, measured on the
layer's device for its shape and the number of rows that it will see. A layer that would become slower than it is
stays as it is, and the report says so. Rounding to nearest: no calibration is needed; with calibration inputs the
loss of the whole model is measured (SQNR of its output).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from hasten.clock import Clock
from hasten.compress import kernels
from hasten.compress.given import finite_weight, planned_for, run_example
from hasten.compress.packed import from_plain, rows_for, to_plain
from hasten.compress.replace import replace_module, told_of
from hasten.compress.technique import LayerReport, TechniqueReport, register, sqnr
from hasten.errors import ConfigurationError

__all__ = ["PackedLinear", "WeightPrecision"]

FORMATS = ("fp32", "bf16", "int8", "int4", "fp8")


class PackedLinear(nn.Module):
    """``nn.Linear`` whose weight is packed for one kernel of one device; inference only.

    >>> layer = PackedLinear.of(nn.Linear(64, 32), "int8-dynamic")
    >>> layer(torch.zeros(2, 5, 64)).shape, layer.packed_bytes
    (torch.Size([2, 5, 32]), 2176)
    """

    bias: Tensor | None

    def __init__(self, packed: kernels.Packed, bias: Tensor | None, name: str) -> None:
        super().__init__()
        self.packed = packed
        self.kernel_name = name
        self.out_features, self.in_features = packed.shape
        self.register_buffer("bias", bias)
        self._run = kernels.kernel(name, packed.device).run

    @classmethod
    def of(cls, layer: nn.Linear, name: str) -> PackedLinear:
        """Pack the weight of ``layer`` for the kernel ``name``; the layer is not changed."""
        bias = layer.bias.detach().clone() if layer.bias is not None else None
        return cls(kernels.kernel(name, layer.weight.device).pack(layer.weight), bias, name)

    @property
    def packed_bytes(self) -> int:
        """Bytes of the packed weight (the bias is a buffer and counts there)."""
        return self.packed.bytes

    def forward(self, x: Tensor) -> Tensor:
        """(…, in) -> (…, out) in the format of ``x``."""
        if x.device != self.packed.device:
            raise ConfigurationError(
                f"a layer packed on {self.packed.device} was given an input on {x.device}; move the model to the "
                "device on which it shall run before it is compressed"
            )
        rows = rows_for(x, self.in_features)
        result = self._run(rows, self.packed)
        if self.bias is not None:
            result = result + self.bias.to(result.dtype)
        return result.reshape(*x.shape[:-1], self.out_features)

    def plain(self) -> nn.Linear:
        """The same layer as ``nn.Linear`` in float32, with the weight that the kernel really uses."""
        layer = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None)
        kernel = kernels.kernel(self.kernel_name, self.packed.device)
        layer.weight = nn.Parameter(kernel.unpack(self.packed), requires_grad=False)
        if self.bias is not None:
            layer.bias = nn.Parameter(self.bias.float(), requires_grad=False)
        return layer

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        held = to_plain(self.packed, self.kernel_name)
        destination.update({f"{prefix}packed.{name}": tensor for name, tensor in held.items()})

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """Takes another weight of the same shape for the same kernel."""
        start = f"{prefix}packed."
        held = {k.removeprefix(start): state_dict.pop(k) for k in list(state_dict) if k.startswith(start)}
        super()._load_from_state_dict(state_dict, prefix, *rest)
        if "about" in held:
            self.packed, _ = from_plain(held, (self.kernel_name, self.packed.shape))
        else:
            rest[2].append(f"{start}about")  # missing keys

    def __getstate__(self) -> dict[str, Any]:
        held = {k: v for k, v in self.__dict__.items() if k not in ("packed", "_run")}
        return {**held, "packed": to_plain(self.packed, self.kernel_name)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        packed, name = from_plain(state["packed"])
        super().__setstate__({k: v for k, v in state.items() if k != "packed"})  # type: ignore[no-untyped-call]
        self.packed = packed
        self._run = kernels.kernel(name, packed.device).run

    def __deepcopy__(self, memo: dict[int, Any]) -> PackedLinear:
        bias = None if self.bias is None else self.bias.clone()
        return told_of(self, PackedLinear(self.packed, bias, self.kernel_name).train(self.training))

    def extra_repr(self) -> str:
        """For ``print(model)``."""
        return f"in_features={self.in_features}, out_features={self.out_features}, kernel={self.kernel_name}"


_CURRENT = {torch.float32: "fp32", torch.bfloat16: "bf16"}
"""The kernel of a layer that nothing was done to."""


@register
@dataclass(frozen=True)
class WeightPrecision:
    """Store the weights of linear layers in ``format``.

    >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    >>> smaller = WeightPrecision("int8", only_faster=False)(model)
    >>> smaller.report.touched, smaller.report.skipped
    (('0',), {'2': 'no int8 kernel takes a weight of 10 x 64'})
    """

    format: str = "int8"
    """fp32, bf16, int8 or int4; fp8 on a GPU"""
    group_size: int = 32
    """inputs that share a scale; int4 only: 32, 64, 128 or 256"""
    layers: tuple[str, ...] = ("*",)
    """patterns of layer names that are considered, as in a shell"""
    skip: tuple[str, ...] = ()
    """patterns of layer names that are left as they are"""
    tokens: int = 1
    """rows that a layer sees at a time; decides which kernel is fastest"""
    only_faster: bool = True
    """keep a layer that would become slower; False packs it anyway, for its memory"""

    name: ClassVar[str] = "weight-precision"

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise ConfigurationError(f"format {self.format!r} is not known; give one of {', '.join(FORMATS)}")
        if self.group_size not in kernels.GROUP_SIZES:
            sizes = ", ".join(map(str, kernels.GROUP_SIZES))
            raise ConfigurationError(f"a group of {self.group_size} has no kernel; give one of {sizes}")
        if self.tokens < 1:
            raise ConfigurationError(f"a layer sees at least one row, got {self.tokens}")

    def __call__(
        self, model: nn.Module, calibration: Sequence[Any] | None = None, *, clock: Clock | None = None
    ) -> nn.Module:
        """A new module with a ``report``; ``calibration`` is example inputs for the loss of the whole model."""
        return self.apply(model, {}, calibration, clock=clock)

    def apply(
        self,
        model: nn.Module,
        plan: Mapping[str, str],
        calibration: Sequence[Any] | None = None,
        *,
        clock: Clock | None = None,
    ) -> nn.Module:
        """As a call, but layers that ``plan`` names (layer -> kernel or ``kept``) follow it without measuring."""
        planned_for(model, plan)
        clone = copy.deepcopy(model)
        reports: list[LayerReport] = []
        shared = _shared_weights(clone)
        for path, layer in list(clone.named_modules()):
            if type(layer) is not nn.Linear or not self._considers(path):
                continue
            finite_weight(path, layer.weight)
            report = self._decide(path, layer, plan.get(path), shared, clock)
            if report.touched:
                packed = PackedLinear.of(layer, report.action).train(layer.training)
                report = _with_bytes(report, packed.packed_bytes)
                clone = replace_module(clone, path, packed)
            reports.append(report)
        measured = {}
        if calibration:
            measured["sqnr"] = _loss(model, clone, calibration)
        kept = sum(not r.touched for r in reports)
        notes = [f"{len(reports) - kept} of {len(reports)} linear layers run in {self.format}, {kept} were kept"]
        if not reports:
            notes = [f"no linear layer matches {', '.join(self.layers)}; the model is unchanged"]
        clone.report = TechniqueReport(self.name, tuple(reports), tuple(notes), measured)  # type: ignore[assignment]
        return clone

    def saved_time(self, model: nn.Module, *, clock: Clock | None = None) -> float:
        """Seconds that the layers of ``model`` would save in one call, by the measured table of kernels; nothing is
        built. Less than nothing where ``only_faster`` is off and kernels are slower."""
        shared, saved = _shared_weights(model), 0.0
        for path, layer in model.named_modules():
            if type(layer) is nn.Linear and self._considers(path) and id(layer.weight) not in shared:
                times = self._times(layer, clock)
                if times is not None:
                    gain = times[0] - min(times[1].values())
                    saved += max(0.0, gain) if self.only_faster else gain
        return saved

    def _times(self, layer: nn.Linear, clock: Clock | None) -> tuple[float, dict[str, float]] | None:
        """Seconds of the layer as it is, and of each kernel of the format; None where nothing can be compared."""
        shape = (layer.out_features, layer.in_features)
        names, current = self._candidates(shape, layer.weight.device), _CURRENT.get(layer.weight.dtype)
        if not names or current is None:
            return None
        rows = layer.weight.dtype
        times = kernels.measure_kernels(
            shape, self.tokens, [current, *names], clock=clock, inputs=rows, device=layer.weight.device
        )
        return times[current], {n: times[n] for n in names}

    def _considers(self, path: str) -> bool:
        wanted = any(fnmatchcase(path, p) for p in self.layers)
        return wanted and not any(fnmatchcase(path, p) for p in self.skip)

    def _candidates(self, shape: tuple[int, int], device: torch.device) -> list[str]:
        names, wanted = [], f"int4-g{self.group_size}"
        for candidate in kernels.available(device):
            if candidate.precision != self.format or not candidate.supports(*shape):
                continue
            if candidate.precision == "int4" and not f"{candidate.name}-".startswith(f"{wanted}-"):
                continue
            names.append(candidate.name)
        return names

    def _decide(
        self, path: str, layer: nn.Linear, planned: str | None, shared: set[int], clock: Clock | None
    ) -> LayerReport:
        shape = (layer.out_features, layer.in_features)
        size = layer.weight.numel() * layer.weight.element_size()
        if planned is not None:
            fitting_kernels = self._candidates(shape, layer.weight.device)
            if planned != "kept" and planned not in fitting_kernels:
                raise ConfigurationError(
                    f"the plan has {planned!r} for layer {path!r} of {shape[0]} x {shape[1]}, where {self.format} runs "
                    f"on {', '.join(fitting_kernels) or 'no kernel'} here; apply the recipe without its plan"
                )
            return LayerReport(path, planned, "as planned", size, size)
        if id(layer.weight) in shared:
            return LayerReport(path, "kept", "its weight is shared with another layer", size, size)
        names = self._candidates(shape, layer.weight.device)
        if not names:
            return LayerReport(
                path, "kept", f"no {self.format} kernel takes a weight of {shape[0]} x {shape[1]}", size, size
            )
        current = _CURRENT.get(layer.weight.dtype)
        if current is None:
            return LayerReport(path, "kept", f"its weight is {layer.weight.dtype}", size, size)
        if current == self.format and len(names) == 1:
            return LayerReport(path, "kept", f"it is {current} already", size, size)
        rows = layer.weight.dtype
        times = kernels.measure_kernels(
            shape, self.tokens, [current, *names], clock=clock, inputs=rows, device=layer.weight.device
        )
        best = min(names, key=lambda n: times[n])
        speedup = times[current] / times[best]
        if best == current:
            return LayerReport(path, "kept", f"{current} is the fastest already", size, size, 1.0)
        if self.only_faster and speedup < 1:
            reason = f"{best} would take {1 / speedup:.2f}× the time of {current} at {self.tokens} rows"
            return LayerReport(path, "kept", reason, size, size, speedup)
        return LayerReport(path, best, f"{speedup:.2f}× as fast at {self.tokens} rows", size, size, speedup)


def _with_bytes(report: LayerReport, size: int) -> LayerReport:
    return LayerReport(
        report.layer, report.action, report.reason, report.bytes_before, size, report.speedup, report.error
    )


def _shared_weights(model: nn.Module) -> set[int]:
    """Identities of parameters that more than one module owns."""
    owners: dict[int, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    return {identity for identity, count in owners.items() if count > 1}


def _loss(model: nn.Module, other: nn.Module, calibration: Sequence[Any]) -> float:
    """SQNR of the output in dB, both in eval mode."""
    results = []
    for one in (model, other):
        modes = [(m, m.training) for m in one.modules()]
        one.eval()
        with torch.inference_mode():
            outputs = [run_example(one, example, index) for index, example in enumerate(calibration)]
        for module, training in modes:
            module.training = training
        results.append(torch.cat([o.flatten() for out in outputs for o in _leaves(out)]))
    return sqnr(results[0], results[1])


def _leaves(tree: Any) -> list[Tensor]:
    from torch.utils import _pytree as pytree

    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
