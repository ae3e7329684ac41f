"""What a search takes and gives: knobs, answers, and what they cost."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from hasten.errors import ConfigurationError

__all__ = ["Hit", "RangeHit", "SearchOptions", "SearchStats"]


@dataclass(frozen=True)
class SearchOptions:
    """How a search trades recall for work.

    >>> SearchOptions(lists=8).with_(epsilon=0.5).epsilon
    0.5
    """

    lists: int | None = 16
    """most lists that are read (m_max); None reads everything and is exact"""
    epsilon: float = 7.0
    """a list is kept while its head is at most (1 + epsilon) times as far as the nearest one"""
    beam: int | None = None
    """heads that the walk keeps; None: twice the lists, at least 24"""
    max_check: int = 1 << 30
    """most distances that the walk computes"""
    radius_rule: bool = False
    """also skip a list that the triangle inequality excludes: d(q, head) - radius > the k-th distance so far"""
    filtered_lists: int = 256
    """most lists that are read under a filter; a filter that keeps half of the rows reads twice the lists"""

    def __post_init__(self) -> None:
        if self.lists is not None and self.lists < 0:
            raise ConfigurationError(f"lists is {self.lists}; read at least 0 lists, or None for all")
        if not self.epsilon >= 0:
            raise ConfigurationError(f"epsilon is {self.epsilon}; it is a share and not negative")
        if self.beam is not None and self.beam < 1:
            raise ConfigurationError(f"beam is {self.beam}; the walk keeps at least 1 head")
        if self.max_check < 1 or self.filtered_lists < 1:
            raise ConfigurationError(
                f"max_check is {self.max_check}, filtered_lists {self.filtered_lists}; both are at least 1"
            )

    def with_(self, **changes: Any) -> SearchOptions:
        """A copy with other knobs."""
        return replace(self, **changes)

    @property
    def walk_beam(self) -> int:
        """The beam that applies."""
        if self.beam is not None:
            return max(self.beam, self.lists or 0, 1)
        return max(24, 2 * (self.lists or 0))

    def to_json(self) -> dict[str, Any]:
        """By name."""
        return {f.name: getattr(self, f.name) for f in fields(self)}


class SearchStats(NamedTuple):
    """What a batch cost, per query; every array is (Q,)."""

    lists: NDArray[np.int64]
    """lists read"""
    reads: NDArray[np.int64]
    """contiguous reads once neighbours are merged"""
    bytes: NDArray[np.int64]
    """bytes of the pages read"""
    distances: NDArray[np.int64]
    """distances computed: heads and rows"""
    complete: NDArray[np.bool_]
    """False where the deadline passed before every list had come"""

    def mean(self) -> dict[str, float]:
        """Means over the batch; ``complete`` as a share."""
        return {name: float(np.mean(each)) if len(each) else 0.0 for name, each in self._asdict().items()}


@dataclass(frozen=True, init=False)
class Hit:
    """The answers of a batch; unpacks as ``scores, ids = index.search(queries)``."""

    distances: NDArray[np.float32]
    """(Q, k) ascending: L2 distance, 1 - cosine, or minus the inner product; inf where there are fewer answers"""
    ids: NDArray[np.int64]
    """(Q, k); -1 where there are fewer answers"""
    stats: SearchStats
    """what it cost"""

    def __init__(self, distances: NDArray[np.float32], ids: NDArray[np.int64], stats: SearchStats) -> None:
        own = self.__dict__  # as quick as an object that is not frozen: a search takes twenty microseconds
        own["distances"], own["ids"], own["stats"] = distances, ids, stats

    def __iter__(self) -> Iterator[NDArray[Any]]:
        yield self.distances
        yield self.ids

    @property
    def complete(self) -> bool:
        """Whether every query read everything it wanted."""
        return bool(self.stats.complete.all())


@dataclass(frozen=True)
class RangeHit:
    """Everything within a radius: the answers of query ``i`` are ``bounds[i]:bounds[i + 1]``."""

    bounds: NDArray[np.int64]
    """(Q + 1,)"""
    distances: NDArray[np.float32]
    """ascending per query"""
    ids: NDArray[np.int64]
    """of each answer"""
    lists: NDArray[np.int64]
    """(Q,) lists read"""

    def __iter__(self) -> Iterator[NDArray[Any]]:
        yield self.bounds
        yield self.distances
        yield self.ids
