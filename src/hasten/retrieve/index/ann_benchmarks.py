"""The index behind the interface of ann-benchmarks: ``fit``, ``set_query_arguments``, ``query``, ``batch_query``,
``get_batch_results``.

In its ``config.yml``: module ``hasten.retrieve.index.ann_benchmarks``, constructor ``Algorithm``, arguments
``["@metric", {head_ratio: 0.16}]``, query arguments ``[[8, 12, 16], [24, 48]]`` (lists, beam).
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hasten.errors import ConfigurationError
from hasten.retrieve.index.hit import SearchOptions
from hasten.retrieve.index.spann import Spann

__all__ = ["Algorithm"]

_METRICS = {"euclidean": "l2", "angular": "cosine", "ip": "ip"}


class Algorithm:
    """One configuration of the index.

    >>> algorithm = Algorithm("euclidean", {"head_ratio": 0.2})
    >>> rows = np.random.default_rng(0).normal(size=(300, 8)).astype(np.float32)
    >>> algorithm.fit(rows)
    >>> algorithm.set_query_arguments(8, 24)
    >>> int(algorithm.query(rows[7], 1)[0])
    7
    >>> algorithm.done()
    """

    def __init__(self, metric: str, options: dict[str, Any] | None = None) -> None:
        if metric not in _METRICS:
            raise ConfigurationError(f"metric {metric!r} is not known; use {', '.join(_METRICS)}")
        self._metric, self._build = _METRICS[metric], dict(options or {})
        self._folder: Path | None = None
        self._index: Spann | None = None
        self._options = SearchOptions()
        self._batch: NDArray[np.int64] | None = None
        self.name = f"hasten-spann({self._metric}, {self._build})"

    @property
    def index(self) -> Spann:
        """The index; raises ConfigurationError before ``fit``."""
        if self._index is None:
            raise ConfigurationError("fit comes first")
        return self._index

    def fit(self, vectors: NDArray[Any]) -> None:
        """Build."""
        self._folder = Path(tempfile.mkdtemp(prefix="hasten-ann-"))
        self._index = Spann.build(np.asarray(vectors), self._folder / "index", metric=self._metric, **self._build)

    def set_query_arguments(self, lists: int, beam: int | None = None, epsilon: float = 1e15) -> None:
        """Knobs of the queries that follow."""
        self._options = SearchOptions(lists=lists, beam=beam, epsilon=epsilon)
        self.name = f"hasten-spann({self._metric}, {self._build}, lists={lists}, beam={beam})"

    def query(self, vector: NDArray[Any], n: int) -> NDArray[np.int64]:
        """Ids of the n nearest."""
        ids = self.index.search(vector, n, options=self._options, detail=False).ids[0]
        return np.asarray(ids[ids >= 0])

    def batch_query(self, vectors: NDArray[Any], n: int) -> None:
        """Answer many at once, on all processors."""
        import os

        hit = self.index.search(vectors, n, options=self._options, threads=os.cpu_count() or 1, detail=False)
        self._batch = hit.ids

    def get_batch_results(self) -> list[NDArray[np.int64]]:
        """Answers of the last batch."""
        return [] if self._batch is None else [row[row >= 0] for row in self._batch]

    def get_memory_usage(self) -> float:
        """Kilobytes in memory, as ann-benchmarks counts."""
        return self.index.memory()["total"] / 1024

    def done(self) -> None:
        """Close and delete."""
        if self._index is not None:
            self._index.close()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    def __str__(self) -> str:
        return self.name
