"""Byte copies of the heads, by which a walk finds its way.

A walk only has to find near heads; what it finds is scored exactly afterwards. One byte a coordinate is a quarter of
the memory traffic: head ``h`` of the mapped space becomes ``u_i = round((h_i - low_i) / unit)`` with one ``unit`` for
all coordinates, so that ``unit² Σ (u_i - v_i)²`` is the squared distance. Rows that are bytes already are their own
codes. There is no guide where its error would matter beside the distances between neighbouring heads.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

from hasten import huge_pages
from hasten.retrieve.index.format import seed_arrays
from hasten.retrieve.index.kernel import hot
from hasten.retrieve.index.metric import INNER, L2, mapped

__all__ = ["ERROR", "code_query", "guide_bytes", "make_guide", "no_guide", "query_lanes"]

ERROR = 0.1
"""largest error of a coded distance, as a share of the distance to the nearest other head"""
STEP = 1024
"""heads that are coded at a time, so that what is held meanwhile is small beside the guide"""

Guide = tuple[Any, ...]
"""codes (H, w) uint8, seeds of codes, low (w,) and 1 / unit float32, whether codes are the heads themselves"""


def query_lanes(width: int) -> int:
    """Length of a coded query: one more coordinate, in whole groups of 32."""
    return (width + 32) // 32 * 32


def no_guide(width: int) -> Guide:
    """The walk takes the heads as they are."""
    nothing = np.zeros((0, width), np.uint8)
    none = np.zeros(0, np.int32)
    seeds = (nothing, none, nothing, none, np.zeros(1, np.int32))
    return (nothing, seeds, np.zeros(width, np.float32), np.float32(1.0), 0)


def guide_bytes(heads: int, groups: Any, width: int, metric: int, *, own: bool) -> int:
    """Bytes that a guide takes; ``own``: the heads are their own codes, only the seeds are copied."""
    return ((0 if own else heads) + len(groups[0]) + len(groups[1])) * (width + (metric == INNER))


def make_guide(heads: NDArray[Any], graph: NDArray[np.int32], groups: Any, metric: int, largest: float) -> Guide:
    """The guide of heads (H, d) in the kernels' dtype (float16 as its bits) with the seeds of ``groups``, or none where
    bytes do not suffice.
    """
    if heads.dtype == np.uint8 and metric == L2:
        seeds = seed_arrays(heads, groups)
        return (heads, seeds, np.zeros(heads.shape[1], np.float32), np.float32(1.0), 1)
    count, width = len(heads), heads.shape[1]
    if count < 64:
        return no_guide(width)

    def floats(rows: NDArray[Any]) -> NDArray[np.float32]:
        return mapped(rows.view(np.float16) if rows.dtype == np.uint16 else rows, metric, largest)

    steps = range(0, count, STEP)
    low = np.min([floats(heads[b : b + STEP]).min(0) for b in steps], axis=0)
    high = np.max([floats(heads[b : b + STEP]).max(0) for b in steps], axis=0)
    unit = float(max((high - low).max() / 255.0, 2.0**-100))
    if heads.dtype == np.int8 and metric == L2:
        low, unit = np.full(width, -128.0, np.float32), 1.0
    sample = np.linspace(0, count - 1, min(count, 512)).astype(np.int64)
    sample = sample[graph[sample, 0] >= 0]
    gap = np.linalg.norm(floats(heads[sample]) - floats(heads[graph[sample, 0]]), axis=1)
    error = unit * np.sqrt(len(low) / 6.0)  # of a difference of two codes
    if not len(gap) or error > ERROR * float(np.median(gap)):
        return no_guide(width)

    def code(rows: NDArray[Any]) -> NDArray[np.uint8]:
        # in large pages where there are any: a walk jumps, and each page is looked up
        out = huge_pages.zeros(len(rows) * len(low)).reshape(len(rows), len(low))
        for b in range(0, len(rows), STEP):
            out[b : b + STEP] = np.clip(np.rint((floats(rows[b : b + STEP]) - low) / unit), 0, 255)
        return out

    codes = code(heads)
    return (codes, seed_arrays(codes, groups), low.astype(np.float32), np.float32(1.0 / unit), 0)


@hot
def code_query(query, low, inverse, out):
    """Code a mapped query into ``out`` (lanes,) int16; returns whether the codes are the query itself.

    A coordinate far outside the heads' range is clipped so that no sum of squares passes 2³¹.
    """
    width = low.shape[0]
    reach = numba.float32(np.floor(np.sqrt(2147483647.0 / width)) - 1.0)
    least, most = max(numba.float32(255.0) - reach, numba.float32(-16000.0)), min(reach, numba.float32(16000.0))
    same = True
    for i in range(width):
        value = (query[i] - low[i]) * inverse
        near = np.rint(value)
        same &= near == value and near >= 0 and near <= 255
        out[i] = numba.int16(min(max(near, least), most))
    return same
