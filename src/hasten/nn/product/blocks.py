"""What the kernels of the three precisions share: panels of 64 outputs, blocks of up to six rows.

Four registers hold a row's sums for the 64 outputs of a panel; six rows of them and the weights fill the 32 registers
of AVX-512. :func:`in_blocks` writes the code for six rows and for each smaller rest.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba.core import cgutils

from hasten import huge_pages
from hasten.nn.product import instructions as avx
from hasten.nn.product.instructions import LANES

__all__ = [
    "GROUP",
    "LINE",
    "PANEL",
    "ROWS",
    "TILES",
    "accumulate",
    "adds_words",
    "aligned",
    "asks",
    "in_blocks",
    "over_steps",
    "scaled",
]

PANEL = 64
"""Outputs of a panel."""
TILES = PANEL // LANES
"""Registers of a row's sums."""
ROWS = 6
"""Rows of a block."""
LINE = 64
"""Bytes of a register, and of a line of memory."""
GROUP = 96
"""Rows that share a stretch of weights from the second-level cache before the next stretch is read."""
_WORD = ir.IntType(64)


def scaled(builder: Any, index: Any, factor: int) -> Any:
    """``index * factor``, both 64 bits wide."""
    return builder.mul(index, ir.Constant(_WORD, factor))


def in_blocks(builder: Any, count: Any, emit: Callable[[int, Any], None], most: int = ROWS) -> None:
    """Code that calls ``emit(rows, first row)`` for ``count`` rows: blocks of ``most``, then the rest in one block."""
    position = cgutils.alloca_once_value(builder, ir.Constant(_WORD, 0))
    full = builder.sdiv(count, ir.Constant(_WORD, most))
    with cgutils.for_range(builder, full) as loop:
        row = scaled(builder, loop.index, most)
        emit(most, row)
        builder.store(builder.add(row, ir.Constant(_WORD, most)), position)
    row = builder.load(position)
    rest = builder.sub(count, row)
    after = builder.append_basic_block("after.rows")
    switch = builder.switch(rest, after)
    for rows in range(1, most):
        case = builder.append_basic_block(f"rows.{rows}")
        switch.add_case(ir.Constant(_WORD, rows), case)
        builder.position_at_end(case)
        emit(rows, row)
        builder.branch(after)
    builder.position_at_end(after)


def accumulate(
    builder: Any, lines: list[Any], weights: Any, steps: Any, totals: list[Any],
    ask: Callable[[Any], None], dot: Callable[[Any, Any, Any, Any], Any],
) -> None:  # fmt: skip
    """totals[row, tile] = dot(totals[row, tile], weights[step, tile], word ``step`` of line ``row``), for all steps.

    ``lines``: an address for each row; ``weights``: that of a panel, 256 bytes a step, ``ask`` asks for those
    of later steps.
    """

    over_steps(builder, weights, steps, ask, adds_words(builder, lines, totals, dot))


def adds_words(
    builder: Any, lines: list[Any], totals: list[Any], dot: Callable[[Any, Any, Any, Any], Any]
) -> Callable[[list[Any], Any], None]:
    """Code that adds a step: weights in four registers, by ``dot`` with word number ``step`` of each line."""

    def add(tiles: list[Any], step: Any) -> None:
        at = scaled(builder, step, 4)
        for r, line in enumerate(lines):
            word = avx.broadcast(builder, line, at)
            for t, tile in enumerate(tiles):
                total = totals[r * TILES + t]
                builder.store(dot(builder, builder.load(total), tile, word), total)

    return add


def over_steps(
    builder: Any, weights: Any, steps: Any, ask: Callable[[Any], None], add: Callable[[list[Any], Any], None]
) -> None:
    """``add(the four registers of a step's weights, number of the step)`` for all steps of a panel."""
    with cgutils.for_range(builder, steps) as loop:
        panel = builder.add(weights, scaled(builder, loop.index, TILES * LINE))
        ask(loop.index)
        add([avx.load(builder, panel, t * LINE, avx.INTS, LINE) for t in range(TILES)], loop.index)


def asks(builder: Any, weights: Any, ahead: int) -> Callable[[Any], None]:
    """What a step asks for: four lines of the panel, four lines apart, about ``ahead`` bytes behind its own.

    Not line by line: in rounds over the quarters of 4 KiB, which memory answers a sixth faster (33 against 28 GB/s on
    two cores of a Xeon). Where whole tiles are asked for, lines a quarter apart are best.
    """

    def ask(step: Any) -> None:
        at = _asked(builder, weights, step)
        for t in range(TILES):
            avx.prefetch(builder, at, ahead + t * 4 * LINE)

    return ask


def _asked(builder: Any, weights: Any, step: Any) -> Any:
    """The first of the lines that a step asks for."""
    word = step.type
    page, quarter = builder.and_(step, ir.Constant(word, -16)), builder.and_(step, ir.Constant(word, 3))
    turn = builder.and_(builder.lshr(step, ir.Constant(word, 2)), ir.Constant(word, 3))
    inside = builder.add(scaled(builder, quarter, 16 * LINE), scaled(builder, turn, LINE))
    return builder.add(weights, builder.add(scaled(builder, page, 4 * LINE), inside))


def aligned(shape: tuple[int, ...], kind: Any) -> Any:
    """An array of zeros that starts at a multiple of 64 bytes; large ones lie in huge pages."""
    size = int(np.prod(shape)) * np.dtype(kind).itemsize
    return huge_pages.zeros(size).view(kind).reshape(shape)
