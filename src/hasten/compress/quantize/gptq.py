"""Rounding in which later columns make up for the error of earlier ones, for any grid.

``H = 2 Σ x xᵀ + damp · mean(diag H) · I``, ``U`` the upper Cholesky factor of ``H⁻¹``. Column by column (those with the
largest diagonal first): ``q = Q(w_c)``, ``err = (w_c - q) / U_cc``, and the columns behind lose ``err · U_{c,c+1:}``.
Scales are those of the weight that was given, so columns may come in any order.

"GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers" https://arxiv.org/abs/2210.17323
Differs from the paper in: any number format; static scales; a batch of independent weights at once (grouped
convolution).
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from hasten.compress.quantize.base import Format
from hasten.errors import ConfigurationError, DataError

__all__ = ["gptq", "hessian_of", "upper_factor"]

_TRIES = 6


def hessian_of(x: Tensor | Iterable[Tensor]) -> Tensor:
    """``2 Σ x xᵀ`` (in, in) in float32 over inputs (…, in); batch by batch where an iterable is given.

    >>> hessian_of([torch.ones(1, 2), torch.tensor([[0.0, 1.0]])])
    tensor([[2., 2.],
            [2., 4.]])
    """
    total: Tensor | None = None
    for batch in [x] if isinstance(x, Tensor) else x:
        rows = batch.detach().reshape(-1, batch.shape[-1]).float()
        product = rows.t() @ rows
        total = product if total is None else total.add_(product)
    if total is None:
        raise DataError("no input was given; a Hessian needs at least one batch")
    return total.mul_(2)


def upper_factor(hessian: Tensor, damp: float) -> Tensor:
    """Upper ``U`` with ``UᵀU = (H + damp · mean(diag H) · I)⁻¹``; (…, in, in).

    Damping is raised tenfold, at most five times, until the factorisation succeeds.
    """
    inner = hessian.shape[-1]
    mean = hessian.diagonal(dim1=-2, dim2=-1).mean(-1)
    eye = torch.eye(inner, dtype=hessian.dtype, device=hessian.device)
    for _ in range(_TRIES):
        lower, info = torch.linalg.cholesky_ex(hessian + (damp * mean)[..., None, None] * eye)
        if not bool((info > 0).any()):
            inverse = torch.cholesky_inverse(lower)
            upper, info = torch.linalg.cholesky_ex(inverse, upper=True)
            if not bool((info > 0).any()):
                return upper  # type: ignore[no-any-return]
        damp = max(damp, 1e-4) * 10
    raise DataError(
        f"the Hessian of {inner} inputs cannot be factorised, not even with damping {damp:g}; give more data"
    )


def gptq(
    weight: Tensor, hessian: Tensor, fmt: Format, damp: float = 0.01, block: int = 128, order: bool = True,
    scale: Tensor | None = None, zero: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Values of ``weight`` (out, in) on the grid of ``fmt`` that keep ``x Wᵀ`` for inputs of this ``hessian`` (in, in).

    A hessian (groups, in, in) is that of a grouped convolution: output rows are split evenly among the groups.
    ``scale`` and ``zero`` (compact) are found from ``weight`` where not given. Inputs that were always zero lose their
    weights. Raises :class:`~hasten.errors.DataError` where no damping helps.
    """
    out, inner = weight.shape
    groups = hessian.shape[0] if hessian.dim() == 3 else 1
    if hessian.shape[-2:] != (inner, inner) or out % groups or block < 1:
        raise ConfigurationError(
            f"a Hessian of shape {tuple(hessian.shape)} does not belong to a weight of {out} x {inner}; give (in, in)"
        )
    h = hessian.detach().float().reshape(groups, inner, inner).clone()
    w = weight.detach().float().reshape(groups, out // groups, inner)
    diagonal = h.diagonal(dim1=-2, dim2=-1)
    dead = diagonal == 0
    if scale is None:
        importance = diagonal.clamp(min=0).repeat_interleave(out // groups, 0)
        scale, zero = fmt.find(weight.detach().float(), importance)
    diagonal[dead] = 1
    # Inputs first, so that a column is contiguous: (groups, in, out).
    w = w.masked_fill(dead[:, None, :], 0).transpose(1, 2)
    s, z = (_columns(fmt, p, (groups, out, inner)) for p in (scale, zero))
    ranks = torch.argsort(diagonal, dim=1, descending=True, stable=True) if order else None
    if ranks is not None:
        w = w.gather(1, ranks[:, :, None].expand_as(w))
        h = h.gather(1, ranks[:, :, None].expand_as(h)).gather(2, ranks[:, None, :].expand_as(h))
        s, z = (p if p is None or p.shape[1] == 1 else _gather(p, ranks) for p in (s, z))
    values = _columns_in_turn(w.contiguous(), upper_factor(h, damp), fmt, s, z, block)
    if ranks is not None:
        values = torch.empty_like(values).scatter_(1, ranks[:, :, None].expand_as(values), values)
    return values.transpose(1, 2).reshape(out, inner).to(weight.dtype)


def _columns(fmt: Format, parameter: Tensor | None, sizes: tuple[int, int, int]) -> Tensor | None:
    """Compact scales as (groups, in or 1, out of a group[, K])."""
    if parameter is None:
        return None
    groups, out, inner = sizes
    spread: Tensor = parameter if parameter.shape[1] == 1 else fmt.spread(parameter, (out, inner))
    behind = spread.shape[2:]
    full = spread.expand(out, spread.shape[1], *behind)
    return full.reshape(groups, out // groups, spread.shape[1], *behind).transpose(1, 2)


def _gather(parameter: Tensor, ranks: Tensor) -> Tensor:
    index = ranks.reshape(*ranks.shape, *[1] * (parameter.dim() - 2)).expand_as(parameter)
    return parameter.gather(1, index)


def _columns_in_turn(
    w: Tensor, upper: Tensor, fmt: Format, scale: Tensor | None, zero: Tensor | None, block: int
) -> Tensor:
    """The loop of the method; everything is (groups, in, out)."""
    inner = w.shape[1]
    values = torch.empty_like(w)
    assert scale is not None

    def at(parameter: Tensor | None, column: int) -> Tensor | None:
        return None if parameter is None else parameter[:, column if parameter.shape[1] > 1 else 0]

    for start in range(0, inner, block):
        stop = min(start + block, inner)
        piece = w[:, start:stop]
        factor = upper[:, start:stop]
        errors = torch.empty_like(piece)
        for index in range(stop - start):
            column = start + index
            current = piece[:, index]
            rounded = fmt.round_to(current, at(scale, column), at(zero, column))  # type: ignore[arg-type]
            error = (current - rounded) / factor[:, index, column, None]
            values[:, column], errors[:, index] = rounded, error
            if index + 1 < stop - start:
                piece[:, index + 1 :].sub_(factor[:, index, column + 1 : stop, None] * error[:, None])
        if stop < inner:
            w[:, stop:].sub_(factor[:, :, stop:].transpose(1, 2) @ errors)
    return values
