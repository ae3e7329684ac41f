"""Attention over pages of sixteen keys on processors with matrix tiles (AMX): sixteen queries at a time share a read.

Query heads of a group, and the rows of a chunk (the guesses of a verification, a piece of a prompt), are the columns of
a tile; sixteen keys are its rows as they lie in the page. So scores come out with a lane per query, the softmax needs
no sum across lanes, and verifying several guesses costs little more than decoding one token: keys and values are read
once for all of them. Blocks of ``KEYS`` keys go through the online softmax, pieces of ``SEGMENTS`` keys are states that
are merged in order, whichever thread computed them (:mod:`lean`). Invariant: a query's result depends on that query,
its keys and their slots alone; keys that it does not see change no bit.
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
from hasten.language.kernels_paged import LOWEST, PAGE, floats, larger, shuffle
from hasten.language.kernels_tiles_codes import STEP, in_two, join_scores, pair_codes, scales_of, scores_of_codes
from hasten.language.kernels_tiles_plan import KEYS, begin_of
from hasten.nn.bfloat import FAST, float_of_bits, store
from hasten.nn.product import instructions as avx
from hasten.nn.product.blocks import LINE, scaled
from hasten.nn.product.denormals import flush_small, keep_small
from hasten.nn.product.dispatch import pointer
from hasten.nn.product.tiles import close_tiles, granted, open_tiles, run_assembly

__all__ = ["FIELDS", "code_of", "power", "takes", "transposed"]

_PAGES = KEYS // PAGE
_STEPS = KEYS // 32
_TILE = 1024
FIELDS = 19
"""Numbers of a job: see :func:`hasten.language.stack.Stack.step`."""
_WORD = ir.IntType(64)
# Plain functions call these and become kernels later; a type checker knows the intrinsics by their own parameters only.
_intrinsic: Callable[[Callable[..., Any]], Any] = intrinsic
_as_float: Any = float_of_bits
_pointer: Any = pointer
_open: Any = open_tiles
_close: Any = close_tiles
_flush: Any = flush_small
_keep: Any = keep_small
_join: Any = join_scores
_pair_codes: Any = pair_codes
_scales: Any = scales_of
_scores_of_codes: Any = scores_of_codes


def takes(page: int, width: int, coded: bool = False) -> bool:
    """Whether this kernel runs here for such pages and heads; ``coded``: pages of codes."""
    if coded and width % STEP:
        return False
    return page == PAGE and width % 32 == 0 and avx.has_bfloat16() and granted()


def _at(builder: Any, base: Any, offset: int) -> Any:
    return builder.add(base, ir.Constant(_WORD, offset))


def _line(builder: Any) -> Any:
    return ir.Constant(_WORD, LINE)


@_intrinsic
def _scores(typing: Any, pages: Any, row: Any, turned: Any, steps: Any, out: Any) -> Any:
    """Scores of ``KEYS`` keys for sixteen queries: pages (8,) addresses of (16, width) bfloat16, rows ``row`` bytes
    apart; turned (steps, 16 pairs, 16 queries, 2) bfloat16; out (KEYS, 16) float32."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pages, row, turned, steps, out = arguments
        for half in range(_PAGES // 4):
            bases = [avx.load(builder, pages, (4 * half + j) * 8, _WORD, 8) for j in range(4)]
            for j in range(4):
                run_assembly(builder, f"tilezero %tmm{j}")
            with cgutils.for_range(builder, steps) as loop:
                along = scaled(builder, loop.index, LINE)
                run_assembly(builder, "tileloadd ($0,$1,1), %tmm4",
                             builder.add(turned, scaled(builder, loop.index, _TILE)), _line(builder))  # fmt: skip
                for j in range(4):
                    side = 5 + j % 2
                    where = builder.add(bases[j], along)
                    run_assembly(builder, f"tileloadd ($0,$1,1), %tmm{side}", where, row)
                    run_assembly(builder, f"tdpbf16ps %tmm4, %tmm{side}, %tmm{j}")
            for j in range(4):
                target = _at(builder, out, (4 * half + j) * _TILE)
                run_assembly(builder, f"tilestored %tmm{j}, ($0,$1,1)", target, _line(builder))
        return context.get_dummy_value()

    return types.void(*[types.intp] * 5), generate


@_intrinsic
def _mix(typing: Any, weights: Any, values: Any, tiles: Any, out: Any, row: Any) -> Any:
    """out (16 queries, 16 * tiles) float32 = weights (steps, 16 queries, 32 keys) times values (steps, tiles, 16 pairs
    of keys, 16 columns, 2), both bfloat16; rows of ``out`` are ``row`` bytes apart."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        weights, values, tiles, out, row = arguments

        def columns(count: int, first: Any) -> None:
            for j in range(count):
                run_assembly(builder, f"tilezero %tmm{j}")
            for step in range(_STEPS):
                run_assembly(builder, "tileloadd ($0,$1,1), %tmm4", _at(builder, weights, step * _TILE), _line(builder))
                base = builder.add(scaled(builder, tiles, step), first)
                base = builder.add(values, scaled(builder, base, _TILE))
                for j in range(count):
                    side = 5 + j % 2
                    run_assembly(builder, f"tileloadd ($0,$1,1), %tmm{side}", _at(builder, base, j * _TILE),
                                 _line(builder))  # fmt: skip
                    run_assembly(builder, f"tdpbf16ps %tmm{side}, %tmm4, %tmm{j}")
            target = builder.add(out, scaled(builder, first, LINE))
            for j in range(count):
                run_assembly(builder, f"tilestored %tmm{j}, ($0,$1,1)", _at(builder, target, j * LINE), row)

        four, two = ir.Constant(_WORD, 4), ir.Constant(_WORD, 2)
        with cgutils.for_range(builder, builder.sdiv(tiles, four)) as loop:
            columns(4, scaled(builder, loop.index, 4))
        with builder.if_then(builder.icmp_signed("!=", builder.srem(tiles, four), ir.Constant(_WORD, 0))):
            columns(2, builder.sub(tiles, two))
        return context.get_dummy_value()

    return types.void(*[types.intp] * 5), generate


@_intrinsic
def _pair(typing: Any, one: Any, other: Any, tiles: Any, out: Any) -> Any:
    """Two rows of bfloat16 as pairs: sixteen words to each of ``tiles`` tiles, 1024 bytes apart."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        one, other, tiles, out = arguments
        short = ir.VectorType(ir.IntType(16), avx.LANES)
        with cgutils.for_range(builder, tiles) as loop:
            at = scaled(builder, loop.index, 2 * avx.LANES)
            low = builder.zext(avx.load(builder, one, at, short, 2), avx.INTS)
            high = builder.zext(avx.load(builder, other, at, short, 2), avx.INTS)
            high = builder.shl(high, ir.Constant(avx.INTS, [16] * avx.LANES))
            avx.store(builder, builder.or_(low, high), out, scaled(builder, loop.index, _TILE))
        return context.get_dummy_value()

    return types.void(*[types.intp] * 4), generate


@_intrinsic
def _ask(typing: Any, address: Any, count: Any) -> Any:
    """Ask for ``count`` bytes to be in the second cache: the first is full of the block that is worked on."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        address, count = arguments
        with cgutils.for_range(builder, builder.sdiv(count, _line(builder))) as loop:
            where = builder.add(address, scaled(builder, loop.index, LINE))
            kind = ir.FunctionType(ir.VoidType(), [_WORD])
            builder.call(ir.InlineAsm(kind, "prefetcht1 ($0)", "r", side_effect=True), [where])
        return context.get_dummy_value()

    return types.void(types.intp, types.intp), generate


def transposed(builder: Any, rows: list[Any]) -> list[Any]:
    """Sixteen registers of sixteen words, rows and columns exchanged."""
    lanes = range(avx.LANES)
    for span in (1, 2, 4, 8):
        low = [i if not i & span else avx.LANES + i - span for i in lanes]
        high = [i + span if not i & span else avx.LANES + i for i in lanes]
        for i in lanes:
            if not i & span:
                a, b = rows[i], rows[i + span]
                rows[i], rows[i + span] = shuffle(builder, a, b, low), shuffle(builder, a, b, high)
    return rows


@_intrinsic
def _turn(typing: Any, lines: Any, steps: Any, out: Any) -> Any:
    """Sixteen queries (16,) addresses as tiles (steps, 16 pairs, 16 queries, 2)."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        lines, steps, out = arguments
        bases = [avx.load(builder, lines, 8 * i, _WORD, 8) for i in range(avx.LANES)]
        with cgutils.for_range(builder, steps) as loop:
            along = scaled(builder, loop.index, LINE)
            rows = [avx.load(builder, base, along, avx.INTS, 2) for base in bases]
            target = builder.add(out, scaled(builder, loop.index, _TILE))
            for i, row in enumerate(transposed(builder, rows)):
                avx.store(builder, row, target, i * LINE)
        return context.get_dummy_value()

    return types.void(*[types.intp] * 3), generate


def power(builder: Any, x: Any) -> Any:
    """2**x for x up to 0: exactly 1 at 0, 0 far below, else to about 1e-6, far below the rounding to bfloat16."""
    one = ir.FunctionType(avx.FLOATS, [avx.FLOATS])
    n = builder.call(ir.InlineAsm(one, "vrndscaleps $$8, $1, $0", "=v,v"), [x])
    f = builder.fsub(x, n)
    p = floats(0.0013333558)
    for c in (0.0096181291, 0.0555041086, 0.2402265069, 0.6931471805599453, 1.0):
        p = avx.multiply_add(builder, p, f, floats(c))
    two = ir.FunctionType(avx.FLOATS, [avx.FLOATS] * 2)
    return builder.call(ir.InlineAsm(two, "vscalefps $2, $1, $0", "=v,v,v"), [p, n])


@_intrinsic
def _soften(
    typing: Any, scores: Any, first: Any, low: Any, high: Any, whole: Any, scale: Any, top: Any, mass: Any, fade: Any,
    weights: Any, own: Any,
) -> Any:  # fmt: skip
    """The online softmax of ``KEYS`` keys from key ``first`` on, a lane per query; powers of two, so ``scale`` holds
    log2(e) and is positive.

    scores (KEYS, 16) float32, overwritten; low, high (16,) int32: keys that a query sees; ``whole``: all see all;
    top, mass, fade (16,) float32; weights (KEYS / 32, 16 queries, 32 keys) bfloat16. The mass is that of the rounded
    weights. ``own``: 0, or the address of a factor (KEYS,) for each key's weights, which the mass does not see.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        scores, first, low, high, whole, scale, top, mass, fade, weights, own = arguments
        factor = avx.splat(builder, scale)
        raw: Any = cgutils.alloca_once_value(builder, floats(LOWEST))  # type: ignore[no-untyped-call]
        keys = ir.Constant(_WORD, KEYS)
        with builder.if_else(builder.icmp_signed("!=", whole, ir.Constant(_WORD, 0))) as (all_seen, some_seen):
            with all_seen, cgutils.for_range(builder, keys) as loop:
                score = avx.load(builder, scores, scaled(builder, loop.index, LINE), avx.FLOATS)
                builder.store(larger(builder)(builder.load(raw), score), raw)
            with some_seen:
                lows, highs = avx.load(builder, low, 0, avx.INTS), avx.load(builder, high, 0, avx.INTS)
                with cgutils.for_range(builder, keys) as loop:
                    at = scaled(builder, loop.index, LINE)
                    key = avx.splat(builder, builder.trunc(builder.add(first, loop.index), ir.IntType(32)))
                    inside = builder.and_(builder.icmp_signed(">=", key, lows), builder.icmp_signed("<", key, highs))
                    score = builder.select(inside, avx.load(builder, scores, at, avx.FLOATS), floats(LOWEST))
                    avx.store(builder, score, scores, at)
                    builder.store(larger(builder)(builder.load(raw), score), raw)
        before = avx.load(builder, top, 0, avx.FLOATS)
        now = larger(builder)(before, builder.fmul(builder.load(raw), factor))
        avx.store(builder, now, top, 0)
        # Above all scores of keys that are not seen, also where no key is.
        under = builder.fsub(floats(0.0), larger(builder)(now, floats(LOWEST * 1e-3)))
        faded = power(builder, builder.fadd(before, under))
        avx.store(builder, faded, fade, 0)
        total: Any = cgutils.alloca_once_value(builder, floats(0.0))  # type: ignore[no-untyped-call]
        sixteen = ir.Constant(avx.INTS, [16] * avx.LANES)
        upper = ir.Constant(avx.INTS, [-65536] * avx.LANES)
        half = ir.Constant(avx.INTS, [0x8000] * avx.LANES)

        def bits(weight: Any) -> Any:
            """A weight as the bits of a bfloat16 in the upper half of a word."""
            return builder.and_(builder.add(builder.bitcast(weight, avx.INTS), half), upper)

        def spread(scale: Any) -> None:
            """The weights of all keys; ``scale`` (index of the key) gives each its factor, or is None."""
            with cgutils.for_range(builder, ir.Constant(_WORD, _STEPS)) as loop:
                pairs = []
                for i in range(avx.LANES):
                    found = []
                    for side in range(2):
                        key = builder.add(scaled(builder, loop.index, 32), ir.Constant(_WORD, 2 * i + side))
                        score = avx.load(builder, scores, scaled(builder, key, LINE), avx.FLOATS)
                        share = power(builder, avx.multiply_add(builder, score, factor, under))
                        rounded = bits(share)
                        if scale is None:
                            share = builder.bitcast(rounded, avx.FLOATS)
                        else:
                            rounded = bits(builder.fmul(share, scale(key)))
                        found.append((rounded, share))
                    (one, first_share), (two, second_share) = found
                    both = builder.fadd(first_share, second_share)
                    builder.store(builder.fadd(builder.load(total), both), total)
                    pairs.append(builder.or_(builder.lshr(one, sixteen), two))
                target = builder.add(weights, scaled(builder, loop.index, _TILE))
                for i, row in enumerate(transposed(builder, pairs)):
                    avx.store(builder, row, target, i * LINE)

        with builder.if_else(builder.icmp_signed("==", own, ir.Constant(_WORD, 0))) as (alike, each):
            with alike:
                spread(None)
            with each:
                spread(lambda key: avx.splat(builder, avx.load(builder, own, scaled(builder, key, 4), ir.FloatType())))
        old = avx.load(builder, mass, 0, avx.FLOATS)
        avx.store(builder, avx.multiply_add(builder, old, faded, builder.load(total)), mass, 0)
        return context.get_dummy_value()

    words = types.intp
    return types.void(words, words, words, words, words, types.float32, *[words] * 5), generate


@_intrinsic
def _gather(typing: Any, sums: Any, fade: Any, added: Any, steps: Any) -> Any:
    """sums (16, 16 * steps) = fade (16,) * sums + added, all float32."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        sums, fade, added, steps = arguments
        with cgutils.for_range(builder, ir.Constant(_WORD, avx.LANES)) as lane:
            factor = avx.splat(builder, avx.load(builder, fade, scaled(builder, lane.index, 4), ir.FloatType()))
            base = builder.mul(lane.index, scaled(builder, steps, LINE))
            with cgutils.for_range(builder, steps) as loop:
                at = builder.add(base, scaled(builder, loop.index, LINE))
                more = avx.load(builder, added, at, avx.FLOATS)
                value = avx.multiply_add(builder, avx.load(builder, sums, at, avx.FLOATS), factor, more)
                avx.store(builder, value, sums, at)
        return context.get_dummy_value()

    return types.void(*[types.intp] * 4), generate


@njit(cache=True, fastmath=FAST, error_model="numpy")
def _write(sums: Any, mass: Any, lanes: int, group: int, first: int, head: int, out: Any) -> None:
    width = sums.shape[1]
    for lane in range(lanes):
        row, h = lane // group, lane % group
        inverse = np.float32(1.0) / mass[lane]
        begin = (head * group + h) * width
        for i in range(width):
            store(out[first + row], begin + i, sums[lane, i] * inverse)


def _attend(job_at: Any, begin: Any, end: Any) -> None:
    """Items ``begin`` to ``end`` of a job."""
    job = carray(_pointer(job_at), (FIELDS,), np.int64)
    rows_all, heads, width, kv_heads, columns = job[0], job[1], job[2], job[3], job[4]
    query = carray(_pointer(job[5]), (rows_all, heads, width), np.uint16)
    places = carray(_pointer(job[6]), (rows_all,), np.int32)
    tables = carray(_pointer(job[7]), (job[8], columns), np.int32)
    keys_at, values_at, window = job[9], job[10], job[11]
    out = carray(_pointer(job[12]), (rows_all, heads * width), np.uint16)
    items = carray(_pointer(job[13]), (end, 6), np.int64)
    blocks_most = job[15]
    states = carray(_pointer(job[16]), (job[14], blocks_most * PAGE, width + 2), np.float32)
    scale = _as_float(np.uint32(job[17])) * np.float32(1.4426950408889634)
    group = heads // kv_heads
    coded = job[18] != 0
    row_bytes = width + SCALE if coded else 2 * width
    page_bytes = PAGE * row_bytes
    block_bytes = kv_heads * page_bytes
    steps, tiles = width // 32, width // 16
    turned = np.empty((blocks_most, steps, 16, 32), np.uint16)
    scores = np.empty((KEYS, 16), np.float32)
    weights = np.empty((_STEPS, 16, 32), np.uint16)
    paired = np.empty((_STEPS, tiles, 16, 32), np.uint16)
    added = np.empty((16, width), np.float32)
    sums = np.empty((blocks_most * 16, width), np.float32)
    top, mass = np.empty(blocks_most * 16, np.float32), np.empty(blocks_most * 16, np.float32)
    low, high = np.zeros(blocks_most * 16, np.int32), np.zeros(blocks_most * 16, np.int32)
    fade = np.empty(16, np.float32)
    nothing = np.zeros(width, np.uint16)
    lines = np.empty(16, np.int64)
    pages = np.empty(_PAGES, np.int64)
    bytes_of = np.zeros((2, 16, width), np.int8)  # of queries, where the cache holds codes
    turned_bytes = np.empty((blocks_most if coded else 0, 2, width // STEP, 16, 16), np.int32)
    lanes_of = np.zeros((blocks_most, 16), np.float32)
    products, lows_of = np.empty((KEYS, 16), np.int32), np.empty((KEYS, 16), np.int32)
    key_scales, value_scales = np.empty(KEYS, np.float32), np.empty(KEYS, np.float32)
    before = _flush()
    _open()
    for item in range(begin, end):
        chunk, first, rows, head, segment, state = (items[item, 0], items[item, 1], items[item, 2], items[item, 3],
                                                    items[item, 4], items[item, 5])  # fmt: skip
        count = rows * group
        blocks = (count + 15) // 16
        least, shortest, highest = np.int64(1 << 60), np.int64(1 << 60), np.int64(0)
        for lane in range(blocks * 16):
            if lane < count:
                row = first + lane // group
                high[lane] = places[row] + 1
                low[lane] = max(0, places[row] - window + 1) if window > 0 else 0
                least, shortest = min(least, low[lane]), min(shortest, high[lane])
                highest = max(highest, low[lane])
                lines[lane % 16] = query.ctypes.data + (row * heads + head * group + lane % group) * width * 2
                if coded:
                    which = head * group + lane % group
                    scale_of = in_two(query[row, which], bytes_of[0, lane % 16], bytes_of[1, lane % 16])
                    lanes_of[lane // 16, lane % 16] = scale_of
            else:
                high[lane] = low[lane] = 0
                lines[lane % 16] = nothing.ctypes.data
                lanes_of[lane // 16, lane % 16] = 0
            if lane % 16 == 15:
                if coded:
                    for part in range(2):
                        for i in range(16):
                            lines[i] = bytes_of[part, i].ctypes.data
                        _turn(lines.ctypes.data, width // STEP, turned_bytes[lane // 16, part].ctypes.data)
                else:
                    _turn(lines.ctypes.data, steps, turned[lane // 16].ctypes.data)
        top[:] = np.float32(LOWEST)
        mass[:] = 0
        sums[: blocks * 16] = 0
        stop = min(places[first + rows - 1] + 1, begin_of(segment + 1))
        start = max(begin_of(segment), least // KEYS * KEYS)
        for key in range(start, stop, KEYS):
            held = min(_PAGES, (stop - key + PAGE - 1) // PAGE)
            for page in range(_PAGES):
                number = key // PAGE + min(page, held - 1)
                offset = tables[chunk, number] * block_bytes + head * page_bytes
                pages[page] = keys_at + offset
                target = paired[page // 2].ctypes.data + (page % 2) * 8 * 64
                inside = min(PAGE, stop - key - page * PAGE)
                if coded:
                    _scales(pages[page], row_bytes, inside, key_scales[page * PAGE :].ctypes.data)
                    _scales(values_at + offset, row_bytes, inside, value_scales[page * PAGE :].ctypes.data)
                    _pair_codes(values_at + offset, row_bytes, tiles, target)
                elif inside >= PAGE:
                    for i in range(8):
                        row_at = values_at + offset + 2 * i * width * 2
                        _pair(row_at, row_at + width * 2, tiles, target + i * 64)
                else:  # what lies behind the end may be anything, and nothing times anything must be nothing
                    for i in range(8):
                        row_at = values_at + offset + 2 * i * width * 2
                        one = row_at if 2 * i < inside else nothing.ctypes.data
                        other = row_at + width * 2 if 2 * i + 1 < inside else nothing.ctypes.data
                        _pair(one, other, tiles, target + i * 64)
                ahead = number + _PAGES
                if ahead * PAGE < stop:
                    following = tables[chunk, ahead] * block_bytes + head * page_bytes
                    _ask(keys_at + following, page_bytes)
                    _ask(values_at + following, page_bytes)
            whole = np.int64(key + KEYS <= shortest and key >= highest)
            for block in range(blocks):
                lanes = block * 16
                if coded:
                    _scores_of_codes(pages.ctypes.data, _PAGES, row_bytes, turned_bytes[block, 0].ctypes.data,
                                     turned_bytes[block, 1].ctypes.data, width // STEP, products.ctypes.data,
                                     lows_of.ctypes.data)  # fmt: skip
                    _join(products.ctypes.data, lows_of.ctypes.data, KEYS, lanes_of[block].ctypes.data,
                          key_scales.ctypes.data)  # fmt: skip
                else:
                    _scores(pages.ctypes.data, width * 2, turned[block].ctypes.data, steps, scores.ctypes.data)
                found = products.ctypes.data if coded else scores.ctypes.data
                _soften(found, key, low[lanes:].ctypes.data, high[lanes:].ctypes.data, whole, scale,
                        top[lanes:].ctypes.data, mass[lanes:].ctypes.data, fade.ctypes.data,
                        weights.ctypes.data, value_scales.ctypes.data if coded else 0)  # fmt: skip
                _mix(weights.ctypes.data, paired.ctypes.data, tiles, added.ctypes.data, width * 4)
                _gather(sums[lanes:].ctypes.data, fade.ctypes.data, added.ctypes.data, tiles)
        if state < 0:
            _write(sums, mass, count, group, first, head, out)
        else:
            one_state = states[state]
            for lane in range(count):
                one_state[lane, :width] = sums[lane]
                one_state[lane, width] = top[lane]
                one_state[lane, width + 1] = mass[lane]
    _close()
    _keep(before)


def _merge(job_at: Any, begin: Any, end: Any) -> None:
    """Merges ``begin`` to ``end``: states of segments, in order."""
    job = carray(_pointer(job_at), (FIELDS,), np.int64)
    rows_all, heads, width, kv_heads = job[0], job[1], job[2], job[3]
    out = carray(_pointer(job[12]), (rows_all, heads * width), np.uint16)
    states = carray(_pointer(job[16]), (job[14], job[15] * PAGE, width + 2), np.float32)
    merges = carray(_pointer(job[13]), (end, 5), np.int64)
    group = heads // kv_heads
    sums, mass = np.empty((group, width), np.float32), np.empty(group, np.float32)
    for number in range(begin, end):
        row, first, head, pieces, state = (merges[number, 0], merges[number, 1], merges[number, 2],
                                           merges[number, 3], merges[number, 4])  # fmt: skip
        for lane in range(group):
            best = np.float32(LOWEST)
            sums[lane] = 0
            total = np.float32(0.0)
            for piece in range(pieces):
                here = states[state + piece, first + lane]
                new = max(best, here[width])
                fade, share = np.exp2(best - new), np.exp2(here[width] - new)
                total = total * fade + here[width + 1] * share
                for i in range(width):
                    sums[lane, i] = sums[lane, i] * fade + here[i] * share
                best = new
            mass[lane] = total
        _write(sums, mass, group, group, row, head, out)


@lru_cache(maxsize=2)
def code_of(name: str) -> Any:
    """``attend`` or ``merge``, compiled; called through its address, so that nobody else needs the instructions."""
    leaf = {"attend": _attend, "merge": _merge}[name]
    return cfunc(types.void(types.intp, types.intp, types.intp), cache=True, error_model="numpy", fastmath=FAST)(leaf)
