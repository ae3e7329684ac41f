"""Outputs of a large product go to memory past the caches.

A matrix that is streamed from memory drives everything else out of the caches, so a line of the output is no longer
there when it is written: it would be read first, then written, and whoever waits for it asks for no weights meanwhile.
Sixteen rows of a decoder of 245 M in bfloat16 take 18.2 ms a step instead of 19.4; with bytes there is nothing to win.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from hasten.nn.product import instructions as avx
from hasten.nn.product.blocks import LINE, PANEL, TILES, scaled

__all__ = ["LEAST_BYTES", "finish", "goes_past", "write_past"]

LEAST_BYTES = 2 << 20
"""Bytes of weights below which a matrix leaves room in the caches for its outputs."""


@njit(cache=True)
def goes_past(size: int, bias: Any, out: Any) -> Any:
    """Whether ``out`` (rows, out) of a product with ``size`` bytes of weights is written so: it is float32 in whole
    lines of memory."""
    large = size >= LEAST_BYTES and out.shape[1] > PANEL
    whole = out.itemsize == 4 and out.shape[1] % PANEL == 0 and out.ctypes.data % LINE == 0
    return large and whole and len(bias) == 0


@intrinsic
def _copy_past(typing: Any, source: Any, target: Any, between: Any, rows: Any) -> Any:
    """``rows`` rows of 64 float32 that follow one another, to places ``between`` bytes apart."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        source, target, between, rows = arguments
        kind = ir.FunctionType(ir.VoidType(), [ir.IntType(64), avx.INTS])
        write = ir.InlineAsm(kind, "vmovntdq $1, ($0)", "r,v,~{memory}", side_effect=True)
        with cgutils.for_range(builder, rows) as loop:
            here = builder.add(source, scaled(builder, loop.index, PANEL * 4))
            there = builder.add(target, builder.mul(loop.index, between))
            for tile in range(TILES):
                line = avx.load(builder, here, tile * LINE, avx.INTS, LINE)
                builder.call(write, [builder.add(there, ir.Constant(ir.IntType(64), tile * LINE)), line])
        return context.get_dummy_value()

    return types.void(*[types.intp] * 4), generate


@intrinsic
def finish(typing: Any) -> Any:
    """What was written past the caches is there for everybody behind this."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kind = ir.FunctionType(ir.VoidType(), [])
        builder.call(ir.InlineAsm(kind, "sfence", "~{memory}", side_effect=True), [])
        return context.get_dummy_value()

    return types.void(), generate


@njit(cache=True)
def write_past(sums: Any, count: int, out: Any, start: int, low: int) -> None:
    """sums (count, 64) float32, lines of memory, to rows ``start`` and columns ``low`` on of ``out``."""
    width = out.shape[1]
    _copy_past(sums.ctypes.data, out.ctypes.data + (start * width + low) * 4, width * 4, count)
