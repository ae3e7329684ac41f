"""Which lists take rows that come to an index that exists."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from hasten.retrieve.index.assign import assign_rows
from hasten.retrieve.index.closure import closure_knobs
from hasten.retrieve.index.format import Generation, Manifest
from hasten.retrieve.index.lists import PAIR
from hasten.retrieve.index.metric import prepare
from hasten.retrieve.index.options import BuildOptions
from hasten.retrieve.index.walk import marks

__all__ = ["assign", "assign_stored", "options_of", "pairs_of", "place"]


def options_of(manifest: Manifest) -> BuildOptions:
    """The options that the index was built with."""
    stored = dict(manifest.parameters.get("options", {}))
    stored["codes"] = manifest.coded
    return BuildOptions(**stored)


def assign_stored(
    rows: NDArray[Any],
    state: tuple[Any, ...],
    metric: int,
    largest: float,
    usable: NDArray[np.uint8],
    options: BuildOptions,
) -> tuple[NDArray[np.int32], NDArray[np.float32], NDArray[np.int32]]:
    """(heads, squared distances, how many) of each row, (m, replicas)."""
    count = len(state[0])
    queries, consts, augs = prepare(rows, metric, largest, stored=True)
    walks = marks(count, state[2].shape[1])
    knobs = closure_knobs(options, count)
    found, distance, sizes = assign_rows(queries, consts, augs, state, metric, usable, knobs, count <= 256, walks)
    lost = np.flatnonzero(sizes == 0)  # every head that the walk met is retired: look at all
    if len(lost):
        found[lost], distance[lost], sizes[lost] = assign_rows(
            queries[lost], consts[lost], augs[lost], state, metric, usable, knobs, True, walks
        )
    return found, distance, sizes


def assign(
    generation: Generation, rows: NDArray[Any], usable: NDArray[np.uint8]
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Lists (m, replicas) of new rows (m, d) in the user's dtype, and how many of them count."""
    g = generation
    found, _, sizes = assign_stored(
        rows, (g.heads, g.extra, g.graph, g.seeds), g.metric, g.manifest.largest, usable, options_of(g.manifest)
    )
    return found, sizes


def pairs_of(
    rows: NDArray[np.int64], found: NDArray[np.int32], distance: NDArray[np.float32], sizes: NDArray[np.int32]
) -> NDArray[Any]:
    """What :func:`assign_stored` found for row numbers, as pairs."""
    used = np.arange(found.shape[1]) < sizes[:, None]
    pairs = np.empty(int(sizes.sum()), PAIR)
    pairs["head"], pairs["distance"], pairs["row"] = found[used], distance[used], np.repeat(rows, sizes)
    return pairs


def place(
    generation: Generation, rows: NDArray[np.int64], vectors: NDArray[Any], usable: NDArray[np.uint8]
) -> NDArray[Any]:
    """Pairs of rows whose lists are lost, from their vectors."""
    g = generation
    state = (g.heads, g.extra, g.graph, g.seeds)
    return pairs_of(rows, *assign_stored(vectors, state, g.metric, g.manifest.largest, usable, options_of(g.manifest)))
