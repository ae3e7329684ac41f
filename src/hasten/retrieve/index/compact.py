"""How a new generation is made of an old one and what was added to it.

Only lists that changed are written, to a new segment; the directory of the new generation points into old and new
segments. Nothing is committed here.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hasten.clock import Clock
from hasten.retrieve.index.delta import Delta
from hasten.retrieve.index.format import DIRECTORY, Manifest, head_tensors, put, write_heads
from hasten.retrieve.index.gather import list_pairs, plain
from hasten.retrieve.index.heads import make_seeds
from hasten.retrieve.index.inputs import pack_attributes
from hasten.retrieve.index.io import Folder
from hasten.retrieve.index.lists import centres_of, shape_of, sort_pairs, writing
from hasten.retrieve.index.metric import mapped
from hasten.retrieve.index.query import View
from hasten.retrieve.index.rebalance import Rebalance
from hasten.retrieve.index.throttle import Throttled

__all__ = ["compact_generation"]

MERGE_SHARE = 0.1
"""a list that lost rows and holds less than this share of the mean gives up"""
CLEAN_SHARE = 0.1
"""a list with more than this share of deleted rows is written again"""
SEGMENTS = 16
"""postings files after which everything is written again"""
ROUNDS = 8
"""most times that lists are split; a split one may be too long still"""


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
) -> tuple[Manifest, dict[str, Any]]:
    """Write the files of the next generation, synced but not committed; returns its manifest and what was done.

    ``count`` rows of ``delta`` are merged, of which ``alive`` live; ``dead`` marks deleted older rows. The empty log
    is the caller's.
    """
    work = Rebalance(view, delta, count, alive, dead)
    everything = everything or _worn(view)
    _change_lists(work, view, delta, count, alive, dead, everything)
    writer = _Writer(folder, work, everything)
    lists = writer.write_lists(rate, clock)
    manifest = writer.write_rest(delta.ids[:count], columns)
    report = {
        "generation": manifest.generation,
        "merged_rows": int(np.count_nonzero(alive)),
        "lists_written": lists,
        "bytes_written": int(manifest.files[writer.segment]["bytes"]),
        "split": work.split,
        "merged": work.merged,
        "moved": work.moved,
        "heads": len(work.heads),
    }
    return manifest, report


def _worn(view: View) -> bool:
    """Whether too much of the segments is no longer read."""
    g, m = view.generation, view.generation.manifest
    used = sum(int(b) for b in -(-g.directory["bytes"].astype(np.int64) // 4096) * 4096)
    return len(m.segments) >= SEGMENTS or used < sum(m.files[s]["bytes"] for s in m.segments) / 2


def _change_lists(
    work: Rebalance,
    view: View,
    delta: Delta,
    count: int,
    alive: NDArray[np.uint8],
    dead: NDArray[np.uint8],
    everything: bool,
) -> None:
    """Bring what was added into its lists, drop what was deleted, merge what is short, split what is long."""
    g = view.generation
    lists = np.arange(len(g.counts))
    live_counts, stale = g.counts.astype(np.int64), np.zeros(len(g.counts), np.bool_)
    if len(dead) and dead.any():
        heads, rows = list_pairs(g, lists)
        gone = np.bincount(heads[~work.live[rows]], minlength=len(g.counts))
        live_counts, stale = live_counts - gone, gone > CLEAN_SHARE * np.maximum(g.counts, 1)
    mean = max(1.0, float(g.counts[g.counts > 0].mean()) if (g.counts > 0).any() else 1.0)
    short = np.flatnonzero(stale & (live_counts < MERGE_SHARE * mean) & ~work.retired)
    heads, rows = delta.pairs(count)
    live = alive[rows] != 0
    heads, rows = heads[live], rows[live]
    work.load(lists if everything else np.unique(np.concatenate([np.flatnonzero(stale), heads])).astype(np.int64))
    work.add_pairs(work.measure(heads, rows + g.manifest.rows))
    work.merge_short(short)
    for _ in range(ROUNDS):
        if not work.split_round():
            break


class _Writer:
    """The files of the next generation."""

    def __init__(self, folder: Folder, work: Rebalance, everything: bool) -> None:
        g, m = work.g, work.g.manifest
        self.folder, self.work, self.number = folder, work, m.generation + 1
        self.directory = np.zeros(len(work.heads), DIRECTORY)
        keep = np.zeros(len(work.heads), np.bool_)
        keep[: len(g.counts)] = ~work.changed[: len(g.counts)]
        self.directory[keep] = g.directory[keep[: len(g.counts)]]
        self.directory["flags"] = work.retired
        self.segment = f"postings-{self.number}-0.bin"
        kept = () if everything else m.segments
        self.segments = (*kept, self.segment)
        self.entries = {name: dict(m.files[name]) for name in kept}
        self.location = work.locations()

    def write_lists(self, rate: float | None, clock: Clock) -> int:
        """The lists that changed; returns how many."""
        work = self.work
        with writing(
            Throttled(self.folder.create(self.segment), rate, clock),
            len(self.segments) - 1,
            self.directory,
            self.location,
            shape_of(work.g),
            centres_of(work.g, work.heads),
        ) as lists:
            chosen = np.flatnonzero(work.changed & ~work.retired)
            pairs = sort_pairs(work.pairs)
            lists.write(chosen, np.bincount(pairs["head"], minlength=len(work.heads))[chosen], pairs, work.take)
        self.entries[self.segment] = {"bytes": lists.offset}
        homeless = np.flatnonzero(work.live & (self.location < 0))
        assert len(homeless) == 0, f"rows {homeless[:5].tolist()} are in no list"
        return len(chosen)

    def write_rest(self, added: NDArray[np.int64], columns: dict[str, NDArray[Any]]) -> Manifest:
        """Everything else; ``added`` are the ids of the rows that came."""
        work, g, m, folder = self.work, self.work.g, self.work.g.manifest, self.folder
        groups, seeded = self._seeds()
        vectors = plain(work.heads, m.dtype)
        names = {"heads": f"heads-{self.number}.safetensors"}
        tensors = head_tensors(vectors, work.extra, work.head_rows, work.graph, groups)
        self.entries[names["heads"]] = write_heads(folder, names["heads"], tensors)
        parts: dict[str, Any] = {"directory": self.directory, "location": self.location}
        ids = np.concatenate([g.ids if g.ids is not None else np.arange(m.rows), added]).astype(np.int64)
        if not np.array_equal(ids, np.arange(work.rows)):
            parts |= {"ids": ids, "order": np.argsort(ids, kind="stable").astype(np.int64)}
        if not work.live.all():
            parts["tombstones"] = np.packbits(~work.live, bitorder="little")
        for role, array in parts.items():
            names[role] = f"{role}-{self.number}.bin"
            self.entries[names[role]] = put(folder, names[role], array.view(np.uint8))
        if columns:
            names["attributes"] = f"attributes-{self.number}.npz"
            self.entries[names["attributes"]] = put(folder, names["attributes"], pack_attributes(columns))
        return replace(
            m,
            generation=self.number,
            rows=work.rows,
            files=self.entries,
            segments=self.segments,
            wal=f"wal-{self.number}.log",
            parameters={**m.parameters, "seeded": seeded},
            roles=names,
        )

    def _seeds(self) -> tuple[Any, int]:
        """Seeds of the walk, new ones where many heads came; and the number of heads that they were made for."""
        work, m, total = self.work, self.work.g.manifest, len(self.work.heads)
        before = m.parameters.get("seeded", len(work.g.counts))
        if total > 1.2 * before or (len(work.groups[0]) == 0 and total > 64):
            vectors = mapped(plain(work.heads, m.dtype), work.g.metric, m.largest)
            return make_seeds(vectors, work.options.seed, 1), total
        return work.groups, before
