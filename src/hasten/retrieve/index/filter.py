"""Filters: which rows a search may return, as a bitmap over row numbers.

A filter is an array of ids, a mapping over attributes, or a function of the attribute columns. A mapping holds for a
row when every entry does: ``{"lang": "en", "year": {"min": 2020, "max": 2024}, "kind": {"in": ["a", "b"]}, "draft":
{"not": True}}``. Few rows are scored directly; otherwise lists are read in ascending order of their heads until k
survivors are found and the next head is too far.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hasten.errors import InvalidRequestError

__all__ = ["bitmap", "evaluate"]


def bitmap(chosen: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """Bits of a boolean array, lowest bit first; never empty, since an empty bitmap means no filter."""
    packed = np.packbits(chosen, bitorder="little")
    return packed if len(packed) else np.zeros(1, np.uint8)


def evaluate(
    where: Mapping[str, Any] | Callable[[dict[str, NDArray[Any]]], Any], columns: dict[str, NDArray[Any]], rows: int
) -> NDArray[np.bool_]:
    """Which of ``rows`` rows satisfy ``where``; raises InvalidRequestError naming the attribute at fault.

    >>> columns = {"year": np.array([1999, 2001]), "lang": np.array(["en", "en"])}
    >>> evaluate({"year": {"min": 2000}, "lang": "en"}, columns, 2).tolist()
    [False, True]
    """
    if callable(where):
        out = np.asarray(where(columns))
        if out.shape != (rows,) or out.dtype != np.bool_:
            raise InvalidRequestError(f"the filter gave {out.shape} {out.dtype}; it must give {rows} booleans", "where")
        return out
    out = np.ones(rows, np.bool_)
    for name, wanted in where.items():
        if name not in columns:
            known = ", ".join(columns) or "none"
            raise InvalidRequestError(f"where names the attribute {name!r}; the index has {known}", "where")
        values = columns[name]
        try:
            if isinstance(wanted, Mapping):
                for operator, bound in wanted.items():
                    out &= _compare(values, operator, bound)
            elif isinstance(wanted, (list, tuple, set)):
                out &= np.isin(values, list(wanted))
            else:
                out &= values == wanted
        except (TypeError, np.exceptions.DTypePromotionError) as error:
            raise InvalidRequestError(
                f"where compares {name!r} ({values.dtype}) with {wanted!r}: {error}", "where"
            ) from error
    return out


def _compare(values: NDArray[Any], operator: str, bound: Any) -> NDArray[np.bool_]:
    if operator == "min":
        return np.asarray(values >= bound)
    if operator == "max":
        return np.asarray(values <= bound)
    if operator == "in":
        return np.isin(values, list(bound))
    if operator == "not":
        return np.asarray(values != bound)
    raise InvalidRequestError(f"where has the operator {operator!r}; known are min, max, in, not", "where")
