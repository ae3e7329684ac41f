"""Rows of a cache as codes of one byte with a scale behind them: written, read number by number, or widened by pages.

A key (or value) of one token and head is ``width`` int8 codes and a bfloat16 scale, ``width + SCALE`` bytes in one row,
so that whatever moves rows moves their scale. It is quantised once, when it is written, as ``x = code * scale`` with
``scale = max |x| / 127``: writing what was read gives the same bits. A page of sixteen rows is widened to bfloat16 in
the first-level cache right before a kernel reads it, so that the kernels for bfloat16 serve both, with the same bits as
over a cache that holds the widened numbers. Other types pass through these functions unchanged.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic, overload

from hasten.nn.bfloat import FAST, bits_of_float, float_of_bits, load, store
from hasten.nn.product import instructions as avx
from hasten.nn.product.blocks import LINE, scaled

__all__ = ["SCALE", "held", "put_key", "put_value", "row_scale", "widen_page", "widen_rows", "width_of"]

SCALE = 2
"""Bytes of a row's scale."""
_WORD = ir.IntType(64)
_bits: Any = bits_of_float
_float: Any = float_of_bits
_intrinsic: Callable[[Callable[..., Any]], Any] = intrinsic


def width_of(rows: Any) -> int:
    """Numbers of a row of a cache array or tensor (..., row)."""
    coded = rows.dtype.itemsize == 1
    return int(rows.shape[-1]) - SCALE if coded else int(rows.shape[-1])


def held(value: Any) -> Any:
    """A stored number, without its row's scale, as float32."""
    raise NotImplementedError("only inside numba")


@overload(held, inline="always")
def _held(value: Any) -> Any:
    if value == types.int8:

        def code(value: Any) -> Any:
            return numba.float32(numba.int32(value))

        return code

    def plain(value: Any) -> Any:
        return load(value)

    return plain


def row_scale(row: Any) -> Any:
    """What the numbers of a row are to be multiplied by."""
    raise NotImplementedError("only inside numba")


@overload(row_scale, inline="always")
def _row_scale(row: Any) -> Any:
    if row.dtype == types.int8:

        def behind(row: Any) -> Any:
            low = numba.uint32(numba.uint8(row[len(row) - 2]))
            return _float(numba.uint32((low | (numba.uint32(numba.uint8(row[len(row) - 1])) << 8)) << 16))

        return behind

    def one(row: Any) -> Any:
        return numba.float32(1.0)

    return one


@njit(cache=True, nogil=True, error_model="numpy", inline="never")
def _close(row: Any, top: Any) -> Any:
    """Write the scale of a row whose largest number is ``top``; returns what to multiply by."""
    bits = _bits(top * np.float32(1.0 / 127))
    bits = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    row[len(row) - 2] = np.int8(bits & np.uint32(255))
    row[len(row) - 1] = np.int8(bits >> np.uint32(8))
    scale = _float(np.uint32(bits << np.uint32(16)))
    return np.float32(1.0) / scale if scale > 0 else np.float32(0.0)


@njit(cache=True, nogil=True, fastmath=FAST, error_model="numpy")
def _code(value: Any) -> Any:
    return np.int8(np.int32(min(max(np.rint(value), np.float32(-127.0)), np.float32(127.0))))


def put_key(line: Any, factor: Any, weight: Any, c: Any, s: Any, pairs: Any, width: Any, target: Any) -> None:
    """Norm and turn the key ``line`` and write it to the row ``target``."""
    raise NotImplementedError("only inside numba")


@overload(put_key)
def _put_key(line: Any, factor: Any, weight: Any, c: Any, s: Any, pairs: Any, width: Any, target: Any) -> Any:
    if target.dtype == types.int8:

        def coded(line: Any, factor: Any, weight: Any, c: Any, s: Any, pairs: Any, width: Any, target: Any) -> None:
            top = np.float32(0.0)
            for i in range(pairs):
                a = load(line[i]) * factor * weight[i]
                b = load(line[pairs + i]) * factor * weight[pairs + i]
                top = max(top, max(abs(a * c[i] - b * s[i]), abs(b * c[i] + a * s[i])))
            for i in range(2 * pairs, width):
                top = max(top, abs(load(line[i]) * factor * weight[i]))
            share = _close(target, top)
            for i in range(pairs):
                a = load(line[i]) * factor * weight[i]
                b = load(line[pairs + i]) * factor * weight[pairs + i]
                target[i] = _code((a * c[i] - b * s[i]) * share)
                target[pairs + i] = _code((b * c[i] + a * s[i]) * share)
            for i in range(2 * pairs, width):
                target[i] = _code(load(line[i]) * factor * weight[i] * share)

        return coded

    def plain(line: Any, factor: Any, weight: Any, c: Any, s: Any, pairs: Any, width: Any, target: Any) -> None:
        for i in range(pairs):
            a = load(line[i]) * factor * weight[i]
            b = load(line[pairs + i]) * factor * weight[pairs + i]
            store(target, i, a * c[i] - b * s[i])
            store(target, pairs + i, b * c[i] + a * s[i])
        for i in range(2 * pairs, width):
            store(target, i, load(line[i]) * factor * weight[i])

    return plain


def put_value(line: Any, width: Any, target: Any) -> None:
    """Write the value ``line`` to the row ``target``."""
    raise NotImplementedError("only inside numba")


@overload(put_value)
def _put_value(line: Any, width: Any, target: Any) -> Any:
    if target.dtype == types.int8:

        def coded(line: Any, width: Any, target: Any) -> None:
            top = np.float32(0.0)
            for i in range(width):
                top = max(top, abs(load(line[i])))
            share = _close(target, top)
            for i in range(width):
                target[i] = _code(load(line[i]) * share)

        return coded

    def plain(line: Any, width: Any, target: Any) -> None:
        for i in range(width):
            store(target, i, load(line[i]))

    return plain


@_intrinsic
def widen_rows(typing: Any, source: Any, rows: Any, width: Any, following: Any, out: Any) -> Any:
    """``rows`` rows of codes as bfloat16 (rows, width) at ``out``; width a multiple of 32. Those at ``following`` are
    asked for: pages lie anywhere, so the processor cannot guess."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        source, rows, width, following, out = arguments
        row = builder.add(width, ir.Constant(_WORD, SCALE))
        codes = ir.VectorType(ir.IntType(8), avx.LANES)
        both = ir.FunctionType(avx.INTS, [avx.FLOATS, avx.FLOATS])
        steps = builder.sdiv(width, ir.Constant(_WORD, 32))
        with cgutils.for_range(builder, rows) as outer:
            offset = builder.mul(outer.index, row)
            avx.prefetch(builder, following, offset)
            line = builder.add(source, offset)
            target = builder.add(out, builder.mul(outer.index, builder.mul(steps, ir.Constant(_WORD, LINE))))
            bits = builder.zext(avx.load(builder, line, width, ir.IntType(16), 1), ir.IntType(32))
            scale = builder.bitcast(builder.shl(bits, ir.Constant(ir.IntType(32), 16)), ir.FloatType())
            scale = avx.splat(builder, scale)
            with cgutils.for_range(builder, steps) as loop:
                at = builder.add(line, scaled(builder, loop.index, 32))
                low, high = (
                    builder.fmul(
                        builder.sitofp(builder.sext(avx.load(builder, at, 16 * i, codes, 1), avx.INTS), avx.FLOATS),
                        scale,
                    )
                    for i in range(2)
                )
                pair = builder.call(ir.InlineAsm(both, "vcvtne2ps2bf16 $1, $2, $0", "=v,v,v"), [low, high])
                avx.store(builder, pair, target, scaled(builder, loop.index, LINE))
        return context.get_dummy_value()

    return types.void(*[types.intp] * 5), generate


def widen_page(pages: Any, block: Any, head: Any, following: Any, width: Any, buffer: Any) -> Any:
    """Address of a page of ``pages`` (blocks, kv_heads, 16, row) as bfloat16: itself, or its numbers in ``buffer``,
    and then the page of the block ``following`` is asked for."""
    raise NotImplementedError("only inside numba")


@overload(widen_page)
def _widen_page(pages: Any, block: Any, head: Any, following: Any, width: Any, buffer: Any) -> Any:
    if pages.dtype == types.int8:

        def coded(pages: Any, block: Any, head: Any, following: Any, width: Any, buffer: Any) -> Any:
            widen_rows(pages[block, head].ctypes.data, pages.shape[2], width, pages[following, head].ctypes.data,
                       buffer.ctypes.data)  # fmt: skip
            return buffer.ctypes.data

        return coded

    def plain(pages: Any, block: Any, head: Any, following: Any, width: Any, buffer: Any) -> Any:
        return pages[block, head].ctypes.data

    return plain
