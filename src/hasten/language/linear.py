"""Packed matrices: weights laid out once for the kernel that will multiply them.

A weight (out, in) is read once per step whatever the number of rows, so up to some tens of rows a product costs the
bytes of its weight. Our own kernels (:mod:`hasten.nn.product`) take one row and a thousand from the same layout, and a
row's bits do not depend on the others; large matrices in bfloat16 take 12 bits a weight there, without loss. Where the
processor lacks their instructions, and in float32, oneDNN multiplies: in deterministic mode always sixteen rows, and
bfloat16 at least four, which it reads faster than one (measured on AVX-512: 27 GB/s for one row, 37 for four). On a GPU
codes of 8 and 4 bits and FP8 stay codes in its memory (:mod:`hasten.compress.kernels_cuda`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from hasten.compress.panels import codes_product, panel_product, short_product, takes
from hasten.compress.quantize.base import Quantized
from hasten.errors import ConfigurationError
from hasten.nn.product import tiles
from hasten.nn.product.instructions import pairs_as_floats

__all__ = ["PRECISIONS", "PackedLinear", "best_precision", "pack", "runs_as_stored"]

PRECISIONS = ("fp32", "bf16", "int8", "int4")
"""Precisions of the weights in the runtime; a GPU has fp8 too."""

_FEWEST = 4
_TILE = 16
_LARGE = 1 << 20  # entries from which a weight streams from memory; smaller ones stay in a cache and gain nothing


class PackedLinear:
    """``x @ weight.T + bias`` for x (rows, in) -> (rows, out), in the type of x."""

    def __init__(
        self,
        product: Callable[[Tensor], Tensor],
        in_features: int,
        out_features: int,
        num_bytes: int,
        tile: int | None = None,
        pads: bool = False,
        packed: Any = None,
        times: dict[int, tuple[float, float]] | None = None,
    ) -> None:
        self._product = product
        self.in_features = in_features
        self.out_features = out_features
        self.num_bytes = num_bytes
        self._tile = tile
        self._pads = pads
        self.packed = packed
        """what :func:`hasten.nn.product.dispatch.describe` takes; None where another kernel multiplies"""
        self.times = times or {}
        """seconds of this product and of one in bfloat16, by rows, where a GPU has measured both"""

    def __call__(self, x: Tensor) -> Tensor:
        rows = x.shape[0]
        if self._tile is not None:
            return self._in_tiles(x, rows)
        if self._pads and rows < _FEWEST:
            padded = torch.empty((_FEWEST, x.shape[1]), dtype=x.dtype)
            padded[:rows] = x
            padded[rows:] = 0
            return self._product(padded)[:rows]
        return self._product(x)

    def _in_tiles(self, x: Tensor, rows: int) -> Tensor:
        assert self._tile is not None
        missing = -rows % self._tile
        if missing:
            x = functional.pad(x, (0, 0, 0, missing))
        parts = [self._product(part) for part in x.split(self._tile)]
        return (parts[0] if len(parts) == 1 else torch.cat(parts))[:rows]


def best_precision(device: str = "cpu") -> str:
    """bf16 where the processor multiplies it in hardware, else fp32."""
    if device.startswith("cuda"):
        return "bf16"
    from torch.backends import cpu

    return "bf16" if torch.ops.mkldnn._is_mkldnn_bf16_supported() and "AVX2" not in cpu.get_cpu_capability() else "fp32"


def pack(
    weight: Tensor | Quantized, precision: str, *, bias: Tensor | None = None, deterministic: bool = False,
    rounds: bool | None = None,
) -> PackedLinear:  # fmt: skip
    """Lay out ``weight`` (out, in) at ``precision``; the caller's tensor is not kept.

    Codes are laid out as they are, whatever the precision, where a kernel runs them; else what they stand for is packed
    at ``precision``. ``rounds``: whether a GPU may round rows to bytes (FP8 with FP8 weights) where that is quicker;
    unless said, it may where the weight is rounded here, as the CPU does, and not where codes are given. Raises
    :class:`ConfigurationError` for a precision that this device or shape does not have.
    """
    at = weight.codes.device if isinstance(weight, Quantized) else weight.device
    if isinstance(weight, Quantized) and at.type != "cpu" and not runs_as_stored(weight, at):
        weight, precision = weight.dequantize(), "fp32" if precision == "fp32" else "bf16"
    if at.type == "cuda" and (isinstance(weight, Quantized) or precision in ("int8", "int4", "fp8")):
        return _on_gpu(weight, precision, bias, not isinstance(weight, Quantized) if rounds is None else rounds)
    if isinstance(weight, Quantized):
        out_features, in_features = weight.shape
        scales = weight.scales.reshape(out_features, -1) if weight.zeros is None and _integer(weight) else None
        found = None if scales is None else codes_product(weight.codes, scales, weight.format.bits, bias)
        if found is not None:
            kind, product, packed, num_bytes = found
            kind = _for_many_rows(kind, in_features, deterministic)
            return PackedLinear(
                product, in_features, out_features, num_bytes, packed=(kind, *packed, out_features, in_features)
            )
        weight = weight.dequantize()
    out_features, in_features = weight.shape
    if weight.device.type == "cpu" and takes(precision, out_features, in_features):
        short = short_product(weight, bias, fixed=deterministic) if precision == "bf16" else None
        product, packed, num_bytes = short or panel_product(weight, precision, bias, fixed=deterministic)
        kind = _for_many_rows("bf12" if short else precision, in_features, deterministic)
        return PackedLinear(
            product, in_features, out_features, num_bytes, packed=(kind, *packed, out_features, in_features)
        )
    tile = _TILE if deterministic else None
    if precision in ("fp32", "bf16"):
        dtype = torch.float32 if precision == "fp32" else torch.bfloat16
        weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
        product = _plain(weight, bias) if weight.device.type != "cpu" else _onednn(weight, bias)
        pads = precision == "bf16" and weight.device.type == "cpu" and weight.numel() >= _LARGE
        return PackedLinear(product, in_features, out_features, weight.numel() * weight.element_size(), tile, pads)
    if precision in ("int8", "int4"):
        from hasten.compress.kernels import quantized_product

        product, num_bytes = quantized_product(weight, precision, bias)
        return PackedLinear(product, in_features, out_features, num_bytes, tile)
    if precision == "fp8":
        raise ConfigurationError("fp8 runs on a GPU; on the CPU choose int8")
    raise ConfigurationError(f"precision {precision!r} is unknown; choose one of {', '.join(PRECISIONS)}")


def runs_as_stored(weight: Quantized, device: torch.device) -> bool:
    """Whether a GPU has a kernel for these codes; what they stand for is packed where not."""
    from hasten.compress.kernels_triton import triton
    from hasten.compress.quantize.device import readable

    return device.type == "cuda" and triton is not None and readable(weight)


def _on_gpu(weight: Tensor | Quantized, precision: str, bias: Tensor | None, rounds: bool) -> PackedLinear:
    """Codes in the memory of a GPU: those given, or of a weight at ``precision``."""
    from hasten.compress.kernels_cuda import against_bf16, lay_out_at, product
    from hasten.compress.quantize.device import packed_of

    found = packed_of(weight) if isinstance(weight, Quantized) else (precision, lay_out_at(weight, precision))
    assert found is not None
    kind, packed = found
    call, num_bytes = product(packed, kind, bias, rounds=rounds)
    times = against_bf16(packed, kind, rounds=rounds)
    return PackedLinear(call, packed.shape[1], packed.shape[0], num_bytes, times=times)


def _for_many_rows(precision: str, inputs: int, deterministic: bool) -> str:
    """The kernel of the stack for a precision: with matrix tiles where the processor has them, else bfloat16 through
    float32 where that is quicker, and bits may differ."""
    exact = precision == "int8"  # sums of bytes are the same either way
    if deterministic and not exact:
        return precision
    if tiles.granted():
        suits = tiles.takes_bytes(inputs) if exact else precision in ("bf16", "bf12")
        return f"{precision}-tiles" if suits else precision
    return f"{precision}-floats" if precision in ("bf16", "bf12") and pairs_as_floats() else precision


def _integer(weight: Quantized) -> bool:
    from hasten.compress.quantize.integer import Int

    return isinstance(weight.format, Int) and weight.scales.numel() % weight.shape[0] == 0


def _plain(weight: Tensor, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
    return lambda x: functional.linear(x, weight, bias)


def _onednn(weight: Tensor, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
    if not torch.backends.mkldnn.is_available():
        return _plain(weight, bias)
    packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), _TILE)
    call = torch.ops.mkldnn._linear_pointwise.default

    def product(x: Tensor) -> Tensor:
        out: Tensor = call(x, packed, bias, "none", [], "")
        return out

    return product
