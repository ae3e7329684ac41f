"""A convolutional network run in bytes where it is measured to be faster.

Weights are symmetric int8 with a scale for each output channel, activations unsigned bytes with a scale and a zero
point for each tensor, from calibration images. Sums are int32; batch normalisations, biases, additions and clamps are
part of the convolution before them ("Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only
Inference", Jacob et al. 2018, arXiv:1712.05877; differs in: sums are scaled in float32, not by fixed-point factors).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, fx, nn

from hasten.clock import Clock
from hasten.compress.int8.lowering import Unsupported, lower, trace
from hasten.compress.int8.network import IntegerNetwork
from hasten.compress.int8.operations import Convolution
from hasten.compress.quantize import Int, MinMax, PerTensor
from hasten.compress.quantize.fold import fold_batch_norm
from hasten.compress.quantize.observers import Observer, Watch
from hasten.compress.quantize.technique import observers_see
from hasten.compress.scarce import Scarcity, count_examples
from hasten.compress.technique import LayerReport, TechniqueReport, register, sqnr
from hasten.errors import ConfigurationError
from hasten.measure.latency import Protocol, compare
from hasten.nn.product.instructions import has_bytes

__all__ = ["Int8Network"]


@register
@dataclass(frozen=True)
class Int8Network:
    """Run a whole convolutional network in bytes.

    >>> net = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
    ...                     nn.Linear(16, 10)).eval()
    >>> fast = Int8Network(only_faster=False)(net, [torch.rand(4, 3, 8, 8)])
    >>> fast(torch.rand(2, 3, 8, 8)).shape, fast.report.touched
    (torch.Size([2, 10]), ('0', '4'))
    """

    observer: Observer = field(default_factory=MinMax)
    """how the range of an activation is chosen from the calibration images"""
    only_faster: bool = True
    """keep the network where it is measured to be slower on the first calibration batch"""

    name: ClassVar[str] = "int8-network"

    def __call__(
        self, model: nn.Module, calibration: Sequence[Any] | None = None, *, clock: Clock | None = None
    ) -> nn.Module:
        """A new module with a ``report``; ``calibration`` is image tensors (batch, channels, height, width), all of one
        shape but for the batch."""
        return self.apply(model, {}, calibration, clock=clock)

    def apply(
        self,
        model: nn.Module,
        plan: Mapping[str, str],
        calibration: Sequence[Any] | None = None,
        *,
        clock: Clock | None = None,
    ) -> nn.Module:
        """As a call; a plan that keeps every layer is followed without measuring."""
        images, scarce = self._images(calibration), Scarcity()
        copied = copy.deepcopy(model)
        layers = [(n, m) for n, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
        if plan and all(action == "kept" for action in plan.values()):
            return self._kept(copied, layers, "as planned")
        folded = copy.deepcopy(model).eval()
        fold_batch_norm(folded)
        try:
            if not has_bytes():
                raise Unsupported("this processor has no vpdpbusd on registers of 512 bits")
            graph = trace(folded)
            network = IntegerNetwork(lower(graph, images[0], self._ranges(graph, images, scarce)), folded)
        except Unsupported as reason:
            return self._kept(copied, layers, str(reason))
        _store_rounded_weights(network, folded)
        small, speedup = network.train(model.training), None
        if not plan:
            with torch.inference_mode():
                rules = Protocol(warmup=2, warmup_time=0.0, min_samples=9, min_time=0.05, max_time=4.0)
                eager = copied.eval()
                result = compare(
                    {"float": lambda: eager(images[0]), "bytes": lambda: network(images[0])}, rules, clock=clock
                )
                copied.train(model.training)
            best = {n: s.summary.minimum for n, s in result.samples.items()}
            speedup = best["float"] / best["bytes"]
            if self.only_faster and speedup < 1:
                return self._kept(copied, layers, f"bytes would take {1 / speedup:.2f}× the time of the float network")
        notes: list[str] = []
        scarce.tell(notes)
        small.report = self._report(model, network, layers, speedup, images, notes)  # type: ignore[assignment]
        return small

    def _images(self, calibration: Sequence[Any] | None) -> list[Tensor]:
        images = list(calibration or [])
        if not images:
            raise ConfigurationError(
                "int8-network needs calibration images; give a list of (batch, channels, height, width)"
            )
        for image in images:
            if not isinstance(image, Tensor) or image.dim() != 4 or image.shape[1:] != images[0].shape[1:]:
                got = tuple(image.shape) if isinstance(image, Tensor) else type(image).__name__
                raise ConfigurationError(
                    f"calibration holds {got}; give tensors (batch, channels, height, width) of one image shape"
                )
        return [i.float() for i in images]

    def _ranges(self, graph: fx.GraphModule, images: list[Tensor], scarce: Scarcity) -> Any:
        """Ranges of the values that are kept as bytes; which these are, a first lowering tells."""
        asked: list[str] = []

        def ask(name: str) -> tuple[float, float]:
            asked.append(name)
            return 0.0, 1.0

        lower(graph, images[0], ask)
        byte = Int(8, PerTensor(), symmetric=False)
        watches = {name: Watch(self.observer, byte) for name in asked}
        watcher = _Watcher(graph, watches)
        with torch.inference_mode():
            for image in images:
                watcher.run(image)
        observers_see(scarce, watches, asked)
        scarce.examples("activations take ranges", count_examples(images))
        found = {name: tuple(float(x) for x in watch.range()) for name, watch in watches.items()}
        return found.__getitem__

    def _kept(self, model: nn.Module, layers: list[tuple[str, Any]], reason: str) -> nn.Module:
        rows = tuple(LayerReport(n, "kept", reason, _size(m), _size(m)) for n, m in layers)
        model.report = TechniqueReport(self.name, rows, (f"the network is unchanged: {reason}",))  # type: ignore[assignment]
        return model

    def _report(
        self, model: nn.Module, network: IntegerNetwork, layers: list[tuple[str, Any]], speedup: float | None,
        images: list[Tensor], notes: list[str],
    ) -> TechniqueReport:  # fmt: skip
        done = {o.name: o for o in network.lowered.operations if isinstance(o, Convolution)}
        rows = []
        for name, module in layers:
            operation = done.get(name)
            if operation is None:
                rows.append(LayerReport(name, "kept", "nothing in the graph reads it", _size(module), _size(module)))
                continue
            kind = "int8-depthwise" if operation.depthwise else "int8"
            size = operation.weight.size + 8 * len(operation.weight)
            rows.append(LayerReport(name, kind, "sums in int32", _size(module), size))
        measured = {"sqnr": _sqnr(model, network, images)}
        note = f"{len(done)} layers run in bytes in {len(network.lowered.operations)} operations"
        if speedup is not None:
            note += f", {speedup:.2f}× as fast as the float network at batch {len(images[0])}"
            measured["speedup"] = speedup
        return TechniqueReport(self.name, tuple(rows), (note, *notes), measured)


class _Watcher(fx.Interpreter):
    def __init__(self, graph: fx.GraphModule, watches: Mapping[str, Watch]) -> None:
        super().__init__(graph)
        self.watches = watches

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n.name in self.watches:
            self.watches[n.name].update(result)
        return result


def _size(module: Any) -> int:
    return int(module.weight.numel() * module.weight.element_size())


def _store_rounded_weights(network: IntegerNetwork, model: nn.Module) -> None:
    """The float twin uses the weights that the bytes stand for."""
    for operation in network.lowered.operations:
        if isinstance(operation, Convolution):
            module: Any = model.get_submodule(operation.name)
            rounded = operation.weight * operation.weight_scale[:, None, None, None]
            module.weight = nn.Parameter(
                torch.from_numpy(rounded).to(module.weight.dtype).reshape(module.weight.shape), requires_grad=False
            )


def _sqnr(model: nn.Module, network: nn.Module, images: list[Tensor]) -> float:
    modes = [(m, m.training) for m in model.modules()]
    model.eval()
    with torch.inference_mode():
        pairs = [(model(i), network(i)) for i in images]
    for module, training in modes:
        module.training = training
    return sqnr(torch.cat([a.flatten() for a, _ in pairs]), torch.cat([b.flatten() for _, b in pairs]))
