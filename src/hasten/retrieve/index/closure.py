"""Closure over a whole collection: blocks of rows, searched by several threads, in the order of the rows."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hasten.retrieve.index.assign import assign_rows, thin_copies
from hasten.retrieve.index.lists import PAIR
from hasten.retrieve.index.metric import prepare
from hasten.retrieve.index.options import BuildOptions
from hasten.retrieve.index.sources import Source
from hasten.retrieve.index.walk import marks

__all__ = ["closure", "closure_knobs"]


def closure(
    source: Source,
    state: tuple[Any, ...],
    metric: int,
    largest: float,
    is_head: NDArray[np.bool_],
    copies: NDArray[np.uint8],
    options: BuildOptions,
    block: int,
    threads: int,
) -> Iterator[tuple[NDArray[Any], float]]:
    """Yield (pairs, share done) of the rows that are not heads, in order.

    ``state`` is (heads, factors, graph, seeds); ``copies`` (n,) is filled.
    """
    n, count = len(source), len(state[0])
    linear = count <= 256
    knobs = closure_knobs(options, count)
    walks = [marks(count, state[2].shape[1]) for _ in range(threads)]

    def run(begin: int) -> tuple[Any, ...]:
        rows = begin + np.flatnonzero(~is_head[begin : begin + block])
        if len(rows) == 0:
            nothing = np.empty((0, options.replicas))
            return rows, nothing.astype(np.int32), nothing.astype(np.float32), np.zeros(0, np.int32)
        own = walks.pop()
        try:
            queries, consts, augs = prepare(source.take(rows), metric, largest, stored=True)
            found, distance, sizes = assign_rows(
                queries,
                consts,
                augs,
                state,
                metric,
                np.empty(0, np.uint8),
                knobs,
                linear,
                own,
            )
        finally:
            walks.append(own)
        return rows, found, distance, sizes

    lengths, most = np.zeros(count, np.int64), -1
    starts = list(range(0, n, block))
    with ThreadPoolExecutor(threads) as pool:
        for at in range(0, len(starts), threads):
            for rows, found, distance, sizes in pool.map(run, starts[at : at + threads]):
                if most < 0 and len(sizes):  # the mean that is to be expected, from the first rows
                    mean = float(sizes[:128].mean()) * (n - count) / count
                    most = int(np.ceil(options.crowding * mean)) if options.crowding > 0 else 1 << 62
                thin_copies(found, distance, sizes, lengths, most)
                copies[rows] = sizes
                used = np.arange(options.replicas) < sizes[:, None]
                pairs = np.empty(int(sizes.sum()), PAIR)
                pairs["head"] = found[used]
                pairs["distance"] = distance[used]
                pairs["row"] = np.repeat(rows, sizes)
                yield pairs, min(1.0, (at + threads) / len(starts))


def closure_knobs(options: BuildOptions, count: int) -> tuple[int, int, float, float, bool, int]:
    """What :func:`~hasten.retrieve.index.assign.assign_rows` takes."""
    candidates = min(options.candidates, count)
    return (
        candidates,
        min(count, max(candidates + candidates // 2, options.replicas)),
        float((1.0 + options.epsilon) ** 2),
        float(options.rng_factor**2),
        bool(options.rng_rule),
        int(options.replicas),
    )
