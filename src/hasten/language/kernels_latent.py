"""Attention of one token per row over pages of latents, on processors with matrix tiles (AMX): decoding.

All heads read one short row per token, which is key and value at once, so the heads fill the lanes of a tile that
:mod:`kernels_decode` fills with those of one group, and values are read from pages that the scores have just brought
into the first cache. Segments of the keys (:mod:`kernels_tiles_plan`) are items that threads share; rows with more than
one have a state for each, and states are merged in order. Scores in tiles, softmax in registers, and values in float32.
Invariant: a row's result depends on its query, its keys and their slots alone.
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

from hasten.language.kernels_decode import PAGES, _fill_queries, _score, _soften, lanes_of
from hasten.language.kernels_paged import LOWEST, PAGE, shuffle
from hasten.language.kernels_tiles_plan import begin_of, segment_of
from hasten.nn.bfloat import FAST, float_of_bits, store
from hasten.nn.product import instructions as avx
from hasten.nn.product.blocks import LINE, scaled
from hasten.nn.product.denormals import flush_small, keep_small
from hasten.nn.product.dispatch import pointer
from hasten.nn.product.tiles import close_tiles, open_narrow_tiles

__all__ = ["FIELDS", "STEP", "code_for", "lanes_for", "merge", "plan_rows"]

FIELDS = 20
"""Numbers of a job: rows, heads, width of a key, width of a value, first column of values that is summed, first column
and number of those that are wanted, columns of the tables; addresses of queries, tables, keys, values, results, items
and states; number of states, number of tables, the window, the bits of the scale, the address of each row's chunk."""
STEP = 32
"""Numbers of a step along a row: keys and values are that wide or several times."""
_HEADS = 4
"""Heads whose sums are held in registers while values are read."""
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


def lanes_for(heads: int) -> int:
    """Lanes for ``heads`` query heads of one latent; more than sixteen heads go in blocks of sixteen."""
    return lanes_of(min(heads, avx.LANES))


def _add(
    builder: Any, lanes: int, heads: int, steps: int, pages: Any, following: Any, asked: Any, more: Any, count: Any,
    low: Any, high: Any, row: Any, weights: Any, fade: Any, sums: Any, line: Any,
) -> None:  # fmt: skip
    """:func:`_add_latents` of ``heads`` heads and 32 ``steps`` columns; the addresses are those of the first."""
    side_by_side = avx.LANES // lanes
    even = [2 * i for i in range(avx.LANES)]
    odd = [2 * i + 1 for i in range(avx.LANES)]
    places, targets = [], []
    for head in range(heads):
        faded = avx.splat(builder, avx.load(builder, fade, head * 4, ir.FloatType()))
        for step in range(steps):
            target = builder.add(sums, builder.add(scaled(builder, line, head), ir.Constant(_WORD, step * 2 * LINE)))
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
        others = [avx.load(builder, builder.add(following, beside), 8 * i, _WORD, 8) for i in range(2)]
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
            for other, lines in zip(others, (asked, more), strict=True):
                with cgutils.for_range(builder, lines) as inner:
                    avx.prefetch(builder, builder.add(other, along), scaled(builder, inner.index, LINE))
            vectors = []
            for step in range(steps):
                both = avx.load(builder, here, step * LINE, avx.INTS, 2)
                vectors.append(builder.bitcast(builder.shl(both, sixteen), avx.FLOATS))
                vectors.append(builder.bitcast(builder.and_(both, upper), avx.FLOATS))
            own = builder.add(shares, scaled(builder, keys.index, LINE))
            for head in range(heads):
                share = avx.splat(builder, avx.load(builder, own, head * 4, ir.FloatType()))
                for i, vector in enumerate(vectors):
                    place = places[len(vectors) * head + i]
                    builder.store(avx.multiply_add(builder, share, vector, builder.load(place)), place)
    low_order = [i // 2 + (i % 2) * avx.LANES for i in range(avx.LANES)]
    high_order = [i + avx.LANES // 2 for i in low_order]
    for number, target in enumerate(targets):
        a, b = (builder.load(places[2 * number + i]) for i in range(2))
        avx.store(builder, shuffle(builder, a, b, low_order), target, 0)
        avx.store(builder, shuffle(builder, a, b, high_order), target, LINE)


@_intrinsic
def _add_latents(
    typing: Any, width: Any, steps: Any, pages: Any, following: Any, asked: Any, more: Any, count: Any, low: Any,
    high: Any, row: Any, weights: Any, fade: Any, heads: Any, sums: Any, line: Any,
) -> Any:  # fmt: skip
    """sums (heads, 32 * steps columns) = fade * sums + weights . values, over ``count`` pages.

    pages (n,): addresses of the columns of (16, width) bfloat16, of which keys ``low`` to ``high`` count; following
    (n, 2): pages of keys and of values of which ``asked`` and ``more`` lines of each row are asked for; weights as
    :func:`kernels_decode._soften` leaves them; rows of ``sums`` are ``line`` bytes apart. ``width`` is the literal
    number of lanes, ``steps`` a literal too.
    """
    lanes, wide = width.literal_value, steps.literal_value

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _, _, pages, following, asked, more, count, low, high, row, weights, fade, heads, sums, line = arguments
        done: Any = cgutils.alloca_once_value(builder, ir.Constant(_WORD, 0))  # type: ignore[no-untyped-call]

        def emit(held: int) -> None:
            head = builder.load(done)
            four = scaled(builder, head, 4)
            _add(builder, lanes, held, wide, pages, following, asked, more, count, low, high, row,
                 builder.add(weights, four), builder.add(fade, four), builder.add(sums, builder.mul(head, line)),
                 line)  # fmt: skip
            builder.store(builder.add(head, ir.Constant(_WORD, held)), done)

        if lanes >= _HEADS:
            with cgutils.for_range(builder, builder.sdiv(heads, ir.Constant(_WORD, _HEADS))):
                emit(_HEADS)
        rest = builder.srem(heads, ir.Constant(_WORD, _HEADS))
        for held in range(1, min(lanes, _HEADS - 1) + 1):
            with builder.if_then(builder.icmp_signed("==", rest, ir.Constant(_WORD, held))):
                emit(held)
        return context.get_dummy_value()

    return types.void(width, steps, *[types.intp] * 13), generate


@njit(cache=True, error_model="numpy")
def _counts(starts: Any, places: Any, most: int, room: int) -> Any:
    """Items, merges and waves that :func:`plan_rows` makes."""
    items = merges = state = 0
    waves = 1
    for chunk in range(len(starts) - 1):
        if starts[chunk + 1] - starts[chunk] > most:
            continue
        for row in range(starts[chunk], starts[chunk + 1]):
            pieces = segment_of(np.int64(places[row])) + 1
            items += pieces
            if pieces > 1:
                merges += 1
                if state > 0 and state + pieces > room:
                    waves, state = waves + 1, 0
                state += pieces
    return items, merges, waves


@njit(cache=True, error_model="numpy")
def plan_rows(starts: Any, places: Any, most: int, threads: int, room: int) -> Any:
    """Items (n, 4) of row, segment, last slot that it sees and state (-1: it is the whole answer), merges (m, 3) of
    row, first state and states, cuts of the items (waves, threads + 1), ends of each wave's merges (waves + 1,), and
    the states of a wave.

    Rows of chunks of more than ``most`` are left out. places (rows,): the last slot that each row sees. Waves come one
    after the other and use the same states, of which there are ``room`` (or those of one row).
    """
    count, joins, waves = _counts(starts, places, most, room)
    items, merges = np.empty((count, 4), np.int64), np.empty((joins, 3), np.int64)
    cost = np.empty(count, np.int64)
    begins, ends = np.zeros(waves + 1, np.int64), np.zeros(waves + 1, np.int64)
    at = joined = state = wave = states = 0
    for chunk in range(len(starts) - 1):
        if starts[chunk + 1] - starts[chunk] > most:
            continue
        for row in range(np.int64(starts[chunk]), np.int64(starts[chunk + 1])):
            last = np.int64(places[row])
            pieces = segment_of(last) + 1
            if pieces > 1:
                if state > 0 and state + pieces > room:
                    wave, state = wave + 1, 0
                    begins[wave], ends[wave] = at, joined
                merges[joined] = (row, state, pieces)
                joined += 1
            for piece in range(pieces):
                items[at] = (row, piece, last, state if pieces > 1 else -1)
                cost[at] = min(last + 1, begin_of(piece + 1)) - begin_of(piece) + PAGE
                at += 1
                if pieces > 1:
                    state += 1
            states = max(states, state)
    begins[waves], ends[waves] = count, joins
    cuts = np.zeros((waves, threads + 1), np.int64)
    for wave in range(waves):
        first, final = begins[wave], begins[wave + 1]
        total, done, part = cost[first:final].sum(), 0, 1
        cuts[wave, 0] = first
        for item in range(first, final):
            while part < threads and 2 * done + cost[item] > 2 * total * part // threads:
                cuts[wave, part] = item
                part += 1
            done += cost[item]
        cuts[wave, part:] = final
    return items, merges, cuts, ends, states


@njit(cache=True, fastmath=FAST, error_model="numpy")
def _write(sums: Any, mass: Any, shift: int, rank: int, out: Any) -> None:
    """out (heads * rank,) = sums (heads, columns) / mass (heads,), from column ``shift`` on."""
    for head in range(sums.shape[0]):
        inverse, line = np.float32(1.0) / mass[head], sums[head, shift : shift + rank]
        target = out[head * rank : (head + 1) * rank]
        for i in range(len(target)):
            store(target, i, line[i] * inverse)


@njit(cache=True, fastmath=FAST, error_model="numpy")
def merge(merges: Any, states: Any, shift: int, rank: int, out: Any, begin: int, end: int) -> None:
    """States of segments (count, heads, columns + 2), in order, into out (rows, heads * rank)."""
    heads, width = states.shape[1], states.shape[2] - 2
    sums, mass = np.empty((heads, width), np.float32), np.empty(heads, np.float32)
    for number in range(begin, end):
        row, first, pieces = merges[number, 0], merges[number, 1], merges[number, 2]
        sums[:] = 0
        for head in range(heads):
            best, total, line = np.float32(LOWEST), np.float32(0.0), sums[head]
            for piece in range(pieces):
                here = states[first + piece, head]
                top = max(best, here[width])
                fade, share = np.exp2(best - top), np.exp2(here[width] - top)
                total = total * fade + here[width + 1] * share
                for i in range(width):
                    line[i] = line[i] * fade + here[i] * share
                best = top
            mass[head] = total
        _write(sums, mass, shift, rank, out[row])


def _kernel(lanes: int) -> Any:
    side_by_side = avx.LANES // lanes
    narrow = 4 * lanes

    def attend(job_at: Any, begin: Any, end: Any) -> None:
        """Items ``begin`` to ``end`` of a job."""
        job = carray(_pointer(job_at), (FIELDS,), np.int64)
        rows, heads, width, value_width, column, wanted, rank = job[0], job[1], job[2], job[3], job[4], job[5], job[6]
        query = carray(_pointer(job[8]), (rows, heads, width // 2), np.uint32)
        tables = carray(_pointer(job[9]), (job[16], job[7]), np.int32)
        keys_at, values_at, window = job[10], job[11], job[17]
        out = carray(_pointer(job[12]), (rows, heads * rank), np.uint16)
        items = carray(_pointer(job[13]), (end, 4), np.int64)
        columns = value_width - column
        states = carray(_pointer(job[14]), (job[15], heads, columns + 2), np.float32)
        scale = _as_float(np.uint32(job[18])) * np.float32(1.4426950408889634)
        chunk_of = carray(_pointer(job[19]), (rows,), np.int32)
        row_bytes, value_bytes = 2 * width, 2 * value_width
        blocks = (heads + avx.LANES - 1) // avx.LANES
        queries = np.empty((blocks, width // 2, lanes), np.uint32)
        scores = np.empty((PAGES // side_by_side, PAGE, avx.LANES), np.float32)
        sums = np.empty((heads, columns), np.float32)
        top, mass = np.empty(blocks * avx.LANES, np.float32), np.empty(blocks * avx.LANES, np.float32)
        fade = np.empty(avx.LANES, np.float32)
        pages, value_pages = np.empty(PAGES, np.int64), np.empty(PAGES, np.int64)
        following = np.empty((PAGES, 2), np.int64)
        lines, others = row_bytes // LINE, (value_bytes // LINE if values_at != keys_at else 0)
        before = _flush()
        _open(narrow)
        for item in range(begin, end):
            row, segment, last, state = items[item, 0], items[item, 1], items[item, 2], items[item, 3]
            for block in range(blocks):
                _fill_queries(query[row, block * avx.LANES : min(heads, (block + 1) * avx.LANES)], queries[block])
            top[:] = np.float32(LOWEST)
            mass[:] = 0
            sums[:] = 0
            least = max(np.int64(0), last - window + 1) if window > 0 else np.int64(0)
            start, stop = max(begin_of(segment), least), min(last + 1, begin_of(segment + 1))
            table, final = tables[chunk_of[row]], (stop - 1) // PAGE
            for first in range(start // PAGE, final + 1, PAGES):
                held = min(PAGES, final + 1 - first)
                groups = (held + side_by_side - 1) // side_by_side
                for page in range(groups * side_by_side):
                    block_at = np.int64(table[first + min(page, held - 1)])
                    pages[page] = keys_at + block_at * PAGE * row_bytes
                    value_pages[page] = values_at + block_at * PAGE * value_bytes + 2 * column
                for page in range(held):
                    block_at = np.int64(table[min(first + PAGES + page, last // PAGE)])
                    following[page, 0] = keys_at + block_at * PAGE * row_bytes
                    following[page, 1] = values_at + block_at * PAGE * value_bytes
                low, high = max(0, start - first * PAGE), min(held * PAGE, stop - first * PAGE)
                for block in range(blocks):
                    for number in range(groups):
                        _score(lanes, pages[number * side_by_side :].ctypes.data, row_bytes,
                               queries[block].ctypes.data, width // STEP, scores[number].ctypes.data)  # fmt: skip
                    at = block * avx.LANES
                    some = min(heads - at, avx.LANES)
                    _soften(lanes, scores.ctypes.data, groups, low, high, scale, top[at:].ctypes.data,
                            mass[at:].ctypes.data, fade.ctypes.data)  # fmt: skip
                    place = np.int64(0)
                    while place < columns:
                        asking = place == 0 and block == 0
                        asked, more = (lines, others) if asking else (0, 0)
                        target = sums[at].ctypes.data + 4 * place
                        if place + 2 * STEP <= columns:
                            _add_latents(lanes, 2, value_pages.ctypes.data, following.ctypes.data, asked, more, held,
                                         low, high, value_bytes, scores.ctypes.data, fade.ctypes.data, some, target,
                                         4 * columns)  # fmt: skip
                            taken = 2 * STEP
                        else:
                            _add_latents(lanes, 1, value_pages.ctypes.data, following.ctypes.data, asked, more, held,
                                         low, high, value_bytes, scores.ctypes.data, fade.ctypes.data, some, target,
                                         4 * columns)  # fmt: skip
                            taken = STEP
                        place += taken
                        for page in range(held):
                            value_pages[page] += 2 * taken
                    for page in range(held):
                        value_pages[page] -= 2 * columns
            if state < 0:
                _write(sums, mass, wanted - column, rank, out[row])
            else:
                for head in range(heads):
                    here = states[state, head]
                    here[:columns] = sums[head]
                    here[columns], here[columns + 1] = top[head], mass[head]
        _close()
        _keep(before)

    return attend


@lru_cache(maxsize=5)
def code_for(lanes: int) -> Any:
    """The compiled kernel for so many lanes, called through its address as those of :mod:`kernels_tiles`."""
    kind = types.void(types.intp, types.intp, types.intp)
    return cfunc(kind, cache=True, error_model="numpy", fastmath=FAST)(_kernel(lanes))
