"""How far a smaller model is from the one it came from: layer by layer and in the end, on the same inputs.

Both models run on each batch; sums are kept, not outputs. ``cosine`` of all elements, ``sqnr`` in dB, ``kl`` of the
softmax over the last axis (mean in nats, model to small), ``top1``: share of rows with the same largest entry. A
layer that batch normalisation was folded into is compared behind the normalisation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from hasten.compress.quantize.graph import pairs
from hasten.compress.quantize.layers import QuantizedLayer
from hasten.compress.quantize.passes import evaluating
from hasten.errors import ConfigurationError, DataError
from hasten.measure.counting import call

__all__ = ["METRICS", "ModelComparison", "compare"]

METRICS = ("cosine", "sqnr", "kl", "top1")


@dataclass
class _Sums:
    dot: float = 0.0
    ours: float = 0.0
    theirs: float = 0.0
    noise: float = 0.0
    kl: float = 0.0
    same: float = 0.0
    rows: int = 0

    def add(self, reference: Tensor, other: Tensor, rows: bool) -> None:
        a, b = reference.detach().double(), other.detach().double()
        self.dot += float((a * b).sum())
        self.ours += float(a.square().sum())
        self.theirs += float(b.square().sum())
        self.noise += float((a - b).square().sum())
        if rows and a.dim() > 0 and a.shape[-1] > 1:
            p, q = a.log_softmax(-1), b.log_softmax(-1)
            self.kl += float((p.exp() * (p - q)).sum())
            self.same += float((a.argmax(-1) == b.argmax(-1)).sum())
            self.rows += a[..., 0].numel()

    def metrics(self, wanted: Sequence[str]) -> dict[str, float]:
        noise = self.noise
        known = {
            "cosine": self.dot / math.sqrt(self.ours * self.theirs)
            if self.ours * self.theirs > 0
            else float(noise == 0),
            "sqnr": math.inf if noise == 0 else 10 * math.log10(max(self.ours, 1e-300) / noise),
        }
        if self.rows:
            known |= {"kl": max(self.kl / self.rows, 0.0), "top1": self.same / self.rows}
        return {name: known[name] for name in wanted if name in known}


@dataclass(frozen=True)
class ModelComparison:
    """What :func:`compare` found."""

    layers: dict[str, dict[str, float]]
    """layer -> metric -> value, in the order of the model"""
    end: dict[str, float]
    """metrics of the model's output"""
    batches: int
    """how many were run"""
    notes: tuple[str, ...] = field(default=())
    """layers that could not be compared"""

    def __str__(self) -> str:
        names = list(self.end)
        rows = [
            ("layer", *names),
            *((k, *(f"{v.get(n, math.nan):.4g}" for n in names)) for k, v in self.layers.items()),
        ]
        rows.append(("output", *(f"{self.end[n]:.4g}" for n in names)))
        widths = [max(len(r[i]) for r in rows) for i in range(len(names) + 1)]
        return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(r, widths, strict=True)).rstrip() for r in rows)


def compare(
    model: nn.Module,
    small: nn.Module,
    batches: Iterable[Any],
    metrics: Sequence[str] = ("cosine", "sqnr", "kl"),
    *,
    layers: Sequence[str] | None = None,
    progress: Callable[[str, float], None] | None = None,
) -> ModelComparison:
    """Run both on ``batches`` (inputs as the model is called with) and compare.

    ``layers`` names what is compared; the quantised layers of ``small`` where not given. Neither model is changed.

    >>> import torch
    >>> from hasten.compress.quantize import Quantize
    >>> net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    >>> result = compare(net, Quantize.scheme("W8A16")(net), [torch.randn(8, 64)])
    >>> list(result.layers), result.end["sqnr"] > 30
    (['0', '2'], True)
    """
    unknown = [m for m in metrics if m not in METRICS]
    if unknown:
        raise ConfigurationError(f"metric {', '.join(unknown)} is not known; give some of {', '.join(METRICS)}")
    behind = {
        p.first: p.second
        for p in pairs(model, (nn.Linear, nn.Conv1d, nn.Conv2d), (nn.modules.batchnorm._BatchNorm,), between=False)
    }
    named = [n for n, m in small.named_modules() if isinstance(m, QuantizedLayer)] if layers is None else list(layers)
    here, there = dict(model.named_modules()), dict(small.named_modules())
    places = {n: behind[n] if isinstance(there.get(behind.get(n, "")), nn.Identity) else n for n in named}
    missing = [n for n, p in places.items() if p not in here or p not in there]
    sums = {n: _Sums() for n in named if n not in missing}
    end = _Sums()
    caught: tuple[dict[str, list[Tensor]], dict[str, list[Tensor]]] = ({}, {})
    handles: list[Any] = []
    for modules, outputs in zip((here, there), caught, strict=True):
        for name in sums:
            if places[name]:  # the model itself is compared at the end
                handles.append(modules[places[name]].register_forward_hook(_catch(outputs, name)))
    count = 0
    listed = list(batches)
    try:
        with evaluating(model), evaluating(small):
            for batch in listed:
                for outputs in caught:
                    outputs.clear()
                reference, other = _first(call(model, batch)), _first(call(small, batch))
                end.add(reference, other, rows=True)
                for name, total in sums.items():
                    for a, b in zip(caught[0].get(name, []), caught[1].get(name, []), strict=False):
                        total.add(a, b, rows=False)
                count += 1
                if progress is not None:
                    progress("compare", count / len(listed))
    finally:
        for handle in handles:
            handle.remove()
    if not count:
        raise DataError("there is no batch to compare on; give at least one")
    notes = tuple(f"{name} is not in both models" for name in missing)
    return ModelComparison({n: s.metrics(metrics) for n, s in sums.items()}, end.metrics(metrics), count, notes)


def _catch(outputs: dict[str, list[Tensor]], name: str) -> Callable[..., None]:
    def hook(module: nn.Module, arguments: Any, result: Any) -> None:
        if isinstance(result, Tensor):
            outputs.setdefault(name, []).append(result)

    return hook


def _first(result: Any) -> Tensor:
    from torch.utils import _pytree as pytree

    for leaf in pytree.tree_leaves(result):
        if isinstance(leaf, Tensor) and leaf.is_floating_point():
            return leaf
    raise DataError(f"the model gives no tensor of floats but {type(result).__name__}; compare a model that does")
