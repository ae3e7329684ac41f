"""Up to 96 rows times 16 outputs of an int8 matrix: one tile of weights at a time meets all rows (AMX).

Weights pass once from memory, so time is that of their stream as long as nothing halts it. Three things do: a pause in
the requests (so the sums of the column before are scaled between the products of this one, line by line), requests
that come faster than memory answers (so they come evenly, a few after each product), and requests one behind the other
in a page (so four pages take turns, each of which the processor then fetches ahead). 64 rows by 64 outputs and 1,024
inputs take 4.9 us a thread where the stream alone takes 4.1; blocks of 32 rows and 32 outputs, with sums scaled apart,
took 9. Sums are those of :mod:`int8`, bit for bit.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from hasten.nn.product import instructions as avx
from hasten.nn.product.blocks import LINE, PANEL, scaled
from hasten.nn.product.tiles_setup import TILE, run_assembly

__all__ = [
    "BEFORE",
    "BEFORE_APART",
    "FACTORS",
    "FIELDS",
    "LEFT",
    "MOST",
    "RESULT",
    "RESULT_APART",
    "ROW_APART",
    "SCALES",
    "STARTS",
    "SUMS",
    "add_column",
    "scale_column",
]

MOST = 6
"""Tiles of rows that fit beside one of weights and one of activations."""
SUMS, STARTS, SCALES, BEFORE, RESULT, LEFT, ROW_APART, BEFORE_APART, RESULT_APART, FACTORS = range(10)
"""Whole numbers of a column whose sums are to be scaled: addresses of the sums (rows, 16) int32, of the rows'
starts and scales, of the float32 that they are added to and of the result; rows that are left; bytes from row to row of
starts and scales, of what is added to and of the result; address of 16 factors of the result."""
FIELDS = 10
_STEPS = 8
"""Tiles of inputs of a whole group: a step scales as many rows that eight do for all."""
_PAGES = 4
_WORD = ir.IntType(64)


class _Column:
    """The column that is scaled, as variables of the code that is written."""

    def __init__(self, builder: Any, fields: Any) -> None:
        self._builder = builder
        values = [avx.load(builder, fields, 8 * i, _WORD, 8) for i in range(FIELDS)]
        self._apart = {
            SUMS: _word(LINE),
            STARTS: values[ROW_APART],
            SCALES: values[ROW_APART],
            BEFORE: values[BEFORE_APART],
            RESULT: values[RESULT_APART],
        }
        self._places: Any = {i: cgutils.alloca_once_value(builder, values[i]) for i in self._apart}  # type: ignore[no-untyped-call]
        self._left: Any = cgutils.alloca_once_value(builder, values[LEFT])  # type: ignore[no-untyped-call]
        self._factors = avx.load(builder, values[FACTORS], 0, avx.FLOATS)

    def scale(self, rows: int) -> None:
        """Scale up to ``rows`` rows more."""
        builder = self._builder
        left = builder.load(self._left)
        with builder.if_else(builder.icmp_signed(">=", left, _word(rows))) as (enough, few):
            with enough:
                for _ in range(rows):
                    self._row()
                builder.store(builder.sub(left, _word(rows)), self._left)
            with few:
                self.rest()

    def rest(self) -> None:
        """Scale all that are left."""
        builder = self._builder
        with cgutils.for_range(builder, builder.load(self._left)):
            self._row()
        builder.store(_word(0), self._left)

    def _row(self) -> None:
        """result = factors * (scale * (start + sums) + what was there); what the factors multiply is rounded once."""
        builder = self._builder
        at = {i: builder.load(place) for i, place in self._places.items()}
        start = avx.broadcast(builder, at[STARTS], 0)
        scale = avx.splat(builder, avx.load(builder, at[SCALES], 0, ir.FloatType()))
        whole = builder.sitofp(builder.add(avx.load(builder, at[SUMS], 0, avx.INTS, LINE), start), avx.FLOATS)
        value = avx.multiply_add(builder, whole, scale, avx.load(builder, at[BEFORE], 0, avx.FLOATS))
        avx.store(builder, builder.fmul(value, self._factors), at[RESULT], 0)
        for i, place in self._places.items():
            builder.store(builder.add(at[i], self._apart[i]), place)


def _word(value: int) -> Any:
    return ir.Constant(_WORD, value)


def _line(part: int) -> int:
    """Bytes to the ``part``-th line that a step asks for: four lines of each of four pages, page by page in turns."""
    return part % _PAGES * 64 * LINE + part // _PAGES * LINE


def _emit(
    builder: Any, sixteens: int, x: Any, tall: Any, weights: Any, steps: Any, sums: Any, following: Any, asked: Any,
    column: _Column,
) -> None:  # fmt: skip
    """:func:`add_column` of ``sixteens`` tiles of rows."""
    line, apart = _word(LINE), _word(PANEL * 4)
    spare = 7 - sixteens  # tiles for activations
    for i in range(sixteens):
        run_assembly(builder, f"tilezero %tmm{i}")
    with cgutils.for_range(builder, steps) as loop:
        number = builder.add(asked, loop.index)
        block = builder.and_(number, _word(-16))
        lines = scaled(builder, builder.sub(number, block), 16 // _PAGES * LINE)
        wanted = builder.add(builder.add(following, scaled(builder, block, TILE)), lines)
        here = builder.add(weights, scaled(builder, loop.index, 4 * TILE))
        # They pass once: the first cache is for the rows.
        run_assembly(builder, f"tileloaddt1 ($0,$1,1), %tmm{sixteens}", here, apart)
        own = builder.add(x, scaled(builder, loop.index, TILE))
        for i in range(sixteens):
            side = sixteens + 1 + i % min(spare, 3)
            run_assembly(builder, f"tileloadd ($0,$1,1), %tmm{side}", own, line)
            run_assembly(builder, f"tdpbsud %tmm{sixteens}, %tmm{side}, %tmm{i}")
            for part in range(16 * i // sixteens, 16 * (i + 1) // sixteens):
                avx.prefetch(builder, wanted, _line(part), 1)
            column.scale(16 // _STEPS)
            own = builder.add(own, tall)
    column.rest()
    for i in range(sixteens):
        target = builder.add(sums, _word(i * TILE))
        run_assembly(builder, f"tilestored %tmm{i}, ($0,$1,1)", target, line)


@intrinsic
def add_column(
    typing: Any, x: Any, tall: Any, weights: Any, steps: Any, sixteens: Any, sums: Any, following: Any, asked: Any,
    column: Any,
) -> Any:  # fmt: skip
    """sums (16 * sixteens, 16) int32 = ``steps`` tiles of rows times those of a column of weights.

    x: address of the rows in tiles, ``tall`` bytes for 16 of them; ``sixteens``: 1 to ``MOST``. Meanwhile the column
    at ``column`` (:data:`FIELDS`) is scaled, and each step asks for 1 KiB of the weights that lie at ``following``:
    the first for the part number ``asked``.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        x, tall, weights, steps, sixteens, sums, following, asked, fields = arguments
        after = builder.append_basic_block("after.column")
        switch = builder.switch(sixteens, after)
        for count in range(1, MOST + 1):
            case = builder.append_basic_block(f"sixteens.{count}")
            switch.add_case(_word(count), case)
            builder.position_at_end(case)
            column = _Column(builder, fields)
            _emit(builder, count, x, tall, weights, steps, sums, following, asked, column)
            builder.branch(after)
        builder.position_at_end(after)
        return context.get_dummy_value()

    return types.void(*[types.intp] * 9), generate


@intrinsic
def scale_column(typing: Any, column: Any) -> Any:
    """Scale what is left of the column at ``column``."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _Column(builder, arguments[0]).rest()
        return context.get_dummy_value()

    return types.void(types.intp), generate
