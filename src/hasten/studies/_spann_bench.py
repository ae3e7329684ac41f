"""One collection of the vector-search study: its rows, the truth, and the indices that were built of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hasten.clock import Clock
from hasten.retrieve.index.build import BuildOptions, build
from hasten.retrieve.index.hit import SearchOptions
from hasten.retrieve.index.spann import Spann
from hasten.retrieve.index.synthetic import clustered
from hasten.retrieve.index.tune import recall_of
from hasten.studies.study import Scale

__all__ = ["WIDE", "Bench", "Curve", "recall_at", "true_neighbours"]

WIDE = 1e15
"""an epsilon that prunes nothing"""
Curve = list[tuple[float, float, float, float]]
"""(lists, candidates, bytes, recall) along a ladder"""


@dataclass
class Bench:
    """The collection of one run, its truth, and the indices that were built of it."""

    scale: Scale
    folder: Path
    rows: NDArray[np.float32]
    queries: NDArray[np.float32]
    truth: NDArray[np.int64]
    clock: Clock
    common: dict[str, Any]
    built: dict[str, Spann]
    seconds: dict[str, float]
    _curves: dict[int, Curve] = field(default_factory=dict)

    @classmethod
    def of(cls, scale: Scale, folder: Path, n: int, d: int, clock: Clock, **common: Any) -> Bench:
        """``n`` rows of the generator, with queries and truth; ``common`` are options of every build."""
        rows, queries = clustered(n, d, scale.choose(quick=200, full=500), seed=7 + scale.seed)
        folder.mkdir()
        return cls(scale, folder, rows, queries, true_neighbours(rows, queries), clock, common, {}, {})

    def close(self) -> None:
        """Close what was built."""
        for index in self.built.values():
            index.close()

    def index(self, name: str, **options: Any) -> Spann:
        """An index by name; built once, with head ratio 0.12 unless told otherwise."""
        if name not in self.built:
            given = {"head_ratio": 0.12, "memory": "4GiB", "seed": self.scale.seed, **self.common, **options}
            chosen = BuildOptions(**given)
            begin = self.clock.now()
            build(self.rows, self.folder / name, chosen)
            self.seconds[name] = self.clock.now() - begin
            self.built[name] = Spann.open(self.folder / name, read_only=True)
        return self.built[name]

    def recall(self, index: Spann, lists: int, epsilon: float = WIDE, beam: int = 0) -> tuple[float, dict[str, float]]:
        """(recall@10, what a query read) with as good as exact head search."""
        beam = min(max(beam, 3 * lists, 96), len(index._view.generation.counts))
        hit = index.search(self.queries, 10, options=SearchOptions(lists=lists, epsilon=epsilon, beam=beam))
        return recall_of(hit.ids, self.truth), hit.stats.mean()

    def curve(self, index: Spann) -> Curve:
        """Along a ladder of lists, with as good as exact head search; kept, since several checks look at it."""
        if id(index) in self._curves:
            return self._curves[id(index)]
        out = []
        heads = self.recall(index, 0)[1]["distances"]
        for lists in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64):
            beam = max(96, 3 * lists)
            recall, told = self.recall(index, lists)
            walk = self.recall(index, 0, beam=beam)[1]["distances"] if beam > 96 else heads
            out.append((told["lists"], max(told["distances"] - walk, 1.0), told["bytes"], recall))
        self._curves[id(index)] = out
        return out


def recall_at(curve: Curve, column: int, value: float) -> float:
    """Recall where a column of the curve has a value, between the points linear in its logarithm."""
    return float(np.interp(np.log(value), np.log([c[column] for c in curve]), [c[3] for c in curve]))


def true_neighbours(rows: NDArray[np.float32], queries: NDArray[np.float32], k: int = 10) -> NDArray[np.int64]:
    """True neighbours, by matrix products and never by the index."""
    best_d = np.full((len(queries), k), np.inf, np.float32)
    best_i = np.full((len(queries), k), -1, np.int64)
    for begin in range(0, len(rows), 20_000):
        part = rows[begin : begin + 20_000]
        distance = (part**2).sum(1) - 2 * queries @ part.T + (queries**2).sum(1)[:, None]
        keep = min(k, len(part) - 1)
        near = np.argpartition(distance, keep, axis=1)[:, :k]
        joined = np.concatenate([best_d, np.take_along_axis(distance, near, 1)], 1)
        names = np.concatenate([best_i, near + begin], 1)
        order = np.argsort(joined, axis=1, kind="stable")[:, :k]
        best_d, best_i = np.take_along_axis(joined, order, 1), np.take_along_axis(names, order, 1)
    return best_i
