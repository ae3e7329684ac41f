"""Attention of one token per row over pages of sixteen keys, on processors with matrix tiles (AMX): decoding.

One row has few query heads for a key head, so that most of a tile of queries would be empty. Here the tiles of queries
and scores are as narrow as the heads (``lanes``: the heads, filled up to a power of two), and the scores of
``16 / lanes`` pages are stored side by side: sixteen lanes of heads times pages, so that the softmax wastes none and
needs ``log2`` of the pages' number of exchanges at its end. Values are added in float32 by registers, even and odd
columns apart, for widening them then takes no shuffle. Up to ``PAGES`` pages are a block of the online softmax.
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

from hasten.language.kernels_paged import LOWEST, PAGE, floats, larger, shuffle
from hasten.language.kernels_tiles import FIELDS, power
from hasten.nn.bfloat import FAST, float_of_bits, store
from hasten.nn.product import instructions as avx
from hasten.nn.product.blocks import LINE, scaled
from hasten.nn.product.denormals import flush_small, keep_small
from hasten.nn.product.dispatch import pointer
from hasten.nn.product.tiles import close_tiles, open_narrow_tiles, run_assembly

__all__ = ["PAGES", "code_for", "first_key", "lanes_of", "write_row"]

PAGES = 16
"""Pages of a block."""
_HEADS = 4
"""Heads whose sums are held in registers while values are read."""
_COLUMNS = 64
"""Columns of values that go through the registers together."""
_WORD = ir.IntType(64)
_INT = ir.IntType(32)
# Plain functions call these and become kernels later; a type checker knows the intrinsics by their own parameters only.
_intrinsic: Callable[[Callable[..., Any]], Any] = intrinsic(prefer_literal=True)
_open: Any = open_narrow_tiles
_close: Any = close_tiles
_flush: Any = flush_small
_keep: Any = keep_small
_pointer: Any = pointer
_as_float: Any = float_of_bits


def lanes_of(group: int) -> int:
    """Lanes for ``group`` query heads of a key head: 1, 2, 4, 8 or 16; 0 where there are more heads than that."""
    return 0 if group > avx.LANES else 1 << (group - 1).bit_length()


@_intrinsic
def _score(typing: Any, width: Any, pages: Any, row: Any, queries: Any, steps: Any, out: Any) -> Any:
    """Scores of ``16 / lanes`` pages; ``width`` is the literal ``lanes``.

    pages (n,): addresses of (16, width) bfloat16, rows ``row`` bytes apart; queries (steps, 16 pairs, lanes, 2)
    bfloat16; out (16 keys, pages, lanes) float32.
    """
    lanes = width.literal_value
    side_by_side = avx.LANES // lanes

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _, pages, row, queries, steps, out = arguments
        line, narrow = ir.Constant(_WORD, LINE), ir.Constant(_WORD, 4 * lanes)
        for first in range(0, side_by_side, 4):
            count = min(4, side_by_side - first)
            bases = [avx.load(builder, pages, (first + j) * 8, _WORD, 8) for j in range(count)]
            for j in range(count):
                run_assembly(builder, f"tilezero %tmm{j}")
            with cgutils.for_range(builder, steps) as loop:
                along = scaled(builder, loop.index, LINE)
                query = builder.add(queries, scaled(builder, loop.index, LINE * lanes))
                run_assembly(builder, "tileloadd ($0,$1,1), %tmm4", query, narrow)
                for j in range(count):
                    side = 5 + j % 3
                    run_assembly(builder, f"tileloadd ($0,$1,1), %tmm{side}", builder.add(bases[j], along), row)
                    run_assembly(builder, f"tdpbf16ps %tmm4, %tmm{side}, %tmm{j}")
            for j in range(count):
                target = builder.add(out, ir.Constant(_WORD, (first + j) * 4 * lanes))
                run_assembly(builder, f"tilestored %tmm{j}, ($0,$1,1)", target, line)
        return context.get_dummy_value()

    return types.void(width, *[types.intp] * 5), generate


@_intrinsic
def _soften(
    typing: Any, width: Any, scores: Any, count: Any, low: Any, high: Any, scale: Any, top: Any, mass: Any, fade: Any
) -> Any:
    """The online softmax of ``count`` groups of pages, of whose keys ``low`` to ``high`` are seen.

    scores (count, 16 keys, 16 lanes of pages times heads) float32 become weights; ``scale`` holds log2(e); top,
    mass, fade (16,) float32, alike for all pages. ``width`` is the literal ``lanes``.
    """
    lanes = width.literal_value

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _, scores, count, low, high, scale, top, mass, fade = arguments
        factor = avx.splat(builder, scale)
        lows, highs = (avx.splat(builder, builder.trunc(x, _INT)) for x in (low, high))
        own = ir.Constant(avx.INTS, [lane // lanes * PAGE for lane in range(avx.LANES)])
        total: Any = cgutils.alloca_once_value(builder, floats(LOWEST))  # type: ignore[no-untyped-call]
        nothing = floats(0.0)

        def seen(number: Any, key: int) -> Any:
            at = builder.trunc(scaled(builder, number, PAGE * avx.LANES // lanes), _INT)
            keys = builder.add(own, avx.splat(builder, builder.add(at, ir.Constant(_INT, key))))
            return builder.and_(builder.icmp_signed(">=", keys, lows), builder.icmp_signed("<", keys, highs))

        def over_pages(vector: Any, join: Any) -> Any:
            span = lanes
            while span < avx.LANES:
                order = [(lane + span) % avx.LANES for lane in range(avx.LANES)]
                vector = join(vector, shuffle(builder, vector, vector, order))
                span *= 2
            return vector

        with cgutils.for_range(builder, count) as loop:
            at = scaled(builder, loop.index, PAGE * LINE)
            best = builder.load(total)
            for key in range(PAGE):
                score = avx.load(builder, scores, builder.add(at, ir.Constant(_WORD, key * LINE)), avx.FLOATS)
                score = builder.select(seen(loop.index, key), score, floats(LOWEST))
                best = larger(builder)(best, score)
            builder.store(best, total)
        raw = builder.fmul(over_pages(builder.load(total), larger(builder)), factor)
        before = avx.load(builder, top, 0, avx.FLOATS)
        now = larger(builder)(before, raw)
        avx.store(builder, now, top, 0)
        # Above all scores of keys that are not seen, also where no key is.
        under = builder.fsub(nothing, larger(builder)(now, floats(LOWEST * 1e-3)))
        faded = power(builder, builder.fadd(before, under))
        avx.store(builder, faded, fade, 0)
        builder.store(nothing, total)
        with cgutils.for_range(builder, count) as loop:
            at = scaled(builder, loop.index, PAGE * LINE)
            sums = builder.load(total)
            for key in range(PAGE):
                where = builder.add(at, ir.Constant(_WORD, key * LINE))
                score = avx.load(builder, scores, where, avx.FLOATS)
                share = power(builder, avx.multiply_add(builder, score, factor, under))
                share = builder.select(seen(loop.index, key), share, nothing)
                avx.store(builder, share, scores, where)
                sums = builder.fadd(sums, share)
            builder.store(sums, total)
        share = over_pages(builder.load(total), builder.fadd)
        old = avx.load(builder, mass, 0, avx.FLOATS)
        avx.store(builder, avx.multiply_add(builder, old, faded, share), mass, 0)
        return context.get_dummy_value()

    words = types.intp
    return types.void(width, *[words] * 4, types.float32, *[words] * 3), generate


def _add(builder: Any, lanes: int, heads: int, pages: Any, wanted: Any, count: Any, low: Any, high: Any, row: Any,
         weights: Any, fade: Any, sums: Any, line: Any) -> None:  # fmt: skip
    """:func:`_add_values` of ``heads`` heads; the addresses are those of the first of them."""
    side_by_side = avx.LANES // lanes
    even = [2 * i for i in range(avx.LANES)]
    odd = [2 * i + 1 for i in range(avx.LANES)]
    places, targets = [], []
    for head in range(heads):
        faded = avx.splat(builder, avx.load(builder, fade, head * 4, ir.FloatType()))
        for half in range(2):
            target = builder.add(sums, builder.add(scaled(builder, line, head), ir.Constant(_WORD, half * 2 * LINE)))
            a, b = avx.load(builder, target, 0, avx.FLOATS), avx.load(builder, target, LINE, avx.FLOATS)
            for order in (even, odd):
                place: Any = cgutils.alloca_once(builder, avx.FLOATS)  # type: ignore[no-untyped-call]
                builder.store(builder.fmul(shuffle(builder, a, b, order), faded), place)
                places.append(place)
            targets.append(target)
    upper = ir.Constant(avx.INTS, [-65536] * avx.LANES)
    sixteen = ir.Constant(avx.INTS, [16] * avx.LANES)
    zero, whole = ir.Constant(_WORD, 0), ir.Constant(_WORD, PAGE)
    with cgutils.for_range(builder, count) as loop:
        values = avx.load(builder, pages, scaled(builder, loop.index, 8), _WORD, 8)
        beside = scaled(builder, loop.index, 16)
        asked = [avx.load(builder, builder.add(wanted, ir.Constant(_WORD, 8 * i)), beside, _WORD, 8) for i in range(2)]
        number = builder.sdiv(loop.index, ir.Constant(_WORD, side_by_side))
        lane = scaled(builder, builder.srem(loop.index, ir.Constant(_WORD, side_by_side)), 4 * lanes)
        shares = builder.add(weights, builder.add(scaled(builder, number, PAGE * LINE), lane))
        first = scaled(builder, loop.index, PAGE)
        begin, end = builder.sub(low, first), builder.sub(high, first)
        begin = builder.select(builder.icmp_signed("<", begin, zero), zero, begin)
        end = builder.select(builder.icmp_signed("<", end, whole), end, whole)
        with cgutils.for_range(builder, end, start=begin) as keys:
            along = builder.mul(keys.index, row)
            here = builder.add(values, along)
            # Evenly: a burst of them would fill the buffers that everything is loaded through.
            for other in asked:
                for half in range(2):
                    avx.prefetch(builder, builder.add(other, along), half * LINE)
            vectors = []
            for half in range(2):
                both = avx.load(builder, here, half * LINE, avx.INTS, 2)
                vectors.append(builder.bitcast(builder.shl(both, sixteen), avx.FLOATS))
                vectors.append(builder.bitcast(builder.and_(both, upper), avx.FLOATS))
            at = builder.add(shares, scaled(builder, keys.index, LINE))
            for head in range(heads):
                share = avx.splat(builder, avx.load(builder, at, head * 4, ir.FloatType()))
                for i in range(4):
                    place = places[4 * head + i]
                    builder.store(avx.multiply_add(builder, share, vectors[i], builder.load(place)), place)
    low_order = [i // 2 + (i % 2) * avx.LANES for i in range(avx.LANES)]
    high_order = [i + avx.LANES // 2 for i in low_order]
    for number, target in enumerate(targets):
        a, b = (builder.load(places[2 * number + i]) for i in range(2))
        avx.store(builder, shuffle(builder, a, b, low_order), target, 0)
        avx.store(builder, shuffle(builder, a, b, high_order), target, LINE)


@_intrinsic
def _add_values(
    typing: Any, width: Any, pages: Any, wanted: Any, count: Any, low: Any, high: Any, row: Any, weights: Any,
    fade: Any, heads: Any, sums: Any, line: Any,
) -> Any:  # fmt: skip
    """sums (heads, 64 columns) = fade * sums + weights . values, over ``count`` pages.

    pages (n,): addresses of the columns of (16, width) bfloat16, of which keys ``low`` to ``high`` count; wanted
    (n, 2): those of such columns to ask for; weights as :func:`_soften` leaves them; rows of ``sums`` are
    ``line`` bytes apart. ``width`` is the literal ``lanes``.
    """
    lanes = width.literal_value

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _, pages, wanted, count, low, high, row, weights, fade, heads, sums, line = arguments
        done: Any = cgutils.alloca_once_value(builder, ir.Constant(_WORD, 0))  # type: ignore[no-untyped-call]

        def emit(held: int) -> None:
            head = builder.load(done)
            four = scaled(builder, head, 4)
            _add(builder, lanes, held, pages, wanted, count, low, high, row, builder.add(weights, four),
                builder.add(fade, four), builder.add(sums, builder.mul(head, line)), line)  # fmt: skip
            builder.store(builder.add(head, ir.Constant(_WORD, held)), done)

        if lanes >= _HEADS:
            with cgutils.for_range(builder, builder.sdiv(heads, ir.Constant(_WORD, _HEADS))):
                emit(_HEADS)
        rest = builder.srem(heads, ir.Constant(_WORD, _HEADS))
        for held in range(1, min(lanes, _HEADS - 1) + 1):
            with builder.if_then(builder.icmp_signed("==", rest, ir.Constant(_WORD, held))):
                emit(held)
        return context.get_dummy_value()

    return types.void(width, *[types.intp] * 11), generate


@njit(cache=True, error_model="numpy")
def _fill_queries(query: Any, out: Any) -> None:
    """query (heads, width / 2) uint32 -> out (width / 2, lanes); lanes without a head are zeros."""
    out[:] = 0
    for head in range(query.shape[0]):
        line = query[head]
        for pair in range(len(line)):
            out[pair, head] = line[pair]


@njit(cache=True, fastmath=FAST, error_model="numpy")
def write_row(sums: Any, mass: Any, out: Any) -> None:
    """out (heads * width,) = sums (heads, width) / mass (heads,)."""
    heads, width = sums.shape
    for head in range(heads):
        inverse, line = np.float32(1.0) / mass[head], sums[head]
        target = out[head * width : (head + 1) * width]
        for i in range(len(target)):
            store(target, i, line[i] * inverse)


@njit(cache=True)
def first_key(position: Any, window: Any) -> Any:
    """The first key that a query at ``position`` sees."""
    return max(np.int64(0), np.int64(position) - window + 1) if window > 0 else np.int64(0)


def _kernel(lanes: int) -> Any:
    side_by_side = avx.LANES // lanes
    narrow = 4 * lanes

    def attend(job_at: Any, begin: Any, end: Any) -> None:
        """Rows times key heads ``begin`` to ``end`` of a job; where its ``places`` are below 0 a row is left out."""
        job = carray(_pointer(job_at), (FIELDS,), np.int64)
        rows, heads, width, kv_heads = job[0], job[1], job[2], job[3]
        query = carray(_pointer(job[5]), (rows, heads, width // 2), np.uint32)
        places = carray(_pointer(job[6]), (rows,), np.int32)
        tables = carray(_pointer(job[7]), (job[8], job[4]), np.int32)
        keys_at, values_at, window = job[9], job[10], job[11]
        out = carray(_pointer(job[12]), (rows, heads * width), np.uint16)
        chunk_of = carray(_pointer(job[13]), (rows,), np.int32)
        scale = _as_float(np.uint32(job[17])) * np.float32(1.4426950408889634)
        group = heads // kv_heads
        page_bytes = PAGE * width * 2
        block_bytes = kv_heads * page_bytes
        queries = np.empty((kv_heads, width // 2, lanes), np.uint32)
        scores = np.empty((kv_heads, PAGES // side_by_side, PAGE, avx.LANES), np.float32)
        sums = np.empty((heads, width), np.float32)
        top, mass = np.empty((kv_heads, 16), np.float32), np.empty((kv_heads, 16), np.float32)
        fade = np.empty(16, np.float32)
        offsets, pages = np.empty(PAGES, np.int64), np.empty(PAGES, np.int64)
        following, wanted = np.empty(PAGES, np.int64), np.empty((PAGES, 2), np.int64)
        before = _flush()
        _open(narrow)
        item = begin
        while item < end:
            row, low_head = item // kv_heads, item % kv_heads
            high_head = min(kv_heads, low_head + end - item)
            item += high_head - low_head
            position: Any = places[row]
            if position < 0:
                continue
            for head in range(low_head, high_head):
                _fill_queries(query[row, head * group : (head + 1) * group], queries[head])
                top[head] = np.float32(LOWEST)
                mass[head] = 0
                sums[head * group : (head + 1) * group] = 0
            least = first_key(position, window)
            table, last = tables[chunk_of[row]], position // PAGE
            for first in range(least // PAGE, last + 1, PAGES):
                held = min(PAGES, last + 1 - first)
                groups = (held + side_by_side - 1) // side_by_side
                for page in range(groups * side_by_side):
                    offsets[page] = table[first + min(page, held - 1)] * block_bytes
                for number in range(groups):
                    for head in range(low_head, high_head):
                        here = head * page_bytes
                        for j in range(side_by_side):
                            page = number * side_by_side + j
                            pages[j] = keys_at + offsets[page] + here
                        _score(lanes, pages.ctypes.data, width * 2, queries[head].ctypes.data, width // 32,
                                  scores[head, number].ctypes.data)  # fmt: skip
                # What is read next, so that it can be asked for: the rest of this row, or the row behind it.
                start, stop, other = first + PAGES, last, table
                if start > last and item < end and places[item // kv_heads] >= 0:
                    ahead = item // kv_heads
                    stop, other = places[ahead] // PAGE, tables[chunk_of[ahead]]
                    start = first_key(places[ahead], window) // PAGE
                for page in range(held):
                    following[page] = other[min(start + page, stop)] * block_bytes
                low, high = max(0, least - first * PAGE), min(held * PAGE, position + 1 - first * PAGE)
                for head in range(low_head, high_head):
                    _soften(lanes, scores[head].ctypes.data, groups, low, high, scale, top[head].ctypes.data,
                           mass[head].ctypes.data, fade.ctypes.data)  # fmt: skip
                    for column in range(0, width, _COLUMNS):
                        for page in range(held):
                            here = head * page_bytes + 2 * column
                            pages[page] = values_at + offsets[page] + here
                            wanted[page, 0] = keys_at + following[page] + here
                            if head + 1 < high_head:
                                wanted[page, 1] = pages[page] + page_bytes
                            else:
                                wanted[page, 1] = values_at + following[page] + low_head * page_bytes + 2 * column
                        _add_values(
                            lanes, pages.ctypes.data, wanted.ctypes.data, held, low, high, width * 2,
                            scores[head].ctypes.data, fade.ctypes.data, group,
                            sums[head * group].ctypes.data + 4 * column, width * 4,
                        )  # fmt: skip
            for head in range(low_head, high_head):
                lines = slice(head * group, (head + 1) * group)
                write_row(sums[lines], mass[head], out[row, head * group * width : (head + 1) * group * width])
        _close()
        _keep(before)

    return attend


@lru_cache(maxsize=5)
def code_for(lanes: int) -> Any:
    """The compiled kernel for so many lanes, called through its address as those of :mod:`kernels_tiles`."""
    kind = types.void(types.intp, types.intp, types.intp)
    return cfunc(kind, cache=True, error_model="numpy", fastmath=FAST)(_kernel(lanes))
