"""Retrieval: an index of vectors that outgrow the memory.

Nothing heavy is imported before it is used; the index needs numpy and numba, never torch.

>>> import hasten.retrieve as hr
>>> hr.SearchOptions(lists=8).lists
8
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hasten.retrieve.index import BuildOptions, Hit, RangeHit, SearchOptions, Spann, clustered, cost, tune_search

__all__ = ["BuildOptions", "Hit", "RangeHit", "SearchOptions", "Spann", "clustered", "cost", "tune_search"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module("hasten.retrieve.index"), name)
