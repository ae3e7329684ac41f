"""Outliers out of activations into the weight, and out of the weight into a low-rank branch: one layer at a time.

``Y = X Wᵀ = X̂ Ŵᵀ`` with ``X̂ = X / λ``, ``Ŵ = W λ``, ``λ_j = max|X_j|^α / max|W_j|^(1-α)``; ``Ŵ = L1 L2 + R`` by SVD, so
``|R|² = sum of σ² from r on``; ``R`` and ``X̂`` are rounded. The residual's rounding error is folded back into the
branch and the round repeated. "SVDQuant: Absorbing Outliers by Low-Rank Components for 4-Bit Diffusion Models", Li et
al. 2024, arXiv:2411.05007. Differs from the paper in: factors are rounded before the residual is taken, which then
corrects them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hasten.compress.quantize import NVFP4, Int, PerGroup, gptq, hessian_of
from hasten.compress.quantize.base import Format, significant

__all__ = ["Absorbed", "absorb", "activation_format", "activation_traffic", "error_bound", "smoothing", "weight_format"]

_LARGE = 4096
"""Width from which singular vectors are found by random projection."""


@dataclass(frozen=True)
class Absorbed:
    """One layer, decomposed and rounded."""

    smooth: Tensor
    """λ (in,) float32, exact in bfloat16"""
    down: Tensor
    """L2 (rank, in)"""
    up: Tensor
    """L1 (out, rank)"""
    residual: Tensor
    """(out, in) float32 on the grid of the format"""
    scales: Tensor
    """(out, groups) of the residual"""
    outer: Tensor | None
    """scale of the whole residual, where the format has one"""
    shifted: bool
    """whether activations have a zero point"""
    error: float
    """relative error of the layer's output on the calibration"""
    alpha: float | None = None
    """exponent of the smoothing; None where nothing was smoothed"""
    rounds: int = 0
    """rounds of iteration that the kept one took"""


def weight_format(form: str, bits: int = 4, group: int = 64) -> Format:
    """What residuals are rounded to: ``int4`` symmetric in groups, or ``nvfp4``."""
    return NVFP4 if form == "nvfp4" else Int(bits, PerGroup(1, group))


def activation_format(form: str, bits: int = 4, group: int = 64, shifted: bool = False) -> Format:
    """What inputs are rounded to, anew in every call; ``shifted`` has a zero point."""
    if form == "nvfp4":
        return replace(NVFP4, dynamic=True)
    return Int(bits, PerGroup(1, group), symmetric=not shifted, dynamic=True)


def smoothing(x: Tensor, weight: Tensor, alpha: float) -> Tensor:
    """λ (in,): x (rows, in), weight (out, in). Inputs that were always zero are left alone."""
    inputs, outputs = x.abs().amax(0).double(), weight.abs().amax(0).double()
    dead = (inputs == 0) | (outputs == 0)
    vector = inputs.clamp_min(1e-12) ** alpha / outputs.clamp_min(1e-12) ** (1 - alpha)
    vector = vector / vector[~dead].log().mean().exp() if bool((~dead).any()) else vector
    vector = vector.clamp(1e-4, 1e4)
    vector[dead] = 1.0
    return significant(vector.float(), 8)


def _factors(matrix: Tensor, rank: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """up (out, rank) and down (rank, in), rounded to ``dtype``, as float32 or wider."""
    if rank == 0:
        return matrix.new_zeros(matrix.shape[0], 0), matrix.new_zeros(0, matrix.shape[1])
    if min(matrix.shape) > _LARGE:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            left, values, right = torch.svd_lowrank(matrix.float(), q=rank + 8, niter=4)
        left, values, right = left[:, :rank], values[:rank], right[:, :rank].T
    else:
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
        left, values, right = left[:, :rank], values[:rank], right[:rank]
    # The branch keeps its large numbers on one side, as published; bfloat16 does not mind.
    return (left * values).to(dtype).to(matrix.dtype), right.to(dtype).to(matrix.dtype)


def absorb(
    weight: Tensor,
    x: Tensor,
    *,
    rank: int,
    form: str = "int4",
    bits: int = 4,
    group: int = 64,
    grid: int = 20,
    iterations: int = 0,
    use_gptq: bool = False,
    shift: bool = False,
    dtype: torch.dtype = torch.bfloat16,
) -> Absorbed:
    """Decompose and round one weight (out, in) for inputs x (rows, in).

    ``grid`` exponents are tried for the smoothing by the error of the finished layer; 0 smooths nothing. ``rank`` 0
    leaves the branch out. ``iterations`` rounds fold the rounding error back, until it rises; the best is kept.
    ``shift`` tries a zero point for activations. Everything in float64 up to a thousand rows and columns, in float32
    above.
    """
    wide = torch.float64 if max(weight.shape) <= 1024 else torch.float32
    weight, x = weight.detach().to(wide), x.detach().to(wide)
    target = x @ weight.T
    size = float(target.norm().clamp_min(1e-300))
    fmt = weight_format(form, bits, group)

    def finish(smooth: Tensor, up: Tensor, down: Tensor, residual: Tensor, rounded: Tensor) -> float:
        made = (x / smooth.to(wide)) @ down.T @ up.T + rounded @ residual.to(wide).T
        return float((target - made).norm()) / size

    def rounded_inputs(smooth: Tensor, shifted: bool) -> Tensor:
        return activation_format(form, bits, group, shifted).fake((x / smooth.to(wide)).float()).to(wide)

    def quantised(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        found = fmt.quantize(matrix.float())
        return found.dequantize(), found.scales, found.zeros

    # Only inputs that stay near zero on one side gain from a zero point.
    shifts = (False, True) if shift and form == "int4" and bool(x.amin() > -0.3 * x.amax()) else (False,)
    ones = torch.ones(weight.shape[1])
    tried: list[tuple[float | None, Tensor]] = [(None, ones)]
    tried += [(a, smoothing(x, weight, a)) for a in torch.linspace(0, 1, grid).tolist()] if grid else []
    best: Absorbed | None = None
    for alpha, smooth in tried:
        scaled = weight * smooth.to(wide)
        up, down = _factors(scaled, rank, dtype)
        residual, scales, outer = quantised(scaled - up @ down)
        for shifted in shifts:
            error = finish(smooth, up, down, residual, rounded_inputs(smooth, shifted))
            if best is None or error < best.error:
                best = Absorbed(smooth, down, up, residual, scales, outer, shifted, error, alpha)
    assert best is not None
    inputs = rounded_inputs(best.smooth, best.shifted)
    scaled = weight * best.smooth.to(wide)
    current = best
    for number in range(iterations if rank else 0):
        up, down = _factors(scaled - current.residual.to(wide), rank, dtype)
        residual, scales, outer = quantised(scaled - up @ down)
        error = finish(best.smooth, up, down, residual, inputs)
        if error > current.error and number:  # it has begun to rise
            break
        current = replace(
            best, up=up, down=down, residual=residual, scales=scales, outer=outer, error=error, rounds=number + 1
        )
        if error < best.error:
            best = current
    if use_gptq:
        hessian = hessian_of(inputs.float())
        plain = (scaled - best.up @ best.down).float()
        scales, outer = fmt.find(plain)
        residual = gptq(plain, hessian, fmt, scale=scales, zero=outer)
        error = finish(best.smooth, best.up, best.down, residual, inputs)
        if error < best.error:
            best = replace(best, residual=residual, scales=scales, outer=outer, error=error)
    return best


def error_bound(x: Tensor, weight: Tensor, x_rounded: Tensor, weight_rounded: Tensor) -> float:
    """``|X W - Q(X) Q(W)| ≤ |X| |W - Q(W)| + |X - Q(X)| (|W| + |W - Q(W)|)``, in the Frobenius norm."""
    gap = float((weight - weight_rounded).norm())
    return float(x.norm()) * gap + float((x - x_rounded).norm()) * (float(weight.norm()) + gap)


def activation_traffic(inputs: int, outputs: int, *, fused: bool) -> float:
    """Bytes of activations that a token moves through a layer with a branch, 16 bits in and out, 4 bits between.

    Fused: read x, write and read its codes, write y. Else the branch reads x again, and reads and writes y.

    >>> activation_traffic(3072, 3072, fused=True), activation_traffic(3072, 3072, fused=False)
    (15360.0, 33792.0)
    """
    codes = 2 * inputs / 2
    base = 2.0 * inputs + codes + 2.0 * outputs
    return base if fused else base + 2.0 * inputs + 4.0 * outputs
