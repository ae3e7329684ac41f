"""Operators that only turn, cut, repeat or join arrays: most of them cost nothing."""

from __future__ import annotations

from typing import Any

from hasten.compress.fused.graph import Arguments, Lowering, repeated, rule
from hasten.compress.fused.values import Value

__all__: list[str] = []


@rule("view", "reshape", "_unsafe_view", "flatten", "unflatten", "squeeze", "unsqueeze")
def _view(to: Lowering, node: Any, given: Arguments) -> Any:
    return to.reshaped(given.value("self"), given.shape)


@rule("permute")
def _permute(to: Lowering, node: Any, given: Arguments) -> Any:
    x = given.value("self")
    order = [d % len(x.shape) for d in given["dims"]]
    return Value(x.buffer, tuple(x.shape[d] for d in order), tuple(x.strides[d] for d in order), x.start)


@rule("transpose", "t", "mT", "numpy_T")
def _transpose(to: Lowering, node: Any, given: Arguments) -> Any:
    x = given.value("self")
    order = list(range(len(x.shape)))
    a, b = (given["dim0"], given["dim1"]) if "dim0" in given.named else (-2, -1)
    order[a], order[b] = order[b], order[a]
    return Value(x.buffer, tuple(x.shape[d] for d in order), tuple(x.strides[d] for d in order), x.start)


def _cut(x: Value, axis: int, start: int, count: int, step: int = 1) -> Value:
    shape, strides = list(x.shape), list(x.strides)
    begin = x.start + start * strides[axis]
    shape[axis], strides[axis] = count, strides[axis] * step
    return Value(x.buffer, tuple(shape), tuple(strides), begin)


def _picked(x: Value, axis: int, index: int) -> Value:
    axis %= len(x.shape)
    one = _cut(x, axis, index % x.shape[axis], 1)
    without = [i for i in range(len(x.shape)) if i != axis]
    return Value(one.buffer, tuple(one.shape[i] for i in without), tuple(one.strides[i] for i in without), one.start)


@rule("select")
def _select(to: Lowering, node: Any, given: Arguments) -> Any:
    return _picked(given.value("self"), given["dim"], given["index"])


@rule("slice")
def _slice(to: Lowering, node: Any, given: Arguments) -> Any:
    x = given.value("self")
    axis = given["dim"] % len(x.shape)
    start, _, step = slice(given["start"], given["end"], given["step"]).indices(x.shape[axis])
    return _cut(x, axis, start, given.shape[axis], step)


@rule("unbind")
def _unbind(to: Lowering, node: Any, given: Arguments) -> Any:
    x = given.value("self")
    return [_picked(x, given["dim"], i) for i in range(x.shape[given["dim"]])]


@rule("split", "split_with_sizes", "chunk")
def _split(to: Lowering, node: Any, given: Arguments) -> Any:
    x, parts, at = given.value("self"), [], 0
    axis = given["dim"] % len(x.shape)
    for made in node.meta["val"]:
        parts.append(_cut(x, axis, at, made.shape[axis]))
        at += made.shape[axis]
    return parts


@rule("getitem")
def _getitem(to: Lowering, node: Any, given: Arguments) -> Any:
    return to.values[given.plain[0]][given.plain[1]]


@rule("expand")
def _expand(to: Lowering, node: Any, given: Arguments) -> Any:
    return repeated(given.value("self"), given.shape)


@rule("cat")
def _cat(to: Lowering, node: Any, given: Arguments) -> Any:
    result, at = to.new(given.shape), 0
    axis = given["dim"] % len(given.shape)
    for part in given["tensors"]:
        x = to.value(part)
        to.copy(x, _cut(result, axis, at, x.shape[axis]))
        at += x.shape[axis]
    return result


@rule("stack")
def _stack(to: Lowering, node: Any, given: Arguments) -> Any:
    result = to.new(given.shape)
    axis = given["dim"] % len(given.shape)
    for index, part in enumerate(given["tensors"]):
        to.copy(to.value(part), _picked(result, axis, index))
    return result


@rule("to", "_to_copy", "type_as")
def _to(to: Lowering, node: Any, given: Arguments) -> Any:
    return given.value("self")  # what is not float32 was refused before
