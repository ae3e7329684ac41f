"""Many rows times a bfloat16 or int8 matrix on processors with matrix tiles (AMX), from the panels of a few rows.

A panel's 16 input pairs of 16 outputs are a tile as they lie, 256 bytes from pair to pair, and so are 32 inputs of 16
rows of activations. Blocks of 32 rows and 32 outputs keep four tiles of sums; rows and inputs that fill no tile go
through :mod:`bfloat16` and :mod:`int8`. Tiles add floats in another order than registers do, so with bfloat16 a row's
last bits depend on how many rows there are; whoever wants them not to uses :mod:`bfloat16` alone. Sums of bytes are
exact, and scaled in the order of :mod:`int8`: the same bits.
"""

from __future__ import annotations

import ctypes
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

__all__ = [
    "FEWEST",
    "byte_panels",
    "close_tiles",
    "granted",
    "multiply",
    "multiply_bytes",
    "open_tiles",
    "panels",
    "run_assembly",
    "takes_bytes",
]

FEWEST = 16
"""Rows from which tiles are used."""
_PAIRS = 16
"""Input pairs of a tile."""
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
    """An instruction on tiles; ``operands`` are whole numbers of 64 bits, called $0 and on."""
    kind = ir.FunctionType(ir.VoidType(), [o.type for o in operands])
    constraints = ",".join(["r"] * len(operands) + ["~{memory}"])
    builder.call(ir.InlineAsm(kind, text, constraints, side_effect=True), list(operands))


def _configure(builder: Any) -> None:
    """Eight tiles of 16 lines of 64 bytes."""
    words = [1, 0, 0, 0, *[0x400040] * 4, 0, 0, 0, 0, 0x10101010, 0x10101010, 0, 0]
    place = cgutils.alloca_once(builder, avx.INTS)
    place.align = LINE
    builder.store(ir.Constant(avx.INTS, words), place).align = LINE
    run_assembly(builder, "ldtilecfg ($0)", builder.ptrtoint(place, ir.IntType(64)))


def _block(
    builder: Any, halves: int, x: Any, x_stride: Any, weights: Any, steps: Any, sums: Any, dot: str, fresh: bool
) -> None:
    """``halves`` times 16 rows, 64 outputs, ``steps`` tiles of inputs, added to ``sums`` (rows, 64), or written there
    where they are ``fresh``."""
    line = ir.Constant(ir.IntType(64), PANEL * 4)
    rows = [builder.add(x, scaled(builder, x_stride, 16 * i)) for i in range(halves)]
    for side in range(2):
        places = [
            (2 * i + j, builder.add(sums, ir.Constant(ir.IntType(64), (16 * i * PANEL + (2 * side + j) * 16) * 4)))
            for i in range(halves)
            for j in range(2)
        ]
        for tile, where in places:
            if fresh:
                run_assembly(builder, f"tilezero %tmm{tile}")
            else:
                run_assembly(builder, f"tileloadd ($0,$1,1), %tmm{tile}", where, line)
        with cgutils.for_range(builder, steps) as loop:
            along = scaled(builder, loop.index, LINE)
            panel = builder.add(weights, scaled(builder, loop.index, _PAIRS * PANEL * 4))
            for i in range(halves):
                run_assembly(builder, f"tileloadd ($0,$1,1), %tmm{4 + i}", builder.add(rows[i], along), x_stride)
            for j in range(2):
                at = builder.add(panel, ir.Constant(ir.IntType(64), (2 * side + j) * LINE))
                run_assembly(builder, f"tileloadd ($0,$1,1), %tmm{6 + j}", at, line)
            for i in range(halves):
                for j in range(2):
                    run_assembly(builder, f"{dot} %tmm{6 + j}, %tmm{4 + i}, %tmm{2 * i + j}")
        for tile, where in places:
            run_assembly(builder, f"tilestored %tmm{tile}, ($0,$1,1)", where, line)


def _tiles_of(dot: str, fresh: bool) -> Any:
    @intrinsic
    def tiles_of(typing: Any, x: Any, x_stride: Any, weights: Any, steps: Any, sums: Any, sixteens: Any) -> Any:
        """16 * ``sixteens`` rows times ``steps`` tiles of a panel's inputs, to ``sums``; see :func:`_block`."""
        return types.void(*[types.intp] * 6), _generator(dot, fresh)

    return tiles_of


def _generator(dot: str, fresh: bool) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        x, x_stride, weights, steps, sums, sixteens = arguments

        def at(number: Any) -> tuple[Any, Any]:
            row = scaled(builder, number, 16)
            return builder.add(x, builder.mul(row, x_stride)), builder.add(sums, scaled(builder, row, PANEL * 4))

        zero, one, two = (ir.Constant(sixteens.type, n) for n in range(3))
        with cgutils.for_range(builder, builder.sdiv(sixteens, two)) as loop:
            rows, target = at(scaled(builder, loop.index, 2))
            _block(builder, 2, rows, x_stride, weights, steps, target, dot, fresh)
        with builder.if_then(builder.icmp_signed("!=", builder.srem(sixteens, two), zero)):
            rows, target = at(builder.sub(sixteens, one))
            _block(builder, 1, rows, x_stride, weights, steps, target, dot, fresh)
        return context.get_dummy_value()

    return generate


@intrinsic
def open_tiles(typing: Any) -> Any:
    """Give this thread's tiles their shape, until :func:`close_tiles`."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _configure(builder)
        return context.get_dummy_value()

    return types.void(), generate


@intrinsic
def close_tiles(typing: Any) -> Any:
    """Leave no tiles behind: the kernel saves those in use whenever it changes threads."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        run_assembly(builder, "tilerelease")
        return context.get_dummy_value()

    return types.void(), generate


_tiles = _tiles_of("tdpbf16ps", False)
_byte_tiles = _tiles_of("tdpbsud", True)  # signed activations, unsigned weights


@njit(cache=True, error_model="numpy")
def panels(x: Any, weights: Any, bias: Any, out: Any, first: int, last: int) -> None:
    """As :func:`hasten.nn.product.bfloat16.panels`."""
    rows, width = out.shape
    groups = (rows + GROUP - 1) // GROUP
    pairs = weights.shape[1]
    sums = np.empty((min(rows, GROUP), PANEL), np.float32)
    base, x_base, x_stride = weights.ctypes.data, x.ctypes.data, x.strides[0]
    open_tiles()
    for item in range(first, last):
        panel, start = item // groups, (item % groups) * GROUP
        count = min(GROUP, rows - start)
        sums[:count] = 0
        tiled = count // 16 * 16
        for pair in range(0, pairs, _SPAN):
            span = min(_SPAN, pairs - pair)
            whole = span // _PAIRS * _PAIRS
            here = x_base + start * x_stride + pair * 4
            there = base + (panel * pairs + pair) * PANEL * 4
            if tiled > 0 and whole > 0:
                _tiles(here, x_stride, there, whole // _PAIRS, sums.ctypes.data, tiled // 16)
                if whole < span:
                    stretch(
                        here + whole * 4, x_stride, there + whole * PANEL * 4, span - whole, sums.ctypes.data, tiled
                    )
                if tiled < count:
                    stretch(here + tiled * x_stride, x_stride, there, span, sums.ctypes.data + tiled * PANEL * 4,
                            count - tiled)  # fmt: skip
            else:
                stretch(here, x_stride, there, span, sums.ctypes.data, count)
        write_sums(sums, count, bias, out, start, panel * PANEL, min(panel * PANEL + PANEL, width))
    close_tiles()


@njit(cache=True, parallel=True, error_model="numpy")
def _multiply(x: Any, weights: Any, bias: Any, out: Any, parts: int) -> None:
    items = weights.shape[0] * ((out.shape[0] + GROUP - 1) // GROUP)
    for part in prange(parts):
        panels(x, weights, bias, out, items * part // parts, items * (part + 1) // parts)


def multiply(x: Any, weights: Any, bias: Any, out: Any) -> None:
    """``out = x @ W.T + bias``; see :func:`hasten.nn.product.bfloat16.multiply`."""
    _multiply(x, weights, bias, out, numba.get_num_threads())


def takes_bytes(inputs: int) -> bool:
    """Whether the inputs of a matrix of int8 fill whole tiles."""
    return inputs % LINE == 0


@njit(cache=True, fastmath={"contract"}, error_model="numpy")
def _add_scaled(totals: Any, starts: Any, scales: Any, group: int, sums: Any) -> None:
    """sums[row] += scale[row] * (start[row] + totals[row]), rounded once, as the registers do."""
    for row in range(len(totals)):
        start, scale = starts[row, group], scales[row, group]
        line, target = totals[row], sums[row]
        for i in range(PANEL):
            target[i] = np.float32(line[i] + start) * scale + target[i]


@njit(cache=True, error_model="numpy")
def byte_panels(
    x: Any, starts: Any, scales: Any, weights: Any, weight_scales: Any, bias: Any, out: Any, first: int, last: int
) -> None:
    """As :func:`hasten.nn.product.int8.panels`, for whole tiles of inputs."""
    rows, width = out.shape
    parts = (rows + GROUP - 1) // GROUP
    quads = weights.shape[1]
    span = int8.INPUTS // 4
    groups = (quads + span - 1) // span
    sums = np.empty((min(rows, GROUP), PANEL), np.float32)
    totals = np.empty((GROUP, PANEL), np.int32)
    base, x_base, x_stride, side = weights.ctypes.data, x.ctypes.data, x.strides[0], scales.strides[0]
    open_tiles()
    for item in range(first, last):
        panel, begin = item // parts, (item % parts) * GROUP
        count = min(GROUP, rows - begin)
        tiled = count // 16 * 16
        sums[:count] = 0
        for group in range(groups):
            if tiled > 0:
                _byte_tiles(
                    x_base + begin * x_stride + group * int8.INPUTS, x_stride,
                    base + (panel * quads + group * span) * PANEL * 4, min(span, quads - group * span) // 16,
                    totals.ctypes.data, tiled // 16,
                )  # fmt: skip
                _add_scaled(totals[:tiled], starts[begin:], scales[begin:], group, sums)
        if tiled < count:
            beside = (begin + tiled) * side
            int8.stretch(
                x_base + (begin + tiled) * x_stride, x_stride, side, base + panel * quads * PANEL * 4, groups, quads,
                starts.ctypes.data + beside, scales.ctypes.data + beside, sums.ctypes.data + tiled * PANEL * 4,
                count - tiled,
            )  # fmt: skip
        low, high = panel * PANEL, min(panel * PANEL + PANEL, width)
        int8.write_scaled(sums, count, weight_scales, bias, out, begin, low, high)
    close_tiles()


@njit(cache=True, parallel=True, error_model="numpy")
def _multiply_bytes(
    x: Any, starts: Any, scales: Any, weights: Any, weight_scales: Any, bias: Any, out: Any, parts: int
) -> None:
    items = weights.shape[0] * ((out.shape[0] + GROUP - 1) // GROUP)
    for part in prange(parts):
        byte_panels(
            x, starts, scales, weights, weight_scales, bias, out, items * part // parts, items * (part + 1) // parts
        )


def multiply_bytes(x: Any, weights: tuple[Any, Any], bias: Any, out: Any) -> None:
    """As :func:`hasten.nn.product.int8.multiply`, for whole tiles of inputs: the same bits."""
    packed, weight_scales = weights
    q, starts, scales = quantise_rows(x, packed.shape[1] * 4, int8.INPUTS, int8.ZERO)
    _multiply_bytes(q, starts, scales, packed, weight_scales, bias, out, numba.get_num_threads())
