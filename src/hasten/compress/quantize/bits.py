"""Codes of 1 … 8 bits side by side in bytes, lowest bit first, as tensors that ``torch.export`` follows."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["pack_bits", "packed_bytes", "unpack_bits"]


def packed_bytes(count: int, bits: int) -> int:
    """Bytes that ``count`` codes take."""
    return math.ceil(count * bits / 8)


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Codes 0 … 2^bits - 1 of any shape -> uint8 (bytes,).

    >>> pack_bits(torch.tensor([1, 2, 3]), 4)
    tensor([33,  3], dtype=torch.uint8)
    """
    flat = codes.reshape(-1).to(torch.uint8)
    if bits == 8:
        return flat.clone()
    per_byte = 8 // bits
    if 8 % bits == 0:  # whole codes in a byte
        short = -len(flat) % per_byte
        rows = torch.nn.functional.pad(flat, (0, short)).view(-1, per_byte)
        packed = rows[:, 0].clone()
        for place in range(1, per_byte):
            packed |= rows[:, place] << (place * bits)
        return packed
    shifts = torch.arange(bits, dtype=torch.uint8, device=flat.device)
    single = ((flat[:, None] >> shifts) & 1).reshape(-1)
    short = -len(single) % 8
    eights = torch.nn.functional.pad(single, (0, short)).view(-1, 8)
    return (eights << torch.arange(8, dtype=torch.uint8, device=flat.device)).sum(1, dtype=torch.uint8)


def unpack_bits(packed: Tensor, bits: int, count: int) -> Tensor:
    """The inverse: uint8 (count,)."""
    if bits == 8:
        return packed
    if 8 % bits == 0:
        shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
        return ((packed[:, None] >> shifts) & (2**bits - 1)).reshape(-1)[:count]  # type: ignore[no-any-return]
    single = ((packed[:, None] >> torch.arange(8, dtype=torch.uint8, device=packed.device)) & 1).reshape(-1)[
        : count * bits
    ]
    return (single.view(count, bits) << torch.arange(bits, dtype=torch.uint8, device=packed.device)).sum(
        1, dtype=torch.uint8
    )
