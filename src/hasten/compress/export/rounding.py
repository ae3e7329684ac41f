"""Rounded inputs as an exporter can say them.

One range for all: an operation that becomes QuantizeLinear and DequantizeLinear. A range for each row found in each
call, and floats of 8 bits: plain arithmetic, without the steps on the bits of a scale that a format takes (its scales
have 16 significant bits; here they keep all 24).
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from hasten.compress.quantize.granularity import PerChannel, PerToken
from hasten.compress.quantize.integer import Int
from hasten.compress.quantize.layers import ActivationQuantizer
from hasten.compress.quantize.minifloat import MiniFloat
from hasten.compress.quantize.mixed import RoundedInput

__all__ = ["RowRounding", "StaticRounding", "float8_of", "marked"]


@torch.library.custom_op("hasten::round_to_codes", mutates_args=())
def round_to_codes(x: Tensor, scale: Tensor, zero: Tensor, low: int, high: int) -> Tensor:
    """``scale * (clip(round(x / scale) + zero, low, high) - zero)``; zero int8."""
    shift = zero.to(torch.float32)
    return scale * ((torch.round(x / scale) + shift).clamp(low, high) - shift)


@round_to_codes.register_fake
def _(x: Tensor, scale: Tensor, zero: Tensor, low: int, high: int) -> Tensor:
    return torch.empty_like(x)


class StaticRounding(nn.Module):
    """Inputs rounded to up to 8 bits with one range for all, found before.

    >>> StaticRounding(Int(8), torch.tensor(0.5), None)(torch.tensor([0.7]))
    tensor([0.5000])
    """

    scale: Tensor
    zero: Tensor

    def __init__(self, fmt: Int, scale: Tensor, zero: Tensor | None) -> None:
        super().__init__()
        self.low, self.high = fmt.lowest, fmt.highest
        self.register_buffer("scale", scale.detach().float().reshape(()).clone())
        found = torch.zeros(()) if zero is None else zero.detach().reshape(())
        self.register_buffer("zero", found.to(torch.int8))

    def forward(self, x: Tensor) -> Tensor:
        """In the shape of ``x``."""
        result: Tensor = torch.ops.hasten.round_to_codes(x, self.scale, self.zero, self.low, self.high)
        return result


class _Behind(nn.Module):
    """A layer behind the rounding of its first input."""

    def __init__(self, rounding: nn.Module, layer: nn.Module) -> None:
        super().__init__()
        self.rounding, self.layer = rounding, layer

    def forward(self, x: Tensor, *rest: Any, **named: Any) -> Any:
        """The layer on the rounded input."""
        return self.layer(self.rounding(x), *rest, **named)


class RowRounding(nn.Module):
    """Inputs rounded with a range for each row (all but the first axis where ``image``), or with a given scale.

    >>> RowRounding(Int(8), image=False)(torch.tensor([[1.0, 0.5]]))
    tensor([[1.0000, 0.5039]])
    """

    scale: Tensor | None

    def __init__(self, fmt: Int | MiniFloat, *, image: bool, scale: Tensor | None = None) -> None:
        super().__init__()
        self.image = image
        self.kind = float8_of(fmt)
        self.top = float(fmt.highest) if isinstance(fmt, Int) else float(torch.finfo(self.kind or torch.half).max)
        self.register_buffer("scale", None if scale is None else scale.detach().float().reshape(()).clone())

    def forward(self, x: Tensor) -> Tensor:
        """In the shape of ``x``."""
        scale = self.scale
        if scale is None:
            axes = tuple(range(1, x.ndim)) if self.image else (-1,)
            scale = x.abs().amax(axes, keepdim=True) / self.top
            scale = torch.where(scale > 0, scale, torch.ones_like(scale))
        codes = (x / scale).clamp(-self.top, self.top)
        return (torch.round(codes) if self.kind is None else codes.to(self.kind).to(x.dtype)) * scale


def float8_of(fmt: object) -> torch.dtype | None:
    """torch's float of 8 bits with exactly the values of this format."""
    if not isinstance(fmt, MiniFloat) or fmt.bits != 8:
        return None
    codes = torch.arange(256, dtype=torch.uint8)
    ours = fmt.value(codes, torch.ones(()))
    kinds = (torch.float8_e4m3fn, torch.float8_e5m2)
    return next((k for k in kinds if _same(ours, codes.view(k).float())), None)


def _same(ours: Tensor, theirs: Tensor) -> bool:
    """Whether all codes that are numbers mean the same; infinities are no values of ours."""
    numbers = torch.isfinite(theirs)
    return torch.equal(ours[numbers], theirs[numbers]) and not bool(torch.isfinite(ours[~numbers]).any())


def _said(fmt: Any, scale: Tensor | None, zero: Tensor | None, image: bool) -> nn.Module | None:
    """The module that says this rounding; None where no such module is known."""
    one = scale is not None and scale.numel() == 1
    if isinstance(fmt, Int) and fmt.bits <= 8 and one and scale is not None:
        return StaticRounding(fmt, scale, zero)
    if float8_of(fmt) is not None and one:
        return RowRounding(fmt, image=image, scale=scale)
    grain = fmt.granularity
    rows = isinstance(grain, PerToken) or (isinstance(grain, PerChannel) and grain.axis == 0)
    if scale is None and rows and (float8_of(fmt) is not None or (isinstance(fmt, Int) and fmt.symmetric)):
        return RowRounding(fmt, image=isinstance(grain, PerChannel))
    return None


def marked(model: nn.Module) -> tuple[nn.Module, int, int]:
    """A copy whose inputs are rounded by modules of this file; how many are said as QDQ nodes, and how many are not."""
    clone = copy.deepcopy(model)
    said = unsaid = 0

    def visit(module: nn.Module) -> nn.Module:
        nonlocal said, unsaid
        if isinstance(module, (RoundedInput, ActivationQuantizer)):
            wrapped = module.layer if isinstance(module, RoundedInput) else None
            fmt = module.form if isinstance(module, RoundedInput) else module.format
            found = _said(fmt, module.scale, module.zero, isinstance(wrapped, nn.modules.conv._ConvNd))
            said += isinstance(found, StaticRounding)
            unsaid += not isinstance(found, StaticRounding)
            if found is not None:
                return found if wrapped is None else _Behind(found, visit(wrapped))
        for name, child in module.named_children():
            setattr(module, name, visit(child))
        return module

    return visit(clone), said, unsaid
