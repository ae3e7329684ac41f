"""bfloat16 and a fast exponential inside numba kernels.

numba knows no bfloat16; here it travels as the upper half of a float32, in arrays of uint16. The conversions are plain
shifts, which the compiler turns into vector instructions.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic, overload, register_jitable

__all__ = ["FAST", "exp", "load", "store"]

FAST = {"reassoc", "contract", "nsz", "arcp"}
"""Floating-point freedoms of the kernels: sums may be regrouped (always in the same way), infinities keep their
meaning."""


@intrinsic
def float_of_bits(typing: Any, bits: Any) -> Any:
    """Reinterpret uint32 as float32."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.FloatType())

    return types.float32(types.uint32), generate


@intrinsic
def bits_of_float(typing: Any, value: Any) -> Any:
    """Reinterpret float32 as uint32."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.IntType(32))

    return types.uint32(types.float32), generate


def load(value: Any) -> Any:
    """A stored element (uint16 that means bfloat16, or float32) as float32."""
    raise NotImplementedError("only inside numba")


@overload(load, inline="always")
def _load(value: Any) -> Any:
    # numba compares the signatures of the two functions, annotations included
    if value == types.uint16:

        def widened(value: Any) -> Any:
            return float_of_bits(numba.uint32(numba.uint32(value) << numba.uint32(16)))

        return widened

    def plain(value: Any) -> Any:
        return value

    return plain


def store(array: Any, index: Any, value: Any) -> None:
    """Write float32 ``value`` to ``array[index]`` in the array's type, rounded to nearest even."""
    raise NotImplementedError("only inside numba")


@overload(store, inline="always")
def _store(array: Any, index: Any, value: Any) -> None:  # type: ignore[return]
    if array.dtype == types.uint16:

        def rounded(array: Any, index: Any, value: Any) -> None:
            bits = bits_of_float(numba.float32(value))
            odd = (bits >> numba.uint32(16)) & numba.uint32(1)
            array[index] = numba.uint16((bits + numba.uint32(0x7FFF) + odd) >> numba.uint32(16))

        return rounded  # type: ignore[return-value]

    def plain(array: Any, index: Any, value: Any) -> None:
        array[index] = value

    return plain  # type: ignore[return-value]


_LOG2E = np.float32(1.4426950408889634)
_C1, _C2, _C3, _C4, _C5, _C6 = (
    np.float32(c) for c in (0.6931471805599453, 0.24022650695910072, 0.05550410866482158, 0.009618129107628477,
                            0.0013333558146428443, 0.00015403530393381606)
)  # fmt: skip


@register_jitable(inline="always")
def exp(x: Any) -> Any:
    """``e**x`` in float32 to 2 units in the last place, without a call, so that loops over it vectorise.

    ``2**(n + f) = 2**n * 2**f`` with n the nearest integer; the Taylor polynomial of ``2**f`` on [-0.5, 0.5]; ``2**n``
    by its bits. Below -87 the result is that of -87 (1e-38), above 88 that of 88.
    """
    y = min(max(x, np.float32(-87.0)), np.float32(88.0)) * _LOG2E
    n = np.floor(y + np.float32(0.5))
    f = y - n
    p = np.float32(1.0) + f * (_C1 + f * (_C2 + f * (_C3 + f * (_C4 + f * (_C5 + f * _C6)))))
    return p * float_of_bits(numba.uint32((numba.int32(n) + numba.int32(127)) << numba.int32(23)))
