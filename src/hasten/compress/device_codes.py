"""Weights as codes in the memory of a GPU: one layout for each width, which every kernel for many or few rows reads.

A row of a weight is a line of bytes, filled up with code 0 to whole 32 bytes. Bytes and FP8 lie as they are; of 4-bit
codes, 8 added to each, a chunk of 16 bytes holds 32 inputs, the first 16 in the low halves and the others in the high
ones, so that a load of 16 bytes meets two runs of neighbouring inputs and nothing is shuffled. A code q stands for
``(q - zero) * scale``; scales belong to a row or to a group of its inputs.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hasten.compress.packed import Packed

__all__ = [
    "CHUNK",
    "Codes",
    "codes_in",
    "float8_rows",
    "int4_groups",
    "int8_rows",
    "lay_out",
    "opened",
    "stored",
]

CHUNK = 16
"""bytes that a thread loads at once"""
_LINE = 32
"""bytes to whole numbers of which a row is filled up"""
_TILES = 16
"""tiles of rows for which a weight has counters"""


class Codes(NamedTuple):
    """What :class:`~hasten.compress.packed.Packed` holds for the kernels of a GPU."""

    codes: Tensor
    """(out, bytes of a line): int8, float8_e4m3fn, or uint8 with two 4-bit codes each"""
    scales: Tensor
    """(out, groups) float32, float16 or bfloat16"""
    zeros: Tensor
    """(out, groups) float32, or empty where every code 0 stands for 0"""
    counters: Tensor
    """int32, zero before and after each launch; so one launch at a time uses a weight"""

    @property
    def four(self) -> bool:
        """Whether a byte holds two codes."""
        return self.codes.dtype is torch.uint8


def codes_in(packed: Packed) -> Codes:
    """The tensors of a packed weight by their names."""
    return Codes(*packed.tensors)


def _filled(codes: Tensor, size: int) -> Tensor:
    """Columns of zeros up to a multiple of ``size``."""
    missing = -codes.shape[1] % size
    if not missing:
        return codes.contiguous()
    return torch.cat([codes, codes.new_zeros(codes.shape[0], missing)], 1)


def _halves(codes: Tensor) -> Tensor:
    """int8 codes -8 … 7 (out, in) -> uint8 (out, bytes), see the module."""
    chunks = _filled(codes, 2 * _LINE).view(codes.shape[0], -1, 2, CHUNK).view(torch.uint8) + 8
    both = (chunks[:, :, 0] & 15) | (chunks[:, :, 1] << 4)
    return both.reshape(codes.shape[0], -1).contiguous()


def _unfolded(line: Tensor, inner: int) -> Tensor:
    """The inverse of :func:`_halves`."""
    both = line.view(line.shape[0], -1, 1, CHUNK)
    codes = torch.cat([both & 15, both >> 4], 2).reshape(line.shape[0], -1)[:, :inner]
    return codes.to(torch.int8) - 8


def lay_out(
    codes: Tensor, scales: Tensor, zeros: Tensor | None = None, *, group: int = 0, four: bool = False
) -> Packed:
    """Codes (out, in) int8 or float8_e4m3fn, scales and zeros (out, groups) -> the layout, on the device of the codes.

    ``group``: inputs of a scale, 0 for a whole row; a multiple of 16, of 32 for 4-bit codes. Nothing is rounded.
    """
    out, inner = codes.shape
    line = _halves(codes) if four else _filled(codes.view(torch.int8), _LINE).view(codes.dtype)
    empty = torch.empty(0, dtype=torch.float32, device=codes.device)
    counters = torch.zeros(-(-out // 32) * _TILES, dtype=torch.int32, device=codes.device)
    kept = (line, _narrowed(scales), empty if zeros is None else zeros.float().contiguous(), counters)
    return Packed(kept, (out, inner), group)


def _narrowed(scales: Tensor) -> Tensor:
    """In the half format that holds them exactly, where one does and they are many."""
    scales = scales.float().contiguous()
    if scales.shape[1] > 1:
        for kind in (torch.float16, torch.bfloat16):
            if torch.equal(scales.to(kind).float(), scales):
                return scales.to(kind)
    return scales


def int8_rows(weight: Tensor, group: int = 0) -> Packed:
    """Symmetric 8-bit codes of a weight (out, in), a scale for each row or each ``group`` inputs."""
    weight = weight.detach().float()
    out, inner = weight.shape
    groups = _in_groups(weight, group or inner)
    scale = groups.abs().amax(2).clamp(min=1e-12) / 127
    if group:
        scale = scale.clamp(min=2.0**-20).bfloat16().float()  # as the kernel reads it
    codes = torch.round(groups / scale[..., None]).clamp(-127, 127).to(torch.int8).reshape(out, -1)[:, :inner]
    return lay_out(codes, scale, group=group)


def int4_groups(weight: Tensor, group: int = 32) -> Packed:
    """4-bit codes of a weight (out, in): a group's largest entry becomes -8, as in llama.cpp's q4_0 and on the CPU."""
    weight = weight.detach().float()
    out, inner = weight.shape
    groups = _in_groups(weight, group)
    top = groups.gather(2, groups.abs().argmax(2, keepdim=True))[..., 0]
    scale = (top / -8).half().float()
    inverse = torch.where(scale == 0, torch.zeros_like(scale), 1 / scale)
    codes = torch.round(groups * inverse[..., None]).clamp(-8, 7).to(torch.int8).reshape(out, -1)[:, :inner]
    return lay_out(codes, scale, group=group, four=True)


def float8_rows(weight: Tensor) -> Packed:
    """FP8 (E4M3) codes of a weight (out, in) with a scale for each row."""
    weight = weight.detach().float()
    scale = weight.abs().amax(1, keepdim=True).clamp(min=1e-12) / 448
    return lay_out((weight / scale).clamp(-448, 448).to(torch.float8_e4m3fn), scale)


def _in_groups(weight: Tensor, size: int) -> Tensor:
    missing = -weight.shape[1] % size
    if missing:
        weight = torch.nn.functional.pad(weight, (0, missing))
    return weight.view(weight.shape[0], -1, size)


def opened(packed: Packed) -> Tensor:
    """The weight (out, in) float32 that the codes stand for: the slow twin of the kernel that opens codes."""
    held = codes_in(packed)
    out, inner = packed.shape
    values = _unfolded(held.codes, inner).float() if held.four else held.codes[:, :inner].float()
    groups = _in_groups(values, packed.group or inner)
    if held.zeros.numel():
        groups = groups - held.zeros[..., None]
    return (groups * held.scales.float()[..., None]).reshape(out, -1)[:, :inner].contiguous()


def stored(packed: Packed) -> Tensor:
    """The codes (out, in) as they were given to :func:`lay_out`."""
    held, inner = codes_in(packed), packed.shape[1]
    return _unfolded(held.codes, inner) if held.four else held.codes[:, :inner].contiguous()
