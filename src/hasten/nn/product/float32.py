"""A few rows times a float32 matrix, in the layout of the kernels beside it: nothing is rounded but sums.

The matrix (out, in) lies in panels of 64 outputs; a panel holds, input by input, the weights of its 64 outputs side by
side. An output is summed over the inputs in their order, each product rounded once with its sum, so a row's bits depend
neither on its neighbours nor on how rows are cut. Any processor with registers of 512 bits will do.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from hasten.nn.product import instructions as avx
from hasten.nn.product.blocks import LINE, PANEL, TILES, accumulate, aligned, asks, in_blocks, scaled

__all__ = ["multiply_rows", "pack", "unpack"]

_AHEAD = 64 * LINE
"""Bytes between a weight in use and the one asked for."""


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
            here = builder.add(x, builder.mul(row, x_stride))
            lines = [builder.add(here, scaled(builder, x_stride, r)) for r in range(rows)]
            totals = [cgutils.alloca_once(builder, avx.FLOATS) for _ in range(rows * TILES)]
            for total in totals:
                builder.store(avx.FLOATS(None), total)
            accumulate(builder, lines, weights, inputs, totals, ask, _dot)
            target = builder.add(sums, scaled(builder, row, PANEL * 4))
            for place, total in enumerate(totals):
                avx.store(builder, builder.load(total), target, place * LINE)

        in_blocks(builder, count, emit)
        return context.get_dummy_value()

    return types.void(*[types.intp] * 6), generate


@njit(cache=True, error_model="numpy")
def multiply_rows(x: Any, stride: Any, rows: Any, inputs: Any, weights: Any, bias: Any, sums: Any, out: Any) -> None:
    """``out = x @ W.T + bias`` by the calling thread.

    ``x``: address of the first row, ``stride`` bytes between rows of ``inputs`` float32; ``weights``: address of what
    :func:`pack` laid out; bias (out,) float32 or empty; sums (rows * 64,) float32 is room; out (rows, out) float32.
    """
    width = out.shape[1]
    for panel in range((width + PANEL - 1) // PANEL):
        _panel(x, stride, weights + panel * inputs * PANEL * 4, inputs, sums.ctypes.data, rows)
        low, high = panel * PANEL, min(panel * PANEL + PANEL, width)
        here = bias[low:high] if len(bias) > 0 else bias
        for row in range(rows):  # slices, see :func:`hasten.nn.product.bfloat16.write_sums`
            line, target = sums[row * PANEL : row * PANEL + high - low], out[row, low:high]
            if len(bias) > 0:
                for i in range(len(target)):
                    target[i] = line[i] + here[i]
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
