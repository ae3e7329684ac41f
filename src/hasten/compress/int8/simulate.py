"""The same network in plain numpy and torch, one operation after the other: the truth that the loop is tested against.

Convolutions of whole numbers are exact in float64; everything behind a sum is float32 in the loop's order, so bytes and
results are equal to the last bit.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch.nn import functional

from hasten.compress.int8.lowering import Lowered
from hasten.compress.int8.operations import Convolution, Joined, Mean, Operation, Pool, Shortcut, Value

__all__ = ["simulate"]


def simulate(lowered: Lowered, images: Any) -> Any:
    """images (batch, channels, height, width) float32 -> the network's output, float32."""
    held = {id(lowered.entry): _bytes(images, lowered.entry, 0.0, 255.0)}
    out: Any = None
    for operation in lowered.operations:
        result = _run(operation, held)
        if operation.result is None:
            out = result
        else:
            held[id(operation.result)] = result
    if lowered.output is not None:
        value = lowered.output
        out = (held[id(value)].astype(np.float32) - np.float32(value.zero)) * np.float32(value.scale)
    return out.reshape(len(images), *lowered.shape)


def _bytes(real: Any, value: Value, low: float, high: float) -> Any:
    inverse = np.float32(1 / value.scale)
    return np.clip(np.rint(real * inverse) + np.float32(value.zero), np.float32(low), np.float32(high)).astype(np.uint8)


def _run(operation: Operation, held: dict[int, Any]) -> Any:
    source = held[id(operation.source)]
    if isinstance(operation, Convolution):
        real = _convolution(operation, source)
    elif isinstance(operation, Pool):
        wide = torch.from_numpy(source.astype(np.float64))
        return (
            functional.max_pool2d(wide, operation.window, operation.stride, operation.padding).numpy().astype(np.uint8)
        )
    elif isinstance(operation, Mean):
        count = np.float32(source.shape[2] * source.shape[3])
        total = source.astype(np.int64).sum((2, 3), keepdims=True).astype(np.float32)
        return np.rint(total / count).astype(np.uint8)
    else:
        value = operation.source
        real = (source.astype(np.float32) - np.float32(value.zero)) * np.float32(value.scale)
    shortcut: Shortcut | None = getattr(operation, "shortcut", None)
    if shortcut is not None:
        real = _added(real, shortcut, held[id(shortcut.value)])
    assert isinstance(operation, (Convolution, Joined))
    low, high = operation.low, operation.high
    if operation.result is None:
        return np.clip(real, np.float32(low), np.float32(high))
    zero, scale = operation.result.zero, operation.result.scale
    least = max(0.0, zero + low / scale) if np.isfinite(low) else 0.0
    most = min(255.0, float(np.rint(zero + high / scale))) if np.isfinite(high) else 255.0
    return _bytes(real, operation.result, least, most)


def _convolution(operation: Convolution, source: Any) -> Any:
    value, padding = operation.source, operation.padding
    x = torch.from_numpy(source.astype(np.float64))
    x = functional.pad(x, (padding,) * 4, value=float(value.zero))
    weight = torch.from_numpy(operation.weight.astype(np.float64))
    groups = len(weight) if operation.depthwise else 1
    total = functional.conv2d(x, weight, stride=operation.stride, groups=groups).numpy()
    scale = operation.weight_scale * value.scale
    sums = operation.weight.astype(np.int64).reshape(len(weight), -1).sum(1)
    bias = (operation.bias - sums * value.zero * scale).astype(np.float32)
    return total.astype(np.float32) * scale.astype(np.float32)[:, None, None] + bias[:, None, None]


def _added(real: Any, shortcut: Shortcut, source: Any) -> Any:
    real = real.copy()
    value, stride = shortcut.value, shortcut.stride
    some = source[:, :, ::stride, ::stride].astype(np.float32) - np.float32(value.zero)
    place = slice(shortcut.offset, shortcut.offset + value.channels)
    real[:, place] += some[:, : real[:, place].shape[1]] * np.float32(value.scale)
    return real
