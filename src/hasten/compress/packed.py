"""What a kernel for linear layers is, and a weight as it wants it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["LinearKernel", "Packed"]


@dataclass(frozen=True)
class Packed:
    """A weight as one kernel wants it. Immutable: copies share the tensors."""

    tensors: tuple[Tensor, ...]
    """the kernel's own layout"""
    shape: tuple[int, int]
    """(out, in) of the weight"""
    group: int = 0
    """inputs that share a scale; 0 where a whole row does"""

    @property
    def bytes(self) -> int:
        """Bytes of the tensors."""
        return sum(t.numel() * t.element_size() for t in self.tensors)

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.tensors[0].device

    def __deepcopy__(self, memo: dict[int, Any]) -> Packed:
        return self


@dataclass(frozen=True)
class LinearKernel:
    """One way to compute ``x Wᵀ``.

    >>> import torch
    >>> from hasten.compress.kernels import kernel
    >>> k = kernel("int8-dynamic")
    >>> weight, x = torch.randn(32, 64), torch.randn(3, 64)
    >>> packed = k.pack(weight)
    >>> k.run(x, packed).shape, packed.bytes
    (torch.Size([3, 32]), 2176)
    """

    name: str
    """unique: ``bf16-packed``, ``int8-dynamic``, …"""
    precision: str
    """format of the stored weight: fp32, bf16, int8 or int4"""
    pack: Callable[[Tensor], Packed]
    """weight (out, in) in any float format -> packed; done once"""
    run: Callable[[Tensor, Packed], Tensor]
    """x (tokens, in), packed -> (tokens, out) in the format of x"""
    unpack: Callable[[Packed], Tensor]
    """packed -> the weight that is really used, (out, in) float32"""
    error: float
    """bound of the relative error against float32, see the module"""
    supports: Callable[[int, int], bool]
    """(out, in) -> whether the kernel takes such a weight"""
    group: int = 0
    """inputs that share a scale; 0 where a row does, or where the name alone says it"""

    def __repr__(self) -> str:
        return f"LinearKernel({self.name!r})"
