"""Bytes times bytes with int32 sums, on any device."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["byte_product"]

_LEAST_ROWS, _EIGHTS = 24, 8
"""CUDA's product takes more than 16 rows, and inputs and outputs in whole eights"""


def byte_product(x: Tensor, weight: Tensor) -> Tensor:
    """x (rows, in) int8 times weight (out, in) int8 -> int32 (rows, out).

    >>> byte_product(torch.ones(2, 3, dtype=torch.int8), torch.full((1, 3), -2, dtype=torch.int8)).tolist()
    [[-6], [-6]]
    """
    if x.device.type != "cuda":
        return torch._int_mm(x, weight.t())
    rows, inner = x.shape
    out = weight.shape[0]
    more = max(_LEAST_ROWS, -(-rows // _EIGHTS) * _EIGHTS) - rows
    missing, beside = -inner % _EIGHTS, -out % _EIGHTS
    if more or missing:
        x = functional.pad(x, (0, missing, 0, more))
    if missing or beside:
        weight = functional.pad(weight, (0, missing, 0, beside))
    return torch._int_mm(x, weight.t())[:rows, :out]
