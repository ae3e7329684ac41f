"""Rows and row numbers out of the lists, the heads and what was added, wherever they lie."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

from hasten.retrieve.index.format import Generation
from hasten.retrieve.index.query import View, row_addresses
from hasten.retrieve.index.simd import load_i64, load_u8

__all__ = ["gather", "list_pairs", "plain"]

njit = numba.njit(nogil=True, cache=True)


@njit
def _copy(addresses, row_bytes, out):
    """Rows at addresses to ``out`` (rows, row_bytes) uint8."""
    whole = row_bytes // 8 * 8
    for i in range(addresses.shape[0]):
        at = addresses[i]
        words = out[i, :whole].view(np.int64)
        for t in range(whole // 8):
            words[t] = load_i64(at + 8 * t)
        for t in range(whole, row_bytes):
            out[i, t] = load_u8(at + t)


def gather(view: View, rows: NDArray[np.int64]) -> NDArray[Any]:
    """Vectors (m, d) of live rows, in the kernels' dtype."""
    g = view.generation
    places, _ = row_addresses(view, rows)
    size = -(-g.row_bytes // 8) * 8
    out = np.zeros((len(rows), size), np.uint8)
    _copy(places, g.row_bytes, out)
    return np.ascontiguousarray(out[:, : g.row_bytes]).view(g.heads.dtype).reshape(len(rows), g.manifest.width)


def plain(rows: NDArray[Any], dtype: str) -> NDArray[Any]:
    """Rows in the kernels' dtype as the user's."""
    return rows.view(np.float16) if dtype == "float16" else rows


@njit
def _numbers(addresses, counts, row_bytes, metric, chosen, heads_out, rows_out):
    """(head, row) of everything in the chosen lists; returns how many."""
    n = 0
    for i in range(chosen.shape[0]):
        h = chosen[i]
        size = counts[h] * row_bytes
        if metric == 1:
            size = ((size + 3) & ~3) + 4 * counts[h]
        at = addresses[h] + ((size + 7) & ~7)
        for r in range(counts[h]):
            heads_out[n] = h
            rows_out[n] = load_i64(at + 8 * r)
            n += 1
    return n


def list_pairs(generation: Generation, chosen: NDArray[np.int64]) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """(heads, rows) of everything in the chosen lists."""
    g = generation
    total = int(g.counts[chosen].sum())
    heads, rows = np.empty(total, np.int32), np.empty(total, np.int64)
    _numbers(g.addresses, g.counts, g.row_bytes, g.metric, np.ascontiguousarray(chosen, np.int64), heads, rows)
    return heads, rows
