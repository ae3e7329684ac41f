"""Memory of a paged cache: keys and values of every layer, as numbers or as codes of one byte with a scale.

A row is what one token leaves for one key head. As numbers it is ``head_dim`` bfloat16 or float32, as codes
``head_dim`` int8 and a bfloat16 scale (:mod:`kernels_codes`): 0.52 of the bytes at 64 numbers. Whoever copies rows need
not know.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hasten.errors import ConfigurationError
from hasten.language.kernels_codes import SCALE

__all__ = ["KV_PRECISIONS", "KVCache", "coded", "row_bytes", "rows_of", "widened"]

KV_PRECISIONS = ("auto", "int8")
"""Of a cache: that of the activations, or codes of 8 bits with a scale for each token and key head."""


@dataclass(frozen=True)
class KVCache:
    """Keys and values of every layer: two of (layers, blocks, kv_heads, block_size, row)."""

    keys: Tensor
    values: Tensor
    _layers: list[tuple[Any, Any]] = field(default_factory=list, repr=False, compare=False)

    def layers(self, form: Callable[[Tensor], Any]) -> list[tuple[Any, Any]]:
        """Keys and values of each layer in the form that the operations take; made once."""
        if not self._layers:
            self._layers.extend((form(k), form(v)) for k, v in zip(self.keys, self.values, strict=True))
        return self._layers

    @property
    def arrays(self) -> tuple[Any, Any]:
        """Both as numpy arrays; bfloat16 as uint16."""
        keys, values = (
            (x.view(torch.uint16) if x.dtype is torch.bfloat16 else x).numpy() for x in (self.keys, self.values)
        )
        return keys, values

    @property
    def bytes(self) -> int:
        """Memory that the cache takes."""
        return 2 * self.keys.numel() * self.keys.element_size()

    @property
    def block_size(self) -> int:
        return self.keys.shape[3]

    @property
    def num_blocks(self) -> int:
        return self.keys.shape[1]

    @property
    def precision(self) -> str:
        """Type of the numbers: int8, bf16 or fp32."""
        return {torch.int8: "int8", torch.bfloat16: "bf16"}.get(self.keys.dtype, "fp32")


def row_bytes(width: int, dtype: torch.dtype, precision: str) -> int:
    """Bytes of a row of ``width`` numbers.

    >>> row_bytes(64, torch.bfloat16, "auto"), row_bytes(64, torch.bfloat16, "int8")
    (128, 66)
    """
    return width + SCALE if precision == "int8" else width * dtype.itemsize


def rows_of(shape: tuple[int, ...], dtype: torch.dtype, precision: str, device: torch.device) -> Tensor:
    """Rows of zeros, (..., head_dim) numbers each, that nobody has touched yet.

    numpy's large arrays lie in huge pages, where the system has any: blocks are scattered, and with small pages each
    would cost a walk through the page table.
    """
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    if precision == "int8":
        return torch.from_numpy(np.zeros((*shape[:-1], shape[-1] + SCALE), np.int8))
    kind = np.float32 if dtype is torch.float32 else np.uint16
    return torch.from_numpy(np.zeros(shape, kind)).view(dtype)


def widened(rows: Tensor) -> Tensor:
    """rows (..., row) as float32 (..., head_dim).

    >>> x = torch.randn(3, 64)
    >>> bool((widened(coded(x)) - x).abs().max() <= 0.51 * x.abs().max() / 127)
    True
    """
    if rows.dtype is not torch.int8:
        return rows.float()
    scale = rows[..., -SCALE:].contiguous().view(torch.bfloat16).float()
    return rows[..., :-SCALE].float() * scale


def coded(numbers: Tensor) -> Tensor:
    """Numbers (..., head_dim) as rows of codes and a scale (..., head_dim + 2); what :func:`widened` gave is kept."""
    numbers = numbers.float()
    scale = (numbers.abs().amax(-1, keepdim=True) / 127).to(torch.bfloat16)
    wide = scale.float()
    codes = torch.where(wide > 0, numbers / wide, torch.zeros_like(numbers)).round().clamp(-127, 127).to(torch.int8)
    return torch.cat([codes, scale.contiguous().view(torch.int8).view(*scale.shape[:-1], SCALE)], -1)


def checked(precision: str, device: torch.device) -> str:
    """``precision`` if a cache can have it on ``device``; raises :class:`~hasten.errors.ConfigurationError`."""
    if precision not in KV_PRECISIONS:
        raise ConfigurationError(f"a KV cache cannot be {precision!r}; choose one of {', '.join(KV_PRECISIONS)}")
    if precision == "int8" and device.type != "cpu":
        raise ConfigurationError(f"a KV cache of 8 bits is for the CPU, not {device.type}; leave --kv-precision out")
    return precision
