"""Vectors on disk, searched within a memory budget: posting lists under a graph of heads (SPANN).

>>> from hasten.retrieve.index import BuildOptions
>>> BuildOptions(metric="cosine").metric
'cosine'
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hasten.retrieve.index.build import BuildOptions
    from hasten.retrieve.index.cost_model import cost
    from hasten.retrieve.index.hit import Hit, RangeHit, SearchOptions, SearchStats
    from hasten.retrieve.index.shards import Shards
    from hasten.retrieve.index.spann import Spann
    from hasten.retrieve.index.synthetic import clustered
    from hasten.retrieve.index.tune import Tuned, tune_search

__all__ = [
    "BuildOptions",
    "Hit",
    "RangeHit",
    "SearchOptions",
    "SearchStats",
    "Shards",
    "Spann",
    "Tuned",
    "clustered",
    "cost",
    "tune_search",
]

_HOMES = {
    "BuildOptions": "build",
    "Hit": "hit",
    "RangeHit": "hit",
    "SearchOptions": "hit",
    "SearchStats": "hit",
    "Shards": "shards",
    "Spann": "spann",
    "Tuned": "tune",
    "clustered": "synthetic",
    "cost": "cost_model",
    "tune_search": "tune",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"hasten.retrieve.index.{_HOMES[name]}"), name)
