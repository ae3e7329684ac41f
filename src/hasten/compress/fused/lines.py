# mypy: disable-error-code="call-arg"
"""What happens to a line of numbers: functions of one, of two, norms, softmax, sums.

Loops that the compiler vectorises. They become part of the function that calls them (and take its freedoms, which are
to be those of :data:`hasten.nn.bfloat.FAST`): a call for each short line would cost more than the line.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit
from numba.extending import register_jitable

from hasten.nn.bfloat import FAST, bits_of_float, exp, float_of_bits

__all__ = ["BINARY", "REDUCE", "UNARY", "binary", "norms", "pair", "reduce", "softmaxes", "unary"]

UNARY = ("copy", "relu", "gelu", "gelu_tanh", "silu", "sigmoid", "tanh", "exp", "sqrt", "rsqrt", "neg", "abs", "square",
         "reciprocal", "erf", "log", "sin", "cos")  # fmt: skip
"""Functions of one number, by their code."""
BINARY = ("add", "sub", "mul", "div", "maximum", "minimum")
"""Functions of two numbers, by their code."""
REDUCE = ("sum", "amax")
"""What a line may become, by its code."""
(_COPY, _RELU, _GELU, _GELU_TANH, _SILU, _SIGMOID, _TANH, _EXP, _SQRT, _RSQRT, _NEG, _ABS, _SQUARE, _RECIPROCAL, _ERF,
 _LOG, _SIN, _COS) = range(len(UNARY))  # fmt: skip
_ADD, _SUB, _MUL, _DIV, _MAXIMUM, _MINIMUM = range(len(BINARY))
_ONE, _HALF, _TWO = np.float32(1), np.float32(0.5), np.float32(2)
_A, _B, _C, _D, _E, _P = (
    np.float32(c) for c in (0.254829592, -0.284496736, 1.421413741, -1.453152027, 1.061405429, 0.3275911)
)
_ROOT_HALF = np.float32(0.7071067811865476)
_TWO_ROOT = np.float32(1.5957691216057308)
"""2 sqrt(2 / pi)"""


@njit(cache=True, fastmath=FAST, error_model="numpy")
def _erf(x: Any) -> Any:
    """Abramowitz and Stegun 7.1.26: within 1.5e-7, the resolution of float32."""
    t = _ONE / (_ONE + _P * abs(x))
    series = t * (_A + t * (_B + t * (_C + t * (_D + t * _E))))
    size = _ONE - series * exp(-x * x)
    return size if x >= 0 else -size


@register_jitable(inline="always")
def unary(code: int, x: Any, out: Any) -> None:
    """out (n,) = f(x) (n,), both float32; ``code`` is the place of f in :data:`UNARY`."""
    if code == _COPY:
        for i in range(len(out)):
            out[i] = x[i]
    elif code == _RELU:
        for i in range(len(out)):
            out[i] = max(x[i], np.float32(0))
    elif code == _GELU:
        for i in range(len(out)):
            out[i] = _HALF * x[i] * (_ONE + _erf(x[i] * _ROOT_HALF))
    elif code == _GELU_TANH:
        for i in range(len(out)):
            u = _TWO_ROOT * (x[i] + np.float32(0.044715) * x[i] * x[i] * x[i])
            out[i] = x[i] / (_ONE + exp(-u))
    elif code == _SILU:
        for i in range(len(out)):
            out[i] = x[i] / (_ONE + exp(-x[i]))
    elif code == _SIGMOID:
        for i in range(len(out)):
            out[i] = _ONE / (_ONE + exp(-x[i]))
    elif code == _TANH:
        for i in range(len(out)):
            out[i] = _TWO / (_ONE + exp(-_TWO * x[i])) - _ONE
    elif code == _EXP:
        for i in range(len(out)):
            out[i] = exp(x[i])
    elif code == _ERF:
        for i in range(len(out)):
            out[i] = _erf(x[i])
    else:
        _rarer(code, x, out)


@njit(cache=True, error_model="numpy")
def _rarer(code: int, x: Any, out: Any) -> None:
    for i in range(len(out)):
        if code == _SQRT:
            out[i] = np.sqrt(x[i])
        elif code == _RSQRT:
            out[i] = _ONE / np.sqrt(x[i])
        elif code == _NEG:
            out[i] = -x[i]
        elif code == _ABS:
            out[i] = abs(x[i])
        elif code == _SQUARE:
            out[i] = x[i] * x[i]
        elif code == _RECIPROCAL:
            out[i] = _ONE / x[i]
        elif code == _LOG:
            out[i] = np.log(x[i])
        elif code == _SIN:
            out[i] = np.sin(x[i])
        else:
            out[i] = np.cos(x[i])


@njit(cache=True, error_model="numpy")
def pair(code: int, x: Any, y: Any) -> Any:
    """f(x, y); ``code`` is the place of f in :data:`BINARY`."""
    made = x + y
    if code == _SUB:
        made = x - y
    elif code == _MUL:
        made = x * y
    elif code == _DIV:
        made = x / y
    elif code == _MAXIMUM:
        made = max(x, y)
    elif code == _MINIMUM:
        made = min(x, y)
    return made


@njit(cache=True, error_model="numpy")
def binary(code: int, x: Any, y: Any, out: Any) -> None:
    """out (n,) = f(x (n,), y (n,)), all float32."""
    if code == _ADD:
        for i in range(len(out)):
            out[i] = x[i] + y[i]
    elif code == _MUL:
        for i in range(len(out)):
            out[i] = x[i] * y[i]
    else:
        for i in range(len(out)):
            out[i] = pair(code, x[i], y[i])


@register_jitable(inline="always")
def _largest(x: Any) -> Any:
    """Whole numbers, since a loop over floats minds those that are none: turned so, bits of floats are in the order of
    the floats."""
    top = np.int32(-2147483648)
    for i in range(len(x)):
        bits = np.int32(bits_of_float(x[i]))
        order = np.int32(bits ^ (np.int32(bits >> 31) & np.int32(0x7FFFFFFF)))
        top = order if order > top else top
    return float_of_bits(np.uint32(np.int32(top ^ (np.int32(top >> 31) & np.int32(0x7FFFFFFF)))))


@register_jitable(inline="always")
def reduce(code: int, x: Any) -> Any:
    """The sum of x (n,), or its largest number."""
    total = np.float32(0)
    if code == 0:
        for i in range(len(x)):
            total += x[i]
        return total
    return _largest(x)


@njit(cache=True, fastmath=FAST, error_model="numpy")
def norms(x: Any, weight: Any, bias: Any, eps: Any, centred: Any, out: Any) -> None:
    """A layer norm of each row of x (rows, n), or one by root mean squares; ``weight`` and ``bias`` (n,) or empty."""
    count = np.float32(x.shape[1])
    for row in range(len(x)):
        mean, spread = np.float32(0), np.float32(0)
        if centred:
            for i in range(x.shape[1]):
                mean += x[row, i]
            mean /= count
        for i in range(x.shape[1]):
            spread += (x[row, i] - mean) * (x[row, i] - mean)
        scale = _ONE / np.sqrt(spread / count + eps)
        for i in range(x.shape[1]):
            out[row, i] = (x[row, i] - mean) * scale
        if len(weight) > 0:
            for i in range(x.shape[1]):
                out[row, i] *= weight[i]
        if len(bias) > 0:
            for i in range(x.shape[1]):
                out[row, i] += bias[i]


@njit(cache=True, fastmath=FAST, error_model="numpy")
def softmaxes(x: Any, out: Any) -> None:
    """Each row of out (rows, n) = exp(x - max x), as shares of its sum."""
    for row in range(len(x)):
        top, total = _largest(x[row]), np.float32(0)
        for i in range(x.shape[1]):
            out[row, i] = exp(x[row, i] - top)
            total += out[row, i]
        share = _ONE / total
        for i in range(x.shape[1]):
            out[row, i] *= share
