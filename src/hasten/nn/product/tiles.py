"""Many rows times a bfloat16 or int8 matrix on processors with matrix tiles (AMX), from the panels of a few rows.

A panel's 16 input pairs of 16 outputs are a tile as they lie, 256 bytes from pair to pair; rows of activations are
arranged, 64 bytes of 16 rows behind one another, so that loading them is one stream of memory. Blocks of 32 rows and
32 outputs keep four tiles of sums. Inputs that fill no tile go through :mod:`bfloat16`. Tiles add floats in another
order than registers do, so with bfloat16 a row's last bits depend on how many rows there are; whoever wants them not to
uses :mod:`bfloat16` alone. Sums of bytes are exact, and scaled in the order of :mod:`int8`: the same bits.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import njit, prange, types
from numba.core import cgutils
from numba.extending import intrinsic

from hasten.nn.product import instructions as avx
from hasten.nn.product import int8
from hasten.nn.product.activations import quantise_rows
from hasten.nn.product.bfloat16 import stretch, write_sums
from hasten.nn.product.blocks import GROUP, LINE, PANEL, scaled
from hasten.nn.product.past_caches import finish, goes_past, write_past

__all__ = [
    "FAR_AHEAD",
    "FEWEST",
    "TILE",
    "arrange_row",
    "ask",
    "byte_panels",
    "close_tiles",
    "granted",
    "multiply",
    "multiply_bytes",
    "open_narrow_tiles",
    "open_tiles",
    "panels",
    "room_for",
    "run_assembly",
    "sixteens_of",
    "takes_bytes",
]

FEWEST = 16
"""Rows from which tiles are used."""
_PAIRS = 16
"""Input pairs (bfloat16) or quads (int8) of a tile."""
TILE = 16 * LINE
"""Bytes of a tile."""
AHEAD = 8 * TILE
"""Bytes between a weight in use and the one asked for, where one pass over the panel does for all rows."""
FAR_AHEAD = 32 * TILE
"""The same where weights are passed several times: these are asked for into the second cache."""
_BITE = 2
"""Tiles of inputs that all rows are multiplied with before the next ones are: activations and weights of a bite lie in
the first cache, so that the way from the second is free for the stream of weights."""
_WORD = ir.IntType(64)
_SPAN = 512
_REQUEST, _TILE_DATA, _SYSCALL = 0x1023, 18, 158  # ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA, arch_prctl


@lru_cache(maxsize=1)
def granted() -> bool:
    """Whether this process may use tiles: the processor has them, and Linux gives the memory that they need."""
    if not avx.has_tiles():
        return False
    try:
        return bool(ctypes.CDLL(None, use_errno=True).syscall(_SYSCALL, _REQUEST, _TILE_DATA) == 0)
    except (OSError, AttributeError):
        return False


def run_assembly(builder: Any, text: str, *operands: Any) -> None:
    """An instruction on tiles; ``operands`` are whole numbers of 64 bits, called $0 and on.

    Nothing where there are no tiles: such a processor compiles kernels that hold it, though it never runs them.
    """
    if not avx.has_tiles():
        return
    kind = ir.FunctionType(ir.VoidType(), [o.type for o in operands])
    constraints = ",".join(["r"] * len(operands) + ["~{memory}"])
    builder.call(ir.InlineAsm(kind, text, constraints, side_effect=True), list(operands))


def _configure(builder: Any, narrow: int = LINE) -> None:
    """Eight tiles of 16 lines of 64 bytes, the first five of them ``narrow`` bytes."""
    first, whole = narrow | narrow << 16, LINE | LINE << 16
    words = [1, 0, 0, 0, first, first, narrow | LINE << 16, whole, 0, 0, 0, 0, 0x10101010, 0x10101010, 0, 0]
    place = cgutils.alloca_once(builder, avx.INTS)
    place.align = LINE
    builder.store(ir.Constant(avx.INTS, words), place).align = LINE
    run_assembly(builder, "ldtilecfg ($0)", builder.ptrtoint(place, ir.IntType(64)))


def _block(
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
        to ``sums``; see :func:`_block`. Meanwhile the weights from ``following`` on are asked for, ``lines`` of them
        after each product of two tiles."""
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
                _block(builder, halves, at, tall, weights, steps, target, dot, first, ask_for, number)

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


@intrinsic
def ask(typing: Any, address: Any, count: Any) -> Any:
    """Ask for ``count`` bytes to be in the second cache."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        address, count = arguments
        with cgutils.for_range(builder, builder.sdiv(count, ir.Constant(_WORD, LINE))) as loop:
            avx.prefetch(builder, builder.add(address, scaled(builder, loop.index, LINE)), 0, 1)
        return context.get_dummy_value()

    return types.void(types.intp, types.intp), generate


@intrinsic
def open_tiles(typing: Any) -> Any:
    """A kernel's first call: it gives this thread's tiles their shape, until :func:`close_tiles`."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _configure(builder, LINE)
        return context.get_dummy_value()

    return types.void(), generate


@intrinsic(prefer_literal=True)
def open_narrow_tiles(typing: Any, narrow: Any) -> Any:
    """:func:`open_tiles`, but the first five tiles are ``narrow`` bytes wide, a literal.

    Literals make one intrinsic of many: one made in a closure would be another in each process, and what calls it
    would never be found in the cache of compiled kernels.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _configure(builder, narrow.literal_value)
        return context.get_dummy_value()

    return types.void(narrow), generate


@intrinsic
def close_tiles(typing: Any) -> Any:
    """Leave no tiles behind: the kernel saves those in use whenever it changes threads."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        run_assembly(builder, "tilerelease")
        return context.get_dummy_value()

    return types.void(), generate


_tiles = _tiles_of("tdpbf16ps")
_byte_tiles = _tiles_of("tdpbsud")  # signed activations, unsigned weights


@njit(cache=True)
def room_for(size: int) -> Any:
    """(size,) bytes that start at a line of memory."""
    room = np.empty(size + LINE, np.uint8)
    start = -room.ctypes.data % LINE
    return room[start : start + size]


@njit(cache=True)
def sixteens_of(rows: int) -> int:
    """Tiles that hold so many rows."""
    return (rows + 15) // 16


@njit(cache=True)
def _serves_as_sums(out: Any, count: int, pairs: int) -> Any:
    """Whether ``count`` rows of ``out`` can hold the sums themselves: whole tiles that are lines of memory."""
    whole = out.shape[1] == PANEL and out.itemsize == 4 and count % 16 == 0
    return whole and out.ctypes.data % LINE == 0 and pairs % _PAIRS == 0


@njit(cache=True)
def lines_for(sixteens: int) -> int:
    """Lines to ask for after each product of two tiles, so that as many are asked for as are used."""
    return (16 + sixteens - 1) // sixteens


@njit(cache=True)
def _sums_for(rows: int) -> Any:
    """(rows, 64) int32 for a group of rows: whole tiles, whose lines are lines of memory, for one that straddles two
    takes twice the time."""
    tall = sixteens_of(min(rows, GROUP)) * 16
    return room_for(tall * PANEL * 4).view(np.int32).reshape((tall, PANEL))


@intrinsic
def _copy_apart(typing: Any, source: Any, target: Any, count: Any) -> Any:
    """``count`` pieces of 64 bytes from ``source`` on, to places that are a tile apart."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        source, target, count = arguments
        with cgutils.for_range(builder, count) as loop:
            piece = avx.load(builder, builder.add(source, scaled(builder, loop.index, LINE)), 0, avx.INTS, 1)
            avx.store(builder, piece, builder.add(target, scaled(builder, loop.index, TILE)), 0, LINE)
        return context.get_dummy_value()

    return types.void(*[types.intp] * 3), generate


@njit(cache=True, error_model="numpy")
def arrange_row(line: Any, tiles: Any, row: int) -> None:
    """Put row number ``row`` into tiles: line (in,), contiguous, of which 64 bytes go to each step; tiles (sixteens,
    steps, 16, 64 bytes) of the same type, at a line of memory. Inputs that fill no step are left out."""
    _copy_apart(line.ctypes.data, tiles[row // 16, 0, row % 16].ctypes.data, tiles.shape[1])


@njit(cache=True)
def _tiles_for(x: Any) -> Any:
    width = LINE // x.itemsize
    count, steps = sixteens_of(len(x)), x.shape[1] // width
    return room_for(count * steps * TILE).view(x.dtype).reshape((count, steps, 16, width))


@njit(cache=True, parallel=True, error_model="numpy")
def _arranged(x: Any) -> Any:
    """x (rows, in) -> (sixteens, steps, 16, 64 bytes); rows that fill a tile up hold anything."""
    tiles = _tiles_for(x)
    for row in prange(len(x)):
        arrange_row(x[row], tiles, row)
    return tiles


@njit(cache=True, error_model="numpy")
def panels(x: Any, tiles: Any, weights: Any, bias: Any, out: Any, first: int, last: int) -> None:
    """As :func:`hasten.nn.product.bfloat16.panels`, of the same rows in tiles as well (:func:`arrange_row`)."""
    rows, width = out.shape
    groups = (rows + GROUP - 1) // GROUP
    pairs = weights.shape[1]
    room = _sums_for(rows).view(np.float32)
    past = goes_past(weights.size * weights.itemsize, bias, out)
    base, x_base, x_stride = weights.ctypes.data, x.ctypes.data, x.strides[0]
    tall = tiles.shape[1] * TILE
    open_tiles()
    for item in range(first, last):
        panel, start = item // groups, (item % groups) * GROUP
        count = min(GROUP, rows - start)
        sixteens = sixteens_of(count)
        ahead = AHEAD if sixteens == 1 else FAR_AHEAD
        in_place = len(bias) == 0 and _serves_as_sums(out, count, pairs)
        sums = out.view(np.float32)[start : start + count] if in_place else room
        longest = pairs if sixteens == 1 else _SPAN
        for pair in range(0, pairs, longest):
            span = min(longest, pairs - pair)
            whole = span // _PAIRS
            there = base + (panel * pairs + pair) * PANEL * 4
            if whole > 0:
                _tiles(
                    tiles.ctypes.data + start // 16 * tall + pair // _PAIRS * TILE, tall, there, whole,
                    sums.ctypes.data, pair == 0, sixteens, there + ahead, lines_for(sixteens) if start == 0 else 0,
                )  # fmt: skip
            elif pair == 0:
                sums[:] = 0
            if whole * _PAIRS < span:
                done = whole * _PAIRS
                stretch(
                    x_base + start * x_stride + (pair + done) * 4, x_stride, there + done * PANEL * 4, span - done,
                    sums.ctypes.data, count,
                )  # fmt: skip
        if past:
            write_past(sums, count, out, start, panel * PANEL)
        elif not in_place:
            write_sums(sums, count, bias, out, start, panel * PANEL, min(panel * PANEL + PANEL, width))
    if past:
        finish()
    close_tiles()


@njit(cache=True, parallel=True, error_model="numpy")
def _multiply(x: Any, tiles: Any, weights: Any, bias: Any, out: Any, parts: int) -> None:
    items = weights.shape[0] * ((out.shape[0] + GROUP - 1) // GROUP)
    for part in prange(parts):
        panels(x, tiles, weights, bias, out, items * part // parts, items * (part + 1) // parts)


def multiply(x: Any, weights: Any, bias: Any, out: Any) -> None:
    """``out = x @ W.T + bias``; see :func:`hasten.nn.product.bfloat16.multiply`."""
    _multiply(x, _arranged(x), weights, bias, out, numba.get_num_threads())


def takes_bytes(inputs: int) -> bool:
    """Whether the inputs of a matrix of int8 fill whole tiles."""
    return inputs % LINE == 0


@njit(cache=True, fastmath={"contract"}, error_model="numpy")
def _add_scaled(totals: Any, starts: Any, scales: Any, group: int, sums: Any, following: int, share: int) -> None:
    """sums[row] += scale[row] * (start[row] + totals[row]), rounded once, as the registers do; the first group's are
    written there. Each row asks for ``share`` bytes of what lies at ``following``."""
    for row in range(len(totals)):
        ask(following + row * share, share)
        start, scale = starts[row, group], scales[row, group]
        line, target = totals[row], sums[row]
        if group == 0:
            for i in range(PANEL):
                target[i] = np.float32(np.int32(line[i] + start)) * scale + np.float32(0.0)
        else:
            for i in range(PANEL):
                target[i] = np.float32(np.int32(line[i] + start)) * scale + target[i]


@njit(cache=True, error_model="numpy")
def byte_panels(
    tiles: Any, starts: Any, scales: Any, weights: Any, weight_scales: Any, bias: Any, out: Any, first: int, last: int
) -> None:
    """As :func:`hasten.nn.product.int8.panels`, of rows in tiles (:func:`arrange_row`)."""
    rows, width = out.shape
    parts = (rows + GROUP - 1) // GROUP
    quads = weights.shape[1]
    span = int8.INPUTS // 4
    groups = (quads + span - 1) // span
    sums, totals = _sums_for(rows).view(np.float32), _sums_for(rows)
    base, tall = weights.ctypes.data, tiles.shape[1] * TILE
    open_tiles()
    for item in range(first, last):
        panel, begin = item // parts, (item % parts) * GROUP
        count = min(GROUP, rows - begin)
        sixteens = sixteens_of(count)
        ahead = AHEAD if sixteens == 1 else FAR_AHEAD
        lines = lines_for(sixteens) if begin == 0 else 0
        # Of many rows' weights a part is asked for while sums are scaled.
        sooner = lines - lines // 4 if sixteens > 1 else lines
        for group in range(groups):
            here = min(span, quads - group * span)
            there = base + (panel * quads + group * span) * PANEL * 4
            steps = here // _PAIRS
            _byte_tiles(
                tiles.ctypes.data + begin // 16 * tall + group * (span // _PAIRS) * TILE, tall, there, steps,
                totals.ctypes.data, 1, sixteens, there + ahead, sooner,
            )  # fmt: skip
            asked = sooner * 4 * sixteens * steps
            left = max(0, 4 * _PAIRS * steps - asked) if lines > 0 else 0
            following = there + ahead + asked * LINE
            _add_scaled(
                totals[:count],
                starts[begin:],
                scales[begin:],
                group,
                sums,
                following,
                (left + count - 1) // count * LINE,
            )
        low, high = panel * PANEL, min(panel * PANEL + PANEL, width)
        int8.write_scaled(sums, count, weight_scales, bias, out, begin, low, high)
    close_tiles()


@njit(cache=True, parallel=True, error_model="numpy")
def _multiply_bytes(
    tiles: Any, starts: Any, scales: Any, weights: Any, weight_scales: Any, bias: Any, out: Any, parts: int
) -> None:
    items = weights.shape[0] * ((out.shape[0] + GROUP - 1) // GROUP)
    for part in prange(parts):
        byte_panels(
            tiles, starts, scales, weights, weight_scales, bias, out, items * part // parts, items * (part + 1) // parts
        )


def multiply_bytes(x: Any, weights: tuple[Any, Any], bias: Any, out: Any) -> None:
    """As :func:`hasten.nn.product.int8.multiply`, for whole tiles of inputs: the same bits."""
    packed, weight_scales = weights
    q, starts, scales = quantise_rows(x, packed.shape[1] * 4, int8.INPUTS, int8.ZERO)
    _multiply_bytes(_arranged(q), starts, scales, packed, weight_scales, bias, out, numba.get_num_threads())
