"""What a kernel for linear layers is, and a weight as it wants it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hasten.errors import ConfigurationError

__all__ = ["LinearKernel", "Packed", "from_plain", "rows_for", "to_plain"]

_OPAQUE = "bf16-packed"
"""Laid out by oneDNN in a tensor that cannot be written down; its bfloat16 numbers can, and give the same layout."""
_SIGNED = {torch.uint16: torch.int16, torch.float8_e4m3fn: torch.uint8, torch.float8_e5m2: torch.uint8}
"""What ``pickle`` writes of tensors in place of what torch.save alone does."""
_BY_PROCESSOR = "int4-g"
"""Kernels of torch whose layout depends on the width of the processor's vectors."""


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


def rows_for(x: Tensor, inner: int) -> Tensor:
    """x (…, inner) as rows (rows, inner). Raises :class:`~hasten.errors.ConfigurationError` for another width, and for
    whole numbers, which the result would be cut to."""
    if x.dim() == 0 or x.shape[-1] != inner or not x.is_floating_point():
        raise ConfigurationError(
            f"a layer of {inner} inputs was given {x.dtype} of shape {tuple(x.shape)}; give floats (…, {inner})"
        )
    return x.reshape(-1, inner)


def to_plain(packed: Packed, name: str) -> dict[str, Tensor]:
    """What the kernel ``name`` holds as tensors that anything stores: its own by their numbers, and ``about`` them.

    >>> from hasten.compress.kernels import kernel
    >>> sorted(to_plain(kernel("int8-weight").pack(torch.ones(32, 32)), "int8-weight"))
    ['0', '1', 'about']
    """
    tensors = [t.to_dense() if t.is_mkldnn else t for t in packed.tensors]
    about = {
        "kernel": name, "shape": packed.shape, "group": packed.group, "layout": _layout(name, packed.device),
        "dtypes": [str(t.dtype).removeprefix("torch.") for t in tensors],
    }  # fmt: skip
    signed = [t.view(_SIGNED[t.dtype]) if t.dtype in _SIGNED else t for t in tensors]
    text = torch.tensor(list(json.dumps(about).encode()), dtype=torch.uint8)
    return {**{str(n): t for n, t in enumerate(signed)}, "about": text}


def from_plain(held: dict[str, Tensor], wanted: tuple[str, tuple[int, int]] | None = None) -> tuple[Packed, str]:
    """The inverse of :func:`to_plain`, bit for bit, and the kernel's name.

    Raises :class:`~hasten.errors.ConfigurationError` on one line for another kernel or shape (out, in) than ``wanted``,
    and where the numbers lie otherwise on this machine than where they were stored.
    """
    about = json.loads(bytes(held["about"].tolist()))
    name, shape = str(about["kernel"]), (int(about["shape"][0]), int(about["shape"][1]))
    if wanted is not None and wanted != (name, shape):
        raise ConfigurationError(
            f"a weight of {shape[0]} x {shape[1]} for {name} was given to a layer of {wanted[1][0]} x {wanted[1][1]} "
            f"that runs {wanted[0]}; make the model by the same recipe and plan"
        )
    tensors = [held[str(n)].view(getattr(torch, kind)) for n, kind in enumerate(about["dtypes"])]
    here = _layout(name, tensors[0].device)
    if about["layout"] != here:
        raise ConfigurationError(
            f"a layer was packed by {name} for {about['layout']} and cannot be read here ({here}); load the model as "
            "it was before compression and apply its recipe"
        )
    if name == _OPAQUE:
        tensors = [torch.ops.mkldnn._reorder_linear_weight(tensors[0].contiguous(), 1)]
    return Packed(tuple(tensors), shape, int(about["group"])), name


def _layout(name: str, device: torch.device) -> str:
    if device.type == "cpu" and name.startswith(_BY_PROCESSOR) and not name.endswith("panels"):
        return f"{torch.backends.cpu.get_cpu_capability()} vectors"
    return device.type
