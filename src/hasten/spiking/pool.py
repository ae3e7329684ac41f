"""Pooling by two, for inference, in one pass; with a threshold behind it, straight to spikes.

Pooling is a third of the time of a small convolutional network whose neurons are fused, since the library's kernel also
looks for the places of the maxima. ``max(u) > V`` is what the neurons of a single step compute of a pooled current.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import torch
from numba import njit, prange
from torch import Tensor, nn

__all__ = ["max_pool", "mean_pool", "pool", "pools"]


@njit(cache=True, inline="always")
def _larger(a: Any, b: Any) -> Any:
    """The larger one; whatever is not a number stays."""
    return a if (a > b or a != a) else b


@njit(cache=True, parallel=True, error_model="numpy")
def _pool(x: Any, out: Any, threshold: float, compare: bool) -> None:
    """x (planes, height, width) -> out (planes, height // 2, width // 2): maxima, or 1 where they exceed."""
    level, one, zero = np.float32(threshold), np.float32(1.0), np.float32(0.0)
    rows, columns = out.shape[1], out.shape[2]
    for plane in prange(x.shape[0]):
        best = np.empty(2 * columns, np.float32)
        for i in range(rows):
            a, b, to = x[plane, 2 * i], x[plane, 2 * i + 1], out[plane, i]
            for j in range(2 * columns):
                best[j] = _larger(a[j], b[j])
            if compare:
                for j in range(columns):
                    to[j] = one if _larger(best[2 * j], best[2 * j + 1]) > level else zero
            else:
                for j in range(columns):
                    to[j] = _larger(best[2 * j], best[2 * j + 1])


@njit(cache=True, parallel=True, error_model="numpy")
def _mean(x: Any, out: Any) -> None:
    """x (planes, height, width) -> out (planes, height // 2, width // 2): means, summed in the library's order."""
    for plane in prange(x.shape[0]):
        for i in range(out.shape[1]):
            a, b, to = x[plane, 2 * i], x[plane, 2 * i + 1], out[plane, i]
            for j in range(out.shape[2]):
                to[j] = (((a[2 * j] + a[2 * j + 1]) + b[2 * j]) + b[2 * j + 1]) * np.float32(0.25)


def _pair(value: Any) -> tuple[Any, Any]:
    return value if isinstance(value, tuple) else (value, value)


def pools(layer: nn.Module, x: Tensor) -> bool:
    """Whether :func:`pool` does what ``layer`` does to x (…, height, width) here: a plain pooling by two on the CPU,
    without a gradient."""
    plain = (
        isinstance(layer, (nn.MaxPool2d, nn.AvgPool2d))
        and (_pair(layer.kernel_size), _pair(layer.stride), _pair(layer.padding)) == ((2, 2), (2, 2), (0, 0))
        and not (layer.ceil_mode or torch.is_grad_enabled() or layer._forward_hooks)
    )
    if isinstance(layer, nn.MaxPool2d):
        plain = plain and _pair(layer.dilation) == (1, 1) and not layer.return_indices
    elif isinstance(layer, nn.AvgPool2d):
        plain = plain and layer.divisor_override is None
    return (
        plain
        and (x.device.type, x.dtype) == ("cpu", torch.float32)
        and min(x.shape[-2:]) > 1
        and x.dim() > 2
        and not (torch.compiler.is_compiling() or torch.compiler.is_exporting())
    )


def max_pool(x: Tensor, threshold: float | None = None) -> Tensor:
    """x (…, height, width) float32 -> the maxima of blocks of two by two, or with ``threshold`` 1 where they exceed it.

    >>> x = torch.arange(8.0).reshape(1, 2, 4)
    >>> max_pool(x).tolist(), max_pool(x, 5.0).tolist()
    ([[[5.0, 7.0]]], [[[0.0, 1.0]]])
    """
    source, out = _planes(x)
    _pool(source, out.reshape(-1, *out.shape[-2:]).numpy(), threshold or 0.0, threshold is not None)
    return out


def mean_pool(x: Tensor) -> Tensor:
    """x (…, height, width) float32 -> the means of blocks of two by two.

    >>> mean_pool(torch.arange(8.0).reshape(1, 2, 4)).tolist()
    [[[2.5, 4.5]]]
    """
    source, out = _planes(x)
    _mean(source, out.reshape(-1, *out.shape[-2:]).numpy())
    return out


def pool(layer: nn.Module, x: Tensor) -> Tensor:
    """What ``layer`` gives, where :func:`pools` says yes."""
    return max_pool(x) if isinstance(layer, nn.MaxPool2d) else mean_pool(x)


def _planes(x: Tensor) -> tuple[Any, Tensor]:
    """x as (planes, height, width) for a kernel, and room for what comes out."""
    height, width = x.shape[-2:]
    numba.set_num_threads(min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS))  # type: ignore[attr-defined]
    source = x.detach().contiguous().reshape(-1, height, width).numpy()
    return source, torch.empty(*x.shape[:-2], height // 2, width // 2)
