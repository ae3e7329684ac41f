"""What a build is given beside its options: rows, ids and attributes, checked before anything is written."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hasten.errors import DataError
from hasten.retrieve.index.metric import check_rows
from hasten.retrieve.index.sources import Source

__all__ = ["check_column", "check_ids", "largest_norm", "pack_attributes"]


def largest_norm(source: Source, metric: int, block: int, progress: Callable[[str, float], None]) -> float:
    """Check every row; the largest norm. Raises DataError naming the row at fault."""
    largest = 0.0
    for begin in range(0, len(source), block):
        rows = source.block(begin, min(begin + block, len(source)))
        largest = max(largest, check_rows(rows, metric, begin))
        progress("check", 0.03 * min(1.0, (begin + block) / len(source)))
    return largest


def check_ids(ids: Any, count: int) -> NDArray[np.int64] | None:
    """(count,) ids; None where they are the row numbers. Raises DataError naming the row at fault."""
    if ids is None:
        return None
    array = np.asarray(ids)
    if array.shape != (count,) or array.dtype.kind not in "iu":
        raise DataError(f"ids have the shape {array.shape} and type {array.dtype}; give {count} integers")
    array = array.astype(np.int64)
    if count and array.min() < 0:
        raise DataError(f"row {int(np.argmin(array))} has the id {int(array.min())}; ids are not negative")
    order = np.argsort(array, kind="stable")
    same = np.flatnonzero(array[order][1:] == array[order][:-1])
    if len(same):
        row = int(order[same[0] + 1])
        raise DataError(
            f"row {row} has the id {int(array[row])}, which row {int(order[same[0]])} has already; ids are unique"
        )
    return None if np.array_equal(array, np.arange(count)) else array


def check_column(name: str, values: Any, count: int) -> NDArray[Any]:
    """(count,) numbers or texts of one attribute; raises DataError."""
    array = np.asarray(values)
    if array.dtype == object:
        array = np.array([str(v) for v in array])
    if array.shape != (count,) or array.dtype.kind not in "biufU":
        raise DataError(
            f"attribute {name!r} has the shape {array.shape} and type {array.dtype}; give {count} numbers or texts"
        )
    return array


def pack_attributes(columns: dict[str, NDArray[Any]]) -> bytes:
    """Columns as one npz document."""
    buffer = io.BytesIO()
    np.savez(buffer, **columns)  # type: ignore[arg-type]
    return buffer.getvalue()
