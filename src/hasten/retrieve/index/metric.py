"""Metrics as squared distances of one Euclidean space, in which the index is built and pruned.

L2 is itself. Cosine maps ``x`` to ``x / |x|``: d² = 2 - 2 cos. Inner product maps ``x`` to ``(x, sqrt(M² - |x|²))``
with ``M`` the largest norm and a query to ``(q, 0)``: d² = |q|² + M² - 2 <q, x>, so that the nearest row has the
largest product. The rows are stored as they came; the factor (1/|x|, or the extra coordinate) is kept beside them
where it is needed.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from hasten.errors import ConfigurationError, DataError

__all__ = [
    "COSINE",
    "DTYPES",
    "INNER",
    "L2",
    "code_of",
    "distances",
    "factors",
    "lanes",
    "mapped",
    "native",
    "prepare",
    "query_scale",
]

L2, COSINE, INNER = 0, 1, 2
_NAMES = {
    "l2": L2,
    "euclidean": L2,
    "cosine": COSINE,
    "angular": COSINE,
    "ip": INNER,
    "inner_product": INNER,
    "dot": INNER,
}
NAMES = ("l2", "cosine", "ip")
DTYPES = ("float32", "float16", "uint8", "int8")


def code_of(name: str) -> int:
    """The metric's number; raises ConfigurationError for an unknown name."""
    code = _NAMES.get(str(name).lower())
    if code is None:
        raise ConfigurationError(f"metric {name!r} is not known; use l2, cosine or ip")
    return code


def lanes(width: int) -> int:
    """Length of a query buffer: room for one more coordinate, in whole groups of sixteen."""
    return (width + 16) // 16 * 16


def native(rows: NDArray[Any]) -> NDArray[Any]:
    """Rows as the kernels read them: contiguous, float16 as its bits."""
    rows = np.ascontiguousarray(rows)
    return rows.view(np.uint16) if rows.dtype == np.float16 else rows


def _norms(rows: NDArray[np.float32]) -> NDArray[np.float64]:
    return np.asarray(np.sqrt(np.einsum("ij,ij->i", rows, rows, dtype=np.float64)))


def factors(rows: NDArray[Any], metric: int, largest: float) -> NDArray[np.float32]:
    """What belongs to each stored row (n,): 1/|x| for cosine, the extra coordinate for the inner product, nothing for
    L2.
    """
    if metric == L2:
        return np.zeros(0, np.float32)
    norms = _norms(rows.astype(np.float32))
    if metric == COSINE:
        return (1.0 / np.maximum(norms, 1e-30)).astype(np.float32)
    return np.sqrt(np.maximum(largest**2 - norms**2, 0.0)).astype(np.float32)


def mapped(rows: NDArray[Any], metric: int, largest: float) -> NDArray[np.float32]:
    """Rows (n, d) in the Euclidean space (n, d) or (n, d + 1), float32."""
    plain = np.ascontiguousarray(rows, np.float32)
    if metric == L2:
        return plain
    extra = factors(plain, metric, largest)
    if metric == COSINE:
        return plain * extra[:, None]
    return np.concatenate([plain, extra[:, None]], axis=1)


def prepare(
    rows: NDArray[Any], metric: int, largest: float, *, stored: bool = False
) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]:
    """Queries for the kernels: (rows padded (n, lanes) float32, the constant of each, the extra coordinate of each).

    ``stored`` treats them as rows of the collection, not as queries; this matters for the inner product only.
    """
    count, width = rows.shape
    out = np.zeros((count, lanes(width)), np.float32)
    out[:, :width] = rows
    none = np.zeros(count, np.float32)
    if metric == L2:
        return out, none, none
    norms = _norms(out)
    if metric == COSINE:
        out /= np.maximum(norms, 1e-30)[:, None].astype(np.float32)
        return out, np.full(count, 2.0, np.float32), none
    extra = np.sqrt(np.maximum(largest**2 - norms**2, 0.0)) if stored else np.zeros(count)
    return out, (norms**2 + extra**2 + largest**2).astype(np.float32), extra.astype(np.float32)


def query_scale(queries: NDArray[Any], metric: int, largest: float) -> NDArray[np.float32] | None:
    """Powers of two (n, 1) that bring inner-product queries (n, d) near the norm ``largest`` of the mapped rows; None
    for the other metrics.

    The order of products does not depend on a query's length, but the walk and the pruning rule see squared distances,
    in which a short query has none: every row is |M| away. A power of two changes no bit of a product.
    """
    if metric != INNER or not largest > 0:
        return None
    norms = _norms(np.asarray(queries, np.float32))
    powers = np.zeros(len(norms))
    some = norms > 0
    powers[some] = np.rint(np.log2(largest / norms[some]))
    return np.exp2(np.clip(powers, -100.0, 100.0)).astype(np.float32)[:, None]


def distances(values: NDArray[np.float32], metric: int) -> NDArray[np.float32]:
    """What a user sees: L2 distance, 1 - cosine, or minus the inner product; inf stays."""
    if metric == L2:
        return np.sqrt(values)  # sums of squares: never below zero
    return values * np.float32(0.5) if metric == COSINE else values


def check_rows(rows: NDArray[Any], metric: int, first: int = 0) -> float:
    """The largest norm; raises DataError naming the first row that is not finite or, under cosine, zero."""
    if rows.dtype.kind == "f":
        with np.errstate(invalid="ignore", over="ignore"):
            norms = _norms(rows.astype(np.float32))
        bad = np.flatnonzero(~np.isfinite(norms))
        if len(bad):
            raise DataError(f"row {first + int(bad[0])} holds NaN or infinity; remove it or replace its values")
    elif metric == L2:
        return 0.0
    else:
        norms = _norms(rows.astype(np.float32))
    if metric == COSINE:
        zero = np.flatnonzero(norms == 0)
        if len(zero):
            raise DataError(
                f"row {first + int(zero[0])} is zero and has no direction; cosine needs non-zero rows, or use l2"
            )
    return float(norms.max(initial=0.0))
