"""What :mod:`kernels_tiles` does differently where the cache holds codes of one byte: nothing is widened in memory.

Scores are products of bytes: the codes of sixteen keys are a tile as they lie in their page, and a query is two rows
of bytes, ``q = s (high + low / 256)``, which keeps 15 bits of it. The scale of a key multiplies its scores, that of a
value its weights, so that the codes of values go into bfloat16 as they are, exactly.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from hasten.nn.bfloat import FAST, float_of_bits, load
from hasten.nn.product import instructions as avx
from hasten.nn.product.blocks import LINE, scaled
from hasten.nn.product.tiles import run_assembly

__all__ = ["STEP", "in_two", "join_scores", "pair_codes", "scales_of", "scores_of_codes"]

STEP = 64
"""Codes of a tile's row: widths are multiples of it."""
_TILE = 1024
_WORD = ir.IntType(64)
_float: Any = float_of_bits
_intrinsic: Callable[[Callable[..., Any]], Any] = intrinsic


def _at(builder: Any, base: Any, offset: int) -> Any:
    return builder.add(base, ir.Constant(_WORD, offset))


@njit(cache=True, fastmath=FAST, error_model="numpy")
def in_two(query: Any, high: Any, low: Any) -> Any:
    """A query (width,) as two rows of bytes; returns the scale of ``256 high + low``."""
    bits = np.int32(0)
    # bfloat16 without their signs are in the order of their bits, and the largest whole number is found in lanes.
    for i in range(len(query)):
        bits = max(bits, np.int32(query[i]) & np.int32(0x7FFF))
    scale = _float(np.uint32(bits) << np.uint32(16)) * np.float32(1.0 / 127)
    share = np.float32(1.0) / scale if scale > 0 else np.float32(0.0)
    for i in range(len(query)):
        x = load(query[i]) * share
        whole = np.rint(x)
        high[i] = np.int8(np.int32(whole))
        low[i] = np.int8(np.int32(min(np.rint((x - whole) * np.float32(256.0)), np.float32(127.0))))
    return scale * np.float32(1.0 / 256)


@_intrinsic
def scores_of_codes(
    typing: Any, pages: Any, count: Any, row: Any, high: Any, low: Any, steps: Any, highs: Any, lows: Any
) -> Any:
    """Products of the keys of ``count`` pages (even) with the two rows of sixteen queries.

    Addresses: pages (count,) addresses of 16 rows of codes, ``row`` bytes apart; high, low (steps, 16 quads, 16
    queries, 4) bytes; highs, lows (16 * count, 16) int32.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pages, count, row, high, low, steps, highs, lows = arguments
        line = ir.Constant(_WORD, LINE)
        with cgutils.for_range(builder, builder.sdiv(count, ir.Constant(_WORD, 2))) as outer:
            base = scaled(builder, outer.index, 16)
            both = [avx.load(builder, builder.add(pages, base), 8 * j, _WORD, 8) for j in range(2)]
            for j in range(4):
                run_assembly(builder, f"tilezero %tmm{j}")
            with cgutils.for_range(builder, steps) as loop:
                tile = scaled(builder, loop.index, _TILE)
                run_assembly(builder, "tileloadd ($0,$1,1), %tmm4", builder.add(high, tile), line)
                run_assembly(builder, "tileloadd ($0,$1,1), %tmm5", builder.add(low, tile), line)
                for j in range(2):
                    where = builder.add(both[j], scaled(builder, loop.index, STEP))
                    run_assembly(builder, f"tileloadd ($0,$1,1), %tmm{6 + j}", where, row)
                    run_assembly(builder, f"tdpbssd %tmm4, %tmm{6 + j}, %tmm{2 * j}")
                    run_assembly(builder, f"tdpbssd %tmm5, %tmm{6 + j}, %tmm{2 * j + 1}")
            for j in range(2):
                offset = builder.add(scaled(builder, outer.index, 2 * _TILE), ir.Constant(_WORD, j * _TILE))
                run_assembly(builder, f"tilestored %tmm{2 * j}, ($0,$1,1)", builder.add(highs, offset), line)
                run_assembly(builder, f"tilestored %tmm{2 * j + 1}, ($0,$1,1)", builder.add(lows, offset), line)
        return context.get_dummy_value()

    return types.void(*[types.intp] * 8), generate


@_intrinsic
def join_scores(typing: Any, highs: Any, lows: Any, count: Any, lanes: Any, keys: Any) -> Any:
    """highs (count, 16) becomes the scores, float32: (256 high + low) lanes (16,) keys (count,)."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        highs, lows, count, lanes, keys = arguments
        factor = avx.load(builder, lanes, 0, avx.FLOATS)
        much = ir.Constant(avx.FLOATS, [ir.Constant(ir.FloatType(), 256.0)] * avx.LANES)
        with cgutils.for_range(builder, count) as loop:
            at = scaled(builder, loop.index, LINE)
            high = builder.sitofp(avx.load(builder, highs, at, avx.INTS), avx.FLOATS)
            low = builder.sitofp(avx.load(builder, lows, at, avx.INTS), avx.FLOATS)
            own = avx.splat(builder, avx.load(builder, keys, scaled(builder, loop.index, 4), ir.FloatType()))
            score = builder.fmul(avx.multiply_add(builder, high, much, low), builder.fmul(factor, own))
            avx.store(builder, score, highs, at)
        return context.get_dummy_value()

    return types.void(*[types.intp] * 5), generate


@_intrinsic
def pair_codes(typing: Any, page: Any, row: Any, tiles: Any, out: Any) -> Any:
    """Sixteen rows of codes, ``row`` bytes apart, as pairs of bfloat16: (tiles, 8 pairs, 16 columns, 2), tiles 1024
    bytes apart."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        page, row, tiles, out = arguments
        codes = ir.VectorType(ir.IntType(8), avx.LANES)
        sixteen = ir.Constant(avx.INTS, [16] * avx.LANES)
        with cgutils.for_range(builder, tiles) as loop:
            at = builder.add(page, scaled(builder, loop.index, avx.LANES))
            target = builder.add(out, scaled(builder, loop.index, _TILE))
            for pair in range(8):
                words = []
                for half in range(2):
                    where = builder.add(at, scaled(builder, row, 2 * pair + half))
                    wide = builder.sitofp(builder.sext(avx.load(builder, where, 0, codes, 1), avx.INTS), avx.FLOATS)
                    words.append(builder.bitcast(wide, avx.INTS))
                # Codes have eight bits, so the lower half of each float is empty.
                avx.store(builder, builder.or_(builder.lshr(words[0], sixteen), words[1]), target, pair * LINE)
        return context.get_dummy_value()

    return types.void(*[types.intp] * 4), generate


@_intrinsic
def scales_of(typing: Any, page: Any, row: Any, held: Any, out: Any) -> Any:
    """Scales of sixteen rows of codes as float32 (16,), 0 from row ``held`` on: what lies there may be anything."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        page, row, held, out = arguments
        word = ir.IntType(32)
        lanes = ir.Constant(avx.INTS, list(range(avx.LANES)))
        index = builder.mul(lanes, avx.splat(builder, builder.trunc(row, word)))
        kind = ir.FunctionType(avx.INTS, [_WORD, avx.INTS])
        text = "kxnorw %k1, %k1, %k1; vpgatherdd ($1,$2,1), $0 {%k1}"
        gather = ir.InlineAsm(kind, text, "=&v,r,v,~{k1},~{memory}", side_effect=True)
        # Four bytes that end with the row, so that nothing behind the page is read.
        found = builder.call(gather, [builder.add(page, builder.sub(row, ir.Constant(_WORD, 4))), index])
        upper = builder.and_(found, ir.Constant(avx.INTS, [-65536] * avx.LANES))
        inside = builder.icmp_signed("<", lanes, avx.splat(builder, builder.trunc(held, word)))
        upper = builder.select(inside, upper, ir.Constant(avx.INTS, [0] * avx.LANES))
        avx.store(builder, upper, out, 0)
        return context.get_dummy_value()

    return types.void(*[types.intp] * 4), generate
