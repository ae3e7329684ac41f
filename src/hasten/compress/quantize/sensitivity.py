"""How sharp the loss is around each layer's weights: extreme Hessian eigenvalues over disjoint portions of the data.

    Ω_i = |mean_j λ_ij| + std_j λ_ij,   λ_ij of largest magnitude in ∂²L_j/∂W_i², L_j the loss on portion j

The spread counts, since a layer can be flat on one portion and sharp on another. A clearly negative eigenvalue says
that the model is not at a minimum, and that few bits will cost more than they should.

"Q-BERT: Hessian Based Ultra Low Precision Quantization of BERT", Shen et al. 2020, arXiv:1909.05840. Differs from the
paper in that both ends come from Lanczos (power iteration where ``both_ends=False``) and operators that
hide their second derivative are looked for.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from torch import nn

from hasten.compress.quantize.hessian import Ends, Hessian, Loss, lanczos, power_iteration
from hasten.compress.quantize.portions import portions
from hasten.compress.quantize.selection import parameters_of, weight_blocks
from hasten.errors import ConfigurationError
from hasten.files import write_text

__all__ = ["HessianSpectrum", "LayerSpectrum", "Spectrum"]

NEGATIVE = 0.05
"""share of the top eigenvalue below zero at which a model counts as not converged"""


@dataclass(frozen=True)
class LayerSpectrum:
    """The curvature of the loss in one block of weights."""

    layer: str
    """path of the module"""
    parameters: tuple[str, ...]
    """paths of its weights"""
    size: int
    """numbers in them"""
    eigenvalues: tuple[float, ...]
    """of largest magnitude, one per portion"""
    bottoms: tuple[float, ...]
    """smallest, one per portion; empty where only one end was asked for"""
    exact: bool = True
    """whether every eigenvalue was found within the tolerance"""

    @property
    def mean(self) -> float:
        """Over the portions."""
        return float(np.mean(self.eigenvalues))

    @property
    def std(self) -> float:
        """Over the portions."""
        return float(np.std(self.eigenvalues))

    @property
    def omega(self) -> float:
        """``|mean| + std``."""
        return abs(self.mean) + self.std

    @property
    def bottom(self) -> float:
        """The smallest eigenvalue, mean of the portions; of the eigenvalues known where only one end was asked for."""
        return float(np.mean(self.bottoms or [min(v, 0.0) for v in self.eigenvalues]))

    @property
    def converged(self) -> bool:
        """Whether the negative end is small beside the positive one."""
        return -self.bottom <= NEGATIVE * max(self.mean, 0.0) or self.bottom >= 0


@dataclass(frozen=True)
class Spectrum:
    """Sensitivity of every block; ``print`` shows it as a table."""

    layers: tuple[LayerSpectrum, ...]
    """in the model's order"""
    products: int = 0
    """Hessian-vector products that were taken"""

    def __getitem__(self, layer: str) -> LayerSpectrum:
        for row in self.layers:
            if row.layer == layer:
                return row
        raise ConfigurationError(f"no sensitivity of {layer!r} is known; known are {', '.join(self.names)}")

    @property
    def names(self) -> tuple[str, ...]:
        """The blocks, in the model's order."""
        return tuple(r.layer for r in self.layers)

    @property
    def order(self) -> tuple[str, ...]:
        """The blocks, most sensitive first."""
        return tuple(r.layer for r in sorted(self.layers, key=lambda r: -r.omega))

    @property
    def converged(self) -> bool:
        """Whether the model is at a minimum as far as these blocks tell."""
        return all(r.converged for r in self.layers)

    @property
    def notes(self) -> tuple[str, ...]:
        """Plain sentences that a user should read."""
        bad = [r.layer for r in self.layers if not r.converged]
        found = []
        if bad:
            found.append(f"not converged in {', '.join(bad)} (negative eigenvalues); low-bit loss will be worse")
        rough = [r.layer for r in self.layers if not r.exact]
        if rough:
            found.append(f"eigenvalues of {', '.join(rough)} had not settled; raise iterations for exact ones")
        return tuple(found)

    def __str__(self) -> str:
        width = max(len(n) for n in self.names)
        head = f"{'layer':{width}}  {'mean':>10}  {'std':>10}  {'omega':>10}  {'bottom':>10}  converged"
        rows = [
            f"{r.layer:{width}}  {r.mean:10.4g}  {r.std:10.4g}  {r.omega:10.4g}  {r.bottom:10.4g}  "
            f"{'yes' if r.converged else 'no'}"
            for r in self.layers
        ]
        return "\n".join([head, *rows, *self.notes])

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        rows = [{**asdict(r), "omega": r.omega, "converged": r.converged} for r in self.layers]
        return {"layers": rows, "products": self.products, "notes": list(self.notes)}

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Write a page with both ends of every block's spectrum."""
        import html

        from hasten.measure.plots import lines

        series = {
            "|mean| + std of the largest": [(k, r.omega) for k, r in enumerate(self.layers, 1)],
            "mean of the largest": [(k, r.mean) for k, r in enumerate(self.layers, 1)],
            "smallest": [(k, r.bottom) for k, r in enumerate(self.layers, 1)],
        }
        drawing = lines(series, label_x="block", label_y="eigenvalue", kind_y="number")
        title = "Sensitivity of the loss to each block of weights"
        table = html.escape(str(self))
        write_text(path, f"<!doctype html><meta charset=utf-8><title>{title}</title><h1>{title}</h1>{drawing}"
                         f"<pre>{table}</pre>\n")  # fmt: skip


@dataclass(frozen=True)
class HessianSpectrum:
    """Measure :class:`Spectrum` of a trained model.

    >>> import torch
    >>> model = nn.Linear(3, 1, bias=False)
    >>> found = HessianSpectrum(portions=2, fraction=0.5)(model, lambda m, x: m(x).square().mean(), [torch.eye(3)] * 4)
    >>> round(found[""].mean, 4), found.converged
    (0.6667, True)
    """

    groups: str | tuple[str, ...] = ()
    """patterns of modules that count as one block each, such as ``encoder.layer.*``; without, each weight's module"""
    portions: int = 10
    """disjoint portions of the data"""
    fraction: float = 0.1
    """share of the samples in a portion"""
    both_ends: bool = True
    """Lanczos, which tells the smallest eigenvalue too; False: power iteration"""
    tolerance: float = 1e-3
    """relative change (power iteration) or residual (Lanczos) at which it ends"""
    iterations: int = 100
    """Hessian-vector products for one eigenvalue, at most"""
    seed: int = 0
    """draws the portions and the first vectors"""

    def __post_init__(self) -> None:
        if self.portions < 1 or not 0 < self.fraction <= 1 or self.portions * self.fraction > 1 + 1e-9:
            raise ConfigurationError(
                f"{self.portions} disjoint portions of {self.fraction} of the data do not exist; their product is to "
                "be 1 at most"
            )
        if self.iterations < 2 or self.tolerance <= 0:
            raise ConfigurationError(
                f"iterations ({self.iterations}) must be 2 or more and tolerance ({self.tolerance}) positive"
            )

    def __call__(
        self,
        model: nn.Module,
        loss: Loss,
        batches: Sequence[Any],
        *,
        progress: Callable[[str, float], None] | None = None,
    ) -> Spectrum:
        """Eigenvalues of every block on every portion; ``loss(model, batch)`` is the mean over a batch."""
        blocks = weight_blocks(model, self.groups)
        found: dict[str, list[tuple[float, float | None, bool]]] = {name: [] for name in blocks}
        products, done, total = 0, 0, self.portions * len(blocks)
        for index, part in enumerate(portions(batches, self.portions, self.fraction, self.seed)):
            hessian = Hessian(model, loss, part, parameters_of(blocks))
            for name in blocks:
                if index == 0:
                    require_exact(hessian, name)
                found[name].append(self._one(hessian, name, self.seed + index))
                done += 1
                if progress is not None:
                    progress(f"curvature of {name}", done / total)
            products += hessian.products
        rows = []
        for name, block in blocks.items():
            values = found[name]
            bottoms = tuple(b for _, b, _ in values if b is not None)
            rows.append(
                LayerSpectrum(
                    name, tuple(block), sum(p.numel() for p in block.values()), tuple(v for v, _, _ in values), bottoms,
                    all(e for _, _, e in values),
                )
            )  # fmt: skip
        return Spectrum(tuple(rows), products)

    def _one(self, hessian: Hessian, name: str, seed: int) -> tuple[float, float | None, bool]:
        if not self.both_ends:
            value, taken = power_iteration(
                hessian, name, tolerance=self.tolerance, iterations=self.iterations, seed=seed
            )
            return value, None, taken < self.iterations
        ends: Ends = lanczos(hessian, name, tolerance=self.tolerance, steps=self.iterations, seed=seed)
        return ends.top if ends.top >= -ends.bottom else ends.bottom, ends.bottom, ends.converged


def require_exact(hessian: Hessian, name: str) -> None:
    """Raises :class:`~hasten.errors.ConfigurationError` where an operator of the model hides its second derivative.

    Only looked for where the loss runs through operators written in Python: kinks (ReLU) make the two sides of the
    comparison differ honestly, and torch's own operators need no check.
    """
    found = hessian.own_operators()
    if not found:
        return
    apart = hessian.verify(name)
    if apart > 0.5:
        raise ConfigurationError(
            f"the loss cannot be differentiated twice in {name}: its products are {100 * apart:.0f} % away from the "
            f"change of its gradient; {', '.join(found)} hides its second derivative, use plain torch operations there"
        )
