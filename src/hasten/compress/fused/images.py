"""Operators over windows of an image or a line: convolutions, pools, borders; and look-ups by whole numbers.

A window is a view, whatever its stride and dilation. A border needs room of its own: the array is copied into the
middle of one that was filled before. Convolutions are then products of windows, pools reductions of them.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from hasten.compress.fused import run
from hasten.compress.fused.graph import Arguments, Lowering, operator_name, rule
from hasten.compress.fused.values import Operation, Unsupported, Value, contiguous

__all__: list[str] = []

_LOWEST = float(torch.finfo(torch.float32).min)
"""Beside an image whose largest numbers are asked for: compiled loops are free to take infinity for none."""


def _bordered(to: Lowering, x: Value, border: list[tuple[int, int]], filling: float) -> Value:
    """``x`` with so many numbers more before and behind along its last axes; negative ones take away."""
    lead = len(x.shape) - len(border)
    sides = [(0, 0)] * lead + border
    for axis, (before, behind) in enumerate(sides):
        if before < 0 or behind < 0:
            cut, strides = max(0, -before), x.strides[axis]
            shape = list(x.shape)
            shape[axis] -= cut + max(0, -behind)
            x = Value(x.buffer, tuple(shape), x.strides, x.start + cut * strides)
    sides = [(max(0, a), max(0, b)) for a, b in sides]
    if not any(a or b for a, b in sides):
        return x
    whole = to.new(tuple(n + a + b for n, (a, b) in zip(x.shape, sides, strict=True)))
    to.copy(to.value(filling), whole)
    start = sum(a * step for (a, _), step in zip(sides, whole.strides, strict=True))
    to.copy(x, Value(whole.buffer, x.shape, whole.strides, start))
    return whole


def _windows(
    x: Value, sizes: tuple[int, ...], sides: tuple[int, ...], stride: list[int], dilation: list[int]
) -> Value:  # fmt: skip
    """Windows of ``sides`` at ``sizes`` places of an array (1, channels, …): (channels, *sizes, *sides)."""
    places = tuple(s * n for s, n in zip(x.strides[2:], stride, strict=True))
    inside = tuple(s * n for s, n in zip(x.strides[2:], dilation, strict=True))
    return Value(x.buffer, (x.shape[1], *sizes, *sides), (x.strides[1], *places, *inside), x.start)


def _each(value: Any, count: int) -> list[int]:
    listed = [value] if isinstance(value, int) else list(value)
    return listed * count if len(listed) == 1 else listed


@rule("conv1d", "conv2d")
def _convolution(to: Lowering, node: Any, given: Arguments) -> Any:
    """Windows of the image as rows, then a product."""
    weight, name = given.tensor("weight")
    axes = weight.dim() - 2
    if given["groups"] != 1:
        raise Unsupported(f"{node.name}: a convolution in {given['groups']} groups has no operation in a fused network")
    x, sides = given.value("input"), tuple(weight.shape[2:])
    stride, dilation = (_each(given[n], axes) for n in ("stride", "dilation"))
    border = [(n, n) for n in _each(given["padding"], axes)] if not isinstance(given["padding"], str) else [
        ((d * (n - 1)) // 2, d * (n - 1) - (d * (n - 1)) // 2) if given["padding"] == "same" else (0, 0)
        for n, d in zip(sides, dilation, strict=True)
    ]  # fmt: skip
    x, sizes = _bordered(to, x, border, 0.0), given.shape[2:]
    found = _windows(x, sizes, sides, stride, dilation)
    # Channels stand behind the places, as the weight has them.
    order = [*range(1, 1 + axes), 0, *range(1 + axes, 1 + 2 * axes)]
    turned = Value(found.buffer, tuple(found.shape[d] for d in order), tuple(found.strides[d] for d in order), x.start)
    ins = weight[0].numel()
    rows = to.reshaped(turned, (math.prod(sizes), ins))
    made = to.product(rows, weight.reshape(len(weight), ins), name, given.optional("bias"))
    steps = contiguous((*sizes, len(weight)))
    return Value(made.buffer, (1, len(weight), *sizes), (0, 1, *steps[:-1]), made.start)


@rule("max_pool1d", "max_pool2d", "avg_pool1d", "avg_pool2d")
def _pool(to: Lowering, node: Any, given: Arguments) -> Any:
    """The largest, or the mean, of windows."""
    name = operator_name(node.target)
    axes = int(name[-2])
    sides = tuple(_each(given["kernel_size"], axes))
    stride, padding = (_each(given[n], axes) for n in ("stride", "padding"))
    mean = name.startswith("avg")
    if mean and (given.named.get("divisor_override") is not None or (any(padding) and not given["count_include_pad"])):
        raise Unsupported(f"{node.name}: a mean that counts by the place has no operation in a fused network")
    x, sizes = given.value("self"), given.shape[2:]
    if len(x.shape) != 2 + axes:
        raise Unsupported(f"{node.name}: a pool of an array of shape {x.shape} has no operation in a fused network")
    steps = [
        max(0, (n - 1) * s + k - length - 2 * p)  # rounding up may read beyond the border
        for n, s, k, length, p in zip(sizes, stride or sides, sides, x.shape[2:], padding, strict=True)
    ]
    if mean and any(steps):
        raise Unsupported(f"{node.name}: a mean beyond the border has no operation in a fused network")
    border = [(p, p + more) for p, more in zip(padding, steps, strict=True)]
    dilation = _each(given.named.get("dilation", 1), axes)
    if any(d != 1 for d in dilation) and any(steps):
        raise Unsupported(f"{node.name}: a dilated pool beyond the border has no operation in a fused network")
    x = _bordered(to, x, border, 0.0 if mean else _LOWEST)
    found = _windows(x, sizes, sides, list(stride or sides), dilation)
    inner = tuple(range(1 + axes, 1 + 2 * axes))
    made = to.reduced("sum" if mean else "amax", found, inner, False, 1 / math.prod(sides) if mean else 1.0)
    return to.reshaped(made, given.shape)


@rule("pad", "constant_pad_nd")
def _pad(to: Lowering, node: Any, given: Arguments) -> Any:
    if given.named.get("mode", "constant") != "constant":
        raise Unsupported(f"{node.name}: a border that is {given['mode']} has no operation in a fused network")
    pairs = list(zip(given["pad"][::2], given["pad"][1::2], strict=True))[::-1]
    return _bordered(to, given.value("self"), pairs, float(given["value"] or 0))


@rule("embedding")
def _embedding(to: Lowering, node: Any, given: Arguments) -> Any:
    """Lines of a stored matrix; whole numbers arrive as float32, which holds them exactly."""
    lines, name = given.tensor("weight")
    places = given.value("indices")
    origin = to.whole.get(places.buffer)
    if origin is None:
        raise Unsupported(f"{node.name}: a look-up by numbers that are computed has no operation in a fused network")
    low, high = to.made.limits[origin] or (0, 0)
    to.made.limits[origin] = max(low, 0), min(high, len(lines) - 1)
    places, width = to.in_order(places), lines.shape[1]
    result = to.new((places.size, width))
    to.made.weights[name] = lines
    sizes = places.size, width, len(lines)
    to.made.operations.append(Operation(run.LOOKUP, result, (places,), sizes, ((), ()), matrix=name))
    return to.reshaped(result, given.shape)
