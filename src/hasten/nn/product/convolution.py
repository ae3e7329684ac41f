"""Convolution of unsigned bytes with signed bytes, exact in int32, without copying patches.

Activations lie as (rows, columns, channels) with a border of the padding's value; then the inputs of an output pixel
are, for each row of the kernel, one contiguous line of ``kernel width * channels`` bytes, and the next output pixel's
line begins ``stride * channels`` bytes later. So a convolution is the block product of :mod:`blocks` run once per
kernel row. Sixteen registers of sums: 16 pixels of 16 outputs, 8 of 32, or 4 of 64.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from hasten.nn.product import instructions as avx
from hasten.nn.product.blocks import LINE, aligned, scaled

__all__ = ["BLOCKS", "finish_bytes", "pack", "panel_widths", "sums_16", "sums_32", "sums_64"]

BLOCKS = {16: 16, 32: 8, 64: 4}
"""Outputs of a panel -> pixels of a block."""
_BYTES = ir.VectorType(ir.IntType(8), avx.LANES)


def panel_widths(outputs: int) -> list[int]:
    """Panels that cover ``outputs`` channels, rounded up to 16: wide ones first.

    >>> panel_widths(100), panel_widths(16)
    ([64, 32, 16], [16])
    """
    rest, widths = -(-outputs // 16) * 16, []
    for width in (64, 32, 16):
        widths += [width] * (rest // width)
        rest %= width
    return widths


def pack(weight: Any) -> Any:
    """weight (out, in, kernel rows, kernel columns) int8 -> flat int8, panel after panel.

    A panel is (kernel rows, kernel columns * in / 4, outputs, 4); ``in`` is filled up to a multiple of four with 0.
    """
    out, channels, rows, columns = weight.shape
    widths = panel_widths(out)
    padded = np.zeros((sum(widths), rows, columns, -(-channels // 4) * 4), np.int8)
    padded[:out, :, :, :channels] = weight.transpose(0, 2, 3, 1)
    lines = padded.reshape(padded.shape[0], rows, -1, 4)
    packed = aligned((padded.size,), np.int8)
    at = first = 0
    for width in widths:
        panel = lines[first : first + width].transpose(1, 2, 0, 3)
        packed[at : at + panel.size] = panel.reshape(-1)
        at, first = at + panel.size, first + width
    return packed


def _emit(
    builder: Any, pixels: int, tiles: int, x: Any, step: Any, line: Any, rows: Any, quads: Any, weights: Any, sums: Any
) -> None:
    """sums[pixel, tile] = over kernel rows and quads: word of the pixel's line times the panel's registers."""
    zero = ir.Constant(avx.INTS, [0] * avx.LANES)
    totals = [cgutils.alloca_once(builder, avx.INTS) for _ in range(pixels * tiles)]
    for total in totals:
        builder.store(zero, total)
    lines = [builder.add(x, scaled(builder, step, p)) for p in range(pixels)]
    with cgutils.for_range(builder, rows) as outer:
        down = builder.mul(line, outer.index)
        panel = builder.add(weights, builder.mul(scaled(builder, quads, tiles * LINE), outer.index))
        starts = [builder.add(one, down) for one in lines]
        with cgutils.for_range(builder, quads) as inner:
            here = builder.add(panel, scaled(builder, inner.index, tiles * LINE))
            at = scaled(builder, inner.index, 4)
            held = [avx.load(builder, here, t * LINE, avx.INTS, LINE) for t in range(tiles)]
            for p, start in enumerate(starts):
                word = avx.broadcast(builder, start, at)
                for t in range(tiles):
                    total = totals[p * tiles + t]
                    builder.store(avx.dot_bytes(builder, builder.load(total), word, held[t]), total)
    for index, total in enumerate(totals):
        avx.store(builder, builder.load(total), sums, index * LINE)


def _halving(builder: Any, count: Any, emit: Callable[[int, Any], None], most: int) -> None:
    """``emit(pixels, first)`` for blocks of ``most``, then for the rest by powers of two: few blocks are compiled."""
    word = count.type
    full = builder.sdiv(count, ir.Constant(word, most))
    with cgutils.for_range(builder, full) as loop:
        emit(most, scaled(builder, loop.index, most))
    size = most // 2
    while size:
        wanted = builder.icmp_signed("!=", builder.and_(count, ir.Constant(word, size)), ir.Constant(word, 0))
        with builder.if_then(wanted):
            emit(size, builder.and_(count, ir.Constant(word, -2 * size)))
        size //= 2


def _sums_of(outputs: int) -> Any:
    tiles = outputs // avx.LANES

    @intrinsic
    def sums_of(
        typing: Any, x: Any, step: Any, line: Any, rows: Any, quads: Any, weights: Any, sums: Any, count: Any
    ) -> Any:
        """``count`` pixels from address ``x``, at most those of a block, times one panel -> ``sums`` (pixels, outputs).

        ``step``: bytes between pixels; ``line``: bytes between rows; ``quads``: words of a line.
        """

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            x, step, line, rows, quads, weights, sums, count = arguments

            def emit(pixels: int, first: Any) -> None:
                where = builder.add(x, builder.mul(first, step))
                target = builder.add(sums, scaled(builder, first, outputs * 4))
                _emit(builder, pixels, tiles, where, step, line, rows, quads, weights, target)

            _halving(builder, count, emit, BLOCKS[outputs])
            return context.get_dummy_value()

        return types.void(*[types.intp] * 8), generate

    return sums_of


sums_16, sums_32, sums_64 = _sums_of(16), _sums_of(32), _sums_of(64)


def _call(builder: Any, name: str, value: Any) -> Any:
    kind = ir.FunctionType(avx.FLOATS, [avx.FLOATS])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, f"llvm.{name}.v{avx.LANES}f32"), [value])


def _bytes_of(builder: Any, value: Any, inverse: Any, zero: Any, low: Any, high: Any) -> Any:
    """Sixteen real numbers -> bytes: scaled, rounded to even, moved, clamped."""
    value = builder.fadd(_call(builder, "rint", builder.fmul(value, inverse)), zero)
    value = builder.select(builder.fcmp_ordered("<", value, low), low, value)
    value = builder.select(builder.fcmp_ordered(">", value, high), high, value)
    return builder.trunc(builder.fptosi(value, avx.INTS), _BYTES)


@intrinsic
def finish_bytes(
    typing: Any, sums: Any, tiles: Any, pixels: Any, scales: Any, biases: Any, out: Any, step: Any, inverse: Any,
    zero: Any, low: Any, high: Any, other: Any, other_step: Any, other_scale: Any, other_zero: Any,
) -> Any:  # fmt: skip
    """Sums of a line of pixels -> bytes: ``sum * scale + bias + other_scale * (other - other_zero)``, then as above.

    ``sums``, ``scales``, ``biases``, ``out`` and ``other`` are addresses, the last 0 where nothing is added; ``step``
    and ``other_step`` the bytes between pixels; ``tiles`` registers of 16 outputs for each pixel.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        sums, tiles, pixels, scales, biases, out, step, inverse, zero, low, high = arguments[:11]
        other, other_step, other_scale, other_zero = arguments[11:]
        flat = [avx.splat(builder, x) for x in (inverse, zero, low, high, other_scale, other_zero)]
        held = scaled(builder, tiles, LINE)

        def emit(with_other: bool) -> None:
            with cgutils.for_range(builder, tiles) as tile:
                beside = scaled(builder, tile.index, LINE)
                channel = scaled(builder, tile.index, avx.LANES)
                scale = avx.load(builder, builder.add(scales, beside), 0, avx.FLOATS)
                bias = avx.load(builder, builder.add(biases, beside), 0, avx.FLOATS)
                with cgutils.for_range(builder, pixels) as pixel:
                    place = builder.add(builder.add(sums, beside), builder.mul(held, pixel.index))
                    value = builder.sitofp(avx.load(builder, place, 0, avx.INTS), avx.FLOATS)
                    value = builder.fadd(builder.fmul(value, scale), bias)
                    if with_other:
                        where = builder.add(builder.add(other, channel), builder.mul(other_step, pixel.index))
                        some = builder.uitofp(avx.load(builder, where, 0, _BYTES, 1), avx.FLOATS)
                        value = builder.fadd(value, builder.fmul(builder.fsub(some, flat[5]), flat[4]))
                    target = builder.add(builder.add(out, channel), builder.mul(step, pixel.index))
                    avx.store(builder, _bytes_of(builder, value, *flat[:4]), target, 0, 1)

        with builder.if_else(builder.icmp_signed("!=", other, other.type(0))) as (then, otherwise):
            with then:
                emit(True)
            with otherwise:
                emit(False)
        return context.get_dummy_value()

    return types.void(
        *[types.intp] * 7, *[types.float32] * 4, types.intp, types.intp, types.float32, types.float32
    ), generate
