"""Entropy coding of byte planes with static tables, sixteen and more lanes at a time.

Asymmetric numeral systems ("Asymmetric numeral systems: entropy coding combining speed of Huffman coding with
compression rate of arithmetic coding", Duda 2013, arXiv:1311.2540): a state x takes in a symbol of frequency f and
start c of M = 4096 by x <- (x div f) M + c + x mod f, and 16 bits leave it when it would grow beyond 32. 64 lanes share
one stream of words. Symbols that a table does not hold are escapes, whose bytes travel beside. Differs from the paper
in: lanes are channels with tables of their own. :mod:`rans_lanes` holds the steps for AVX-512; the bytes are the same.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from hasten.errors import DataError
from hasten.language.rans_lanes import BITS, LOW, REGISTERS, decode_run, encode_run, has_lanes

__all__ = ["ESCAPE", "LANES", "Tables", "cuts", "decode", "encode", "frequencies"]

ESCAPE = 255
"""Code of a symbol that its table does not hold."""
LANES = 16 * REGISTERS
"""Channels that are coded side by side."""
_TOTAL = 1 << BITS
_RUN = 64
"""Tokens of a run: how far a decoder reads before it looks whether the words are used up."""
_PAD = 2 * LANES * _RUN + 64
_STREAM = 1 << 17
"""Symbols of a stream; several streams are coded at the same time."""
_TRIVIAL = np.uint32(_TOTAL << 16)
Codes = NDArray[np.uint8]


def frequencies(chances: NDArray[np.float32]) -> NDArray[np.uint16]:
    """chances (n, 255) of the codes 0 to 254 -> frequencies (n, 256) that add up to 4096, the escape's behind.

    The codes between the first and the last whose chance is worth a share of 4096 have one; the others are escapes.

    >>> table = frequencies(np.full((1, 255), 1 / 255, np.float32))
    >>> int(table.sum()), int(table[0, ESCAPE])
    (4096, 1)
    """
    count, symbols = chances.shape
    chances = chances.astype(np.float64)
    chances = chances / chances.sum(-1, keepdims=True)
    worth = chances * _TOTAL >= 0.4
    worth[np.arange(count), chances.argmax(-1)] = True
    places = np.arange(symbols)
    first = worth.argmax(-1)
    last = symbols - 1 - worth[:, ::-1].argmax(-1)
    held = (places >= first[:, None]) & (places <= last[:, None])
    missing = np.where(held, 0, chances).sum(-1)
    out = np.zeros((count, symbols + 1), np.int64)
    out[:, :symbols] = np.where(held, np.maximum(1, np.rint(chances * _TOTAL)), 0)
    out[:, ESCAPE] = np.maximum(1, np.rint(missing * _TOTAL))
    rows = np.arange(count)[:, None]
    while True:
        excess = out.sum(-1) - _TOTAL
        if not excess.any():
            return out.astype(np.uint16)
        order = np.argsort(-out, axis=-1, kind="stable")
        able = np.take_along_axis(out, order, -1) > 1
        rank = np.cumsum(able, -1)
        step = np.where(able & (rank <= np.abs(excess)[:, None]), -np.sign(excess)[:, None], 0)
        out[rows, order] += step


class Tables:
    """Tables in the form that the coder reads. Immutable.

    >>> Tables(frequencies(np.full((3, 255), 1 / 255, np.float32))).count
    3
    """

    def __init__(self, counts: NDArray[np.uint16]) -> None:
        """``counts`` (n, 256) as :func:`frequencies` gives them; raises :class:`DataError` for anything else."""
        counts = np.asarray(counts)
        good = counts.ndim == 2 and counts.shape[1] == 256 and counts.dtype == np.uint16
        if not good or (counts.sum(-1, dtype=np.int64) != _TOTAL).any() or (counts[:, ESCAPE] == 0).any():
            raise DataError("the tables of this codec do not add up; fit one again")
        self.count = len(counts)
        wide = counts.astype(np.uint32)
        starts = np.cumsum(wide, -1, dtype=np.uint32) - wide
        self.packed = np.zeros((self.count + 1, 256), np.uint32)
        self.packed[:-1] = (wide << 16) | starts
        self.packed[-1, 0] = _TRIVIAL  # of lanes that hold nothing
        held = counts[:, :ESCAPE] > 0
        some = held.any(-1)
        self.first = np.zeros(self.count + 1, np.uint8)
        self.first[:-1] = np.where(some, held.argmax(-1), 1)
        self.last = np.zeros(self.count + 1, np.uint8)
        self.last[:-1] = np.where(some, ESCAPE - 1 - held[:, ::-1].argmax(-1), 0)
        if (held.sum(-1) != self.last[:-1].astype(int) - self.first[:-1] + 1).any():
            raise DataError("a table of this codec has gaps; fit one again")


# ---- one stream -----------------------------------------------------------------------------------------------------


@njit(cache=True, nogil=True, error_model="numpy")
def _begin_of_run(end: int, group: int, apart: bool) -> Any:
    """First token of the run that ends before ``end``, and whether it is an anchor."""
    if apart and (end - 1) % group == 0:
        return end - 1, 1
    begin = max(0, end - _RUN)
    if apart:
        begin = max(begin, (end - 1) // group * group + 1)
    return begin, 0


@njit(cache=True, nogil=True, error_model="numpy")
def _encode_lanes(plane: Any, group: int, packed: Any, ids: Any, first: int, last: int, out: Any) -> Any:
    """Rows ``first`` to ``last`` of a plane (rows, tokens, lanes) into ``out``; returns the bytes written."""
    tokens, lanes = plane.shape[1], plane.shape[2]
    held = min(lanes, LANES)
    states = np.full(LANES, np.uint32(LOW), np.uint32)
    at = out.ctypes.data + 4 * held
    for row in range(last - 1, first - 1, -1):
        offsets = (ids[row] * 256).astype(np.int32)
        apart = not np.array_equal(ids[row, 0], ids[row, 1])
        for base in range((lanes - 1) // LANES * LANES, -1, -LANES):
            registers, end = min(LANES, lanes - base) // 16, tokens
            while end > 0:
                begin, anchor = _begin_of_run(end, group, apart)
                at = encode_run(
                    registers, end - begin, states.ctypes.data, at, packed.ctypes.data,
                    offsets[anchor, base:].ctypes.data, plane[row, begin, base:].ctypes.data, lanes
                )  # fmt: skip
                end = begin
    out[: 4 * held] = states[:held].view(np.uint8)
    return at - out.ctypes.data


@njit(cache=True, nogil=True, error_model="numpy")
def _encode_plain(plane: Any, group: int, packed: Any, ids: Any, first: int, last: int, out: Any) -> Any:
    """:func:`_encode_lanes` for any processor."""
    tokens, lanes = plane.shape[1], plane.shape[2]
    held = min(lanes, LANES)
    states = np.full(LANES, np.uint32(LOW), np.uint32)
    at = 4 * held
    for row in range(last - 1, first - 1, -1):
        for base in range((lanes - 1) // LANES * LANES, -1, -LANES):
            width = min(LANES, lanes - base)
            for token in range(tokens - 1, -1, -1):
                tables = ids[row, 1 if token % group == 0 else 0]
                for half in range(width // 16 - 1, -1, -1):
                    for lane in range(16 * half, 16 * half + 16):
                        both = packed[tables[base + lane], plane[row, token, base + lane]]
                        often, start = both >> np.uint32(16), both & np.uint32(0xFFFF)
                        state = states[lane]
                        if state >> np.uint32(32 - BITS) >= often:
                            out[at] = state & np.uint32(255)
                            out[at + 1] = (state >> np.uint32(8)) & np.uint32(255)
                            at += 2
                            state >>= np.uint32(16)
                        states[lane] = ((state // often) << np.uint32(BITS)) + state % often + start
    out[: 4 * held] = states[:held].view(np.uint8)
    return at


@njit(cache=True, nogil=True, error_model="numpy")
def _fill(packed: Any, low: Any, high: Any, tables: Any, slots: Any) -> None:
    """slots (lanes, 4096): the symbol of each slot of each lane's table."""
    for lane in range(len(tables)):
        table, line = tables[lane], slots[lane]
        for symbol in range(low[table], high[table] + 1):
            both = packed[table, symbol]
            start = both & np.uint32(0xFFFF)
            line[start : start + (both >> np.uint32(16))] = symbol
        both = packed[table, ESCAPE]
        start = both & np.uint32(0xFFFF)
        line[start : start + (both >> np.uint32(16))] = ESCAPE


@njit(cache=True, nogil=True, error_model="numpy")
def _decode_lanes(
    blob: Any, begin: int, end: int, group: int, packed: Any, low: Any, high: Any, ids: Any, first: int, last: int,
    plane: Any,
) -> Any:  # fmt: skip
    """The inverse, out of ``blob[begin:end]`` with ``_PAD`` bytes in front; whether the stream is sound."""
    tokens, lanes = plane.shape[1], plane.shape[2]
    held = min(lanes, LANES)
    states = np.full(LANES, np.uint32(LOW), np.uint32)
    if end - begin < 4 * held:
        return False
    states[:held] = blob[begin : begin + 4 * held].copy().view(np.uint32)
    room = np.zeros(2 * (LANES << BITS) + 4, np.uint8)
    slots = room[: 2 * (LANES << BITS)].reshape(2, LANES, 1 << BITS)
    bottom = blob.ctypes.data + begin + 4 * held
    at = blob.ctypes.data + end
    for row in range(first, last):
        offsets = (ids[row] * 256).astype(np.int32)
        apart = not np.array_equal(ids[row, 0], ids[row, 1])
        for base in range(0, lanes, LANES):
            width = min(LANES, lanes - base)
            for anchor in range(2 if apart else 1):
                _fill(packed, low, high, ids[row, anchor, base : base + width], slots[anchor])
            token = 0
            while token < tokens:
                anchor = 1 if apart and token % group == 0 else 0
                stop = token + 1 if anchor else min(tokens, token + _RUN)
                if apart and not anchor:
                    stop = min(stop, (token // group + 1) * group)
                at = decode_run(
                    width // 16, stop - token, states.ctypes.data, at, packed.ctypes.data,
                    offsets[anchor, base:].ctypes.data, slots[anchor].ctypes.data, plane[row, token, base:].ctypes.data,
                    lanes
                )  # fmt: skip
                if at < bottom:
                    return False
                token = stop
    return at == bottom and (states == np.uint32(LOW)).all()


@njit(cache=True, nogil=True, error_model="numpy")
def _decode_plain(
    blob: Any, begin: int, end: int, group: int, packed: Any, low: Any, high: Any, ids: Any, first: int, last: int,
    plane: Any,
) -> Any:  # fmt: skip
    """:func:`_decode_lanes` for any processor."""
    tokens, lanes = plane.shape[1], plane.shape[2]
    held = min(lanes, LANES)
    states = np.full(LANES, np.uint32(LOW), np.uint32)
    if end - begin < 4 * held:
        return False
    states[:held] = blob[begin : begin + 4 * held].copy().view(np.uint32)
    slots = np.zeros((2, LANES, 1 << BITS), np.uint8)
    at, bottom = end, begin + 4 * held
    for row in range(first, last):
        for base in range(0, lanes, LANES):
            width = min(LANES, lanes - base)
            for anchor in range(2):
                _fill(packed, low, high, ids[row, anchor, base : base + width], slots[anchor])
            for token in range(tokens):
                anchor = 1 if token % group == 0 else 0
                for half in range(width // 16):
                    words = at
                    for lane in range(16 * half, 16 * half + 16):
                        state = states[lane]
                        slot = state & np.uint32(_TOTAL - 1)
                        symbol = slots[anchor, lane, slot]
                        plane[row, token, base + lane] = symbol
                        both = packed[ids[row, anchor, base + lane], symbol]
                        state = (both >> np.uint32(16)) * (state >> np.uint32(BITS)) + slot - (both & np.uint32(0xFFFF))
                        states[lane] = state
                        if state < np.uint32(LOW):
                            words -= 2
                    if words < bottom:
                        return False
                    at = words
                    for lane in range(16 * half, 16 * half + 16):
                        if states[lane] < np.uint32(LOW):
                            word = np.uint32(blob[words]) | (np.uint32(blob[words + 1]) << np.uint32(8))
                            states[lane] = (states[lane] << np.uint32(16)) | word
                            words += 2
    return at == bottom and (states == np.uint32(LOW)).all()


@njit(cache=True, nogil=True, error_model="numpy")
def _mark(plane: Any, group: int, low: Any, high: Any, ids: Any, first: int, last: int, out: Any) -> Any:
    """Codes that their tables do not hold go to ``out`` and become escapes; returns how many."""
    count = 0
    for row in range(first, last):
        lows, highs = low[ids[row, 0]], high[ids[row, 0]]
        anchor_lows, anchor_highs = low[ids[row, 1]], high[ids[row, 1]]
        for token in range(plane.shape[1]):
            line, least, most = plane[row, token], lows, highs
            if token % group == 0:
                least, most = anchor_lows, anchor_highs
            outside = np.uint8(0)
            for lane in range(len(line)):
                outside |= np.uint8((line[lane] < least[lane]) | (line[lane] > most[lane]))
            if outside:
                for lane in range(len(line)):
                    if line[lane] < least[lane] or line[lane] > most[lane]:
                        out[count] = line[lane]
                        line[lane] = ESCAPE
                        count += 1
    return count


@njit(cache=True, nogil=True, error_model="numpy")
def _unmark(plane: Any, first: int, last: int, raw: Any) -> Any:
    """Escapes become the codes ``raw``; whether there are as many."""
    count = 0
    for row in range(first, last):
        for token in range(plane.shape[1]):
            line = plane[row, token]
            some = np.uint8(0)
            for lane in range(len(line)):
                some |= np.uint8(line[lane] == ESCAPE)
            if some:
                for lane in range(len(line)):
                    if line[lane] == ESCAPE:
                        if count == len(raw):
                            return False
                        line[lane] = raw[count]
                        count += 1
    return count == len(raw)


# ---- rows of a plane ------------------------------------------------------------------------------------------------


def cuts(rows: int, tokens: int, lanes: int) -> list[int]:
    """Where to cut the rows of a plane into streams that are coded each for itself.

    >>> cuts(16, 64, 64), len(cuts(16, 1000, 64))
    ([0, 16], 9)
    """
    streams = max(1, min(rows, -(-rows * tokens * lanes // _STREAM)))
    return [rows * i // streams for i in range(streams + 1)]


def encode(
    plane: Codes, group: int, tables: Tables, ids: NDArray[np.int32], first: int = 0, last: int | None = None,
    *, lanes: bool | None = None,
) -> tuple[bytes, bytes]:  # fmt: skip
    """Rows ``first`` to ``last`` of a plane of codes -> a stream of words, and the codes of its escapes.

    plane (rows, tokens, lanes) of codes 0 to 254, lanes a multiple of 16; its escapes are marked in place. ids (rows,
    2, lanes): table of each lane, for tokens and for every ``group``-th; ``tables.count`` where a lane holds nothing
    but 0. ``lanes`` False takes the plain steps.

    >>> tables = Tables(frequencies(np.eye(1, 255, 3, dtype=np.float32) + 0.01))
    >>> plane, ids = np.full((1, 50, 16), 3, np.uint8), np.zeros((1, 2, 16), np.int32)
    >>> words, escapes = encode(plane.copy(), 10, tables, ids)
    >>> back = np.empty_like(plane)
    >>> decode(words, escapes, back, 10, tables, ids), bool((back == plane).all())
    (True, True)
    """
    last = len(plane) if last is None else last
    size = (last - first) * plane.shape[1] * plane.shape[2]
    raw = np.empty(size, np.uint8)
    count = _mark(plane, group, tables.first, tables.last, ids, first, last, raw)
    out = np.empty(4 * LANES + 2 * size + 64, np.uint8)
    code = _encode_lanes if (has_lanes() if lanes is None else lanes) else _encode_plain
    end = code(plane, group, tables.packed, ids, first, last, out)
    return out[:end].tobytes(), raw[:count].tobytes()


def decode(
    words: bytes, escapes: bytes, plane: Codes, group: int, tables: Tables, ids: NDArray[np.int32], first: int = 0,
    last: int | None = None, *, lanes: bool | None = None,
) -> bool:  # fmt: skip
    """The inverse of :func:`encode`, into the rows ``first`` to ``last`` of ``plane``; whether the stream was sound."""
    last = len(plane) if last is None else last
    blob = np.empty(_PAD + len(words), np.uint8)
    blob[_PAD:] = np.frombuffer(words, np.uint8)
    code = _decode_lanes if (has_lanes() if lanes is None else lanes) else _decode_plain
    given = (blob, _PAD, len(blob), group, tables.packed, tables.first, tables.last, ids, first, last, plane)
    return bool(code(*given)) and bool(_unmark(plane, first, last, np.frombuffer(escapes, np.uint8)))
