"""Stored matrices put together: query, key and value are one matrix in the runtime, gate and up another."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from hasten.compress.quantize.base import Quantized

__all__ = ["joined", "moved"]


def moved(weight: Quantized, device: torch.device) -> Quantized:
    """The same codes on ``device``."""
    zeros = None if weight.zeros is None else weight.zeros.to(device)
    return replace(weight, codes=weight.codes.to(device), scales=weight.scales.to(device), zeros=zeros)


def joined(parts: list[Tensor | Quantized]) -> Tensor | Quantized:
    """Matrices with the same inputs, one below the other; codes stay codes where all have one format."""
    first = parts[0]
    if len(parts) == 1:
        return first
    if isinstance(first, Quantized) and all(isinstance(p, Quantized) and p.format == first.format for p in parts):
        codes: list[Any] = list(parts)
        zeros = None if first.zeros is None else torch.cat([p.zeros for p in codes])
        if first.scales.shape[0] == first.codes.shape[0] and (zeros is None or first.zeros is not None):
            return Quantized(
                torch.cat([p.codes for p in codes]),
                torch.cat([p.scales for p in codes]),
                zeros,
                first.format,
                first.dtype,
            )
    return torch.cat([p.dequantize() if isinstance(p, Quantized) else p for p in parts])
