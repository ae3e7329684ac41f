"""Products with a bfloat16 matrix in 12 bits (:mod:`twelve_bits`): 16 pairs at a time are opened into the first cache
and multiplied there as :mod:`bfloat16` and :mod:`tiles` multiply them, to the same bits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import njit, prange, types
from numba.core import cgutils
from numba.extending import intrinsic

from hasten.nn.product import instructions as avx
from hasten.nn.product.bfloat16 import address_of_rows, adds_pairs, bytes_of_pair, float_rows, rows_times, write_sums
from hasten.nn.product.blocks import GROUP, LINE, PANEL, TILES, in_blocks, scaled
from hasten.nn.product.past_caches import finish, goes_past, write_past
from hasten.nn.product.tiles import serves_as_sums
from hasten.nn.product.tiles_blocks import FAR_AHEAD, block_times, word_tiles
from hasten.nn.product.tiles_setup import (
    TILE,
    arranged,
    close_tiles,
    open_tiles,
    room_for,
    run_assembly,
    sixteens_of,
    sums_for,
)
from hasten.nn.product.twelve_bits import BLOCK, FOURS, OPENED, PAIRS, Opening, ask, is_plain, open_block

__all__ = ["multiply", "multiply_floats", "multiply_tiles", "panels", "tile_panels"]

# A checker would count the context of a call; what is literal chooses the code.
_intrinsic: Callable[[Callable[..., Any]], Any] = intrinsic(prefer_literal=True)
_WORD = ir.IntType(64)
_AHEAD = 3 * BLOCK
"""Bytes between the block that is opened and the one asked for."""
_SOONER = 2
"""Blocks between the activations in use and those asked for: their lines would queue behind those of the weights."""
_CLOSED = 6
"""Rows up to which weights go from memory to registers; more rows would open them several times."""
_BITE = 2
"""Blocks that all rows are multiplied with before the next ones are, where there are more than 16 rows."""
_ROOM = 2 * _BITE * OPENED
_SPAN = 32
"""Blocks of a stretch of an opened panel."""


@_intrinsic
def _add_rows(
    typing: Any, floats: Any, x: Any, x_stride: Any, weights: Any, sums: Any, count: Any, stream: Any, four: Any
) -> Any:
    """Add the product of ``count`` rows and an opened block to ``sums`` (count, 64) float32, asking for eight times
    four lines of a stream (:func:`hasten.nn.product.twelve_bits.ask`) from ``four`` on, two with each pair. ``floats``
    is a literal: 1 where the rows are float32, 0 where they are bfloat16."""
    wide = bool(floats.literal_value)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _, x, x_stride, weights, sums, count, stream, four = arguments
        one = ir.Constant(_WORD, 1)

        def ask_for(step: Any) -> None:
            number = builder.add(four, builder.lshr(step, one))
            ask(builder, stream, number, builder.and_(step, one))

        rows_times(builder, x, x_stride, weights, ir.Constant(_WORD, PAIRS), sums, count, ask_for, wide)
        return context.get_dummy_value()

    return types.void(floats, *[types.intp] * 7), generate


@intrinsic
def _add_closed(
    typing: Any,
    x: Any,
    x_stride: Any,
    record: Any,
    head: Any,
    blocks: Any,
    block: Any,
    sums: Any,
    count: Any,
    ahead: Any,
) -> Any:
    """Add the product of up to six rows and a block whose weights all have a code: they never leave the registers."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        x, x_stride, record, head, blocks, block, sums, count, ahead = arguments
        opening = Opening(builder, record, head, blocks, block)
        stream, first = builder.add(opening.stream, ahead), builder.mul(block, ir.Constant(_WORD, FOURS))

        def emit(rows: int, row: Any) -> None:
            lines = [
                builder.add(x, builder.mul(builder.add(row, ir.Constant(_WORD, r)), x_stride)) for r in range(rows)
            ]
            target = builder.add(sums, scaled(builder, row, PANEL * 4))
            places = [n * LINE for n in range(rows * TILES)]
            totals = [cgutils.alloca_once(builder, avx.FLOATS) for _ in places]
            for total, place in zip(totals, places, strict=True):
                builder.store(avx.load(builder, target, place, avx.FLOATS), total)

            add = adds_pairs(builder, lines, totals, floats=False)

            def four(number: Any, at: Any) -> None:
                asked = builder.add(first, scaled(builder, number, 3))
                pairs = scaled(builder, number, 4)
                for step in range(4):
                    if step < 3:
                        ask(builder, stream, builder.add(asked, ir.Constant(_WORD, step)))
                    add(opening.pair(at, step), builder.add(pairs, ir.Constant(_WORD, step)))

            opening.fours(four)
            for total, place in zip(totals, places, strict=True):
                avx.store(builder, builder.load(total), target, place)

        in_blocks(builder, count, emit)
        return context.get_dummy_value()

    return types.void(*[types.intp] * 9), generate


@njit(cache=True, error_model="numpy")
def panels(x: Any, packed: Any, bias: Any, out: Any, first: int, last: int, floats: bool) -> None:
    """As :func:`hasten.nn.product.bfloat16.panels`, with packed (panels, stride) uint8."""
    rows, width = out.shape
    groups = (rows + GROUP - 1) // GROUP
    blocks = x.shape[1] // (2 * PAIRS)
    head = packed.shape[1] - blocks * BLOCK
    sums = room_for(min(rows, GROUP) * PANEL * 4).view(np.float32).reshape((min(rows, GROUP), PANEL))
    own = room_for(OPENED)
    room = own.ctypes.data
    base, lines = packed.ctypes.data, float_rows(rows, x.shape[1], floats)
    rows_at, x_stride = address_of_rows(x, 0, min(GROUP, rows), lines)
    for item in range(first, last):
        panel, start = item // groups, (item % groups) * GROUP
        count = min(GROUP, rows - start)
        if groups > 1:
            rows_at, x_stride = address_of_rows(x, start, count, lines)
        record = base + panel * packed.shape[1]
        sums[:count] = 0
        for block in range(blocks):
            here = rows_at + block * PAIRS * bytes_of_pair(floats)
            if count <= _CLOSED and not floats and is_plain(record, block):
                _add_closed(here, x_stride, record, head, blocks, block, sums.ctypes.data, count, _AHEAD)
                continue
            open_block(record, head, blocks, block, room, _AHEAD if start == 0 else 0)
            stream, four = record + head + _AHEAD, block * FOURS + 4
            if floats:
                _add_rows(1, here, x_stride, room, sums.ctypes.data, count, stream, four)
            else:
                _add_rows(0, here, x_stride, room, sums.ctypes.data, count, stream, four)
        write_sums(sums, count, bias, out, start, panel * PANEL, min(panel * PANEL + PANEL, width))
    own[0] = 0  # numba frees an array behind its last use, and its address is none
    if floats:
        lines[0, 0] = 0


@intrinsic
def _clear(typing: Any) -> Any:
    """The sums of 16 rows and 64 outputs, kept in four tiles, are 0."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        for tile in range(4):
            run_assembly(builder, f"tilezero %tmm{tile}")
        return context.get_dummy_value()

    return types.void(), generate


@intrinsic
def _add_tile(
    typing: Any, x: Any, weights: Any, record: Any, head: Any, blocks: Any, block: Any, target: Any, ahead: Any
) -> Any:
    """Add the product of a tile of 16 rows and an opened block. Meanwhile open block number ``block`` of a record to
    ``target``, and ask for the one ``ahead`` bytes behind it: matrix tiles, registers and memory work at once."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        x, weights, record, head, blocks, block, target, ahead = arguments
        line = ir.Constant(_WORD, PANEL * 4)
        opening = Opening(builder, record, head, blocks, block)
        stream, four = builder.add(opening.stream, ahead), builder.mul(block, ir.Constant(_WORD, FOURS))
        run_assembly(builder, "tileloadd ($0,$1,1), %tmm4", x, ir.Constant(_WORD, LINE))
        for column in range(4):
            tile = 5 + column % 3
            where = builder.add(weights, ir.Constant(_WORD, column * LINE))
            run_assembly(builder, f"tileloadd ($0,$1,1), %tmm{tile}", where, line)
            run_assembly(builder, f"tdpbf16ps %tmm{tile}, %tmm4, %tmm{column}")
            for part in range(3):
                ask(builder, stream, builder.add(four, ir.Constant(_WORD, 3 * column + part)))
            for step in range(4):
                avx.prefetch(builder, x, _SOONER * TILE + (4 * column + step) * LINE)
            opening.piece(ir.Constant(_WORD, column), target)
        opening.finish(target)
        return context.get_dummy_value()

    return types.void(*[types.intp] * 8), generate


@intrinsic
def _keep(typing: Any, sums: Any) -> Any:
    """The sums to (16, 64) float32."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        for column in range(4):
            where = builder.add(arguments[0], ir.Constant(_WORD, column * LINE))
            run_assembly(builder, f"tilestored %tmm{column}, ($0,$1,1)", where, ir.Constant(_WORD, PANEL * 4))
        return context.get_dummy_value()

    return types.void(types.intp), generate


@njit(cache=True, error_model="numpy")
def _sixteen(x: int, record: int, head: int, blocks: int, sums: int, room: int) -> None:
    """One tile of rows times a panel: a block is opened while the one before is multiplied."""
    _clear()
    open_block(record, head, blocks, 0, room, _AHEAD)
    for block in range(blocks):
        odd = block % 2 * OPENED
        # the last one opens itself again: it is there, and what is behind it may belong to nobody
        _add_tile(x + block * TILE, room + odd, record, head, blocks, min(block + 1, blocks - 1),
                  room + OPENED - odd, _AHEAD)  # fmt: skip
    _keep(sums)


@intrinsic
def _add_bite(
    typing: Any, x: Any, tall: Any, weights: Any, steps: Any, sums: Any, fresh: Any, sixteens: Any, record: Any,
    head: Any, blocks: Any, block: Any, more: Any, target: Any, lines: Any,
) -> Any:  # fmt: skip
    """``sums`` of two or more tiles of rows and ``steps`` opened blocks, added or ``fresh``. Meanwhile ``more`` blocks
    from number ``block`` on are opened to ``target``, a piece with every second product, and later ones asked for,
    ``lines`` lines with each."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        x, tall, weights, steps, sums, fresh, sixteens, record, head, blocks, block, more, target, lines = arguments
        fresh = builder.icmp_signed("!=", fresh, ir.Constant(_WORD, 0))
        one, two, three = (ir.Constant(_WORD, n) for n in (1, 2, 3))
        pieces = scaled(builder, more, 4)
        at_block = builder.add(builder.add(record, head), scaled(builder, block, BLOCK))
        following = builder.add(at_block, ir.Constant(_WORD, FAR_AHEAD))

        def meanwhile(number: Any, step: Any, quarter: int) -> None:
            turn = builder.add(scaled(builder, number, _BITE), step)
            asked = builder.add(scaled(builder, turn, 4), ir.Constant(_WORD, quarter))
            begin = builder.add(following, builder.mul(asked, scaled(builder, lines, LINE)))
            with cgutils.for_range(builder, lines) as loop:
                avx.prefetch(builder, builder.add(begin, scaled(builder, loop.index, LINE)), 0, 1)
            if quarter % 2:
                return
            piece = builder.add(scaled(builder, turn, 2), ir.Constant(_WORD, quarter // 2))
            with builder.if_then(builder.icmp_signed("<", piece, pieces)):
                past, inside = builder.lshr(piece, two), builder.and_(piece, three)
                opening = Opening(builder, record, head, blocks, builder.add(block, past))
                place = builder.add(target, scaled(builder, past, OPENED))
                opening.piece(inside, place)
                with builder.if_then(builder.icmp_signed("==", inside, three)):
                    opening.finish(place)

        def rows(halves: int, number: Any) -> None:
            at = builder.add(x, builder.mul(number, tall))
            to = builder.add(sums, scaled(builder, number, 16 * PANEL * 4))
            block_times(builder, halves, at, tall, weights, steps, to, "tdpbf16ps", fresh, meanwhile, number)

        with cgutils.for_range(builder, builder.sdiv(sixteens, two)) as loop:
            rows(2, scaled(builder, loop.index, 2))
        with builder.if_then(builder.icmp_signed("!=", builder.and_(sixteens, one), ir.Constant(_WORD, 0))):
            rows(1, builder.sub(sixteens, one))
        return context.get_dummy_value()

    return types.void(*[types.intp] * 14), generate


@njit(cache=True, error_model="numpy")
def _in_bites(
    x: int, tall: int, record: int, head: int, blocks: int, sums: int, sixteens: int, room: int, lines: int
) -> None:
    """Several tiles of rows times a panel, two blocks at a time; the next two are opened meanwhile."""
    for block in range(min(_BITE, blocks)):
        open_block(record, head, blocks, block, room + block * OPENED, 0)
    for begin in range(0, blocks, _BITE):
        odd = begin // _BITE % 2
        here, other = room + odd * _BITE * OPENED, room + (1 - odd) * _BITE * OPENED
        after = begin + _BITE
        _add_bite(x + begin * TILE, tall, here, min(_BITE, blocks - begin), sums, begin == 0, sixteens, record, head,
                  blocks, after, max(0, min(_BITE, blocks - after)), other, lines)  # fmt: skip


@njit(cache=True, error_model="numpy")
def _from_room(x: int, tall: int, room: int, blocks: int, sums: int, sixteens: int, following: int, lines: int) -> None:
    """A group of rows times a panel that has been opened as a whole; the next panel is asked for."""
    for begin in range(0, blocks, _SPAN):
        count = min(_SPAN, blocks - begin)
        word_tiles(x + begin * TILE, tall, room + begin * OPENED, count, sums, begin == 0, sixteens,
               following + begin * BLOCK, lines)  # fmt: skip


@njit(cache=True, error_model="numpy")
def tile_panels(lines: Any, packed: Any, bias: Any, out: Any, first: int, last: int, space: int) -> None:
    """As :func:`hasten.nn.product.tiles.panels`, ``lines`` being the rows in tiles, with packed (panels, stride).

    ``space``: address of room for an opened panel, at a line of memory; 0 where there is none.
    """
    rows, width = out.shape
    groups = (rows + GROUP - 1) // GROUP
    blocks = lines.shape[1]
    head = packed.shape[1] - blocks * BLOCK
    own = sums_for(rows).view(np.float32)
    past = goes_past(blocks * OPENED * len(packed), bias, out)
    tall = blocks * TILE
    own_room = room_for(_ROOM if groups == 1 or space != 0 else blocks * OPENED)
    room = space if groups > 1 and space != 0 else own_room.ctypes.data
    opened = -1
    open_tiles()
    for item in range(first, last):
        panel, start = item // groups, (item % groups) * GROUP
        count = min(GROUP, rows - start)
        sixteens = sixteens_of(count)
        record = packed.ctypes.data + panel * packed.shape[1]
        in_place = len(bias) == 0 and serves_as_sums(out, count, blocks * PAIRS)
        sums = out.view(np.float32)[start : start + count] if in_place else own
        rows_at = lines.ctypes.data + start // 16 * tall
        asked = (12 + sixteens - 1) // sixteens
        if groups > 1:
            if panel != opened:
                for block in range(blocks):
                    open_block(record, head, blocks, block, room + block * OPENED, _AHEAD)
                opened = panel
            following = record + packed.shape[1] + head
            _from_room(rows_at, tall, room, blocks, sums.ctypes.data, sixteens, following, asked if start == 0 else 0)
        elif sixteens == 1:
            _sixteen(rows_at, record, head, blocks, sums.ctypes.data, room)
        else:
            _in_bites(rows_at, tall, record, head, blocks, sums.ctypes.data, sixteens, room, asked)
        if past:
            write_past(sums, count, out, start, panel * PANEL)
        elif not in_place:
            write_sums(sums, count, bias, out, start, panel * PANEL, min(panel * PANEL + PANEL, width))
    if past:
        finish()
    close_tiles()
    own_room[0] = 0


@njit(cache=True, parallel=True, error_model="numpy")
def _multiply(x: Any, packed: Any, bias: Any, out: Any, parts: int, floats: bool) -> None:
    items = len(packed) * ((out.shape[0] + GROUP - 1) // GROUP)
    for part in prange(parts):
        panels(x, packed, bias, out, items * part // parts, items * (part + 1) // parts, floats)


def multiply(x: Any, packed: Any, bias: Any, out: Any) -> None:
    """``out = x @ W.T + bias`` with ``W`` as :func:`hasten.nn.product.twelve_bits.pack` laid it out: the bits of
    :func:`hasten.nn.product.bfloat16.multiply`."""
    _multiply(x, packed, bias, out, numba.get_num_threads(), False)


def multiply_floats(x: Any, packed: Any, bias: Any, out: Any) -> None:
    """The bits of :func:`hasten.nn.product.bfloat16.multiply_floats`."""
    _multiply(x, packed, bias, out, numba.get_num_threads(), True)


@njit(cache=True, parallel=True, error_model="numpy")
def _multiply_tiles(lines: Any, packed: Any, bias: Any, out: Any, parts: int) -> None:
    items = len(packed) * ((out.shape[0] + GROUP - 1) // GROUP)
    for part in prange(parts):
        tile_panels(lines, packed, bias, out, items * part // parts, items * (part + 1) // parts, 0)


def multiply_tiles(x: Any, packed: Any, bias: Any, out: Any) -> None:
    """The same on matrix tiles: the bits of :func:`hasten.nn.product.tiles.multiply`."""
    _multiply_tiles(arranged(x), packed, bias, out, numba.get_num_threads())
