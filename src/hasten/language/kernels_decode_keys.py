"""Attention of one token per row with a lane per key: caches of codes, and bfloat16 where there are no matrix tiles.

Sixteen keys of a page are exchanged in registers, words for rows, so that a word of a query meets sixteen keys at once
and no score is ever summed across lanes. Codes are multiplied as bytes: a key shifted to 0..255 with the two bytes of
:func:`hasten.language.kernels_tiles_codes.in_two`, which keep 15 bits of a query; the shift is taken off with the sum
of the query. The scale of a key multiplies its lane of scores, that of a value its lane of weights, so that nothing is
widened in memory. bfloat16 goes through float32 products: where ``vdpbf16ps`` is slow they take half its time (see
:func:`hasten.nn.product.instructions.pairs_as_floats`). Up to ``PAGES`` pages are a block of the online softmax.
Invariant as in :mod:`kernels_tiles`: a row's result depends on its query, its keys and their slots alone.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
from llvmlite import ir
from numba import cfunc, njit, types
from numba.core import cgutils
from numba.extending import intrinsic
from numba.np.numpy_support import carray

from hasten.language.kernels_codes import SCALE
from hasten.language.kernels_decode import first_key, write_row
from hasten.language.kernels_paged import LOWEST, PAGE, ask_page, floats, larger, over_lanes
from hasten.language.kernels_tiles import FIELDS, power, transposed
from hasten.language.kernels_tiles_codes import in_two, scales_of
from hasten.nn.bfloat import FAST, float_of_bits, load
from hasten.nn.product import instructions as avx
from hasten.nn.product.blocks import LINE, scaled
from hasten.nn.product.denormals import flush_small, keep_small
from hasten.nn.product.dispatch import pointer

__all__ = ["PAGES", "code_for", "takes"]

PAGES = 16
"""Pages of a block."""
_HEADS = 4
"""Heads whose sums are held in registers while values are read."""
_COLUMNS = 64
"""Columns of values that go through the registers together."""
_MOST = 16
"""Query heads of a key head at most."""
_WORD = ir.IntType(64)
_INT = ir.IntType(32)
# Plain functions call these and become kernels later; a type checker knows the intrinsics by their own parameters only.
_intrinsic: Callable[[Callable[..., Any]], Any] = intrinsic(prefer_literal=True)
_flush: Any = flush_small
_keep: Any = keep_small
_pointer: Any = pointer
_as_float: Any = float_of_bits
_scales: Any = scales_of


def takes(page: int, width: int, group: int, coded: bool) -> bool:
    """Whether this kernel runs here for pages of so many keys, heads of ``width`` numbers and ``group`` query heads of
    a key head; ``coded``: pages of codes."""
    able = avx.has_bytes() if coded else avx.has_bfloat16()
    return page == PAGE and width % _COLUMNS == 0 and 0 < group <= _MOST and able


@_intrinsic
def _score(
    typing: Any, group: Any, coded: Any, page: Any, wanted: Any, row: Any, queries: Any, steps: Any, base: Any,
    factors: Any, own: Any, out: Any,
) -> Any:  # fmt: skip
    """Scores of one page; ``group`` and ``coded`` are literals.

    page: address of sixteen rows, ``row`` bytes apart; wanted: of a page to ask for; queries: for codes (steps, 16
    quads, group, 2) words of bytes, else (steps, 16 pairs, 2, group) float32; base (group, 2) int32: what codes begin
    with; factors (group,) float32; own (16,) float32: scales of the keys, of codes; out (group, 16) float32.
    """
    heads, codes = group.literal_value, bool(coded.literal_value)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _, _, page, wanted, row, queries, steps, base, factors, own, out = arguments
        kind = avx.INTS if codes else avx.FLOATS
        count = 2 * heads if codes else heads
        sums = [cgutils.alloca_once(builder, kind) for _ in range(count)]  # type: ignore[no-untyped-call]
        for i, place in enumerate(sums):
            first = avx.splat(builder, avx.load(builder, base, 4 * i, _INT)) if codes else floats(0.0)
            builder.store(first, place)
        ask_page(builder, wanted, row)
        shift = ir.Constant(avx.INTS, [-0x7F7F7F80] * avx.LANES)  # 0x80 in each byte
        sixteen = ir.Constant(avx.INTS, [16] * avx.LANES)
        upper = ir.Constant(avx.INTS, [-65536] * avx.LANES)
        bytes_of_step = avx.LANES * 2 * heads * 4
        with cgutils.for_range(builder, steps) as loop:
            along = builder.add(page, scaled(builder, loop.index, LINE))
            lines = []
            for key in range(PAGE):
                where = builder.add(along, scaled(builder, row, key))
                line = avx.load(builder, where, 0, avx.INTS, 1)
                lines.append(builder.xor(line, shift) if codes else line)
            words = transposed(builder, lines)
            asked = builder.add(queries, scaled(builder, loop.index, bytes_of_step))
            for number, word in enumerate(words):
                at = number * 2 * heads * 4
                if codes:
                    for i, place in enumerate(sums):
                        query = avx.broadcast(builder, asked, at + 4 * i)
                        builder.store(avx.dot_bytes(builder, builder.load(place), word, query), place)
                else:
                    halves = (builder.shl(word, sixteen), builder.and_(word, upper))
                    for half, bits in enumerate(halves):
                        keys = builder.bitcast(bits, avx.FLOATS)
                        for i, place in enumerate(sums):
                            one = avx.load(builder, asked, at + (half * heads + i) * 4, ir.FloatType())
                            total = avx.multiply_add(builder, keys, avx.splat(builder, one), builder.load(place))
                            builder.store(total, place)
        much = floats(256.0)
        for head in range(heads):
            factor = avx.splat(builder, avx.load(builder, factors, 4 * head, ir.FloatType()))
            if codes:
                high, low = (builder.sitofp(builder.load(sums[2 * head + i]), avx.FLOATS) for i in range(2))
                score = avx.multiply_add(builder, high, much, low)
                score = builder.fmul(score, builder.fmul(factor, avx.load(builder, own, 0, avx.FLOATS)))
            else:
                score = builder.fmul(builder.load(sums[head]), factor)
            avx.store(builder, score, out, head * LINE)
        return context.get_dummy_value()

    return types.void(group, coded, *[types.intp] * 9), generate


@_intrinsic
def _soften(
    typing: Any, group: Any, coded: Any, scores: Any, count: Any, low: Any, high: Any, top: Any, mass: Any, fade: Any,
    own: Any,
) -> Any:  # fmt: skip
    """The online softmax of ``count`` pages, of whose keys ``low`` to ``high`` are seen; powers of two.

    scores (count, group, 16 keys) float32 become weights, times own (count, 16) for codes; top, mass, fade (group,)
    float32. ``group`` and ``coded`` are literals.
    """
    heads, codes = group.literal_value, bool(coded.literal_value)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _, _, scores, count, low, high, top, mass, fade, own = arguments
        lows, highs = (avx.splat(builder, builder.trunc(x, _INT)) for x in (low, high))
        lanes = ir.Constant(avx.INTS, list(range(avx.LANES)))
        total: Any = cgutils.alloca_once_value(builder, floats(LOWEST))  # type: ignore[no-untyped-call]
        nothing = floats(0.0)

        def seen(number: Any) -> Any:
            keys = builder.add(lanes, avx.splat(builder, builder.trunc(scaled(builder, number, PAGE), _INT)))
            return builder.and_(builder.icmp_signed(">=", keys, lows), builder.icmp_signed("<", keys, highs))

        with cgutils.for_range(builder, ir.Constant(_WORD, heads)) as each:
            line = scaled(builder, each.index, LINE)
            four = scaled(builder, each.index, 4)
            builder.store(floats(LOWEST), total)
            with cgutils.for_range(builder, count) as loop:
                at = builder.add(line, scaled(builder, loop.index, heads * LINE))
                score = builder.select(seen(loop.index), avx.load(builder, scores, at, avx.FLOATS), floats(LOWEST))
                avx.store(builder, score, scores, at)
                builder.store(larger(builder)(builder.load(total), score), total)
            best = over_lanes(builder, builder.load(total), larger(builder))
            before = avx.splat(builder, avx.load(builder, top, four, ir.FloatType()))
            now = larger(builder)(before, best)
            # Above all scores of keys that are not seen, also where no key is.
            under = builder.fsub(nothing, larger(builder)(now, floats(LOWEST * 1e-3)))
            faded = power(builder, builder.fadd(before, under))
            builder.store(nothing, total)
            with cgutils.for_range(builder, count) as loop:
                at = builder.add(line, scaled(builder, loop.index, heads * LINE))
                share = power(builder, builder.fadd(avx.load(builder, scores, at, avx.FLOATS), under))
                share = builder.select(seen(loop.index), share, nothing)
                builder.store(builder.fadd(builder.load(total), share), total)
                if codes:
                    scale = avx.load(builder, own, scaled(builder, loop.index, LINE), avx.FLOATS)
                    share = builder.fmul(share, scale)
                avx.store(builder, share, scores, at)
            share = over_lanes(builder, builder.load(total), builder.fadd)
            old = avx.splat(builder, avx.load(builder, mass, four, ir.FloatType()))
            for value, target in ((now, top), (faded, fade), (avx.multiply_add(builder, old, faded, share), mass)):
                avx.store(builder, builder.extract_element(value, ir.Constant(_INT, 0)), target, four)
        return context.get_dummy_value()

    return types.void(group, coded, *[types.intp] * 8), generate


def _columns(builder: Any, codes: bool, here: Any) -> list[Any]:
    """64 numbers of a row as four registers: in their order of codes, of bfloat16 even and odd ones apart."""
    if codes:
        kind = ir.VectorType(ir.IntType(8), avx.LANES)
        parts = [builder.sext(avx.load(builder, here, avx.LANES * i, kind, 1), avx.INTS) for i in range(4)]
        return [builder.sitofp(part, avx.FLOATS) for part in parts]
    vectors = []
    for half in range(2):
        both = avx.load(builder, here, half * LINE, avx.INTS, 2)
        low = builder.shl(both, ir.Constant(avx.INTS, [16] * avx.LANES))
        high = builder.and_(both, ir.Constant(avx.INTS, [-65536] * avx.LANES))
        vectors += [builder.bitcast(low, avx.FLOATS), builder.bitcast(high, avx.FLOATS)]
    return vectors


@_intrinsic
def _add_values(
    typing: Any, group: Any, coded: Any, pages: Any, wanted: Any, count: Any, low: Any, high: Any, row: Any,
    weights: Any, fade: Any, sums: Any, line: Any,
) -> Any:  # fmt: skip
    """sums (group, 64 columns) = fade * sums + weights . values, over ``count`` pages.

    pages (n,): addresses of the columns of sixteen rows, ``row`` bytes apart, of which keys ``low`` to ``high`` count;
    wanted (n,): those of such columns to ask for; weights as :func:`_soften` leaves them; rows of ``sums`` are ``line``
    bytes apart, their columns in the order of :func:`_columns`. ``group`` and ``coded`` are literals.
    """
    heads, codes = group.literal_value, bool(coded.literal_value)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _, _, pages, wanted, count, low, high, row, weights, fade, sums, line = arguments
        zero, whole = ir.Constant(_WORD, 0), ir.Constant(_WORD, PAGE)

        def emit(first: int, held: int) -> None:
            places, targets = [], []
            for head in range(first, first + held):
                faded = avx.splat(builder, avx.load(builder, fade, head * 4, ir.FloatType()))
                target = builder.add(sums, scaled(builder, line, head))
                targets.append(target)
                for i in range(4):
                    place: Any = cgutils.alloca_once(builder, avx.FLOATS)  # type: ignore[no-untyped-call]
                    before = avx.load(builder, target, i * LINE, avx.FLOATS)
                    builder.store(builder.fmul(before, faded), place)
                    places.append(place)
            with cgutils.for_range(builder, count) as loop:
                beside = scaled(builder, loop.index, 8)
                values = avx.load(builder, pages, beside, _WORD, 8)
                asked = avx.load(builder, wanted, beside, _WORD, 8)
                shares = builder.add(weights, scaled(builder, loop.index, heads * LINE))
                begin = builder.sub(low, scaled(builder, loop.index, PAGE))
                end = builder.sub(high, scaled(builder, loop.index, PAGE))
                begin = builder.select(builder.icmp_signed("<", begin, zero), zero, begin)
                end = builder.select(builder.icmp_signed("<", end, whole), end, whole)
                with cgutils.for_range(builder, end, start=begin) as keys:
                    along = builder.mul(keys.index, row)
                    if not first:
                        for i in range(1 if codes else 2):
                            avx.prefetch(builder, builder.add(asked, along), i * LINE)
                    vectors = _columns(builder, codes, builder.add(values, along))
                    at = builder.add(shares, scaled(builder, keys.index, 4))
                    for head in range(held):
                        share = avx.splat(builder, avx.load(builder, at, (first + head) * LINE, ir.FloatType()))
                        for i in range(4):
                            place = places[4 * head + i]
                            builder.store(avx.multiply_add(builder, share, vectors[i], builder.load(place)), place)
            for number, target in enumerate(targets):
                for i in range(4):
                    avx.store(builder, builder.load(places[4 * number + i]), target, i * LINE)

        for first in range(0, heads, _HEADS):
            emit(first, min(_HEADS, heads - first))
        return context.get_dummy_value()

    return types.void(group, coded, *[types.intp] * 10), generate


@njit(cache=True, fastmath=FAST, error_model="numpy")
def _byte_queries(query: Any, scale: Any, words: Any, base: Any, factors: Any, halves: Any) -> None:
    """query (group, width) bfloat16 -> words (steps, 16 quads, group, 2) uint32, base (group, 2) int32 and factors
    (group,) float32; halves (2, width) int8 is room."""
    quads = halves.view(np.uint32)
    for head in range(query.shape[0]):
        factors[head] = in_two(query[head], halves[0], halves[1]) * scale
        for half in range(2):
            total = np.int32(0)
            for i in range(halves.shape[1]):
                total += np.int32(halves[half, i])
            base[head, half] = -128 * total
            for quad in range(quads.shape[1]):
                words[quad // 16, quad % 16, head, half] = quads[half, quad]


@njit(cache=True, fastmath=FAST, error_model="numpy")
def _float_queries(query: Any, scale: Any, floats_of: Any, factors: Any) -> None:
    """query (group, width) bfloat16 -> floats_of (steps, 16 pairs, 2, group) float32, factors (group,)."""
    for head in range(query.shape[0]):
        factors[head] = scale
        for i in range(query.shape[1]):
            floats_of[i // 32, i // 2 % 16, i % 2, head] = load(query[head, i])


@njit(cache=True, error_model="numpy")
def _in_order(sums: Any, room: Any) -> None:
    """Bring columns that lie even and odd apart, 32 at a time, into their order."""
    for head in range(sums.shape[0]):
        line = sums[head]
        for start in range(0, len(line), 32):
            for i in range(16):
                room[2 * i] = line[start + i]
                room[2 * i + 1] = line[start + 16 + i]
            line[start : start + 32] = room


@njit(cache=True, error_model="numpy")
def _ahead(
    places: Any, tables: Any, chunk_of: Any, kv_heads: Any, window: Any, item: Any, end: Any, page: Any, count: Any,
    page_bytes: Any, out: Any,
) -> None:  # fmt: skip
    """Offsets (count,) of the pages that are read next: of this item from ``page`` on, else of the item behind it."""
    row = item // kv_heads
    if page * PAGE > places[row] and item + 1 < end and places[(item + 1) // kv_heads] >= 0:
        item += 1
        row = item // kv_heads
        page = first_key(places[row], window) // PAGE
    table, last = tables[chunk_of[row]], places[row] // PAGE
    for number in range(count):
        block = table[min(page + number, last)]
        out[number] = (np.int64(block) * kv_heads + item % kv_heads) * page_bytes


def _kernel(group: int, coded: int) -> Any:
    step = LINE if coded else LINE // 2  # numbers of a register
    rest = SCALE if coded else 0
    size = 1 if coded else 2

    def attend(job_at: Any, begin: Any, end: Any) -> None:
        """Rows times key heads ``begin`` to ``end`` of a job; where its ``places`` are below 0 a row is left out."""
        job = carray(_pointer(job_at), (FIELDS,), np.int64)
        rows, heads, width, kv_heads = job[0], job[1], job[2], job[3]
        query = carray(_pointer(job[5]), (rows, heads, width), np.uint16)
        places = carray(_pointer(job[6]), (rows,), np.int32)
        tables = carray(_pointer(job[7]), (job[8], job[4]), np.int32)
        keys_at, values_at, window = job[9], job[10], job[11]
        out = carray(_pointer(job[12]), (rows, heads * width), np.uint16)
        chunk_of = carray(_pointer(job[13]), (rows,), np.int32)
        scale = _as_float(np.uint32(job[17])) * np.float32(1.4426950408889634)
        row_bytes = width * size + rest
        page_bytes = PAGE * row_bytes
        block_bytes = kv_heads * page_bytes
        steps = width // step
        queries = np.empty((steps, 16, group, 2), np.uint32)
        float_queries = queries.view(np.float32).reshape((steps, 16, 2, group))
        base, factors = np.empty((group, 2), np.int32), np.empty(group, np.float32)
        halves, room = np.empty((2, width), np.int8), np.empty(32, np.float32)
        scores = np.empty((PAGES, group, 16), np.float32)
        own = np.ones((2, PAGES, 16), np.float32)  # scales of keys and of values
        sums = np.empty((group, width), np.float32)
        top, mass, fade = np.empty(group, np.float32), np.empty(group, np.float32), np.empty(group, np.float32)
        offsets, pages = np.empty(PAGES, np.int64), np.empty(PAGES, np.int64)
        following, wanted = np.empty(PAGES, np.int64), np.empty(PAGES, np.int64)
        before = _flush()
        for item in range(begin, end):
            row, head = item // kv_heads, item % kv_heads
            position: Any = places[row]
            if position < 0:
                continue
            lines = slice(head * group, (head + 1) * group)
            if coded:
                _byte_queries(query[row, lines], scale, queries, base, factors, halves)
            else:
                _float_queries(query[row, lines], scale, float_queries, factors)
            top[:] = np.float32(LOWEST)
            mass[:] = 0
            sums[:] = 0
            least = first_key(position, window)
            table, last = tables[chunk_of[row]], position // PAGE
            for first in range(least // PAGE, last + 1, PAGES):
                held = min(PAGES, last + 1 - first)
                here = head * page_bytes
                after = first + PAGES
                _ahead(places, tables, chunk_of, kv_heads, window, item, end, after, held, page_bytes, following)
                for page in range(held):
                    offsets[page] = table[first + page] * block_bytes + here
                low, high = max(0, least - first * PAGE), min(held * PAGE, position + 1 - first * PAGE)
                for page in range(held):
                    if coded:
                        inside = high - page * PAGE
                        _scales(keys_at + offsets[page], row_bytes, inside, own[0, page].ctypes.data)
                        _scales(values_at + offsets[page], row_bytes, inside, own[1, page].ctypes.data)
                    _score(
                        group, coded, keys_at + offsets[page], keys_at + following[page], row_bytes,
                        queries.ctypes.data, steps, base.ctypes.data, factors.ctypes.data, own[0, page].ctypes.data,
                        scores[page].ctypes.data,
                    )  # fmt: skip
                _soften(group, coded, scores.ctypes.data, held, low, high, top.ctypes.data, mass.ctypes.data,
                        fade.ctypes.data, own[1].ctypes.data)  # fmt: skip
                for column in range(0, width, _COLUMNS):
                    for page in range(held):
                        pages[page] = values_at + offsets[page] + column * size
                        wanted[page] = values_at + following[page] + column * size
                    _add_values(
                        group, coded, pages.ctypes.data, wanted.ctypes.data, held, low, high, row_bytes,
                        scores.ctypes.data, fade.ctypes.data, sums.ctypes.data + 4 * column, width * 4,
                    )  # fmt: skip
            if not coded:
                _in_order(sums, room)
            write_row(sums, mass, out[row, head * group * width : (head + 1) * group * width])
        _keep(before)

    return attend


@lru_cache(maxsize=8)
def code_for(group: int, coded: bool) -> Any:
    """The compiled kernel for so many query heads of a key head, called through its address as those of
    :mod:`kernels_tiles`."""
    kind = types.void(types.intp, types.intp, types.intp)
    return cfunc(kind, cache=True, error_model="numpy", fastmath=FAST)(_kernel(group, int(coded)))
