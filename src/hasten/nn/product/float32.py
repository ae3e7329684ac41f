"""A few rows times a float32 matrix, in the layout of the kernels beside it: nothing is rounded but sums.

The matrix (out, in) lies in panels of 64 outputs; a panel holds, input by input, the weights of its 64 outputs side by
side. An output is summed over the inputs in their order, each product rounded once with its sum, so a row's bits depend
neither on its neighbours nor on how rows are cut. Of a panel that is not full only the registers that hold outputs are
multiplied. Any processor with registers of 512 bits will do.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from hasten.nn.product import instructions as avx
from hasten.nn.product.blocks import LINE, PANEL, ROWS, TILES, accumulate, aligned, asks, in_blocks, scaled
from hasten.nn.product.instructions import LANES

__all__ = ["multiply_rows", "pack", "unpack"]

_AHEAD = 64 * LINE
"""Bytes between a weight in use and the one asked for."""
_NARROW_ROWS = 8
"""Rows of a block whose sums are one or two registers: as many sums as hide how long one takes."""


def _dot(builder: Any, total: Any, weights: Any, word: Any) -> Any:
    """``total + weights * word`` of sixteen float32 that come as the bits of whole numbers."""
    return avx.multiply_add(builder, builder.bitcast(weights, avx.FLOATS), builder.bitcast(word, avx.FLOATS), total)


@intrinsic
def _panel(typing: Any, x: Any, x_stride: Any, weights: Any, inputs: Any, sums: Any, count: Any) -> Any:
    """``count`` rows at address ``x``, ``x_stride`` bytes apart, times a panel: sums (count, 64) float32."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        x, x_stride, weights, inputs, sums, count = arguments
        ask = asks(builder, weights, _AHEAD)

        def emit(rows: int, row: Any) -> None:
            lines, totals = _begun(builder, x, x_stride, row, rows, TILES)
            accumulate(builder, lines, weights, inputs, totals, ask, _dot)
            _written(builder, totals, sums, row, TILES)

        in_blocks(builder, count, emit)
        return context.get_dummy_value()

    return types.void(*[types.intp] * 6), generate


def _begun(builder: Any, x: Any, x_stride: Any, row: Any, rows: int, tiles: int) -> tuple[list[Any], list[Any]]:
    """Addresses of ``rows`` rows from number ``row`` on, and their sums, which are zero."""
    here = builder.add(x, builder.mul(row, x_stride))
    totals = [cgutils.alloca_once(builder, avx.FLOATS) for _ in range(rows * tiles)]
    for total in totals:
        builder.store(avx.FLOATS(None), total)
    return [builder.add(here, scaled(builder, x_stride, r)) for r in range(rows)], totals


def _written(builder: Any, totals: list[Any], sums: Any, row: Any, tiles: int) -> None:
    """Sums to their rows, 64 numbers apart."""
    target = builder.add(sums, scaled(builder, row, PANEL * 4))
    for place, total in enumerate(totals):
        at = place // tiles * TILES + place % tiles
        avx.store(builder, builder.load(total), target, at * LINE)


def _summed(builder: Any, lines: list[Any], weights: Any, inputs: Any, totals: list[Any], tiles: int, ask: Any) -> None:
    """Add to ``totals`` (row by row, ``tiles`` for each) over all inputs; ``ask`` asks for later weights."""
    with cgutils.for_range(builder, inputs) as loop:
        at = builder.add(weights, scaled(builder, loop.index, TILES * LINE))
        if ask is not None:
            ask(loop.index)
        some = [avx.load(builder, at, t * LINE, avx.INTS, LINE) for t in range(tiles)]
        for r, line in enumerate(lines):
            word = avx.broadcast(builder, line, scaled(builder, loop.index, 4))
            for total, weight in zip(totals[r * tiles : (r + 1) * tiles], some, strict=True):
                builder.store(_dot(builder, builder.load(total), weight, word), total)


def _narrow(tiles: int) -> Any:
    """:func:`_panel` for one whose first ``tiles`` registers alone hold outputs."""

    @intrinsic
    def panel(typing: Any, x: Any, x_stride: Any, weights: Any, inputs: Any, sums: Any, count: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            x, x_stride, weights, inputs, sums, count = arguments

            def emit(rows: int, row: Any) -> None:
                lines, totals = _begun(builder, x, x_stride, row, rows, tiles)
                _summed(builder, lines, weights, inputs, totals, tiles, None)
                _written(builder, totals, sums, row, tiles)

            in_blocks(builder, count, emit, _NARROW_ROWS)
            return context.get_dummy_value()

        return types.void(*[types.intp] * 6), generate

    return panel


_one, _two = _narrow(1), _narrow(2)


def _whole(tiles: int) -> Any:
    """A panel of ``16 tiles`` outputs, written with their bias where they belong: out at address ``out``, ``stride``
    bytes between its rows; ``bias``: address, or 0."""
    most = ROWS if tiles > 2 else _NARROW_ROWS

    @intrinsic
    def panel(
        typing: Any, x: Any, x_stride: Any, weights: Any, inputs: Any, bias: Any, out: Any, stride: Any, count: Any
    ) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            x, x_stride, weights, inputs, bias, out, stride, count = arguments
            ask = asks(builder, weights, _AHEAD) if tiles == TILES else None
            shifted = builder.icmp_unsigned("!=", bias, bias.type(0))

            def emit(rows: int, row: Any) -> None:
                lines, totals = _begun(builder, x, x_stride, row, rows, tiles)
                _summed(builder, lines, weights, inputs, totals, tiles, ask)
                with builder.if_then(shifted):
                    for t in range(tiles):
                        line = avx.load(builder, bias, t * LINE, avx.FLOATS)
                        for total in totals[t::tiles]:
                            builder.store(builder.fadd(builder.load(total), line), total)
                target = builder.add(out, builder.mul(row, stride))
                for r in range(rows):
                    place = builder.add(target, scaled(builder, stride, r))
                    for t, total in enumerate(totals[r * tiles : (r + 1) * tiles]):
                        avx.store(builder, builder.load(total), place, t * LINE)

            in_blocks(builder, count, emit, most)
            return context.get_dummy_value()

        return types.void(*[types.intp] * 8), generate

    return panel


_whole_1, _whole_2, _whole_3, _whole_4 = (_whole(tiles) for tiles in range(1, 5))


@njit(cache=True, error_model="numpy")
def multiply_rows(x: Any, stride: Any, rows: Any, inputs: Any, weights: Any, bias: Any, sums: Any, out: Any) -> None:
    """``out = x @ W.T + bias`` by the calling thread.

    ``x``: address of the first row, ``stride`` bytes between rows of ``inputs`` float32; ``weights``: address of what
    :func:`pack` laid out; bias (out,) float32 or empty; sums (rows * 64,) float32 is room; out (rows, out) float32.
    """
    width = out.shape[1]
    for panel in range((width + PANEL - 1) // PANEL):
        here = weights + panel * inputs * PANEL * 4
        low, high = panel * PANEL, min(panel * PANEL + PANEL, width)
        tiles, rest = divmod(high - low, LANES)
        if rest == 0:
            at, to = bias.ctypes.data + low * 4 if len(bias) > 0 else 0, out.ctypes.data + low * 4
            if tiles == 4:
                _whole_4(x, stride, here, inputs, at, to, width * 4, rows)
            elif tiles == 3:
                _whole_3(x, stride, here, inputs, at, to, width * 4, rows)
            elif tiles == 2:
                _whole_2(x, stride, here, inputs, at, to, width * 4, rows)
            else:
                _whole_1(x, stride, here, inputs, at, to, width * 4, rows)
            continue
        if high - low > PANEL // 2:
            _panel(x, stride, here, inputs, sums.ctypes.data, rows)
        elif high - low > PANEL // 4:
            _two(x, stride, here, inputs, sums.ctypes.data, rows)
        else:
            _one(x, stride, here, inputs, sums.ctypes.data, rows)
        shift = bias[low:high] if len(bias) > 0 else bias
        for row in range(rows):  # slices, see :func:`hasten.nn.product.bfloat16.write_sums`
            line, target = sums[row * PANEL : row * PANEL + high - low], out[row, low:high]
            if len(bias) > 0:
                for i in range(len(target)):
                    target[i] = line[i] + shift[i]
            else:
                for i in range(len(target)):
                    target[i] = line[i]


def pack(weight: Any) -> Any:
    """weight (out, in) float32 -> (panels, in, 64) float32; zeros fill the last panel.

    >>> pack(np.ones((3, 2), np.float32)).shape
    (1, 2, 64)
    """
    outs, ins = weight.shape
    packed = aligned((-(-outs // PANEL), ins, PANEL), np.float32)
    filled = np.zeros((packed.shape[0] * PANEL, ins), np.float32)
    filled[:outs] = weight
    packed[:] = filled.reshape(-1, PANEL, ins).transpose(0, 2, 1)
    return packed


def unpack(packed: Any, outs: int) -> Any:
    """The weight (out, in) that :func:`pack` laid out."""
    return packed.transpose(0, 2, 1).reshape(-1, packed.shape[1])[:outs].copy()
