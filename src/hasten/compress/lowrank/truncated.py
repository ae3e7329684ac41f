"""One matrix at a time: each linear layer becomes the product of two thin ones.

The best rank-r matrix in the norm that calibration gives: ``min |X (W - Ŵ)ᵀ|`` with ``C = XᵀX`` is the truncated SVD of
``W C^½``, taken back by ``C^-½``; without calibration the plain SVD. ``r (in + out)`` numbers take the place of
``in * out``, so a layer is smaller only below half rank, and it is two products where one was. The baseline of pairwise
decomposition, and of ranks that are trained.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from hasten.compress.given import finite_weight
from hasten.compress.lowrank.layers import FactorConv2d, LowRankLinear, truncate
from hasten.compress.lowrank.moments import Moments, observe, output_sqnr, require_cpu
from hasten.compress.replace import replace_module
from hasten.compress.scarce import Scarcity
from hasten.compress.technique import LayerReport, TechniqueReport, register
from hasten.errors import ConfigurationError

__all__ = ["TruncatedSvd", "weighted_factors"]

_WEIGHED = ", weighed by inputs"
"""In a plan: these factors follow from calibration too."""


def weighted_factors(weight: Tensor, rank: int, moment: Tensor | None = None) -> tuple[Tensor, Tensor, float]:
    """up (out, rank), down (rank, in) and the relative error in the norm of ``moment`` (in, in), float64.

    >>> up, down, error = weighted_factors(torch.eye(4), 3)
    >>> up.shape, down.shape, round(error, 3)
    (torch.Size([4, 3]), torch.Size([3, 4]), 0.5)
    """
    if moment is None:
        up, down, values = truncate(weight, rank)
    else:
        spectrum, vectors = torch.linalg.eigh(moment.double())
        floor = 1e-8 * spectrum.max().clamp_min(1e-300)
        root = spectrum.clamp_min(float(floor)).sqrt()
        up, turned, values = truncate(weight.double() @ (vectors * root), rank)
        down = (turned / root) @ vectors.T
    error = float((values[rank:].square().sum() / values.square().sum().clamp_min(1e-300)).sqrt())
    return up, down, error


@register
@dataclass(frozen=True)
class TruncatedSvd:
    """Low-rank factors in the place of linear layers (and convolutions).

    >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    >>> TruncatedSvd(ratio=0.5)(model)[0].rank
    16
    """

    ratio: float | None = 0.5
    """share of each layer's weights that goes: the rank is ``(1 - ratio) in out / (in + out)``"""
    rank: int | None = None
    """the same rank everywhere instead; ``ratio`` must be None then"""
    layers: tuple[str, ...] = ("*",)
    """patterns of layer names that are considered, as in a shell"""
    skip: tuple[str, ...] = ()
    """patterns of layer names that are left as they are"""
    convolutions: bool = False
    """factor convolutions too: a spatial one and one of 1 x 1"""

    name: ClassVar[str] = "truncated-svd"

    def __post_init__(self) -> None:
        if (self.ratio is None) == (self.rank is None):
            raise ConfigurationError(
                f"ratio is {self.ratio} and rank {self.rank}; give one of them, None for the other"
            )
        if self.ratio is not None and not 0 < self.ratio < 1:
            raise ConfigurationError(f"ratio is {self.ratio}; give the share of weights to remove, between 0 and 1")
        if self.rank is not None and self.rank < 1:
            raise ConfigurationError(f"rank is {self.rank}; give at least 1")

    def __call__(
        self,
        model: nn.Module,
        calibration: Sequence[Any] | None = None,
        *,
        progress: Callable[[str, float], None] | None = None,
    ) -> nn.Module:
        """A new module with a ``report``; calibration weighs the inputs of linear layers, and may be left out."""
        return self.apply(model, {}, calibration, progress=progress)

    def apply(
        self,
        model: nn.Module,
        plan: Mapping[str, str],
        calibration: Sequence[Any] | None = None,
        *,
        progress: Callable[[str, float], None] | None = None,
    ) -> nn.Module:
        """As calling it. Raises :class:`~hasten.errors.ConfigurationError` for a plan whose factors were weighed by
        inputs where there are none now: they would be others."""
        weighed = next((n for n, action in plan.items() if action.endswith(_WEIGHED)), None)
        if weighed is not None and not calibration:
            raise ConfigurationError(
                f"the plan has factors of {weighed!r} that were weighed by inputs; give calibration, or apply the "
                "recipe without its plan"
            )
        require_cpu(model)
        clone = copy.deepcopy(model)
        owners: dict[int, int] = {}
        for module in model.modules():
            for parameter in module.parameters(recurse=False):
                owners[id(parameter)] = owners.get(id(parameter), 0) + 1
        found: dict[str, Any] = {}
        for name, module in model.named_modules():
            kind = type(module) is nn.Linear or (self.convolutions and type(module) is nn.Conv2d)
            wanted = any(fnmatchcase(name, p) for p in self.layers) and not any(fnmatchcase(name, p) for p in self.skip)
            if kind and wanted:
                finite_weight(name, module.weight)
                found[name] = module
        moments = {n: Moments(m.in_features) for n, m in found.items() if isinstance(m, nn.Linear)}
        if calibration:
            tell = {n: (lambda given, named, m=m: m.add(given[0])) for n, m in moments.items()}
            observe(model, calibration, tell, progress=lambda s, x: progress(s, 0.5 * x) if progress else None)
        reports = []
        for index, (name, layer) in enumerate(found.items()):
            size = layer.weight.numel() * layer.weight.element_size()
            if owners[id(layer.weight)] > 1:
                reports.append(LayerReport(name, "kept", "its weight is shared with another layer", size, size))
                continue
            moment = moments.get(name)  # of a layer that calibration never reached nothing is known
            report, new = self._factor(name, layer, moment if moment is not None and moment.count else None, size)
            reports.append(report)
            if new is not None:
                new.train(layer.training)
                clone = replace_module(clone, name, new)
            if progress is not None:
                progress("decomposing", 0.5 + 0.5 * (index + 1) / len(found))
        changed = sum(r.touched for r in reports)
        notes = [f"{changed} of {len(reports)} layers are products of two; each is two calls where one was"]
        if not reports:
            notes = [f"no layer to factor matches {', '.join(self.layers)}; the model is unchanged"]
        if calibration:
            scarce, cut = Scarcity(), [r.layer for r in reports if r.touched and r.layer in moments]
            scarce.rows("TruncatedSvd", {n: moments[n].count for n in cut}, {n: found[n].in_features for n in cut})
            scarce.tell(notes)
        measured = {"sqnr": output_sqnr(model, clone, calibration[:4])} if calibration else {}
        clone.report = TechniqueReport(self.name, tuple(reports), tuple(notes), measured)  # type: ignore[assignment]
        return clone

    def _factor(self, name: str, layer: Any, moment: Moments | None, size: int) -> tuple[LayerReport, nn.Module | None]:
        if isinstance(layer, nn.Conv2d) and layer.groups != 1:
            return LayerReport(name, "kept", f"{layer.groups} groups have no common factors", size, size), None
        weight = layer.weight.detach().flatten(1)
        out, inner = weight.shape
        limit = min(out, inner)
        rank = self.rank if self.rank is not None else int((1 - float(self.ratio or 0)) * out * inner / (out + inner))
        if rank < 1 or rank * (out + inner) >= out * inner:
            reason = f"rank {rank} of {limit} would not be smaller than {out} x {inner}"
            return LayerReport(name, "kept", reason, size, size), None
        matrix = None if moment is None or moment.count == 0 else moment.mean
        up, down, error = weighted_factors(weight, rank, matrix)
        after = rank * (out + inner) * layer.weight.element_size()
        action = f"rank {rank}" + ("" if matrix is None else _WEIGHED)
        report = LayerReport(name, action, f"of {limit}", size, after, error=error)
        if isinstance(layer, nn.Conv2d):
            return report, FactorConv2d.from_factors(layer, up, down)
        dtype = layer.weight.dtype
        bias = None if layer.bias is None else layer.bias.detach().clone()
        return report, LowRankLinear(down.to(dtype).contiguous(), up.to(dtype).contiguous(), bias=bias)
