"""From simulated layers to layers that run real kernels, where a kernel stores just these codes and is measured faster.

A kernel counts as the same function when its weights are the codes themselves: int8 rows, or int4 groups with scales
that its number format holds. Which activations it reads is part of its name: bfloat16 (``int8-weight``, ``int4-g32``),
bytes per token (``int8``), bytes per 32 or 512 inputs (``int4-panels``, ``int8-panels``). On a GPU all integer and FP8
weights have kernels that read activations as they are; with bytes per token there are ``int8`` and ``int8-bytes``, with
FP8 per token ``fp8-dynamic`` and ``fp8-bytes``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hasten.clock import Clock
from hasten.compress import kernels
from hasten.compress.device_codes import codes_in, stored
from hasten.compress.packed import Packed
from hasten.compress.panels import panels_of_codes
from hasten.compress.precision import PackedLinear
from hasten.compress.quantize.base import Format, Quantized
from hasten.compress.quantize.device import kind_of, packed_of
from hasten.compress.quantize.granularity import PerChannel, PerGroup, PerTensor, PerToken
from hasten.compress.quantize.integer import Int
from hasten.compress.quantize.layers import ActivationQuantizer, IntegerLinear, QuantizedLayer, Simulated
from hasten.compress.quantize.minifloat import MiniFloat

__all__ = ["KernelLinear", "candidates", "codes_of", "convolution", "realise"]

INTEGER = "int8"
"""Name of :class:`IntegerLinear` in reports; the table of kernels measures it as ``int8-dynamic``, its like."""


class KernelLinear(QuantizedLayer):
    """A linear layer whose codes are laid out for one kernel of the table, on their device; inference on this machine.

    >>> layer = nn.Linear(64, 32)
    >>> weight = Int(8, PerChannel(0)).quantize(layer.weight)
    >>> KernelLinear(weight, None, "int8-weight")(torch.zeros(1, 64)).shape
    torch.Size([1, 32])
    """

    def __init__(self, weight: Quantized, bias: Tensor | None, name: str, inputs: Format | None = None) -> None:
        super().__init__()
        self.format = weight.format
        self.activation = None
        self.inputs = inputs  # what was asked for; the kernel rounds inputs itself, as its name says
        self.inner = PackedLinear(_lay_out(weight, name), bias, name)
        self.kernel_name = name

    @property
    def bias(self) -> Tensor | None:  # type: ignore[override]
        """As the layer that it replaces."""
        return self.inner.bias

    @property
    def packed_bytes(self) -> int:
        """Bytes of the packed weight."""
        return self.inner.packed_bytes

    def forward(self, x: Tensor) -> Tensor:
        """(…, in) -> (…, out)."""
        result: Tensor = self.inner(x)
        return result

    def plain(self) -> nn.Module:
        """A float layer with the weight that the kernel uses."""
        return self.inner.plain()

    def quantized(self) -> Quantized:
        """The codes, read back from the kernel's layout."""
        return codes_of(self.inner.packed, self.kernel_name, self.format)


def codes_of(packed: Packed, name: str, fmt: Format) -> Quantized:
    """The codes that the kernel ``name`` reads, in their format."""
    if packed.device.type == "cuda":
        return _codes_on_gpu(packed, fmt)
    if name in ("int8-weight", "int8-dynamic"):
        codes, scale = packed.tensors
        return Quantized(codes, scale[:, None], None, fmt)
    values = kernels.kernel(name).unpack(packed)
    scale = _scales_of(packed, name)
    if scale.dim() == 1:
        scale = scale[:, None]
    return fmt.quantize(values, scale)


def _codes_on_gpu(packed: Packed, fmt: Format) -> Quantized:
    held, codes = codes_in(packed), stored(packed)
    if codes.dtype is torch.float8_e4m3fn:
        codes = codes.view(torch.uint8)
    shape = fmt.granularity.compact(packed.shape)
    scales = held.scales.float()[: shape[0]].reshape(shape)
    zeros = held.zeros[: shape[0]].reshape(shape) if held.zeros.numel() else None
    return Quantized(codes, scales, zeros, fmt)


def _lay_out(weight: Quantized, name: str) -> Packed:
    """Codes and scales as the kernel wants them; no rounding takes place."""
    if weight.codes.device.type == "cuda":
        found = packed_of(weight)
        assert found is not None
        return found[1]
    shape = (weight.shape[0], weight.shape[1])
    if name in ("int8-weight", "int8-dynamic"):
        return Packed((weight.codes.contiguous(), weight.scales.reshape(-1).contiguous()), shape)
    if name in ("int8-panels", "int4-panels"):
        precision = name.partition("-")[0]
        arrays = panels_of_codes(weight.codes, weight.scales, precision)
        return Packed(tuple(torch.from_numpy(a) for a in arrays), shape, 0 if precision == "int8" else 32)
    size = _group(weight.format)
    codes = (weight.codes.to(torch.int32) + 8).contiguous()
    stored = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    scale = weight.scales.t().contiguous()
    both = torch.stack([scale, torch.zeros_like(scale)], dim=-1).to(torch.bfloat16).contiguous()
    return Packed((stored, both), shape, size)


def _scales_of(packed: Packed, name: str) -> Tensor:
    if name == "int8-panels":
        return packed.tensors[1]
    if name == "int4-panels":
        from hasten.nn.product.blocks import PANEL
        from hasten.nn.product.int4 import INPUTS

        array = packed.tensors[0].numpy()
        scales: Any = array[:, :, PANEL * INPUTS // 2 :].copy().view(np.float16).astype(np.float32)
        plain = scales.transpose(0, 2, 1).reshape(-1, scales.shape[1])
        return torch.from_numpy(np.ascontiguousarray(plain[: packed.shape[0]]))
    return packed.tensors[1][..., 0].t().float().contiguous()


def _group(fmt: Format) -> int:
    return fmt.granularity.size if isinstance(fmt.granularity, PerGroup) and fmt.granularity.axis in (1, -1) else 0


def candidates(
    weight: Format, activation: Format | None, shape: tuple[int, int], device: torch.device | str = "cpu"
) -> list[str]:
    """Kernels of ``device`` that run a linear layer of these formats and this shape (out, in)."""
    if torch.device(device).type == "cuda":
        return _on_gpu(weight, activation, shape, torch.device(device))
    if not isinstance(weight, Int) or not weight.symmetric:
        return []
    present = {k.name for k in kernels.available() if k.supports(*shape)}
    bytes_in = isinstance(activation, Int) and activation.bits == 8
    tokens = bytes_in and isinstance(activation, Int) and isinstance(activation.granularity, PerToken)
    rows = isinstance(weight.granularity, PerChannel) and weight.granularity.axis == 0
    if weight.bits == 8 and rows:
        if activation is None:
            return [n for n in ("int8-weight",) if n in present]
        if not isinstance(activation, Int) or not isinstance(activation.granularity, (PerToken, PerTensor)):
            return []
        names = [INTEGER] if bytes_in and "int8-dynamic" in present else []
        return names + [n for n in ("int8-panels",) if tokens and activation.symmetric and n in present]
    group = _group(weight)
    if weight.bits == 4 and group:
        if activation is None:
            return [n for n in (f"int4-g{group}",) if n in present]
        if tokens and group == 32 and isinstance(activation, Int) and activation.symmetric:
            return [n for n in ("int4-panels",) if n in present]
    return []


def _on_gpu(weight: Format, activation: Format | None, shape: tuple[int, int], device: torch.device) -> list[str]:
    kind = kind_of(weight, shape[1])
    if kind is None:
        return []
    precision, group = kind
    present = {k.name for k in kernels.available(device) if k.supports(*shape)}
    if activation is None:
        size = next((g for g in kernels.GROUP_SIZES if g >= (group or 32)), kernels.GROUP_SIZES[-1])
        stem = f"int4-g{size}" if precision == "int4" else precision
        return [n for n in (f"{stem}-row", f"{stem}-tiles", f"{stem}-opened") if n in present]
    tokens = isinstance(activation.granularity, PerToken)
    if group or not (isinstance(weight, Int) and weight.symmetric and precision == "int8"):
        floats = precision == "fp8" and not group and tokens
        same = isinstance(activation, MiniFloat) and (activation.e, activation.m, activation.special) == (4, 3, "nan")
        return [n for n in ("fp8-dynamic", "fp8-bytes") if floats and same and n in present]
    if not isinstance(activation, Int) or activation.bits != 8:
        return []
    if not isinstance(activation.granularity, (PerToken, PerTensor)):
        return []
    names = [INTEGER] if "int8-dynamic" in present and isinstance(weight.granularity, PerChannel) else []
    return names + [n for n in ("int8-bytes",) if tokens and activation.symmetric and n in present]


def fits_half(weight: Quantized) -> bool:
    """Whether the scales survive the half formats that the int4 kernels read."""
    return all(torch.equal(weight.scales.to(k).float(), weight.scales) for k in (torch.float16, torch.bfloat16))


def realise(layer: Simulated, name: str) -> QuantizedLayer:
    """The layer on the kernel ``name``: :data:`INTEGER`, or one of the table."""
    weight = layer.quantized()
    bias = None if layer.bias is None else layer.bias.detach().clone()
    made: QuantizedLayer
    if name == INTEGER:
        assert isinstance(layer.activation, ActivationQuantizer)
        made = IntegerLinear(weight, bias, layer.activation)
    else:
        made = KernelLinear(weight, bias, name, layer.activation.format if layer.activation is not None else None)
    return made.train(layer.training)


def decide(
    layer: Simulated, tokens: int, only_faster: bool, clock: Clock | None = None, wanted: Sequence[str] | None = None
) -> tuple[str | None, str, float | None]:
    """Kernel or None, the reason, and how much faster than float32 it is, where that was measured."""
    if layer.layer["kind"] != "Linear":
        return convolution(layer, tokens, only_faster, clock)
    shape = (layer.matrix[0], layer.matrix[1])
    activation = layer.activation.format if layer.activation is not None else None
    device = next(layer.buffers()).device
    names = candidates(layer.format, activation, shape, device)
    if wanted is not None:
        names = [n for n in names if n in wanted]
    if names and device.type == "cpu" and layer.format.bits == 4 and not fits_half(layer.quantized()):
        return None, "its scales leave the range of the int4 kernels", None
    if not names:
        return None, f"no kernel here runs {layer.format.label} weights of {shape[0]} x {shape[1]}", None
    asked = {n: "int8-dynamic" if n == INTEGER else n for n in names}
    rows = torch.float32  # of the model in place of which this one is asked for
    times = kernels.measure_kernels(shape, tokens, ["fp32", *asked.values()], clock=clock, inputs=rows, device=device)
    best = min(names, key=lambda n: times[asked[n]])
    speedup = times["fp32"] / times[asked[best]]
    if only_faster and speedup < 1:
        return None, f"{best} would take {1 / speedup:.2f}× the time of fp32 at {tokens} rows", speedup
    return best, f"{speedup:.2f}× as fast as fp32 at {tokens} rows", speedup


def convolution(
    layer: Simulated, tokens: int, only_faster: bool, clock: Clock | None = None
) -> tuple[str | None, str, float | None]:
    """The real integer convolution for this layer: kernel or None, reason, speed-up. None is built in yet."""
    return None, "convolutions run simulated", None
