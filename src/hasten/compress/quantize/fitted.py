"""Ranges of weights fitted to what a layer computes: rounding stays to nearest, data decide where the grid lies.

With ``e`` the error of one output's weights and ``H = 2 Σ x xᵀ`` the output changes by ``e H eᵀ``, squared and summed.
Group by group a range, hence scale and zero point, gives way to the one near it for which

    e_g H_gg e_gᵀ + 2 e_g Σ_{k≠g} H_gk e_kᵀ

is least, so what the other groups lost is counted. Every exchange lowers the error: the result is never worse than
the ranges that the search began with. Squares weighted by the diagonal of ``H`` alone, as importance matrices weigh
them, gain a tenth of the error; inputs that vary together gain most of it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hasten.compress.quantize.base import Format
from hasten.compress.quantize.blocks import BlockFloat
from hasten.compress.quantize.granularity import PerChannel, PerGroup
from hasten.compress.quantize.observers import range_of
from hasten.compress.quantize.steps import Layer, Step
from hasten.compress.values import named_value
from hasten.errors import ConfigurationError

__all__ = ["FitRanges", "fit_ranges"]

_FAR = (1.2, 1.15, 1.1, 1.05, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6)
_NEAR = (0.94, 0.97, 0.985, 1.015, 1.03, 1.06)
_END = (0.8, 0.85, 0.9, 0.94, 0.97, 1.03, 1.06, 1.1, 1.15, 1.2)
"""Factors that are tried: on both ends at first and later, and on one end"""


@named_value
@dataclass(frozen=True)
class FitRanges(Step):
    """Scales and zero points by the layer's output; every weight is still the nearest value of its grid.

    For ranges of groups of inputs or of output channels; other formats (learned codebooks, NVFP4) stay as they are. Not
    before :class:`~hasten.compress.quantize.rounding.Gptq`, whose errors are others than those of rounding to
    nearest: with it the fitted ranges are no better than those of the weights alone.

    >>> FitRanges().sweeps
    2
    """

    sweeps: int = 2
    """times that every group is looked at"""

    def __post_init__(self) -> None:
        if self.sweeps < 1:
            raise ConfigurationError(f"{self.sweeps} sweeps fit nothing; give 1 or more, such as 2")

    def round(self, layer: Layer) -> Tensor | None:
        """The nearest values of the fitted grid; the layer's scale and zero point are exchanged."""
        if not _fits(layer.format):
            return None
        layer.scale, layer.zero = fit_ranges(layer.matrix, layer.hessian(), layer.format, self.sweeps)
        return layer.format.fake(layer.matrix, layer.scale, layer.zero)


def _fits(fmt: Format) -> bool:
    """Whether scale and zero point of a group are a function of its range, and groups lie along the inputs."""
    by_range = type(fmt).find is Format.find and not (isinstance(fmt, BlockFloat) and fmt.scale == "e4m3")
    along = isinstance(fmt.granularity, PerGroup | PerChannel) and fmt.granularity.axis in _AXES[type(fmt.granularity)]
    return by_range and along


_AXES: dict[type, tuple[int, ...]] = {PerGroup: (1, -1), PerChannel: (0, -2)}


def fit_ranges(weight: Tensor, hessian: Tensor, fmt: Format, sweeps: int = 2) -> tuple[Tensor, Tensor | None]:
    """Scale and zero point (compact) for ``weight`` (out, in), least in ``Σ e H eᵀ`` among ranges near the observer's.

    A hessian (groups, in, in) is that of a grouped convolution: output rows are split evenly among the groups. Raises
    :class:`~hasten.errors.ConfigurationError` for a Hessian of another shape.
    """
    out, inner = weight.shape
    parts = hessian.shape[0] if hessian.dim() == 3 else 1
    if hessian.shape[-2:] != (inner, inner) or out % parts:
        raise ConfigurationError(
            f"a Hessian of shape {tuple(hessian.shape)} does not belong to a weight of {out} x {inner}; give (in, in)"
        )
    given = range_of(fmt.observer, weight, fmt)
    search = _Search(weight.float(), hessian.float(), fmt, given, parts)
    before = search.total()
    for sweep in range(sweeps):
        search.sweep(_NEAR if sweep else _FAR)
    # Sums in float32 may call an exchange a gain that is none.
    worse = (search.total() > before).reshape(-1, 1)
    low, high = (torch.where(worse, old, new) for old, new in zip(given, search.ranges(), strict=True))
    return fmt.parameters(low, high)


class _Search:
    """The state of a search: ranges (parts, rows, groups) and the error (parts, rows, in) that they leave."""

    def __init__(self, weight: Tensor, hessian: Tensor, fmt: Format, given: tuple[Tensor, Tensor], parts: int) -> None:
        inner = weight.shape[1]
        self.fmt, self.shape = fmt, given[0].shape
        self.size = fmt.granularity.size if isinstance(fmt.granularity, PerGroup) else inner
        self.weight = weight.reshape(parts, -1, inner)
        self.hessian = hessian.reshape(parts, inner, inner)
        self.low, self.high = (x.clone().reshape(parts, self.weight.shape[1], -1) for x in given)
        scale, zero = fmt.parameters(*given)
        self.affine = zero is not None
        self.error = (fmt.fake(weight, scale, zero) - weight).reshape(self.weight.shape)

    def total(self) -> Tensor:
        """Squared error of each row's output, (parts, rows)."""
        return ((self.error @ self.hessian) * self.error).sum(-1)

    def ranges(self) -> tuple[Tensor, Tensor]:
        """In the compact shape of the granularity."""
        return self.low.reshape(self.shape), self.high.reshape(self.shape)

    def sweep(self, factors: tuple[float, ...]) -> None:
        """Every group once, all rows together; ``factors`` are tried on both ends, then others on each end alone."""
        slope = self.error @ self.hessian
        for group in range(self.low.shape[-1]):
            place = slice(group * self.size, min((group + 1) * self.size, self.weight.shape[-1]))
            own = self.hessian[:, place, place]
            before = self.error[..., place].clone()
            rest = 2 * (slope[..., place] - before @ own)  # what the other groups' errors add to each weight's
            best = ((before @ own + rest) * before).sum(-1)
            # A symmetric grid has one end; both ends' factors are then a finer search of it.
            pairs = [(f, f) for f in (factors if self.affine else (*factors, *_END))]
            best = self._take(group, place, own, rest, best, pairs)
            if self.affine:
                best = self._take(group, place, own, rest, best, [(1.0, f) for f in _END])
                self._take(group, place, own, rest, best, [(f, 1.0) for f in _END])
            slope += (self.error[..., place] - before) @ self.hessian[:, place]

    def _take(
        self, group: int, place: slice, own: Tensor, rest: Tensor, best: Tensor, pairs: list[tuple[float, float]]
    ) -> Tensor:
        """Try factors of one group's ends and keep the best for each row; the error that is left, (parts, rows)."""
        piece = self.weight[..., place]
        low, high = self.low[..., group].clone(), self.high[..., group].clone()
        for down, up in pairs:
            ends = low * down, high * up
            error = self.fmt.round_to(piece, *self.fmt.parameters(*(x[..., None] for x in ends))) - piece
            lost = ((error @ own + rest) * error).sum(-1)
            better = lost < best
            best = torch.where(better, lost, best)
            self.low[..., group] = torch.where(better, ends[0], self.low[..., group])
            self.high[..., group] = torch.where(better, ends[1], self.high[..., group])
            self.error[..., place] = torch.where(better[..., None], error, self.error[..., place])
        return best
