"""Distances between a query and heads.

They are squared and of the mapped space (see ``metric``): metric 0 is L2, 1 cosine, 2 inner product, 3 L2 between byte
codes and a query of int16 (see ``guide``).
"""

from __future__ import annotations

import numba

from hasten.retrieve.index.kernel import hot
from hasten.retrieve.index.simd import address_of, dot1, dot4, squared1, squared4, widen
from hasten.retrieve.index.simd_bytes import bytes1, bytes4

__all__ = ["CODED", "four_distances", "head_distance", "map_head"]

CODED = 3
"""the metric of byte codes"""


@hot
def head_distance(heads, extra, metric, query, const, aug, head):
    """Squared mapped distance between the query at address ``query`` and one head."""
    width = heads.shape[1]
    row = address_of(heads) + head * width * heads.itemsize
    if metric == 3:
        return bytes1(query, row, width)
    if metric == 0:
        return squared1(heads, query, row, width)
    dot = dot1(heads, query, row, width)
    if metric == 1:
        return const - numba.float32(2.0) * dot * extra[head]
    return const - numba.float32(2.0) * (dot + aug * extra[head])


@hot
def four_distances(rows, extra, metric, query, const, aug, base, stride, width, a, b, c, d, ha, hb, hc, hd):
    """Distances to rows a, b, c, d of ``rows``; ``ha`` … are the heads whose extras belong to them."""
    two = numba.float32(2.0)
    pa, pb, pc, pd = base + a * stride, base + b * stride, base + c * stride, base + d * stride
    if metric == 3:
        return bytes4(query, pa, pb, pc, pd, width)
    if metric == 0:
        return squared4(rows, query, pa, pb, pc, pd, width)
    da, db, dc, dd = dot4(rows, query, pa, pb, pc, pd, width)
    if metric == 1:
        return (
            const - two * da * extra[ha],
            const - two * db * extra[hb],
            const - two * dc * extra[hc],
            const - two * dd * extra[hd],
        )
    return (
        const - two * (da + aug * extra[ha]),
        const - two * (db + aug * extra[hb]),
        const - two * (dc + aug * extra[hc]),
        const - two * (dd + aug * extra[hd]),
    )


@hot
def map_head(heads, extra, metric, head, out):
    """Write a head in the mapped space to ``out`` (lanes,) float32; returns the width of the mapped space."""
    width = heads.shape[1]
    widen(heads, address_of(heads) + head * width * heads.itemsize, address_of(out), width)
    if metric == 1:
        for i in range(width):
            out[i] *= extra[head]
        return width
    if metric == 2:
        out[width] = extra[head]
        return width + 1
    return width
