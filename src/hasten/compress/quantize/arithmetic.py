"""Layers in integers alone: bytes times bytes, int32 sums, and a multiplier that is an integer and a shift.

``M = S_a S_w / S_o = M0 · 2^(-n)`` with M0 an int32 in [2^30, 2^31); ``q_o = clip((acc · M0 + 2^(n-1)) >> n + Z_o)``.
The bias is an int32 at scale ``S_a S_w``, and holds the constant ``-Z_a Σ q_w`` of the inputs' zero point as well.
Padding is with Z_a.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from hasten.compress.quantize.base import Quantized
from hasten.compress.quantize.integer import Int
from hasten.compress.quantize.products import byte_product
from hasten.errors import ConfigurationError

__all__ = ["IntegerLayer", "accumulate", "dyadic", "requantize"]

_MANTISSA = 31


def dyadic(multiplier: Tensor) -> tuple[Tensor, Tensor]:
    """Positive reals -> int32 mantissas in [2^30, 2^31) and shifts, ``M ≈ mantissa · 2^(-shift)`` within 2^-31.

    >>> dyadic(torch.tensor([0.75]))
    (tensor([1610612736], dtype=torch.int32), tensor([31], dtype=torch.int32))
    """
    if bool((multiplier <= 0).any()):
        raise ConfigurationError("a multiplier that is not positive has no dyadic form; scales are positive")
    share, exponent = torch.frexp(multiplier.double())
    mantissa = torch.round(share * 2**_MANTISSA).long()
    full = mantissa == 2**_MANTISSA
    mantissa = torch.where(full, mantissa // 2, mantissa)
    return mantissa.to(torch.int32), (_MANTISSA - exponent - full.int()).to(torch.int32)


def requantize(total: Tensor, mantissa: Tensor, shift: Tensor, zero: int, fmt: Int) -> Tensor:
    """int32 sums (…, out) -> codes of ``fmt``, halves away from minus infinity; mantissa and shift (out,)."""
    wide = total.long() * mantissa.long()
    shift = shift.long()
    half = torch.where(shift > 0, torch.ones_like(shift) << (shift - 1).clamp(min=0), torch.zeros_like(shift))
    moved = torch.where(shift >= 0, (wide + half) >> shift.clamp(min=0), wide << (-shift).clamp(min=0))
    return (moved + zero).clamp(fmt.lowest, fmt.highest).to(torch.int8)


def accumulate(codes: Tensor, weight: Tensor, layer: dict[str, Any], pad: int = 0) -> Tensor:
    """Bytes of inputs and of a weight (out, inputs of an output) -> int32 sums in the layout of the layer's output.

    ``layer`` is what :func:`hasten.compress.quantize.layers.describe` gives; padding is with the byte ``pad``.
    """
    if layer["kind"] == "Linear":
        rows = codes.reshape(-1, codes.shape[-1])
        return byte_product(rows, weight).reshape(*codes.shape[:-1], -1)
    from hasten.compress.quantize.layers import _reach

    if layer["padding_mode"] != "zeros":
        codes = functional.pad(codes.float(), _reach(layer), mode=layer["padding_mode"]).to(torch.int8)
    else:
        codes = functional.pad(codes, _reach(layer), value=pad)
    flat = codes.dim() == 3
    if flat:
        codes = codes[:, :, None]
        kernel, stride, dilation = (1, *layer["shape"][2:]), (1, *layer["stride"]), (1, *layer["dilation"])
    else:
        kernel, stride, dilation = tuple(layer["shape"][2:]), tuple(layer["stride"]), tuple(layer["dilation"])
    batch, channels, height, width = codes.shape
    out_h = (height - dilation[0] * (kernel[0] - 1) - 1) // stride[0] + 1
    out_w = (width - dilation[1] * (kernel[1] - 1) - 1) // stride[1] + 1
    s = codes.contiguous().stride()
    windows = codes.contiguous().as_strided(
        (batch, out_h, out_w, channels, *kernel),
        (s[0], s[2] * stride[0], s[3] * stride[1], s[1], s[2] * dilation[0], s[3] * dilation[1]),
    )
    groups, out = layer["groups"], layer["shape"][0]
    rows = windows.reshape(batch * out_h * out_w, groups, -1)
    if groups == 1:
        total = byte_product(rows[:, 0].contiguous(), weight)
    else:
        split = weight.reshape(groups, out // groups, -1)
        total = torch.bmm(rows.transpose(0, 1).int(), split.transpose(1, 2).int()).transpose(0, 1).reshape(-1, out)
    result = total.reshape(batch, out_h, out_w, out).permute(0, 3, 1, 2)
    return result[:, :, 0] if flat else result


@dataclass(frozen=True)
class IntegerLayer:
    """A linear or convolution layer from codes to codes; nothing in :meth:`run` is a float.

    >>> weight = Int(8).per_channel().quantize(torch.tensor([[1.0, -1.0]]))
    >>> layer = IntegerLayer.of({"kind": "Linear", "shape": [1, 2]}, weight, None, (0.5, 0), (0.5, 0))
    >>> layer.run(torch.tensor([[4, 2]], dtype=torch.int8))
    tensor([[2]], dtype=torch.int8)
    """

    layer: dict[str, Any]
    """description of the layer"""
    codes: Tensor
    """int8 (out, inputs of an output)"""
    bias: Tensor
    """int32 (out,), the zero point's constant included"""
    mantissa: Tensor
    """int32 (out,)"""
    shift: Tensor
    """int32 (out,)"""
    pad: int
    """code of zero in the inputs"""
    zero: int
    """code of zero in the outputs"""
    output: Int = Int(8, symmetric=False)
    """format of the outputs"""

    @classmethod
    def of(
        cls, layer: dict[str, Any], weight: Quantized, bias: Tensor | None, inputs: tuple[float, int],
        outputs: tuple[float, int],
    ) -> IntegerLayer:  # fmt: skip
        """From a weight of symmetric bytes (one scale per tensor or output), and (scale, zero) of inputs and
        outputs."""
        if not isinstance(weight.format, Int) or not weight.format.symmetric or weight.codes.dtype != torch.int8:
            raise ConfigurationError(f"integer arithmetic needs a symmetric int8 weight, got {weight.format.label}")
        scales = weight.scales.double().reshape(-1).expand(weight.shape[0])
        own = scales * inputs[0]
        total = -inputs[1] * weight.codes.long().sum(1)
        if bias is not None:
            total = total + torch.round(bias.double() / own).long()
        mantissa, shift = dyadic(own / outputs[0])
        return cls(layer, weight.codes, total.to(torch.int32), mantissa, shift, inputs[1], outputs[1])

    def run(self, codes: Tensor) -> Tensor:
        """int8 codes of inputs -> int8 codes of outputs."""
        total = accumulate(codes, self.codes, self.layer, self.pad)
        channel = -1 if self.layer["kind"] == "Linear" else 1
        moved = total.movedim(channel, -1) + self.bias
        return requantize(moved, self.mantissa, self.shift, self.zero, self.output).movedim(-1, channel)
