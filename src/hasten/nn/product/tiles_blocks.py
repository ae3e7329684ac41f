"""Sixteen rows, or blocks of 32 rows and 32 outputs, times a panel's inputs, in matrix tiles.

A panel's 16 input pairs (bfloat16) or quads (int8) of 16 outputs are a tile as they lie, 256 bytes from pair to pair.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from hasten.nn.product import instructions as avx
from hasten.nn.product.blocks import LINE, PANEL, scaled
from hasten.nn.product.tiles_setup import TILE, run_assembly

__all__ = ["AHEAD", "FAR_AHEAD", "block_times", "lines_for", "word_tiles"]

AHEAD = 8 * TILE
"""Bytes between a weight in use and the one asked for, where one pass over the panel does for all rows."""
FAR_AHEAD = 32 * TILE
"""The same where weights are passed several times: these are asked for into the second cache."""
_BITE = 2
"""Tiles of inputs that all rows are multiplied with before the next ones are: activations and weights of a bite lie in
the first cache, so that the way from the second is free for the stream of weights."""
_WORD = ir.IntType(64)


def block_times(
    builder: Any, halves: int, x: Any, tall: Any, weights: Any, steps: Any, sums: Any, dot: str, fresh: Any,
    ask: Callable[[Any, Any, int], None], first: Any,
) -> None:  # fmt: skip
    """``halves`` times 16 rows, 64 outputs, ``steps`` tiles of inputs, added to ``sums`` (rows, 64), or written there
    where they are ``fresh``. ``ask(pass, step, quarter)`` asks for weights to come, before each of the four products
    of a step; passes are counted from ``first``."""
    line = ir.Constant(_WORD, PANEL * 4)
    rows = [builder.add(x, scaled(builder, tall, i)) for i in range(halves)]
    # Four tiles of sums: 16 rows by 64 outputs in one pass over the panel, or 32 rows by 32 outputs in two.
    columns = 4 // halves
    for side in range(halves):
        places = [
            (columns * i + j, builder.add(sums, ir.Constant(_WORD, (16 * i * PANEL + (columns * side + j) * 16) * 4)))
            for i in range(halves)
            for j in range(columns)
        ]

        with builder.if_else(fresh) as (begin, go_on):
            with begin:
                for tile, _ in places:
                    run_assembly(builder, f"tilezero %tmm{tile}")
            with go_on:
                for tile, where in places:
                    run_assembly(builder, f"tileloadd ($0,$1,1), %tmm{tile}", where, line)
        with cgutils.for_range(builder, steps) as loop:
            along = scaled(builder, loop.index, TILE)
            panel = builder.add(weights, scaled(builder, loop.index, 4 * TILE))
            number = builder.add(first, ir.Constant(_WORD, side))
            ask(number, loop.index, 0)
            for j in range(columns):
                tile = 4 + halves + j % (4 - halves)
                where = builder.add(panel, ir.Constant(_WORD, (columns * side + j) * LINE))
                for i in range(halves):
                    if j == 0:
                        own = builder.add(rows[i], along)
                        run_assembly(builder, f"tileloadd ($0,$1,1), %tmm{4 + i}", own, ir.Constant(_WORD, LINE))
                    if i == 0:
                        run_assembly(builder, f"tileloadd ($0,$1,1), %tmm{tile}", where, line)
                    run_assembly(builder, f"{dot} %tmm{tile}, %tmm{4 + i}, %tmm{columns * i + j}")
                    if halves * j + i < 3:
                        ask(number, loop.index, halves * j + i + 1)
        for tile, where in places:
            run_assembly(builder, f"tilestored %tmm{tile}, ($0,$1,1)", where, line)


def _scattered(line: int) -> int:
    """Which line of 4 KiB is asked for after ``line`` others, see :func:`hasten.nn.product.blocks.accumulate`."""
    return line % 4 * 16 + line // 4


def _tiles_of(dot: str) -> Any:
    @intrinsic
    def tiles_of(
        typing: Any, x: Any, tall: Any, weights: Any, steps: Any, sums: Any, fresh: Any, sixteens: Any, following: Any,
        lines: Any,
    ) -> Any:  # fmt: skip
        """16 * ``sixteens`` rows (arranged, ``tall`` bytes for 16 of them) times ``steps`` tiles of a panel's inputs,
        to ``sums``; see :func:`block_times`. Meanwhile the weights from ``following`` on are asked for, ``lines`` of
        them after each product of two tiles."""
        return types.void(*[types.intp] * 9), _generator(dot)

    return tiles_of


def _generator(dot: str) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        x, tall, weights, steps, sums, fresh, sixteens, following, lines = arguments
        fresh = builder.icmp_signed("!=", fresh, ir.Constant(_WORD, 0))
        zero, one, two, bite = (ir.Constant(_WORD, n) for n in (0, 1, 2, _BITE))
        share = scaled(builder, lines, 4 * LINE)

        def passes(x: Any, weights: Any, steps: Any, following: Any, first: Any, single: bool) -> None:
            def ask_for(number: Any, step: Any, quarter: int) -> None:
                if single:
                    at = builder.add(following, scaled(builder, step, 4 * TILE))
                    with builder.if_then(builder.icmp_signed("!=", lines, zero)):
                        for line in range(16 * quarter, 16 * quarter + 16):
                            avx.prefetch(builder, at, _scattered(line) * LINE)
                    return
                done = builder.add(builder.mul(number, steps), step)
                begin = builder.add(following, builder.mul(done, share))
                begin = builder.add(begin, scaled(builder, lines, quarter * LINE))
                with cgutils.for_range(builder, lines) as loop:
                    avx.prefetch(builder, builder.add(begin, scaled(builder, loop.index, LINE)), 0, 1)

            def block(halves: int, number: Any) -> None:
                at = builder.add(x, builder.mul(number, tall))
                target = builder.add(sums, scaled(builder, number, 16 * PANEL * 4))
                block_times(builder, halves, at, tall, weights, steps, target, dot, first, ask_for, number)

            if single:
                block(1, zero)
                return
            with cgutils.for_range(builder, builder.sdiv(sixteens, two)) as loop:
                block(2, scaled(builder, loop.index, 2))
            with builder.if_then(builder.icmp_signed("!=", builder.srem(sixteens, two), zero)):
                block(1, builder.sub(sixteens, one))

        with builder.if_else(builder.icmp_signed("==", sixteens, one)) as (alone, several):
            with alone:
                passes(x, weights, steps, following, fresh, single=True)
            with several:
                bites = builder.sdiv(builder.add(steps, builder.sub(bite, one)), bite)
                with cgutils.for_range(builder, bites) as loop:
                    done = builder.mul(loop.index, bite)
                    rest = builder.sub(steps, done)
                    count = builder.select(builder.icmp_signed("<", rest, bite), rest, bite)
                    first = builder.and_(fresh, builder.icmp_signed("==", done, zero))
                    here = builder.add(x, scaled(builder, done, TILE))
                    there = builder.add(weights, scaled(builder, done, 4 * TILE))
                    asked = builder.mul(builder.mul(done, sixteens), share)
                    passes(here, there, count, builder.add(following, asked), first, single=False)
        return context.get_dummy_value()

    return generate


word_tiles = _tiles_of("tdpbf16ps")


@njit(cache=True)
def lines_for(sixteens: int) -> int:
    """Lines to ask for after each product of two tiles, so that as many are asked for as are used."""
    return (16 + sixteens - 1) // sixteens
