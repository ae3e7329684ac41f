"""Searching one opened generation: prepare queries, call the kernels on as many threads as wanted, translate the
answer.

With ``io="mmap"`` a batch is one call without the GIL per thread. With ``pread`` or ``direct``, or a deadline, each
query plans its lists, merges them into reads, and scores each read as it arrives while the others are under way.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import isfinite
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hasten.clock import Clock
from hasten.errors import InvalidRequestError
from hasten.retrieve.index import scan
from hasten.retrieve.index.blocks import scan_lists
from hasten.retrieve.index.exact import score_rows, within
from hasten.retrieve.index.format import HEAD_BIT, SLOT_BITS, Generation, bytes_of_list
from hasten.retrieve.index.hit import SearchOptions, SearchStats
from hasten.retrieve.index.io import PAGE, Read, Reader, merge_reads
from hasten.retrieve.index.metric import COSINE, INNER, L2, prepare, query_scale
from hasten.retrieve.index.plan import CHECKED, KEPT
from hasten.retrieve.index.plan import plan as plan_one
from hasten.retrieve.index.plan import scratch as new_scratch

__all__ = ["NO_MASK", "MappedReader", "View", "plan", "row_addresses", "run", "run_rows", "run_within"]


NO_MASK = np.zeros(0, np.uint8)
"""every row passes"""
_NONE = np.zeros(0, np.int32)
_COMPLETE = np.ones(4096, np.bool_)
_COMPLETE.setflags(write=False)  # the flags of a search that nothing cuts short


@dataclass(frozen=True)
class View:
    """What a search sees: one generation, the rows added since, the rows deleted since. Immutable."""

    generation: Generation
    delta: tuple[Any, ...]
    """rows, factors, alive, first, entry rows, entry next, base; see ``delta``"""
    dead: NDArray[np.uint8]
    """bitmap over the generation's rows; empty: none"""
    floor: float
    """least squared distance to the nearest head that pruning assumes, so that a query equal to a head keeps its
    neighbours
    """
    heads: tuple[Any, ...]
    """what the kernels take for the heads"""
    lists: tuple[Any, ...]
    """what the kernels take for the lists"""

    @classmethod
    def of(cls, generation: Generation, delta: tuple[Any, ...], dead: NDArray[np.uint8], floor: float) -> View:
        """From a generation."""
        g = generation
        guided = len(g.guide[0]) > 0  # then the walk does not take the seeds' own vectors
        seeds = (g.heads[:0], _NONE, g.heads[:0], _NONE, _NONE) if guided else g.seeds
        return cls(
            g,
            delta,
            dead,
            floor,
            (g.heads, g.extra, g.graph, seeds, g.head_rows, g.guide),
            (g.addresses, g.counts, g.radii, g.coded),
        )


class MappedReader:
    """Ranges of the mapped segments, nearest list first; what a deadline cuts off is left out."""

    def __init__(self, segments: tuple[NDArray[np.uint8], ...]) -> None:
        self._segments = segments

    def fetch(
        self, reads: list[Read], clock: Clock, deadline: float | None
    ) -> Iterator[tuple[Read, NDArray[np.uint8]]]:
        """Yield (range, bytes) while there is time."""
        for read in sorted(reads, key=lambda r: min(r.parts)):
            if deadline is not None and clock.now() >= deadline:
                return
            yield read, self._segments[read.file][read.offset : read.offset + read.size]

    def close(self) -> None:
        """The map belongs to the generation."""


class Scratch:
    """Working memory of the threads, kept between calls; a free one is taken, and made where there is none."""

    def __init__(self) -> None:
        self._free: dict[tuple[int, int], list[Any]] = {}
        self._asked: tuple[Any, ...] = (None, None, None, (), ())

    def asked(self, view: View, options: SearchOptions, *, filtered: bool) -> tuple[Any, ...]:
        """(what the kernel takes of the view, :func:`knobs_of`), kept while the same is asked again."""
        seen = self._asked
        if seen[0] is not view or seen[1] is not options or seen[2] != filtered:
            state = (view.generation.metric, view.heads, view.lists, view.delta, view.dead)
            seen = self._asked = (view, options, filtered, state, knobs_of(view, options, filtered=filtered))
        return seen[3:]

    def take(self, generation: Generation, beam: int) -> Any:
        """One for the heads of a generation and this beam."""
        heads = len(generation.counts)
        free = self._free.setdefault((heads, beam), [])
        try:
            return free.pop()
        except IndexError:
            return new_scratch(heads, generation.graph.shape[1], beam, generation.manifest.width)

    def give(self, heads: int, beam: int, scratch: Any) -> None:
        """Put it back."""
        self._free.setdefault((heads, beam), []).append(scratch)

    def clear(self) -> None:
        """Forget all, such as after the number of heads has changed."""
        self._free = {}
        self._asked = (None, None, None, (), ())


def knobs_of(view: View, options: SearchOptions, *, filtered: bool) -> tuple[int, float, float, int, int, int]:
    """What the kernels take."""
    heads = len(view.generation.counts)
    if options.lists is None:
        return (-1, 0.0, 0.0, 1, 1, 0)
    beam = options.walk_beam
    if filtered:
        beam = max(beam, options.filtered_lists)
    ratio = min((1.0 + options.epsilon) ** 2, 1e30)
    return (options.lists, ratio, view.floor, min(beam, heads), options.max_check, int(options.radius_rule))


def check_queries(queries: Any, width: int) -> NDArray[Any]:
    """Queries as (Q, d); raises InvalidRequestError naming the field at fault."""
    array = np.asarray(queries)
    if array.ndim == 1:
        array = array[None]
    if array.ndim != 2 or array.shape[1] != width:
        raise InvalidRequestError(f"queries have the shape {array.shape}; this index takes (count, {width})", "queries")
    kind = array.dtype.kind
    if kind not in "fiu":
        raise InvalidRequestError(f"queries are {array.dtype}; give numbers", "queries")
    if kind == "f" and not isfinite(np.vdot(array, array)) and not np.isfinite(array).all():
        bad = int(np.flatnonzero(~np.isfinite(array).all(1))[0])
        raise InvalidRequestError(f"query {bad} holds NaN or infinity; replace its values", "queries")
    return array


def run(
    view: View,
    queries: NDArray[Any],
    k: int,
    options: SearchOptions,
    mask: NDArray[np.uint8],
    scratch: Scratch,
    *,
    pool: ThreadPoolExecutor | None = None,
    threads: int = 1,
    detail: bool = True,
) -> tuple[NDArray[np.float32], NDArray[np.int64], SearchStats]:
    """Values and row numbers (Q, k), straight from the map."""
    g = view.generation
    count = len(queries)
    scale = query_scale(queries, g.metric, g.manifest.largest) if g.metric == INNER else None
    prepared, consts, _ = prepare(queries if scale is None else queries * scale, g.metric, g.manifest.largest)
    values, rows = np.empty((count, k), np.float32), np.empty((count, k), np.int64)
    told = np.zeros((count, 4), np.int64)
    state, knobs = scratch.asked(view, options, filtered=len(mask) > 0)
    heads, beam, limit = len(g.counts), knobs[3], options.filtered_lists
    if threads <= 1 or count < 2 or pool is None:
        own = scratch.take(g, beam)
        scan.search(prepared, consts, *state, mask, knobs, limit, k, own, values, rows, told, detail)
        scratch.give(heads, beam, own)
    else:

        def part(begin: int, end: int) -> None:
            own = scratch.take(g, beam)
            cut = slice(begin, end)
            out = (values[cut], rows[cut], told[cut])
            scan.search(prepared[cut], consts[cut], *state, mask, knobs, limit, k, own, *out, detail)
            scratch.give(heads, beam, own)

        cuts = np.linspace(0, count, min(count, 4 * threads) + 1).astype(int).tolist()
        list(pool.map(part, cuts[:-1], cuts[1:]))
    if options.lists is None and detail:
        told[:, scan.READS], told[:, scan.BYTES] = _reads_of_all(g)
    complete = _COMPLETE[:count] if count <= len(_COMPLETE) else np.ones(count, np.bool_)
    stats = SearchStats(told[:, 0], told[:, 1], told[:, 2], told[:, 3], complete)
    return values if scale is None else values / scale, rows, stats


def _reads_of_all(g: Generation) -> tuple[int, int]:
    """(contiguous reads, bytes of the pages) of a search that reads every list."""
    filled = g.counts > 0
    size = -(-bytes_of_list(g.counts[filled].astype(np.int64), g.row_bytes, g.metric) // PAGE) * PAGE
    begin = g.addresses[filled]
    order = np.argsort(begin)
    apart = begin[order][1:] - (begin + size)[order][:-1] > PAGE
    return int(np.count_nonzero(apart)) + int(len(size) > 0), int(size.sum())


def plan(
    view: View, query: NDArray[np.float32], const: NDArray[np.float32], knobs: tuple[Any, ...], scratch: tuple[Any, ...]
) -> tuple[NDArray[np.int64], int]:
    """(lists that a query reads, nearest head first; distances computed), as the kernel plans them."""
    plan_one(view.heads, view.lists, view.generation.metric, query, 0, const, knobs, scratch)
    notes = scratch[5][0]
    return scratch[2][0][scratch[3][0, : notes[KEPT]]].astype(np.int64), int(notes[CHECKED])


def run_read(
    view: View,
    queries: NDArray[Any],
    k: int,
    options: SearchOptions,
    mask: NDArray[np.uint8],
    scratch: Scratch,
    reader: Reader,
    clock: Clock,
    deadline: float | None,
) -> tuple[NDArray[np.float32], NDArray[np.int64], SearchStats]:
    """The same through a reader: each read is scored while the others are under way; ``deadline`` seconds per query."""
    g = view.generation
    count = len(queries)
    scale = query_scale(queries, g.metric, g.manifest.largest)
    prepared, consts, _ = prepare(queries if scale is None else queries * scale, g.metric, g.manifest.largest)
    values = np.full((count, k), np.inf, np.float32)
    rows = np.full((count, k), -1, np.int64)
    told = np.zeros((count, 4), np.int64)
    complete = np.ones(count, np.bool_)
    knobs = knobs_of(view, options, filtered=len(mask) > 0)
    everything = options.lists is None
    if not everything and len(mask):
        knobs = (max(knobs[0], options.filtered_lists), *knobs[1:])
    filled = np.flatnonzero(g.counts > 0)
    no_lists = (g.addresses, np.zeros_like(g.counts), g.radii, 0)  # then a search scores heads and rows in memory
    own = scratch.take(g, knobs[3])
    for q in range(count):
        until = None if deadline is None else clock.now() + deadline
        one = slice(q, q + 1)
        scan.search(
            prepared[one],
            consts[one],
            g.metric,
            view.heads,
            no_lists,
            view.delta,
            view.dead,
            mask,
            knobs,
            0 if everything else knobs[0],
            k,
            own,
            values[one],
            rows[one],
            np.zeros((1, 4), np.int64),
            False,
        )
        chosen, checks = (filled, len(g.counts)) if everything else plan(view, prepared[one], consts[one], knobs, own)
        told[q, scan.DISTANCES] = checks
        query = (prepared[q].ctypes.data, consts[q])
        complete[q] = _score_reads(view, query, chosen, k, mask, reader, clock, until, values[q], rows[q], told[q])
    scratch.give(len(g.counts), knobs[3], own)
    if scale is not None:
        values /= scale
    return values, rows, SearchStats(told[:, 0], told[:, 1], told[:, 2], told[:, 3], complete)


def _score_reads(
    view: View,
    query: tuple[int, Any],
    chosen: NDArray[np.int64],
    k: int,
    mask: NDArray[np.uint8],
    reader: Reader,
    clock: Clock,
    until: float | None,
    values: NDArray[np.float32],
    rows: NDArray[np.int64],
    told: NDArray[np.int64],
) -> bool:
    """Read the lists ``chosen`` for one query (address, constant) and offer their rows to its answer (k,) as they
    arrive, until the time ``until``; counts into ``told`` (4,) and returns whether all came.
    """
    g = view.generation
    entry = g.directory[chosen]
    sizes = bytes_of_list(entry["count"].astype(np.int64), g.row_bytes, g.metric)  # without the codes
    reads = merge_reads(entry["segment"], entry["offset"], sizes)
    found = int(np.count_nonzero(rows >= 0))
    missing = len(reads)
    for read, data in reader.fetch(reads, clock, until):
        missing -= 1
        parts = np.array(read.parts)
        addresses = data.ctypes.data + entry["offset"][parts].astype(np.int64) - read.offset
        counts = g.counts[chosen[parts]]
        found = scan_lists(g.heads, g.metric, *query, addresses, counts, values, rows, found, k, view.dead, mask)
        told += (len(parts), 1, read.size, int(entry["count"][parts].sum()))
    return missing == 0


def row_addresses(view: View, rows: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(addresses of the vectors, addresses of the factors) of live rows, wherever they lie."""
    g = view.generation
    base = g.manifest.rows
    place = np.empty(len(rows), np.int64)
    factor = np.zeros(len(rows), np.int64)
    old = rows < base
    where = g.location[rows[old]]
    head = (where & HEAD_BIT) != 0
    lists = np.where(head, 0, where >> SLOT_BITS)
    slot = where & ((1 << SLOT_BITS) - 1)
    number = np.where(head, where & ~HEAD_BIT, 0)
    place[old] = np.where(head, g.heads.ctypes.data + number * g.row_bytes, g.addresses[lists] + slot * g.row_bytes)
    if g.metric == COSINE:
        begin = (g.addresses[lists] + g.counts[lists].astype(np.int64) * g.row_bytes + 3) // 4 * 4
        factor[old] = np.where(head, g.extra.ctypes.data + 4 * number, begin + 4 * slot)
    added, factors = view.delta[0], view.delta[1]
    place[~old] = added.ctypes.data + (rows[~old] - base) * g.row_bytes
    if g.metric == COSINE:
        factor[~old] = factors.ctypes.data + 4 * (rows[~old] - base)
    return place, factor


def run_rows(
    view: View, queries: NDArray[Any], k: int, rows: NDArray[np.int64]
) -> tuple[NDArray[np.float32], NDArray[np.int64], SearchStats]:
    """Score the live ``rows`` one by one: exact, and cheap where they are few."""
    g = view.generation
    count = len(queries)
    prepared, consts, _ = prepare(queries, g.metric, g.manifest.largest)
    places, factors = row_addresses(view, rows)
    values = np.full((count, k), np.inf, np.float32)
    out = np.full((count, k), -1, np.int64)
    for q in range(count):
        score_rows(g.heads, g.metric, prepared[q].ctypes.data, consts[q], places, factors, rows, k, values[q], out[q])
    size = np.full(count, len(rows), np.int64)
    pages = size * (-(-g.row_bytes // PAGE)) * PAGE
    none = np.zeros(count, np.int64)
    return values, out, SearchStats(none, size, pages, size, np.ones(count, np.bool_))


def run_within(
    view: View, queries: NDArray[Any], radius: float, mask: NDArray[np.uint8], total: int
) -> tuple[NDArray[np.int64], list[NDArray[np.float32]], list[NDArray[np.int64]], NDArray[np.int64]]:
    """Every row within ``radius`` (L2 distance, 1 - cosine, or minus the inner product): counts, values, rows, lists
    read.
    """
    g = view.generation
    prepared, consts, _ = prepare(queries, g.metric, g.manifest.largest)
    counts, lists = np.zeros(len(queries), np.int64), np.zeros(len(queries), np.int64)
    values, rows = [], []
    size = 1024
    for q in range(len(queries)):
        if g.metric == L2:
            square = float(radius) ** 2 if radius >= 0 else -1.0
        elif g.metric == COSINE:
            square = 2.0 * radius
        else:
            square = float(consts[q]) + 2.0 * radius
        reach = float(np.sqrt(max(square, 0.0)))
        while True:
            out_d, out_r = np.empty(size, np.float32), np.empty(size, np.int64)
            found, read = within(
                prepared,
                consts,
                q,
                g.metric,
                view.heads,
                view.lists,
                view.delta,
                view.dead,
                mask,
                np.float32(reach),
                np.float32(square),
                out_d,
                out_r,
                np.zeros(total // 8 + 1, np.uint8),
            )
            if found <= size:
                break
            size = int(found)
        order = np.lexsort((out_r[:found], out_d[:found]))
        counts[q], lists[q] = found, read
        values.append(out_d[:found][order])
        rows.append(out_r[:found][order])
    return counts, values, rows, lists
