"""Layers whose weights are codes: simulated arithmetic for every format, integer arithmetic for 8-bit linear layers.

A :class:`Simulated` layer holds packed codes and scales, never the float weight; each call dequantises, which costs
time and saves memory. An :class:`IntegerLinear` multiplies bytes (``torch._int_mm``) and scales the int32 sums. Both
compute the same function up to float32 rounding.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from hasten.compress.float8 import Float8Buffers
from hasten.compress.packed import rows_for
from hasten.compress.quantize.base import Format, Quantized, at_least_float
from hasten.compress.quantize.compact import expand, shrink
from hasten.compress.quantize.granularity import PerChannel, PerGroup, PerToken
from hasten.compress.quantize.integer import Int
from hasten.compress.quantize.products import byte_product

__all__ = ["ActivationQuantizer", "IntegerLinear", "QuantizedLayer", "Simulated", "convolve", "is_convolution"]


def is_convolution(layer: nn.Module) -> bool:
    """Whether it is a one- or two-dimensional convolution."""
    return isinstance(layer, (nn.Conv1d, nn.Conv2d))


class ActivationQuantizer(nn.Module):
    """Inputs of a layer in a number format: with the range of the calibration, or found in each call.

    >>> ActivationQuantizer(Int(8, PerToken(), dynamic=True))(torch.tensor([[1.0, 0.5]]))
    tensor([[1.0000, 0.5039]])
    """

    scale: Tensor | None
    zero: Tensor | None

    def __init__(self, fmt: Format, scale: Tensor | None = None, zero: Tensor | None = None) -> None:
        super().__init__()
        self.format = fmt
        self.register_buffer("scale", scale)
        self.register_buffer("zero", zero)

    def forward(self, x: Tensor) -> Tensor:
        """In the shape and dtype of ``x``."""
        return self.format.fake(x, self.scale, self.zero)

    def extra_repr(self) -> str:
        """For ``print(model)``."""
        return f"{self.format.label}, {'static' if self.scale is not None else 'dynamic'}"


class QuantizedLayer(Float8Buffers, ABC):
    """What the quantised layers share: their weight as codes, and a plain layer with the same weight."""

    bias: Tensor | None
    activation: ActivationQuantizer | None

    @abstractmethod
    def quantized(self) -> Quantized:
        """The weight (out, inputs of an output) as codes."""

    @abstractmethod
    def plain(self) -> nn.Module:
        """A float layer of the same function, for ``torch.export``."""

    @property
    @abstractmethod
    def packed_bytes(self) -> int:
        """Bytes of codes, scales and zero points."""


class Simulated(QuantizedLayer):
    """A linear or convolution layer with packed codes; the product is in float.

    >>> layer = nn.Linear(64, 32)
    >>> small = Simulated.of(layer, Int(4).per_group(32).quantize(layer.weight))
    >>> small.packed_bytes, small(torch.zeros(1, 64)).shape
    (1152, torch.Size([1, 32]))
    """

    def __init__(
        self, layer: dict[str, Any], quantized: Quantized, bias: Tensor | None, activation: ActivationQuantizer | None
    ) -> None:
        super().__init__()
        self.layer = layer
        self.format = quantized.format
        self.matrix = quantized.shape
        self.parts = tuple(shrink(quantized))
        for name, tensor in shrink(quantized).items():
            self.register_buffer(name, tensor)
        self.register_buffer("bias", bias)
        self.activation = activation

    @classmethod
    def of(cls, layer: nn.Module, quantized: Quantized, activation: ActivationQuantizer | None = None) -> Simulated:
        """A layer like ``layer`` with the weight ``quantized`` (out, inputs of an output); ``layer`` stays."""
        bias = cast("Tensor | None", layer.bias)
        kept = None if bias is None else bias.detach().clone()
        return cls(describe(layer), quantized, kept, activation).train(layer.training)

    @property
    def packed_bytes(self) -> int:
        """Bytes of codes, scales and zero points."""
        parts = (self.get_buffer(name) for name in self.parts)
        return sum(p.numel() * p.element_size() for p in parts)

    def quantized(self) -> Quantized:
        """The weight as codes."""
        return expand({name: self.get_buffer(name) for name in self.parts}, self.format, self.matrix)

    @property
    def weight(self) -> Tensor:
        """Dequantised, in the layer's own shape, float32."""
        return self.quantized().dequantize().view(self.layer["shape"])

    def forward(self, x: Tensor) -> Tensor:
        """As the layer that it replaces."""
        if self.activation is not None:
            x = self.activation(x)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return convolve(x, self.weight.to(x.dtype), bias, self.layer)

    def plain(self) -> nn.Module:
        """The float layer with the dequantised weight, behind the rounding of its inputs where there is one."""
        layer = rebuild(self.layer, self.weight, self.bias).train(self.training)
        return layer if self.activation is None else nn.Sequential(self.activation, layer)

    def extra_repr(self) -> str:
        """For ``print(model)``."""
        return f"{self.layer['kind']} {tuple(self.layer['shape'])}, weight={self.format.label}"


class IntegerLinear(QuantizedLayer):
    """int8 inputs times int8 weights (one scale for each output), int32 sums, then scales.

    ``y = (Σ q_w q_a - Z Σ q_w) S_a S_w + b``: the term of the zero point is one constant per output.

    >>> layer = nn.Linear(64, 32)
    >>> weight = Int(8, PerChannel(0)).quantize(layer.weight)
    >>> real = IntegerLinear(weight, None, ActivationQuantizer(Int(8, PerToken(), dynamic=True)))
    >>> real(torch.zeros(3, 64)).shape
    torch.Size([3, 32])
    """

    codes: Tensor
    scales: Tensor
    sums: Tensor
    activation: ActivationQuantizer

    def __init__(self, weight: Quantized, bias: Tensor | None, activation: ActivationQuantizer) -> None:
        super().__init__()
        self.format = weight.format
        self.out_features, self.in_features = weight.shape
        self.register_buffer("codes", weight.codes.contiguous())
        self.register_buffer("scales", weight.scales.reshape(-1).contiguous())
        self.register_buffer("sums", weight.codes.sum(1, dtype=torch.int32), persistent=False)
        self.register_buffer("bias", bias)
        self.activation = activation

    @property
    def packed_bytes(self) -> int:
        """Bytes of codes, scales and the sums for the zero point."""
        return self.codes.numel() + 4 * self.scales.numel() + 4 * self.sums.numel()

    def _load_from_state_dict(self, *arguments: Any, **named: Any) -> None:
        super()._load_from_state_dict(*arguments, **named)
        self.sums = self.codes.sum(1, dtype=torch.int32)

    def quantized(self) -> Quantized:
        """The weight as codes."""
        shape = self.format.granularity.compact((self.out_features, self.in_features))
        return Quantized(self.codes, self.scales.view(shape), None, self.format)

    def forward(self, x: Tensor) -> Tensor:
        """(…, in) -> (…, out) in the dtype of ``x``."""
        rows = at_least_float(rows_for(x, self.in_features))
        fmt = self.activation.format
        scale, zero = self.activation.scale, self.activation.zero
        largest = rows.amax(1, keepdim=True)
        if scale is None:
            if isinstance(fmt.granularity, PerToken) and isinstance(fmt, Int) and fmt.symmetric:
                top = torch.maximum(largest, -rows.amin(1, keepdim=True))
                scale, zero = fmt.parameters(-top, top)
            else:
                scale, zero = fmt.find(rows)
        else:
            scale = scale.reshape(1, 1)
            zero = None if zero is None else zero.reshape(1, 1)
        total = byte_product(fmt.encode(rows, scale, zero), self.codes)
        if zero is not None:
            total = total - zero.to(torch.int32) * self.sums
        # A byte holds no NaN and no infinity: without them in the scale such a row would come out as numbers.
        result = (total * (scale + largest * 0)).mul_(self.scales)
        if self.bias is not None:
            result += self.bias
        return result.to(x.dtype).reshape(*x.shape[:-1], self.out_features)

    def plain(self) -> nn.Module:
        """A float layer behind the rounding of its inputs."""
        layer = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None)
        layer.weight = nn.Parameter(self.quantized().dequantize(), requires_grad=False)
        if self.bias is not None:
            layer.bias = nn.Parameter(self.bias.float(), requires_grad=False)
        return nn.Sequential(self.activation, layer)

    def extra_repr(self) -> str:
        """For ``print(model)``."""
        return f"in_features={self.in_features}, out_features={self.out_features}, kernel=int8"


def describe(layer: nn.Module) -> dict[str, Any]:
    """What is needed to compute a layer of this kind: plain values."""
    shape = [int(n) for n in cast(Tensor, layer.weight).shape]
    if isinstance(layer, nn.Linear):
        return {"kind": "Linear", "shape": shape}
    if isinstance(layer, (nn.Conv1d, nn.Conv2d)):
        padding: Any = layer.padding
        return {
            "kind": type(layer).__name__,
            "shape": shape,
            "stride": list(layer.stride),
            "padding": padding if isinstance(padding, str) else list(padding),
            "dilation": list(layer.dilation),
            "groups": layer.groups,
            "padding_mode": layer.padding_mode,
        }
    raise TypeError(f"{type(layer).__name__} is neither linear nor a convolution")


def rebuild(layer: dict[str, Any], weight: Tensor, bias: Tensor | None) -> nn.Module:
    """The float layer that :func:`describe` described."""
    shape = layer["shape"]
    made: nn.Module
    if layer["kind"] == "Linear":
        made = nn.Linear(shape[1], shape[0], bias=bias is not None)
    else:
        kind = nn.Conv1d if layer["kind"] == "Conv1d" else nn.Conv2d
        padding = layer["padding"] if isinstance(layer["padding"], str) else tuple(layer["padding"])
        made = kind(
            shape[1] * layer["groups"], shape[0], tuple(shape[2:]), stride=tuple(layer["stride"]), padding=padding,
            dilation=tuple(layer["dilation"]), groups=layer["groups"], bias=bias is not None,
            padding_mode=layer["padding_mode"],
        )  # fmt: skip
    made.weight = nn.Parameter(weight.float(), requires_grad=False)
    if bias is not None:
        made.bias = nn.Parameter(bias.float(), requires_grad=False)
    return made


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, layer: dict[str, Any]) -> Tensor:
    """The product that the description names, for any weight."""
    if layer["kind"] == "Linear":
        return functional.linear(x, weight, bias)
    two = layer["kind"] == "Conv2d"
    padding: Any = layer["padding"]
    if layer["padding_mode"] != "zeros":
        reach = _reach(layer)
        x = functional.pad(x, reach, mode=layer["padding_mode"])
        padding = 0
    stride, dilation = tuple(layer["stride"]), tuple(layer["dilation"])
    padding = tuple(padding) if isinstance(padding, list) else padding
    run: Any = functional.conv2d if two else functional.conv1d
    result: Tensor = run(x, weight, bias, stride, padding, dilation, layer["groups"])
    return result


def _reach(layer: dict[str, Any]) -> list[int]:
    """Padding of both sides from the last axis backwards."""
    result: list[int] = []
    sizes = list(zip(layer["shape"][2:], layer["dilation"], strict=True))
    for axis in reversed(range(len(sizes))):
        size, dilation = sizes[axis]
        if layer["padding"] == "same":
            total = dilation * (size - 1)
            result += [total // 2, total - total // 2]
        elif layer["padding"] == "valid":
            result += [0, 0]
        else:
            result += [layer["padding"][axis]] * 2
    return result


def activation_format(fmt: Format, layer: nn.Module) -> Format:
    """The format as this layer can use it: a token of an image is the image, groups are of channels."""
    if is_convolution(layer):
        if isinstance(fmt.granularity, PerToken):
            return cast(Format, replace(cast(Any, fmt), granularity=PerChannel(0)))
        if isinstance(fmt.granularity, PerGroup) and fmt.granularity.axis == -1:
            return cast(Format, replace(cast(Any, fmt), granularity=PerGroup(1, fmt.granularity.size)))
    return fmt
