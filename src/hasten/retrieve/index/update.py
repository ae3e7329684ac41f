"""Where added rows go, and how a new generation is made of an old one.

Only lists that changed are written, to a new segment; the directory of the new generation points into old and new
segments. A list that outgrew its limit is split by balanced 2-means into two new heads, one that shrank gives its
rows back to the others, and after a split the rows of neighbouring lists that are nearer to a new head than to their
own join it (the rule of SPFresh, https://arxiv.org/abs/2410.14452). The head of a list that is gone stays in the
graph and navigates.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

from hasten.clock import Clock
from hasten.retrieve.index.assign import assign_rows
from hasten.retrieve.index.build import BuildOptions, closure_knobs, pack_attributes
from hasten.retrieve.index.delta import Delta
from hasten.retrieve.index.format import (
    DIRECTORY,
    HEAD_BIT,
    SLOT_BITS,
    Generation,
    Manifest,
    put,
    read_list,
    write_heads,
)
from hasten.retrieve.index.heads import make_seeds
from hasten.retrieve.index.io import Folder, Writer
from hasten.retrieve.index.links import link_heads
from hasten.retrieve.index.lists import PAIR, ListWriter, sort_pairs
from hasten.retrieve.index.metric import factors, mapped, prepare
from hasten.retrieve.index.query import View, row_addresses
from hasten.retrieve.index.simd import load_i64, load_u8
from hasten.retrieve.index.tree import assign_all, cluster, workspace

__all__ = ["assign", "compact_generation", "gather", "list_pairs"]

njit = numba.njit(nogil=True, cache=True)
NEIGHBOURS = 8
"""lists around a split one whose rows are looked at again"""
MERGE_SHARE = 0.1
"""a list that lost rows and holds less than this share of the mean gives up"""
CLEAN_SHARE = 0.1
"""a list with more than this share of deleted rows is written again"""
SEGMENTS = 16
"""postings files after which everything is written again"""
BLOCK = 4096


@njit
def _copy(addresses, row_bytes, out):
    """Rows at addresses to ``out`` (rows, row_bytes) uint8."""
    whole = row_bytes // 8 * 8
    for i in range(addresses.shape[0]):
        at = addresses[i]
        words = out[i, :whole].view(np.int64)
        for t in range(whole // 8):
            words[t] = load_i64(at + 8 * t)
        for t in range(whole, row_bytes):
            out[i, t] = load_u8(at + t)


def gather(view: View, rows: NDArray[np.int64]) -> NDArray[Any]:
    """Vectors (m, d) of live rows, in the kernels' dtype."""
    g = view.generation
    places, _ = row_addresses(view, rows)
    size = -(-g.row_bytes // 8) * 8
    out = np.zeros((len(rows), size), np.uint8)
    _copy(places, g.row_bytes, out)
    return np.ascontiguousarray(out[:, : g.row_bytes]).view(g.heads.dtype).reshape(len(rows), g.manifest.width)


def _user(rows: NDArray[Any], dtype: str) -> NDArray[Any]:
    return rows.view(np.float16) if dtype == "float16" else rows


def options_of(manifest: Manifest) -> BuildOptions:
    """The options that the index was built with."""
    stored = dict(manifest.parameters.get("options", {}))
    stored["codes"] = manifest.coded
    return BuildOptions(**stored)


def _assign(
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
    marks = (np.zeros(count, np.uint16), np.zeros(1, np.int64))
    knobs = closure_knobs(options, count)
    found, distance, sizes = assign_rows(queries, consts, augs, state, metric, usable, knobs, count <= 256, marks)
    lost = np.flatnonzero(sizes == 0)  # every head that the walk met is retired: look at all
    if len(lost):
        found[lost], distance[lost], sizes[lost] = assign_rows(
            queries[lost], consts[lost], augs[lost], state, metric, usable, knobs, True, marks
        )
    return found, distance, sizes


def assign(
    generation: Generation, rows: NDArray[Any], usable: NDArray[np.uint8]
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Lists (m, replicas) of new rows (m, d) in the user's dtype, and how many of them count."""
    g = generation
    found, _, sizes = _assign(
        rows, (g.heads, g.extra, g.graph, g.seeds), g.metric, g.manifest.largest, usable, options_of(g.manifest)
    )
    return found, sizes


@njit
def _numbers(addresses, counts, row_bytes, metric, chosen, heads_out, rows_out):
    """(head, row) of everything in the chosen lists; returns how many."""
    n = 0
    for i in range(chosen.shape[0]):
        h = chosen[i]
        size = counts[h] * row_bytes
        if metric == 1:
            size = ((size + 3) & ~3) + 4 * counts[h]
        at = addresses[h] + ((size + 7) & ~7)
        for r in range(counts[h]):
            heads_out[n] = h
            rows_out[n] = load_i64(at + 8 * r)
            n += 1
    return n


def list_pairs(generation: Generation, chosen: NDArray[np.int64]) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """(heads, rows) of everything in the chosen lists."""
    g = generation
    total = int(g.counts[chosen].sum())
    heads, rows = np.empty(total, np.int32), np.empty(total, np.int64)
    _numbers(g.addresses, g.counts, g.row_bytes, g.metric, np.ascontiguousarray(chosen, np.int64), heads, rows)
    return heads, rows


class _Throttled:
    """A writer that keeps to a rate by sleeping on the clock."""

    def __init__(self, writer: Writer, rate: float | None, clock: Clock) -> None:
        self._writer, self._rate, self._clock = writer, rate, clock
        self._began, self._done = clock.now(), 0

    def write(self, data: bytes | memoryview) -> int:
        view = memoryview(data).cast("B")
        step = len(view) if self._rate is None else max(4096, int(self._rate / 20))
        for begin in range(0, len(view), max(step, 1)):
            self._writer.write(view[begin : begin + step])
            self._done += min(step, len(view) - begin)
            if self._rate is not None:
                self._clock.sleep(self._began + self._done / self._rate - self._clock.now())
        return len(view)

    def sync(self) -> None:
        self._writer.sync()

    def tell(self) -> int:
        return self._writer.tell()

    def close(self) -> None:
        self._writer.close()


class _Compaction:
    """The work of one compaction: pairs of the lists that change, heads that come and go."""

    def __init__(self, view: View, delta: Delta, count: int, alive: NDArray[np.uint8], dead: NDArray[np.uint8]) -> None:
        g = view.generation
        self.view, self.g, self.delta, self.count = view, g, delta, count
        self.base = g.manifest.rows
        self.rows = self.base + count
        self.options = options_of(g.manifest)
        self.limit = self.options.row_limit(g.manifest.width, g.heads.itemsize)
        live = np.ones(self.rows, np.bool_)
        if len(dead):
            live[: self.base] = ~np.unpackbits(dead, bitorder="little")[: self.base].astype(np.bool_)
        live[self.base :] = alive != 0
        self.live = live
        self.heads, self.extra, self.graph, self.head_rows = g.heads, g.extra, g.graph, g.head_rows
        self.seeds, self.groups = g.seeds, g.groups
        self.retired = (g.directory["flags"] & 1) != 0
        self.changed = np.zeros(len(g.counts), np.bool_)
        self.loaded = np.zeros(len(g.counts), np.bool_)
        self.pairs = np.empty(0, PAIR)
        self.is_head = np.zeros(self.rows, np.bool_)
        self.is_head[self.head_rows] = True
        self.split = self.merged = self.moved = 0

    def take(self, rows: NDArray[np.int64]) -> NDArray[Any]:
        """Vectors in the user's dtype."""
        return _user(gather(self.view, rows), self.g.manifest.dtype)

    def measure(self, heads: NDArray[Any], rows: NDArray[Any]) -> NDArray[Any]:
        """Pairs with their distances, in the mapped space."""
        out = np.empty(len(heads), PAIR)
        out["head"], out["row"] = heads, rows
        metric, largest = self.g.metric, self.g.manifest.largest
        for begin in range(0, len(heads), 1 << 15):
            cut = slice(begin, begin + (1 << 15))
            left = mapped(self.take(np.ascontiguousarray(rows[cut])), metric, largest)
            right = mapped(_user(self.heads[heads[cut]], self.g.manifest.dtype), metric, largest)
            out["distance"][cut] = np.einsum("ij,ij->i", left - right, left - right)
        return out

    def load(self, chosen: NDArray[np.int64]) -> None:
        """Bring the live rows of lists that change into the pairs."""
        chosen = chosen[~self.loaded[chosen] & ~self.retired[chosen]]
        if not len(chosen):
            return
        old = chosen[chosen < len(self.g.counts)]
        for h in old:
            read_list(self.g, int(h))  # checks the checksum before the list is copied
        heads, rows = list_pairs(self.g, old)
        good = self.live[rows] & ~self.is_head[rows]
        self.pairs = np.concatenate([self.pairs, self.measure(heads[good], rows[good])])
        self.loaded[chosen] = self.changed[chosen] = True

    def add_pairs(self, pairs: NDArray[Any]) -> None:
        """Put rows into lists; a copy that is there already is dropped."""
        self.load(np.unique(pairs["head"]).astype(np.int64))
        joined = np.concatenate([self.pairs, pairs])
        order = np.lexsort((joined["row"], joined["head"]))
        joined = joined[order]
        same = (joined["head"][1:] == joined["head"][:-1]) & (joined["row"][1:] == joined["row"][:-1])
        self.pairs = joined[np.concatenate([[True], ~same])] if len(joined) else joined

    def settle(self, rows: NDArray[np.int64]) -> None:
        """Assign rows by closure to the lists that there are now."""
        usable = (~self.retired).astype(np.uint8)
        for begin in range(0, len(rows), BLOCK):
            part = rows[begin : begin + BLOCK]
            found, distance, sizes = _assign(
                self.take(part),
                (self.heads, self.extra, self.graph, self.seeds),
                self.g.metric,
                self.g.manifest.largest,
                usable,
                self.options,
            )
            used = np.arange(found.shape[1]) < sizes[:, None]
            pairs = np.empty(int(sizes.sum()), PAIR)
            pairs["head"], pairs["distance"], pairs["row"] = found[used], distance[used], np.repeat(part, sizes)
            self.add_pairs(pairs)

    def new_heads(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Make rows heads: they leave their lists and join the graph."""
        g = self.g
        vectors = self.take(rows)
        first = len(self.heads)
        kernel = vectors.view(np.uint16) if vectors.dtype == np.float16 else vectors
        self.heads = np.ascontiguousarray(np.concatenate([self.heads, kernel]))
        self.extra = np.concatenate([self.extra, factors(vectors, g.metric, g.manifest.largest)])
        self.head_rows = np.concatenate([self.head_rows, rows])
        self.graph = np.concatenate([self.graph, np.full((len(rows), self.graph.shape[1]), -1, np.int32)])
        grow = np.zeros(len(rows), np.bool_)
        self.retired = np.concatenate([self.retired, grow])
        self.changed = np.concatenate([self.changed, ~grow])
        self.loaded = np.concatenate([self.loaded, ~grow])
        self.is_head[rows] = True
        self.pairs = self.pairs[~np.isin(self.pairs["row"], rows)]
        numbers = np.arange(first, first + len(rows))
        link_heads(
            self.heads,
            self.extra,
            self.graph,
            self.seeds,
            g.metric,
            g.manifest.largest,
            numbers,
            beam=self.options.build_beam,
            alpha=self.options.alpha,
        )
        return numbers

    def retire(self, heads: NDArray[np.int64]) -> NDArray[np.int64]:
        """Close lists; returns the rows that they held."""
        gone = np.isin(self.pairs["head"], heads)
        rows = np.unique(self.pairs["row"][gone])
        self.pairs = self.pairs[~gone]
        self.retired[heads] = True
        self.changed[heads] = True
        return rows

    def split_round(self) -> bool:
        """Split every list that is too long; False where there is none."""
        counts = np.bincount(self.pairs["head"], minlength=len(self.heads))
        long = np.flatnonzero(counts > self.limit)
        if not len(long):
            return False
        rng = np.random.default_rng(self.g.manifest.generation)
        chosen: list[int] = []
        closed: list[int] = []
        taken: set[int] = set()
        for h in long:
            members = np.unique(self.pairs["row"][self.pairs["head"] == h])
            members = members[[int(r) not in taken for r in members]]
            two = _two_means(mapped(self.take(members), self.g.metric, self.g.manifest.largest), rng)
            if two is not None:
                picked = [int(members[t]) for t in two]
                taken.update(picked)
                chosen.extend(picked)
                closed.append(int(h))
        if not chosen:
            return False
        around = self._neighbours(np.array(closed))
        rows = self.retire(np.array(closed))
        heads = self.new_heads(np.array(chosen, np.int64))
        self.split += len(closed)
        self.settle(rows[~self.is_head[rows]])
        self._recheck(heads, around[~self.retired[around]])
        return True

    def _neighbours(self, heads: NDArray[np.int64]) -> NDArray[np.int64]:
        """The lists whose heads are nearest to some heads."""
        near = self.graph[heads][:, :NEIGHBOURS]
        return np.unique(near[near >= 0]).astype(np.int64)

    def _recheck(self, heads: NDArray[np.int64], around: NDArray[np.int64]) -> None:
        """Rows of neighbouring lists that are nearer to a new head than to their own join it."""
        self.load(around)
        g = self.g
        inside = self.pairs[np.isin(self.pairs["head"], around)]
        new = mapped(_user(self.heads[heads], g.manifest.dtype), g.metric, g.manifest.largest)
        square = np.einsum("ij,ij->i", new, new)
        found = []
        for begin in range(0, len(inside), 1 << 14):
            part = inside[begin : begin + (1 << 14)]
            rows = mapped(self.take(np.ascontiguousarray(part["row"])), g.metric, g.manifest.largest)
            distance = np.maximum(np.einsum("ij,ij->i", rows, rows)[:, None] + square - 2 * rows @ new.T, 0)
            best = distance.argmin(1)
            value = distance[np.arange(len(part)), best]
            nearer = value < part["distance"]
            pairs = np.empty(int(nearer.sum()), PAIR)
            pairs["head"], pairs["distance"] = heads[best[nearer]], value[nearer]
            pairs["row"] = part["row"][nearer]
            found.append(pairs)
        if found:
            pairs = np.concatenate(found)
            self.moved += len(pairs)
            self.add_pairs(pairs)

    def merge_short(self, short: NDArray[np.int64]) -> None:
        """Close lists that have become too short; their rows go to the others."""
        open_lists = int(np.count_nonzero(~self.retired))
        short = short[: max(0, open_lists - 1)]
        if len(short):
            rows = self.retire(short)
            self.merged += len(short)
            self.settle(rows)

    def locations(self) -> NDArray[np.int64]:
        """Where each row stands (rows,): its place if its list stays, its head if it is one, -1 for rows that the lists
        to be written will take, and for dead ones."""
        g = self.g
        location = np.full(self.rows, -1, np.int64)
        location[: g.manifest.rows] = g.location
        location[~self.live] = -1
        live_rows = np.flatnonzero(location >= 0)
        where = location[live_rows]
        in_list = (where & HEAD_BIT) == 0
        location[live_rows[in_list][self.changed[where[in_list] >> SLOT_BITS]]] = -1
        live_heads = self.live[self.head_rows]
        location[self.head_rows[live_heads]] = HEAD_BIT | np.flatnonzero(live_heads)
        return location


def _two_means(rows: NDArray[np.float32], rng: Any) -> tuple[int, int] | None:
    """Two rows that halve a list; None where they are all equal."""
    if len(rows) < 4:
        return None
    order = np.arange(len(rows))
    centres = np.empty((2, rows.shape[1]), np.float32)
    state = np.array([rng.integers(1, 1 << 62)], np.uint64)
    cluster(rows, order, 0, len(rows), 2, 1.0, True, state, centres, workspace(2, rows.shape[1], len(rows)))
    which = assign_all(rows, order, 0, len(rows), centres, 2, np.empty(len(rows), np.int32))
    if which[0] < 0 or which[1] < 0 or np.array_equal(rows[which[0]], rows[which[1]]):
        return None
    return int(which[0]), int(which[1])


def compact_generation(
    folder: Folder,
    view: View,
    delta: Delta,
    count: int,
    alive: NDArray[np.uint8],
    dead: NDArray[np.uint8],
    columns: dict[str, NDArray[Any]],
    clock: Clock,
    *,
    rate: float | None = None,
    everything: bool = False,
    drop: NDArray[np.int64] | None = None,
    restore: tuple[NDArray[np.int64], NDArray[Any]] | None = None,
) -> tuple[Manifest, dict[str, Any]]:
    """Write the files of the next generation, synced but not committed; returns its manifest and what was done.

    ``count`` rows of ``delta`` are merged, of which ``alive`` live; ``dead`` marks deleted older rows. The empty log
    is the caller's.
    """
    g = view.generation
    m = g.manifest
    work = _Compaction(view, delta, count, alive, dead)
    lists = np.arange(len(g.counts))
    live_counts = g.counts.astype(np.int64)
    stale = np.zeros(len(g.counts), np.bool_)
    if len(dead) and dead.any():
        heads, rows = list_pairs(g, lists)
        gone = np.bincount(heads[~work.live[rows]], minlength=len(g.counts))
        live_counts = live_counts - gone
        stale = gone > CLEAN_SHARE * np.maximum(g.counts, 1)
    used = sum(int(b) for b in -(-g.directory["bytes"].astype(np.int64) // 4096) * 4096)
    held = sum(m.files[s]["bytes"] for s in m.segments)
    everything = everything or len(m.segments) >= SEGMENTS or used < held / 2
    mean = max(1.0, float(g.counts[g.counts > 0].mean()) if (g.counts > 0).any() else 1.0)
    short = np.flatnonzero(stale & (live_counts < MERGE_SHARE * mean) & ~work.retired)

    fresh_heads, fresh_rows = delta.pairs(count)
    fresh_live = alive[fresh_rows] != 0
    fresh_heads, fresh_rows = fresh_heads[fresh_live], fresh_rows[fresh_live]
    work.load(lists if everything else np.unique(np.concatenate([np.flatnonzero(stale), fresh_heads])).astype(np.int64))
    work.add_pairs(work.measure(fresh_heads, fresh_rows + m.rows))
    work.merge_short(short)
    rounds = 0
    while rounds < 8 and work.split_round():
        rounds += 1

    # write
    generation = m.generation + 1
    total = len(work.heads)
    directory = np.zeros(total, DIRECTORY)
    keep = np.zeros(total, np.bool_)
    keep[: len(g.counts)] = ~work.changed[: len(g.counts)]
    segments = list(m.segments)
    if everything:
        segments = []
    directory[keep] = g.directory[keep[: len(g.counts)]]
    directory["flags"] = work.retired
    location = work.locations()
    segment = f"postings-{generation}-0.bin"
    entries = {name: dict(m.files[name]) for name in segments}
    segments.append(segment)

    def centres(which: NDArray[Any]) -> NDArray[np.float32]:
        return mapped(_user(work.heads[which], m.dtype), g.metric, m.largest)

    writer = folder.create(segment)
    try:
        out = ListWriter(
            _Throttled(writer, rate, clock),
            len(segments) - 1,
            directory,
            location,
            g.metric,
            m.largest,
            m.width,
            g.heads.itemsize,
            centres if m.coded else None,
        )
        chosen = np.flatnonzero(work.changed & ~work.retired)
        pairs = sort_pairs(work.pairs)
        counts = np.bincount(pairs["head"], minlength=total)[chosen]
        out.write(chosen, counts, pairs, work.take)
        writer.sync()
        entries[segment] = {"bytes": out.offset}
    finally:
        writer.close()
    homeless = np.flatnonzero(work.live & (location < 0))
    assert len(homeless) == 0, f"rows {homeless[:5].tolist()} are in no list"

    groups = work.groups
    if total > 1.2 * (m.parameters.get("seeded", len(g.counts))) or (len(groups[0]) == 0 and total > 64):
        user_heads = _user(work.heads, m.dtype)
        groups = make_seeds(mapped(user_heads, g.metric, m.largest), work.options.seed, 1)
    names = {
        "heads": f"heads-{generation}.safetensors",
        "directory": f"directory-{generation}.bin",
        "location": f"location-{generation}.bin",
    }
    entries[names["heads"]] = write_heads(
        folder,
        names["heads"],
        {
            "heads": _user(work.heads, m.dtype),
            "extra": work.extra,
            "head_rows": work.head_rows,
            "graph": work.graph,
            "group_heads": groups[0],
            "seed_heads": groups[1],
            "seed_begins": groups[2],
        },
    )
    entries[names["directory"]] = put(folder, names["directory"], directory.view(np.uint8))
    entries[names["location"]] = put(folder, names["location"], location.view(np.uint8))
    ids = np.concatenate([g.ids if g.ids is not None else np.arange(m.rows), delta.ids[:count]]).astype(np.int64)
    if not np.array_equal(ids, np.arange(work.rows)):
        names |= {"ids": f"ids-{generation}.bin", "order": f"order-{generation}.bin"}
        entries[names["ids"]] = put(folder, names["ids"], ids.view(np.uint8))
        order = np.argsort(ids, kind="stable").astype(np.int64)
        entries[names["order"]] = put(folder, names["order"], order.view(np.uint8))
    if not work.live.all():
        names["tombstones"] = f"tombstones-{generation}.bin"
        entries[names["tombstones"]] = put(folder, names["tombstones"], np.packbits(~work.live, bitorder="little"))
    if columns:
        names["attributes"] = f"attributes-{generation}.npz"
        entries[names["attributes"]] = put(folder, names["attributes"], pack_attributes(columns))
    parameters = {
        **m.parameters,
        "seeded": total if groups is not work.groups else m.parameters.get("seeded", len(g.counts)),
    }
    manifest = replace(
        m,
        generation=generation,
        rows=work.rows,
        files=entries,
        segments=tuple(segments),
        wal=f"wal-{generation}.log",
        parameters=parameters,
        roles=names,
    )
    report = {
        "generation": generation,
        "merged_rows": int(np.count_nonzero(alive)),
        "lists_written": int(len(chosen)),
        "bytes_written": int(entries[segment]["bytes"]),
        "split": work.split,
        "merged": work.merged,
        "moved": work.moved,
        "heads": total,
    }
    return manifest, report


def put_back(view: View, homeless: NDArray[np.int64], vectors: NDArray[Any], usable: NDArray[np.uint8]) -> NDArray[Any]:
    """Pairs of rows whose lists are lost, from their vectors."""
    g = view.generation
    found, distance, sizes = _assign(
        vectors, (g.heads, g.extra, g.graph, g.seeds), g.metric, g.manifest.largest, usable, options_of(g.manifest)
    )
    used = np.arange(found.shape[1]) < sizes[:, None]
    pairs = np.empty(int(sizes.sum()), PAIR)
    pairs["head"], pairs["distance"], pairs["row"] = found[used], distance[used], np.repeat(homeless, sizes)
    return pairs
