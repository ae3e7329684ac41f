"""Keys and values as codes of one byte, and back: turned to position 0, less their anchor, in bins of a layer's width.

One pass over the numbers in each direction, row by row (a row is the keys or the values of one layer): rotation, the
anchor of every ``group``-th token with its scale, the difference of the others to it, rounding to a bin. A channel
whose values are narrower than its differences is coded as they are, less its mean. Codes are 0 to 254, 127 is zero.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from hasten.errors import DataError
from hasten.nn.bfloat import FAST, bits_of_float, float_of_bits

__all__ = ["EDGE", "LEVELS", "Form", "Level", "dequantise", "quantise", "turns"]

EDGE = 127
"""The code of zero, and the largest distance from it."""
Floats = NDArray[np.float32]
_bits: Any = bits_of_float
_float: Any = float_of_bits


@dataclass(frozen=True)
class Level:
    """How coarse: bin widths as multiples of the layer's spread, for thirds of the layers."""

    keys: tuple[float, float, float]
    values: tuple[float, float, float]

    def width(self, which: int, layer: int, layers: int) -> float:
        """Bin width for keys (0) or values (1) of a layer."""
        return (self.keys, self.values)[which][min(2, 3 * layer // layers)]


LEVELS: dict[int, Level] = {
    1: Level((1.0, 1.5, 2.0), (1.2, 1.8, 2.4)),
    2: Level((0.7, 1.0, 1.4), (0.8, 1.2, 1.6)),
    3: Level((0.5, 0.7, 1.0), (0.6, 0.9, 1.2)),
    4: Level((0.25, 0.35, 0.5), (0.3, 0.45, 0.6)),
}
"""From coarse to fine. Level 0 is no level of this table: it means the exact bytes."""


@dataclass(frozen=True)
class Form:
    """What the kernels need to know of a level; rows are layers times keys and values."""

    group: int
    """tokens from one anchor to the next"""
    delta: NDArray[np.bool_]
    """(rows, channels): whether differences to the anchor are coded"""
    mean: Floats
    """(rows, channels): taken off the others"""
    width: Floats
    """(rows,): of a bin"""
    heads: int
    pairs: int
    """numbers of a head that turn with another"""
    local: NDArray[np.bool_]
    """(rows / 2,): layers with the rotation of local attention"""


_TABLES: dict[Any, Any] = {}


def turns(config: Any, start: int, tokens: int, back: bool) -> Floats:
    """Rotation of positions ``start`` on, or back to 0: (global or local, cos or sin, tokens, pairs)."""
    if config not in _TABLES:
        from hasten.language.decoder import rotary_tables

        _TABLES.clear()
        longest = config.max_position_embeddings
        one = rotary_tables(config, longest)
        other = rotary_tables(config, longest, local=True) if config.local_rope_theta is not None else one
        _TABLES[config] = np.stack([np.stack([t.numpy() for t in pair]) for pair in (one, other)]).astype(np.float32)
    out = _TABLES[config][:, :, start : start + tokens].copy()
    if out.shape[2] != tokens:
        raise DataError(
            f"tokens {start} to {start + tokens}, the model takes {config.max_position_embeddings}; compute them again"
        )
    if back:
        scale = (out**2).sum(1, keepdims=True)  # one, but for stretched embeddings that scale
        out /= scale
        out[:, 1] *= -1
    return np.ascontiguousarray(out)


@njit(cache=True, nogil=True, fastmath=FAST, error_model="numpy")
def _turn(line: Any, heads: int, pairs: int, cos: Any, sin: Any, out: Any) -> None:
    width = len(line) // heads
    for head in range(heads):
        x, y = line[head * width : (head + 1) * width], out[head * width : (head + 1) * width]
        for i in range(pairs):
            a, b = x[i], x[pairs + i]
            y[i] = a * cos[i] - b * sin[i]
            y[pairs + i] = b * cos[i] + a * sin[i]
        for i in range(2 * pairs, width):
            y[i] = x[i]


@njit(cache=True, nogil=True, fastmath=FAST, error_model="numpy")
def _quantise(
    keys: Any, values: Any, turns: Any, local: Any, heads: int, pairs: int, group: int, delta: Any, mean: Any,
    widths: Any, first: int, last: int, plane: Any, scales: Any,
) -> Any:  # fmt: skip
    tokens, channels = keys.shape[1], keys.shape[2]
    base, turned = np.empty(channels, np.float32), np.empty(channels, np.float32)
    anchored = np.empty(channels, np.float32)
    probe = np.float32(0.0)
    for row in range(first, last):
        layer, half = row // 2, keys if row % 2 == 0 else values
        table = turns[1 if local[layer] else 0]
        inverse = np.float32(1.0) / widths[row]
        some = delta[row].any()
        base[:] = mean[row]
        for token in range(tokens):
            line = half[layer, token]
            for i in range(channels):
                probe += line[i] * np.float32(0.0)
            if row % 2 == 0:
                _turn(line, heads, pairs, table[0, token], table[1, token], turned)
                line = turned
            codes = plane[row, token]
            anchor = some and token % group == 0
            if anchor:
                top = np.float32(1e-7)
                for i in range(channels):
                    top = max(top, abs(line[i]))
                bits = (_bits(top / np.float32(EDGE)) + np.uint32(0xFFFF)) >> np.uint32(16)  # up, so that it fits
                scales[row, token // group] = bits
                scale = _float(np.uint32(bits << np.uint32(16)))
                share = np.float32(1.0) / scale
                for i in range(channels):
                    anchored[i] = np.rint(line[i] * share)
                    base[i] = anchored[i] * scale if delta[row, i] else mean[row, i]
            for i in range(channels):
                bins = np.rint((line[i] - base[i]) * inverse)
                if anchor:
                    bins = anchored[i] if delta[row, i] else bins
                bins = min(max(bins, np.float32(-EDGE)), np.float32(EDGE))
                codes[i] = np.uint8(np.int32(bins) + EDGE)
    return probe == 0


@njit(cache=True, nogil=True, fastmath=FAST, error_model="numpy")
def _dequantise(
    plane: Any, scales: Any, turns: Any, local: Any, heads: int, pairs: int, group: int, delta: Any, mean: Any,
    widths: Any, first: int, last: int, keys: Any, values: Any,
) -> None:  # fmt: skip
    tokens, channels = keys.shape[1], keys.shape[2]
    base, straight = np.empty(channels, np.float32), np.empty(channels, np.float32)
    for row in range(first, last):
        layer, half = row // 2, keys if row % 2 == 0 else values
        table, width = turns[1 if local[layer] else 0], widths[row]
        some = delta[row].any()
        base[:] = mean[row]
        for token in range(tokens):
            out = half[layer, token]
            line = straight if row % 2 == 0 else out
            codes = plane[row, token]
            if some and token % group == 0:
                scale = _float(np.uint32(np.uint32(scales[row, token // group]) << np.uint32(16)))
                for i in range(channels):
                    bins = np.float32(np.int32(codes[i]) - EDGE)
                    base[i] = bins * scale if delta[row, i] else mean[row, i]
                    line[i] = base[i] if delta[row, i] else base[i] + bins * width
            else:
                for i in range(channels):
                    line[i] = base[i] + np.float32(np.int32(codes[i]) - EDGE) * width
            if row % 2 == 0:
                _turn(line, heads, pairs, table[0, token], table[1, token], out)


def quantise(
    form: Form, keys: Floats, values: Floats, back: Floats, first: int, last: int, plane: Any, scales: Any
) -> bool:
    """Rows ``first`` to ``last`` of keys and values (layers, tokens, channels) -> codes into plane (rows, tokens,
    lanes), scales of the anchors as the upper halves of float32 into (rows, anchors) uint16; whether all is finite.

    ``back``: what :func:`turns` gives for these positions.
    """
    given = (back, form.local, form.heads, form.pairs, form.group, form.delta, form.mean, form.width, first, last)
    return bool(_quantise(keys, values, *given, plane, scales))


def dequantise(
    form: Form, plane: Any, scales: Any, forth: Floats, first: int, last: int, keys: Floats, values: Floats
) -> None:
    """The inverse of :func:`quantise` as far as there is one, into ``keys`` and ``values``."""
    given = (forth, form.local, form.heads, form.pairs, form.group, form.delta, form.mean, form.width, first, last)
    _dequantise(plane, scales, *given, keys, values)
