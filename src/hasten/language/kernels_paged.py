"""Attention of one token over pages of sixteen keys, for AVX-512 with bfloat16 instructions.

Sixteen keys are one register of scores: each key's dot product gathers in sixteen lanes, and a tree of shuffles adds
the lanes of all sixteen keys together (compilers do one key at a time, which costs more than the product). Values are
added in float32, for up to four query heads at once. The online softmax is that of :mod:`kernels_cpu`, which takes what
this kernel does not: other page sizes and widths, capped scores, float32.
"""

from __future__ import annotations

import struct
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from hasten.nn.product import instructions as avx
from hasten.nn.product.blocks import LINE, in_blocks, scaled

__all__ = [
    "LOWEST",
    "PAGE",
    "ask_page",
    "attend_page",
    "exp_lanes",
    "floats",
    "larger",
    "over_lanes",
    "paged_kernel_takes",
    "shuffle",
]

PAGE = avx.LANES
"""Keys of a page."""
_HEADS = 4
"""Query heads whose sums are held in registers while values are read."""
_STEP = 32
"""bfloat16 numbers of a register."""
_INT = ir.IntType(32)
_FLOAT = ir.FloatType()
LOWEST = -1e30
"""Score of a key that is not seen."""


def paged_kernel_takes(page: int, width: int) -> bool:
    """Whether this kernel runs here for such pages and heads."""
    return page == PAGE and width % _STEP == 0 and avx.has_bfloat16()


def floats(value: float) -> Any:
    """Sixteen copies of a number."""
    single = struct.unpack("f", struct.pack("f", value))[0]
    return ir.Constant(avx.FLOATS, [ir.Constant(_FLOAT, single)] * avx.LANES)


def shuffle(builder: Any, a: Any, b: Any, lanes: list[int]) -> Any:
    """Lanes of two registers: 0 to 15 of the first, 16 to 31 of the second."""
    return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(_INT, avx.LANES), lanes))


def _lane_sums(builder: Any, vectors: list[Any]) -> Any:
    """Lane ``i`` of the result is the sum of all lanes of vector ``i``: each stage halves both the vectors and the
    lanes that belong to one of them."""
    span = avx.LANES // 2
    while span:
        low, high = [], []
        for base in range(0, avx.LANES, 2 * span):
            for side in (0, avx.LANES):
                low += [side + base + i for i in range(span)]
                high += [side + base + span + i for i in range(span)]
        half = len(vectors) // 2
        vectors = [
            builder.fadd(
                shuffle(builder, vectors[i], vectors[i + half], low),
                shuffle(builder, vectors[i], vectors[i + half], high),
            )
            for i in range(half)
        ]
        span //= 2
    return vectors[0]


def over_lanes(builder: Any, vector: Any, join: Any) -> Any:
    """Every lane of the result holds ``join`` of all lanes."""
    span = avx.LANES // 2
    while span:
        turned = shuffle(builder, vector, vector, [(i + span) % avx.LANES for i in range(avx.LANES)])
        vector = join(vector, turned)
        span //= 2
    return vector


def larger(builder: Any) -> Any:
    """The larger of two registers, lane by lane, as a function."""
    return lambda a, b: builder.select(builder.fcmp_ordered(">", a, b), a, b)


def exp_lanes(builder: Any, x: Any) -> Any:
    """``e**x`` as in :func:`hasten.nn.bfloat.exp`."""
    floor = cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(avx.FLOATS, [avx.FLOATS]), f"llvm.floor.v{avx.LANES}f32"
    )
    lowest = floats(-87.0)
    x = builder.select(builder.fcmp_ordered(">", x, lowest), x, lowest)
    y = builder.fmul(x, floats(1.4426950408889634))
    n = builder.call(floor, [builder.fadd(y, floats(0.5))])
    f = builder.fsub(y, n)
    p = floats(0.00015403530393381606)
    for c in (0.0013333558146428443, 0.009618129107628477, 0.05550410866482158, 0.24022650695910072,
              0.6931471805599453, 1.0):  # fmt: skip
        p = avx.multiply_add(builder, p, f, floats(c))
    bits = builder.add(builder.fptosi(n, avx.INTS), ir.Constant(avx.INTS, [127] * avx.LANES))
    return builder.fmul(p, builder.bitcast(builder.shl(bits, ir.Constant(avx.INTS, [23] * avx.LANES)), avx.FLOATS))


def _first(builder: Any, vector: Any) -> Any:
    return builder.extract_element(vector, ir.Constant(_INT, 0))


def _score_head(
    builder: Any, q: Any, keys: Any, row: Any, steps: Any, inside: Any, scale: Any, best: Any, total: Any, weights: Any,
    fade: Any,
) -> None:  # fmt: skip
    """One query head against the page: its softmax weights (16,), and its running maximum and sum brought forward."""
    sums = [cgutils.alloca_once(builder, avx.FLOATS) for _ in range(PAGE)]
    for place in sums:
        builder.store(floats(0.0), place)
    with cgutils.for_range(builder, steps) as loop:
        at = scaled(builder, loop.index, LINE)
        query = avx.load(builder, q, at, avx.INTS)
        for key in range(PAGE):
            where = builder.add(builder.add(keys, scaled(builder, row, key)), at)
            part = avx.load(builder, where, 0, avx.INTS)
            builder.store(avx.dot_bfloat16(builder, builder.load(sums[key]), part, query), sums[key])
    scores = builder.fmul(_lane_sums(builder, [builder.load(place) for place in sums]), avx.splat(builder, scale))
    scores = builder.select(inside, scores, floats(LOWEST))
    before = avx.splat(builder, avx.load(builder, best, 0, _FLOAT))
    top = larger(builder)(over_lanes(builder, scores, larger(builder)), before)
    faded = exp_lanes(builder, builder.fsub(before, top))
    shares = builder.select(inside, exp_lanes(builder, builder.fsub(scores, top)), floats(0.0))
    avx.store(builder, shares, weights, 0)
    avx.store(builder, _first(builder, top), best, 0)
    avx.store(builder, _first(builder, faded), fade, 0)
    share = over_lanes(builder, shares, builder.fadd)
    old = avx.splat(builder, avx.load(builder, total, 0, _FLOAT))
    avx.store(builder, _first(builder, avx.multiply_add(builder, old, faded, share)), total, 0)


def _add_values(
    builder: Any, heads: int, values: Any, row: Any, steps: Any, low: Any, high: Any, weights: Any, fade: Any,
    sums: Any, line: Any,
) -> None:  # fmt: skip
    """sums[head] = fade[head] * sums[head] + weights[head, keys] . values[keys] for ``heads`` heads."""
    with cgutils.for_range(builder, steps) as outer:
        at = scaled(builder, outer.index, LINE)
        beside = scaled(builder, outer.index, 2 * LINE)
        places, targets = [], []
        for head in range(heads):
            faded = avx.splat(builder, avx.load(builder, fade, head * 4, _FLOAT))
            for half in range(2):
                target = builder.add(builder.add(sums, scaled(builder, line, head)), beside)
                place = cgutils.alloca_once(builder, avx.FLOATS)
                builder.store(builder.fmul(avx.load(builder, target, half * LINE, avx.FLOATS), faded), place)
                places.append(place)
                targets.append((target, half * LINE))
        with cgutils.for_range(builder, high, start=low) as loop:
            where = builder.add(builder.add(values, builder.mul(loop.index, row)), at)
            pairs = [_widened(builder, where, half * LINE // 2) for half in range(2)]
            for head in range(heads):
                share = avx.splat(
                    builder,
                    avx.load(
                        builder,
                        weights,
                        builder.add(scaled(builder, loop.index, 4), ir.Constant(ir.IntType(64), head * LINE)),
                        _FLOAT,
                    ),
                )
                for half in range(2):
                    place = places[2 * head + half]
                    builder.store(avx.multiply_add(builder, share, pairs[half], builder.load(place)), place)
        for place, (target, offset) in zip(places, targets, strict=True):
            avx.store(builder, builder.load(place), target, offset)


def _widened(builder: Any, address: Any, offset: int) -> Any:
    """Sixteen bfloat16 as float32."""
    short = avx.load(builder, address, offset, ir.VectorType(ir.IntType(16), avx.LANES), 2)
    return builder.bitcast(
        builder.shl(builder.zext(short, avx.INTS), ir.Constant(avx.INTS, [16] * avx.LANES)), avx.FLOATS
    )


def ask_page(builder: Any, page: Any, row: Any) -> None:
    """Prefetch a page of sixteen rows."""
    with cgutils.for_range(builder, builder.sdiv(row, row.type(LINE // PAGE))) as loop:
        avx.prefetch(builder, page, scaled(builder, loop.index, LINE))


@intrinsic
def attend_page(
    typing: Any, q: Any, keys: Any, values: Any, ahead: Any, low: Any, high: Any, heads: Any, width: Any, scale: Any,
    best: Any, total: Any, weights: Any, fade: Any, sums: Any,
) -> Any:  # fmt: skip
    """Bring the softmax of ``heads`` query heads forward by the keys ``low`` to ``high`` of one page.

    Addresses: q (heads, width) and keys, values (16, width) bfloat16, ``ahead`` bytes from those of the next page,
    which are asked for (pages lie anywhere, so the processor cannot guess); best, total, fade (heads,), weights (heads,
    16) and sums (heads, width) float32. Sums are those of the unnormalised weighted values.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        q, keys, values, ahead, low, high, heads, width, scale, best, total, weights, fade, sums = arguments
        row, line = scaled(builder, width, 2), scaled(builder, width, 4)
        steps = builder.sdiv(width, width.type(_STEP))
        lanes = ir.Constant(avx.INTS, list(range(avx.LANES)))
        edges = [avx.splat(builder, builder.trunc(edge, _INT)) for edge in (low, high)]
        inside = builder.and_(builder.icmp_signed(">=", lanes, edges[0]), builder.icmp_signed("<", lanes, edges[1]))
        ask_page(builder, builder.add(keys, ahead), row)
        with cgutils.for_range(builder, heads) as loop:
            each = scaled(builder, loop.index, 4)
            _score_head(
                builder, builder.add(q, builder.mul(loop.index, row)), keys, row, steps, inside, scale,
                builder.add(best, each), builder.add(total, each),
                builder.add(weights, scaled(builder, loop.index, LINE)), builder.add(fade, each),
            )  # fmt: skip

        ask_page(builder, builder.add(values, ahead), row)

        def emit(count: int, head: Any) -> None:
            _add_values(
                builder, count, values, row, steps, low, high, builder.add(weights, scaled(builder, head, LINE)),
                builder.add(fade, scaled(builder, head, 4)), builder.add(sums, builder.mul(head, line)), line,
            )  # fmt: skip

        in_blocks(builder, heads, emit, _HEADS)
        return context.get_dummy_value()

    whole = types.intp
    return types.void(*[whole] * 8, types.float32, *[whole] * 5), generate
