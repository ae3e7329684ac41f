"""A bfloat16 matrix in 12 bits a weight, without loss: a quarter less to read, and results of the same bits.

The upper byte of a weight (sign, seven bits of the exponent) takes few values: the sixteen most frequent of a matrix
get a code of four bits, the lower byte stays as it is. The few others, one or two in ten thousand of normal weights,
are listed beside and put in their places when a block is opened. Lossless like DFloat11 (Zhang et al. 2025,
https://arxiv.org/abs/2504.11651), which codes exponents by Huffman (11 bits); differs from it in a code of fixed
length, so that one shuffle opens 64 weights in a fraction of the time in which memory hands them out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, prange, types
from numba.core import cgutils
from numba.extending import intrinsic

from hasten.nn.product import instructions as avx
from hasten.nn.product.blocks import LINE, PANEL, TILES, aligned, scaled

__all__ = [
    "BLOCK",
    "FOURS",
    "OPENED",
    "PAIRS",
    "STEP",
    "Opening",
    "ask",
    "is_plain",
    "open_block",
    "pack",
    "rows_of",
    "takes",
    "unpack",
]

STEP = 3 * LINE
"""Bytes of an input pair of 64 outputs: two lines of lower bytes, one of codes."""
PAIRS = 16
"""Input pairs of a block."""
BLOCK = PAIRS * STEP
"""Bytes of 16 input pairs of 64 outputs."""
FOURS = 12
"""The same in four lines of memory each."""
OPENED = PAIRS * PANEL * 4
"""Bytes of the same as bfloat16."""
_INPUTS = 2 * PAIRS
LEAST_BYTES = 1 << 20
"""Bytes in bfloat16 below which a matrix stays as it is: it may be in a cache, where bytes cost little."""
_MOST = 1 / 128
"""Share of weights outside the code above which a matrix stays as it is."""
_BYTES = ir.VectorType(ir.IntType(8), LINE)
_HALVES = ir.VectorType(ir.IntType(16), LINE // 2)
_WORD = ir.IntType(64)


def takes(out_features: int, in_features: int) -> bool:
    """Whether a weight (out, in) is worth it by its shape: large, and of whole blocks."""
    return in_features % _INPUTS == 0 and out_features * in_features * 2 >= LEAST_BYTES


@njit(cache=True, parallel=True, error_model="numpy")
def _histograms(weight: Any, parts: int) -> Any:
    """How often each upper byte occurs, (parts, 256)."""
    found = np.zeros((parts, 256), np.int64)
    for part in prange(parts):
        counts = np.zeros(256, np.int64)
        for row in range(len(weight) * part // parts, len(weight) * (part + 1) // parts):
            for value in weight[row]:
                counts[value >> 8] += 1
        found[part] = counts
    return found


@njit(cache=True, parallel=True, error_model="numpy")
def _others(weight: Any, code_of: Any, counts: Any) -> None:
    """counts (panels, blocks): weights that have no code."""
    for panel in prange(len(counts)):
        for row in range(panel * PANEL, min(panel * PANEL + PANEL, len(weight))):
            line = weight[row]
            for i in range(len(line)):
                if code_of[line[i] >> 8] == 16:
                    counts[panel, i // _INPUTS] += 1


@njit(cache=True)
def _byte_of(output: int, element: int) -> int:
    """Where in a line the byte of one of 32 outputs stands: opening interleaves eight bytes of each of four lanes with
    their codes, and so gives the weights of 16 outputs by pairs."""
    half, lane = output // 16, output % 16 // 4
    return 16 * lane + 8 * half + 2 * (output % 4) + element


@njit(cache=True, parallel=True, error_model="numpy")
def _fill(weight: Any, code_of: Any, table: Any, counts: Any, head: int, packed: Any) -> None:
    blocks = counts.shape[1]
    for panel in prange(len(packed)):
        record = packed[panel]
        for lane in range(4):
            record[16 * lane : 16 * lane + 16] = table
        starts = record[LINE : LINE + 2 * (blocks + 1)].view(np.uint16)
        rest = record[LINE + 4 * ((blocks + 2) // 2) : head]
        others = rest[: len(rest) // 4 * 4].view(np.uint16)
        starts[0] = 0
        for block in range(blocks):
            starts[block + 1] = starts[block] + counts[panel, block]
        ends = starts[:blocks].copy()
        for row in range(panel * PANEL, min(panel * PANEL + PANEL, len(weight))):
            line, output = weight[row], row % PANEL
            side, inside = output // 32, output % 32
            for i in range(len(line)):
                value = line[i]
                block, pair = i // _INPUTS, i // 2
                code = code_of[value >> 8]
                if code == 16:
                    at = ends[block]
                    ends[block] += 1
                    others[2 * at] = (pair % PAIRS * PANEL + output) * 2 + i % 2
                    others[2 * at + 1] = value
                    code = 0
                here = head + pair * STEP
                byte = _byte_of(inside, i % 2)
                record[here + side * LINE + byte] = value & 255
                record[here + 2 * LINE + byte] |= code << (4 * side)


def pack(weight: Any, limit: float = _MOST) -> Any | None:
    """weight (out, in) bfloat16 as uint16 -> (panels, stride) uint8, or None where more than ``limit`` of the weights
    would have no code. ``in`` is a multiple of 32; what fills the last panel belongs to nobody.

    A record: the sixteen upper bytes (four times), where each block's weights without a code begin (uint16), these as
    place in the block and value (uint16 each), to whole lines; then the blocks.
    """
    out_features, in_features = weight.shape
    weight = np.ascontiguousarray(weight)
    seen = _histograms(weight, 16).sum(0)
    table = np.argsort(-seen, kind="stable")[:16].astype(np.uint8)
    if seen.sum() - seen[table].sum() > limit * weight.size:
        return None
    code_of = np.full(256, 16, np.uint8)
    code_of[table] = np.arange(16, dtype=np.uint8)
    panels, blocks = -(-out_features // PANEL), in_features // _INPUTS
    counts = np.zeros((panels, blocks), np.int64)
    _others(weight, code_of, counts)
    most = int(counts.sum(1).max())
    if most >= 1 << 16:
        return None
    head = LINE + -(-(4 * ((blocks + 2) // 2) + 4 * most) // LINE) * LINE
    packed = aligned((panels, head + blocks * BLOCK), np.uint8)
    _fill(weight, code_of, table, counts, head, packed)
    return packed


def _constant(value: int) -> Any:
    return ir.Constant(_BYTES, [value] * LINE)


def _upper_bytes(builder: Any, table: Any, codes: Any) -> Any:
    kind = ir.FunctionType(_BYTES, [_BYTES, _BYTES])
    shuffle = cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.avx512.pshuf.b.512")
    return builder.call(shuffle, [table, codes])


def _interleaved(builder: Any, low: Any, high: Any, half: int) -> Any:
    """The lower or upper eight bytes of each 16 of ``low``, each followed by its upper byte."""
    order = []
    for lane in range(0, LINE, 16):
        for i in range(lane + 8 * half, lane + 8 * half + 8):
            order += [i, LINE + i]
    return builder.shuffle_vector(low, high, ir.Constant(ir.VectorType(ir.IntType(32), LINE), order))


def ask(builder: Any, stream: Any, four: Any, half: Any = None) -> None:
    """Ask for the four lines that are number ``four`` of a stream: in rounds over the quarters of 4 KiB (see
    :func:`hasten.nn.product.blocks.asks`); or for the first or second two of them. A block is twelve fours."""
    page = builder.and_(four, ir.Constant(_WORD, -16))
    turn = builder.and_(four, ir.Constant(_WORD, 15))
    at = builder.add(stream, builder.add(scaled(builder, page, 4 * LINE), scaled(builder, turn, LINE)))
    if half is not None:
        at = builder.add(at, scaled(builder, half, 32 * LINE))
    for quarter in range(4 if half is None else 2):
        avx.prefetch(builder, at, quarter * 16 * LINE)


def _start(builder: Any, record: Any, block: Any) -> Any:
    """Where the weights without a code of a block begin."""
    at = builder.add(record, builder.add(ir.Constant(_WORD, LINE), scaled(builder, block, 2)))
    return builder.zext(avx.load(builder, at, 0, ir.IntType(16), 2), _WORD)


@intrinsic
def is_plain(typing: Any, record: Any, block: Any) -> Any:
    """Whether all weights of a block have a code."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        record, block = arguments
        after = builder.add(block, ir.Constant(_WORD, 1))
        return builder.icmp_signed("==", _start(builder, record, block), _start(builder, record, after))

    return types.boolean(types.intp, types.intp), generate


def _put_others(builder: Any, record: Any, blocks: Any, block: Any, target: Any) -> None:
    """Put the weights without a code into their places of an opened block."""
    half = ir.IntType(16)
    first = _start(builder, record, block)
    last = _start(builder, record, builder.add(block, ir.Constant(_WORD, 1)))
    with builder.if_then(builder.icmp_signed("<", first, last), likely=False):
        two = ir.Constant(_WORD, 2)
        rest = builder.add(record, ir.Constant(_WORD, LINE))
        rest = builder.add(rest, scaled(builder, builder.sdiv(builder.add(blocks, two), two), 4))
        with cgutils.for_range_slice(builder, first, last, ir.Constant(_WORD, 1), _WORD) as (index, _):
            pair = builder.add(rest, scaled(builder, index, 4))
            place = builder.zext(avx.load(builder, pair, 0, half, 2), _WORD)
            value = avx.load(builder, pair, 2, half, 2)
            avx.store(builder, value, builder.add(target, scaled(builder, place, 2)), 0, 2)


class Opening:
    """Code that opens a block piece by piece, so that it can stand between other work: four pieces of four pairs."""

    def __init__(self, builder: Any, record: Any, head: Any, blocks: Any, block: Any) -> None:
        self._builder = builder
        self._record, self._blocks, self._block = record, blocks, block
        self.stream = builder.add(record, head)
        self._here = builder.add(self.stream, scaled(builder, block, BLOCK))
        self._table = avx.load(builder, record, 0, _BYTES, LINE)

    def pair(self, at: Any, step: int) -> list[Any]:
        """The four registers of pair number ``step`` behind address ``at``: 16 outputs each, as integers."""
        builder, found = self._builder, []
        codes = avx.load(builder, at, step * STEP + 2 * LINE, _BYTES, LINE)
        shifted = builder.lshr(builder.bitcast(codes, _HALVES), ir.Constant(_HALVES, [4] * (LINE // 2)))
        for side, raw in enumerate((codes, builder.bitcast(shifted, _BYTES))):
            high = _upper_bytes(builder, self._table, builder.and_(raw, _constant(15)))
            low = avx.load(builder, at, step * STEP + side * LINE, _BYTES, LINE)
            found += [builder.bitcast(_interleaved(builder, low, high, half), avx.INTS) for half in range(2)]
        return found

    def fours(self, emit: Callable[[Any, Any], None]) -> None:
        """Code that calls ``emit(number, address)`` for each four pairs."""
        with cgutils.for_range(self._builder, ir.Constant(_WORD, PAIRS // 4)) as loop:
            emit(loop.index, self._builder.add(self._here, scaled(self._builder, loop.index, 4 * STEP)))

    def piece(self, number: Any, target: Any) -> None:
        """Write piece ``number`` to its place in ``target``."""
        at = self._builder.add(self._here, scaled(self._builder, number, 4 * STEP))
        to = self._builder.add(target, scaled(self._builder, number, 4 * PANEL * 4))
        for step in range(4):
            for tile, register in enumerate(self.pair(at, step)):
                avx.store(self._builder, register, to, (step * TILES + tile) * LINE, LINE)

    def finish(self, target: Any) -> None:
        """Put the weights without a code into their places, behind the last piece."""
        _put_others(self._builder, self._record, self._blocks, self._block, target)


@intrinsic
def open_block(typing: Any, record: Any, head: Any, blocks: Any, block: Any, target: Any, ahead: Any) -> Any:
    """Write block number ``block`` of a record's ``blocks`` to ``target`` as :func:`hasten.nn.product.bfloat16.pack`
    lays it out, 4 KiB at a line of memory. ``ahead``: bytes between it and the block of which a third is asked for, the
    rest being left to the product; 0: none is."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        record, head, blocks, block, target, ahead = arguments
        opening = Opening(builder, record, head, blocks, block)
        asked = builder.add(opening.stream, ahead)
        asks = builder.icmp_signed("!=", ahead, ir.Constant(_WORD, 0))
        with cgutils.for_range(builder, ir.Constant(_WORD, 4)) as loop:
            with builder.if_then(asks):
                ask(builder, asked, builder.add(scaled(builder, block, FOURS), loop.index))
            opening.piece(loop.index, target)
        opening.finish(target)
        return context.get_dummy_value()

    return types.void(*[types.intp] * 6), generate


@njit(cache=True, parallel=True, error_model="numpy")
def _open_all(packed: Any, head: int, blocks: int, out: Any) -> None:
    for panel in prange(len(packed)):
        for block in range(blocks):
            open_block(packed[panel].ctypes.data, head, blocks, block, out[panel, block].ctypes.data, 0)


@njit(cache=True, error_model="numpy")
def _rows(packed: Any, tokens: Any, head: int, out: Any) -> None:
    blocks = out.shape[1] // _INPUTS
    for index in range(len(tokens)):
        record, output, line = packed[tokens[index] // PANEL], tokens[index] % PANEL, out[index]
        side, inside = output // 32, output % 32
        for i in range(len(line)):
            at = head + i // 2 * STEP
            byte = _byte_of(inside, i % 2)
            code = record[at + 2 * LINE + byte] >> (4 * side) & 15
            line[i] = np.uint16(record[code]) << 8 | record[at + side * LINE + byte]
        starts = record[LINE : LINE + 2 * (blocks + 1)].view(np.uint16)
        rest = record[LINE + 4 * ((blocks + 2) // 2) : head]
        others = rest[: len(rest) // 4 * 4].view(np.uint16)
        for block in range(blocks):
            for at in range(starts[block], starts[block + 1]):
                place = others[2 * at]
                if place // 2 % PANEL == output:
                    line[block * _INPUTS + place // (2 * PANEL) * 2 + place % 2] = others[2 * at + 1]


def rows_of(packed: Any, tokens: Any, in_features: int) -> Any:
    """Outputs ``tokens`` (n,) int64 of the matrix, as an embedding reads it: (n, in) bfloat16 as uint16."""
    out = np.empty((len(tokens), in_features), np.uint16)
    _rows(packed, tokens, packed.shape[1] - in_features // _INPUTS * BLOCK, out)
    return out


def unpack(packed: Any, out_features: int, in_features: int) -> Any:
    """The weight (out, in) float32 that :func:`pack` laid out."""
    blocks = in_features // _INPUTS
    out = aligned((len(packed), blocks, OPENED // 2), np.uint16)
    _open_all(packed, packed.shape[1] - blocks * BLOCK, blocks, out)
    plain = out.reshape(len(packed), blocks * PAIRS, PANEL, 2).transpose(0, 2, 1, 3).reshape(-1, in_features)
    return (plain[:out_features].astype(np.uint32) << 16).view(np.float32)
