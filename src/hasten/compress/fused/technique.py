"""A small network run in one call where it is measured to be faster.

Of the time of a small transformer at batch 1, most passes between its operations, not in them: each asks Python and
torch for a kernel, a place and a shape. Here the model is exported once, its operations become rows of a table and its
weights panels of our products, and one compiled loop runs them all. In float32 nothing is rounded but sums; with
bfloat16 or bytes the products take rounded weights and rows.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from hasten.clock import Clock
from hasten.compress.acm.module import AdaptiveComputation
from hasten.compress.fused.network import INPUTS, FusedModule, cannot_run
from hasten.compress.given import finite_parameters, planned_for
from hasten.compress.technique import LayerReport, TechniqueReport, register, sqnr
from hasten.errors import ConfigurationError
from hasten.measure.latency import Protocol, compare

__all__ = ["FusedNetwork"]

_LEAST = {"fp32": 60.0, "bf16": 10.0, "int8": 5.0}
"""Decibels between the model's outputs and these: below, the lowering is not that of the model."""
_RULES = Protocol(warmup=2, warmup_time=0.0, min_samples=15, min_time=0.05, max_time=4.0)


@register
@dataclass(frozen=True)
class FusedNetwork:
    """Run a whole network in one call.

    >>> model = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 4)).eval()
    >>> fast = FusedNetwork(only_faster=False)(model, [torch.rand(1, 16)])
    >>> fast(torch.rand(2, 16)).shape, fast.report.touched
    (torch.Size([2, 4]), ('0', '2'))
    """

    precision: str = "fp32"
    """of the products: fp32, bf16 or int8"""
    only_faster: bool = True
    """keep the model where it is measured to be slower on the first calibration input"""

    name: ClassVar[str] = "fused-network"

    def __post_init__(self) -> None:
        if self.precision not in _LEAST:
            raise ConfigurationError(f"precision {self.precision!r} is not known; give one of {', '.join(_LEAST)}")

    @property
    def label(self) -> str:
        """For tables.

        >>> FusedNetwork("bf16").label
        'fused bf16'
        """
        return f"fused {self.precision}" + ("" if self.only_faster else " only_faster=False")

    def __call__(
        self, model: nn.Module, calibration: Sequence[Any] | None = None, *, clock: Clock | None = None
    ) -> nn.Module:
        """A new module with a ``report``; the first of ``calibration`` (a tensor or a tuple of them, batch first) tells
        the shape and is what both are timed and compared on."""
        return self.apply(model, {}, calibration, clock=clock)

    def apply(
        self,
        model: nn.Module,
        plan: Mapping[str, str],
        calibration: Sequence[Any] | None = None,
        *,
        clock: Clock | None = None,
    ) -> nn.Module:
        """As a call; a plan is followed without measuring, and without calibration too."""
        planned_for(model, plan)
        finite_parameters(model, "run in one call")
        copied = copy.deepcopy(model)
        layers = [(n, m) for n, m in model.named_modules() if _holds(m)]
        if plan and all(action == "kept" for action in plan.values()):
            return self._kept(copied, layers, "as planned")
        if not calibration and not plan:
            raise ConfigurationError("fused-network needs an example; give calibration=[input]")
        reason = cannot_run(self.precision)
        if reason is not None:
            return self._kept(copied, layers, reason)
        small = FusedModule(copy.deepcopy(model).eval(), self.precision).train(model.training)
        if not calibration:
            rows = tuple(LayerReport(layer, action, "as planned") for layer, action in plan.items())
            small.report = TechniqueReport(self.name, rows, ("lowered when it is first called",))  # type: ignore[assignment]
            return small
        example = calibration[0] if isinstance(calibration[0], tuple) else (calibration[0],)
        if not all(isinstance(x, Tensor) and x.dtype in INPUTS for x in example):
            return self._kept(copied, layers, "its inputs are not all tensors of float32 or whole numbers")
        modes = [(m, m.training) for m in copied.modules()]
        plain = copied.eval()
        try:
            with torch.inference_mode():
                (expected, spec), (found, own) = (pytree.tree_flatten(m(*example)) for m in (plain, small))
                if spec != own or any(a.shape != b.shape for a, b in zip(expected, found, strict=True)):
                    return self._kept(copied, layers, "its result does not begin with the batch of its input")
                quality = min(sqnr(a, b) for a, b in zip(expected, found, strict=True))
                if not quality >= _LEAST[self.precision]:
                    return self._kept(
                        copied, layers,
                        f"in one call the result is {quality:.0f} dB from the model's; samples of a batch may "
                        "depend on each other, or the numbers may be too far apart for this precision",
                    )  # fmt: skip
                speedup = None if plan else self._speedup(plain, small, example, clock)
        except ConfigurationError as error:
            return self._kept(copied, layers, str(error).partition("; call the model")[0])
        finally:
            for module, training in modes:
                module.training = training
        if speedup is not None and self.only_faster and speedup < 1:
            return self._kept(copied, layers, f"one call would take {1 / speedup:.2f}× the time of the model")
        small.report = self._report(small, layers, speedup, quality, len(example[0]))  # type: ignore[assignment]
        return small

    def _speedup(self, plain: nn.Module, small: nn.Module, example: tuple[Any, ...], clock: Clock | None) -> float:
        calls = {"model": lambda: plain(*example), "one call": lambda: small(*example)}
        result = compare(calls, _RULES, clock=clock)
        best = {n: s.summary.minimum for n, s in result.samples.items()}
        return best["model"] / best["one call"] if best["one call"] else 1.0

    def _kept(self, model: nn.Module, layers: list[tuple[str, Any]], reason: str) -> nn.Module:
        rows = tuple(LayerReport(n, "kept", reason, _size(m), _size(m)) for n, m in layers)
        model.report = TechniqueReport(self.name, rows, (f"the model is unchanged: {reason}",))  # type: ignore[assignment]
        return model

    def _report(
        self, small: FusedModule, layers: list[tuple[str, Any]], speedup: float | None, quality: float, batch: int
    ) -> TechniqueReport:
        packed = set(small.matrices.names)
        rows = []
        for name, module in layers:
            size = _size(module)
            start = f"{name}." if name else ""
            mine = [n for n in packed if n == f"{start}weight" or n.startswith((f"{start}into[", f"{start}out["))]
            after = sum(small.matrices.bytes_of(n) for n in mine)
            if any(small.matrices.precision_of(n) != "fp32" for n in mine):
                rows.append(LayerReport(name, self.precision, "in one call", size, after))
            else:
                rows.append(LayerReport(name, "fp32", "in one call", size, after or size))
        note = f"{len(packed)} products and all between them run in one call"
        measured = {"sqnr": quality}
        if speedup is not None:
            note += f", {speedup:.2f}× as fast as the model at batch {batch}"
            measured["speedup"] = speedup
        return TechniqueReport(self.name, tuple(rows), (note,), measured)


def _holds(module: nn.Module) -> bool:
    """Whether a module has weights of its own."""
    return isinstance(getattr(module, "weight", None), Tensor) or isinstance(module, AdaptiveComputation)


def _size(module: Any) -> int:
    weights = [module.into, module.out] if isinstance(module, AdaptiveComputation) else [module.weight]
    return sum(w.numel() * w.element_size() for w in weights)
