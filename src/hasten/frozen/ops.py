"""The operations that a frozen program may hold, over numpy arrays, by the names that torch gives them.

Each takes the arguments of the ATen operation of that name. Arrays stay float32 (or integer, or bool).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["OPERATIONS"]

Array = NDArray[Any]
OPERATIONS: dict[str, Callable[..., Any]] = {}
"""name -> function"""
_INT64_MAX = 9223372036854775807


def _op(*names: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        for name in names:
            OPERATIONS[name] = function
        return function

    return register


def _erf(x: Array) -> Array:
    """Abramowitz and Stegun 7.1.26: within 1.5e-7, the resolution of float32."""
    t = 1 / (1 + 0.3275911 * np.abs(x))
    series = t * (0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429))))
    result: Array = np.sign(x) * (1 - series * np.exp(-x * x))
    return result


@_op("linear")
def _linear(x: Array, weight: Array, bias: Array | None = None) -> Array:
    result: Array = x @ weight.T
    return result if bias is None else result + bias


@_op("addmm")
def _addmm(bias: Array, a: Array, b: Array) -> Array:
    result: Array = a @ b + bias
    return result


@_op("matmul", "bmm", "mm")
def _matmul(a: Array, b: Array) -> Array:
    result: Array = np.matmul(a, b)
    return result


def _pairs(value: Any, count: int) -> list[int]:
    return [int(value)] * count if isinstance(value, int) else [int(v) for v in value]


def _convolution(
    x: Array, weight: Array, bias: Array | None, stride: Any, padding: Any, dilation: Any, groups: int, axes: int
) -> Array:
    stride, dilation = _pairs(stride, axes), _pairs(dilation, axes)
    if isinstance(padding, str):
        spans = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True)]
        pads = [(0, 0) if padding == "valid" else (s // 2, s - s // 2) for s in spans]
    else:
        pads = [(p, p) for p in _pairs(padding, axes)]
    if any(a or b for a, b in pads):
        x = np.pad(x, [(0, 0), (0, 0), *pads])
    spans = [d * (k - 1) + 1 for d, k in zip(dilation, weight.shape[2:], strict=True)]
    windows = np.lib.stride_tricks.sliding_window_view(x, spans, axis=tuple(range(2, 2 + axes)))
    places = tuple(slice(None, None, s) for s in stride) + tuple(slice(None, None, d) for d in dilation)
    windows = windows[(slice(None), slice(None), *places)]
    batch, inner = windows.shape[:2]
    sizes = windows.shape[2 : 2 + axes]
    order = [0, *range(2, 2 + axes), 1, *range(2 + axes, 2 + 2 * axes)]
    columns = windows.transpose(order).reshape(batch, *sizes, groups, -1)
    kernels = weight.reshape(groups, weight.shape[0] // groups, -1)
    result: Array = (
        np.einsum("b...gi,goi->b...go", columns, kernels, optimize=groups > 1)
        if groups > 1
        else (columns[..., 0, :] @ kernels[0].T)
    )
    result = result.reshape(batch, *sizes, -1)
    if bias is not None:
        result = result + bias
    return np.moveaxis(result, -1, 1)


@_op("conv1d")
def _conv1d(
    x: Array, weight: Array, bias: Array | None = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1,
    groups: int = 1,
) -> Array:  # fmt: skip
    if weight.shape[2] == 1 and groups == 1 and _pairs(stride, 1) == [1] and padding in (0, [0], "valid", "same"):
        result: Array = np.matmul(weight[:, :, 0], x)
        return result if bias is None else result + bias[:, None]
    return _convolution(x, weight, bias, stride, padding, dilation, groups, 1)


@_op("conv2d")
def _conv2d(
    x: Array, weight: Array, bias: Array | None = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1,
    groups: int = 1,
) -> Array:  # fmt: skip
    return _convolution(x, weight, bias, stride, padding, dilation, groups, 2)


@_op("max_pool2d")
def _max_pool2d(x: Array, size: Any, stride: Any = (), padding: Any = 0, *_: Any) -> Array:
    size = _pairs(size, 2)
    stride = _pairs(stride or size, 2)
    pads = _pairs(padding, 2)
    if any(pads):
        x = np.pad(x, [(0, 0), (0, 0), *((p, p) for p in pads)], constant_values=-np.inf)
    windows = np.lib.stride_tricks.sliding_window_view(x, size, axis=(2, 3))
    result: Array = windows[:, :, :: stride[0], :: stride[1]].max((-1, -2))
    return result


@_op("avg_pool2d")
def _avg_pool2d(x: Array, size: Any, stride: Any = (), *_: Any) -> Array:
    size = _pairs(size, 2)
    stride = _pairs(stride or size, 2)
    windows = np.lib.stride_tricks.sliding_window_view(x, size, axis=(2, 3))
    result: Array = windows[:, :, :: stride[0], :: stride[1]].mean((-1, -2))
    return result


@_op("batch_norm")
def _batch_norm(
    x: Array, weight: Array | None, bias: Array | None, mean: Array, var: Array, training: bool, momentum: float,
    eps: float, *_: Any,
) -> Array:  # fmt: skip
    shape = (1, -1, *([1] * (x.ndim - 2)))
    scale = 1 / np.sqrt(var + np.float32(eps))
    if weight is not None:
        scale = scale * weight
    result: Array = (x - mean.reshape(shape)) * scale.reshape(shape)
    return result if bias is None else result + bias.reshape(shape)


@_op("layer_norm")
def _layer_norm(
    x: Array, shape: Any, weight: Array | None = None, bias: Array | None = None, eps: float = 1e-5, *_: Any
) -> Array:
    axes, count = tuple(range(-len(shape), 0)), np.float32(math.prod(shape))
    centred = x - np.add.reduce(x, axes, keepdims=True) / count
    spread = np.add.reduce(centred * centred, axes, keepdims=True) / count
    result: Array = centred / np.sqrt(spread + np.float32(eps))
    if weight is not None:
        result *= weight
    if bias is not None:
        result += bias
    return result


@_op("softmax")
def _softmax(x: Array, axis: int, *_: Any) -> Array:
    shifted = np.exp(x - x.max(axis, keepdims=True))
    result: Array = shifted / shifted.sum(axis, keepdims=True)
    return result


@_op("log_softmax")
def _log_softmax(x: Array, axis: int, *_: Any) -> Array:
    shifted = x - x.max(axis, keepdims=True)
    result: Array = shifted - np.log(np.exp(shifted).sum(axis, keepdims=True))
    return result


@_op("scaled_dot_product_attention")
def _attention(
    q: Array, k: Array, v: Array, mask: Array | None = None, dropout: float = 0.0, causal: bool = False,
    scale: float | None = None, **_: Any,
) -> Array:  # fmt: skip
    factor = np.float32(scale if scale is not None else q.shape[-1] ** -0.5)
    # Heads come as views, and products of arrays that do not lie in order leave BLAS. Scores lie keys by queries: the
    # largest over the keys is then taken of whole rows at a time.
    queries, k = np.ascontiguousarray(np.swapaxes(q * factor, -1, -2)), np.ascontiguousarray(k)
    scores = np.matmul(k, queries)
    if causal:
        mask = np.tri(q.shape[-2], k.shape[-2], dtype=bool)
    if mask is not None:
        turned = np.swapaxes(mask, -1, -2)
        scores = np.where(turned, scores, -np.inf) if mask.dtype == bool else scores + turned
    if (mask is not None and mask.dtype != bool) or not _largest(q) * _largest(k) * factor < _SAFE:
        scores -= scores.max(-2, keepdims=True)
        if mask is None:  # what is nothing beside the largest costs a hundred times as much as a denormal number
            np.maximum(scores, -_SAFE, out=scores)
    np.exp(scores, out=scores)
    # A row of ones below the values: the sums of all exponentials come with the product.
    wide = np.empty((*v.shape[:-2], v.shape[-1] + 1, v.shape[-2]), v.dtype)
    wide[..., :-1, :], wide[..., -1, :] = np.swapaxes(v, -1, -2), 1
    mixed = np.matmul(wide, scores)
    result: Array = np.swapaxes(mixed[..., :-1, :] / mixed[..., -1:, :], -1, -2)
    return result


_SAFE = 60.0
"""Scores up to this need no largest one taken off: their exponentials and sums stay inside what float32 holds."""


def _largest(rows: Array) -> float:
    """The largest Euclidean norm of a row; a product of two bounds every score."""
    return math.sqrt(float(np.einsum("...i,...i->...", rows, rows).max())) if rows.size else 0.0


def _unary(name: str, function: Callable[[Array], Any]) -> None:
    OPERATIONS[name] = lambda x, *_, **__: function(x)


_UNARY: dict[str, Callable[[Array], Any]] = {
    "relu": lambda x: np.maximum(x, 0), "tanh": np.tanh, "exp": np.exp, "log": np.log, "sqrt": np.sqrt, "sin": np.sin,
    "cos": np.cos, "abs": np.abs, "neg": np.negative, "square": np.square, "rsqrt": lambda x: 1 / np.sqrt(x),
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)), "silu": lambda x: x / (1 + np.exp(-x)), "reciprocal": np.reciprocal,
    "contiguous": lambda x: x, "clone": lambda x: x, "detach": lambda x: x, "alias": lambda x: x,
    "dropout": lambda x: x, "lift_fresh_copy": lambda x: x, "round": np.rint, "t": lambda x: x.T,
    "hardtanh": lambda x: np.clip(x, -1, 1), "erf": _erf,
}  # fmt: skip
for _name, _function in _UNARY.items():
    _unary(_name, _function)


@_op("gelu")
def _gelu(x: Array, approximate: str = "none") -> Array:
    if approximate == "tanh":
        inner = np.float32(math.sqrt(2 / math.pi)) * (x + np.float32(0.044715) * x**3)
        result: Array = 0.5 * x * (1 + np.tanh(inner))
        return result
    exact: Array = 0.5 * x * (1 + _erf(x * np.float32(math.sqrt(0.5))))
    return exact


@_op("add")
def _add(a: Any, b: Any, alpha: float = 1) -> Any:
    return a + (b if alpha == 1 else b * alpha)


@_op("sub")
def _sub(a: Any, b: Any, alpha: float = 1) -> Any:
    return a - (b if alpha == 1 else b * alpha)


OPERATIONS["mul"] = lambda a, b: a * b
OPERATIONS["div"] = lambda a, b: a / b
OPERATIONS["pow"] = lambda a, b: a**b
OPERATIONS["maximum"] = np.maximum
OPERATIONS["minimum"] = np.minimum
OPERATIONS["sym_size"] = lambda x, axis: x.shape[axis]
OPERATIONS["getitem"] = lambda x, index: x[index]
OPERATIONS["floordiv"] = lambda a, b: a // b


@_op("clamp")
def _clamp(x: Array, min: Any = None, max: Any = None) -> Array:
    result: Array = np.clip(x, min, max)
    return result


def _axes(dim: Any) -> Any:
    return None if dim is None or dim == [] else tuple(dim) if isinstance(dim, list | tuple) else dim


@_op("mean")
def _mean(x: Array, dim: Any = None, keepdim: bool = False, **_: Any) -> Any:
    return x.mean(_axes(dim), keepdims=keepdim)


@_op("sum")
def _sum(x: Array, dim: Any = None, keepdim: bool = False, **_: Any) -> Any:
    return x.sum(_axes(dim), keepdims=keepdim)


@_op("amax")
def _amax(x: Array, dim: Any = None, keepdim: bool = False) -> Any:
    return x.max(_axes(dim), keepdims=keepdim)


@_op("adaptive_avg_pool2d", "adaptive_avg_pool1d")
def _adaptive(x: Array, size: Any) -> Array:
    sizes = [int(s) for s in (size if isinstance(size, list | tuple) else [size])]
    for axis, wanted in zip(range(-len(sizes), 0), sizes, strict=True):
        length = x.shape[axis]
        pieces = [
            np.take(x, range(k * length // wanted, -(-(k + 1) * length // wanted)), axis).mean(axis, keepdims=True)
            for k in range(wanted)
        ]
        x = np.concatenate(pieces, axis)
    return x


@_op("view", "reshape", "_unsafe_view")
def _view(x: Array, shape: Any) -> Array:
    return x.reshape([int(s) for s in shape])


@_op("flatten")
def _flatten(x: Array, start: int = 0, end: int = -1) -> Array:
    end %= x.ndim
    return x.reshape(*x.shape[:start], -1, *x.shape[end + 1 :])


@_op("unflatten")
def _unflatten(x: Array, axis: int, sizes: Any) -> Array:
    axis %= x.ndim
    return x.reshape(*x.shape[:axis], *(int(s) for s in sizes), *x.shape[axis + 1 :])


@_op("permute")
def _permute(x: Array, order: Any) -> Array:
    return x.transpose([int(d) for d in order])


@_op("transpose")
def _transpose(x: Array, a: int, b: int) -> Array:
    return np.swapaxes(x, a, b)


@_op("unsqueeze")
def _unsqueeze(x: Array, axis: int) -> Array:
    return np.expand_dims(x, axis)


@_op("squeeze")
def _squeeze(x: Array, axis: Any = None) -> Array:
    axes = range(x.ndim) if axis is None else [axis] if isinstance(axis, int) else axis
    return np.squeeze(x, tuple(a for a in axes if x.shape[a] == 1))


@_op("expand")
def _expand(x: Array, shape: Any, **_: Any) -> Array:
    given = (1,) * (len(shape) - x.ndim) + x.shape
    return np.broadcast_to(x.reshape(given), [g if s == -1 else int(s) for s, g in zip(shape, given, strict=True)])


@_op("cat")
def _cat(parts: Any, axis: int = 0) -> Array:
    return np.concatenate(parts, axis)


@_op("stack")
def _stack(parts: Any, axis: int = 0) -> Array:
    return np.stack(parts, axis)


@_op("slice")
def _slice(x: Array, axis: int = 0, start: int | None = None, end: int | None = None, step: int = 1) -> Array:
    end = None if end == _INT64_MAX else end
    return x[(slice(None),) * (axis % x.ndim) + (slice(start, end, step),)]


@_op("select")
def _select(x: Array, axis: int, index: int) -> Array:
    return x[(slice(None),) * (axis % x.ndim) + (index,)]


@_op("unbind")
def _unbind(x: Array, axis: int = 0) -> list[Array]:
    return list(np.moveaxis(x, axis, 0))


@_op("split", "split_with_sizes")
def _split(x: Array, sizes: Any, axis: int = 0) -> list[Array]:
    even = isinstance(sizes, int)
    places = list(range(sizes, x.shape[axis], sizes)) if even else np.cumsum(sizes)[:-1].tolist()
    found: list[Array] = list(np.split(x, places, axis))
    return found


@_op("chunk")
def _chunk(x: Array, count: int, axis: int = 0) -> list[Array]:
    found: list[Array] = _split(x, -(-x.shape[axis] // count), axis)
    return found


@_op("embedding")
def _embedding(table: Array, index: Array, *_: Any) -> Array:
    return table[index]


@_op("arange")
def _arange(*places: Any, **_: Any) -> Array:
    kind = np.float32 if any(isinstance(p, float) for p in places) else np.int64
    return np.arange(*places, dtype=kind)


@_op("to")
def _to(x: Array, *rest: Any, dtype: str | None = None, **_: Any) -> Array:
    kind = dtype or next((r for r in rest if isinstance(r, str) and r in _KINDS), None)
    return x if kind is None else x.astype(_KINDS[kind])


_KINDS = {"float32": np.float32, "int64": np.int64, "int32": np.int32, "bool": np.bool_, "float64": np.float64}
OPERATIONS["_to_copy"] = _to
OPERATIONS["where"] = np.where
OPERATIONS["full"] = lambda shape, value, **_: np.full([int(s) for s in shape], value, np.float32)
