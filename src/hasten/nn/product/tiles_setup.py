"""Matrix tiles (AMX) as pieces of numba kernels: permission, instructions, and rows of activations laid out for them.

Rows are arranged, 64 bytes of 16 rows behind one another, so that loading them is one stream of memory.
"""

from __future__ import annotations

import ctypes
from functools import lru_cache
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, prange, types
from numba.core import cgutils
from numba.extending import intrinsic

from hasten.nn.product import instructions as avx
from hasten.nn.product.blocks import GROUP, LINE, PANEL, scaled

__all__ = [
    "FEWEST",
    "STEP",
    "TILE",
    "arrange_row",
    "arranged",
    "ask",
    "close_tiles",
    "granted",
    "open_narrow_tiles",
    "open_tiles",
    "room_for",
    "run_assembly",
    "sixteens_of",
    "sums_for",
]

FEWEST = 16
"""Rows from which tiles are used."""
STEP = 16
"""Input pairs (bfloat16) or quads (int8) of a tile."""
TILE = 16 * LINE
"""Bytes of a tile."""
_WORD = ir.IntType(64)
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
def sums_for(rows: int) -> Any:
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
def arranged(x: Any) -> Any:
    """x (rows, in) -> (sixteens, steps, 16, 64 bytes); rows that fill a tile up hold anything."""
    tiles = _tiles_for(x)
    for row in prange(len(x)):
        arrange_row(x[row], tiles, row)
    return tiles
