"""Modules with eight-bit floats in their buffers, made to survive ``pickle``: torch writes such tensors with its own
``torch.save`` alone. Their bytes are stored, and read as what they were."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

__all__ = ["Float8Buffers"]


class Float8Buffers(nn.Module):
    """Base of a module whose buffers may be float8.

    >>> import pickle
    >>> layer = Float8Buffers()
    >>> layer.register_buffer("scales", torch.ones(2).to(torch.float8_e4m3fn))
    >>> pickle.loads(pickle.dumps(layer)).scales.dtype
    torch.float8_e4m3fn
    """

    def __getstate__(self) -> dict[str, Any]:
        eighths = {n: b.dtype for n, b in self._buffers.items() if b is not None and _is_eighth(b.dtype)}
        stored = {n: b.view(torch.uint8) if n in eighths and b is not None else b for n, b in self._buffers.items()}
        return {**self.__dict__, "_buffers": stored, "_eighths": eighths}

    def __setstate__(self, state: dict[str, Any]) -> None:
        eighths = state.get("_eighths", {})
        buffers = {n: b.view(eighths[n]) if n in eighths else b for n, b in state["_buffers"].items()}
        rest = {k: v for k, v in state.items() if k != "_eighths"}
        super().__setstate__({**rest, "_buffers": buffers})  # type: ignore[no-untyped-call]


def _is_eighth(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point and dtype.itemsize == 1
