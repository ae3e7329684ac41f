"""Making an index whole whose lists are damaged: corrupt lists are emptied, their rows placed again, a generation is
written in which every row can be found.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from hasten.errors import DataError
from hasten.retrieve.index import format as files
from hasten.retrieve.index.gather import plain
from hasten.retrieve.index.io import map_behind
from hasten.retrieve.index.lists import PAIR, centres_of, shape_of, sort_pairs, writing
from hasten.retrieve.index.metric import mapped
from hasten.retrieve.index.placing import place
from hasten.retrieve.index.sources import Source, open_source
from hasten.retrieve.index.verify import Verification, live_rows, verify

if TYPE_CHECKING:
    from hasten.retrieve.index.spann import Spann

__all__ = ["repair"]


def repair(index: Spann, vectors: Any = None) -> dict[str, Any]:
    """Empty the corrupt lists and write a new generation in which every row can be found.

    ``vectors`` (rows by row number, as the index was built from; rows added later behind them) restore rows whose
    only copy was lost. Without them such rows are deleted and counted as lost. What was added since the last
    compaction stays in the log.
    """
    index._writable()
    found = verify(index._view, index._delta)
    if not found.corrupt and not found.num_missing:
        return {"corrupt": 0, "restored": 0, "lost": 0}
    work = _Repair(index, found, None if vectors is None else open_source(vectors))
    work.place_again()
    work.write_lists()
    work.find_other_copies()
    work.commit()
    return {
        "corrupt": len(work.bad),
        "restored": len(work.homeless) - len(work.lost),
        "lost": len(work.lost),
    }


class _Repair:
    """The work of one repair."""

    def __init__(self, index: Spann, found: Verification, source: Source | None) -> None:
        view = index._view
        self.index, self.view, self.g, self.source = index, view, view.generation, source
        g, m = self.g, self.g.manifest
        if source is not None and (source.width != m.width or len(source) < m.rows):
            raise DataError(
                f"vectors are ({len(source)}, {source.width}); repair needs ({m.rows}, {m.width}), by row number"
            )
        self.bad = np.array(found.corrupt, np.int64)
        self.counts = g.counts.copy()
        self.counts[self.bad] = 0
        self.live = live_rows(view)
        self.held = np.zeros(m.rows, np.bool_)
        self.held[g.head_rows] = True
        for h in np.flatnonzero(self.counts > 0):
            self.held[files.read_list(g, int(h))[1]] = True
        self.homeless = np.flatnonzero(self.live & ~self.held)
        self.lost = self.homeless if source is None else self.homeless[:0]
        self.location = np.array(g.location)
        self.directory = np.array(g.directory)
        for column in ("count", "bytes", "crc32", "radius"):
            self.directory[column][self.bad] = 0
        self.number = m.generation + 1
        self.segment = f"postings-{self.number}-0.bin"
        self.segments = (*m.segments, self.segment)

    def place_again(self) -> None:
        """Which lists are written, and what they hold."""
        g, location = self.g, self.location
        in_list = (location >= 0) & (location & files.HEAD_BIT == 0)
        fresh = np.empty(0, PAIR)
        if self.source is not None:
            near = np.flatnonzero(self.live & in_list)
            near = near[np.isin(location[near] >> files.SLOT_BITS, self.bad)]  # whose first copy lay in a lost list
            wanted = np.union1d(self.homeless, near)
            rows = self.source.take(wanted).astype(g.manifest.dtype)
            fresh = sort_pairs(place(g, wanted, rows, self.index._usable))
        # the lists that get rows back are written again, with what they hold now
        targets = np.union1d(np.unique(fresh["head"]).astype(np.int64), self.bad)
        kept = [_pairs_of_list(g, int(h)) for h in targets if self.counts[h] > 0]
        pairs = np.concatenate([fresh, *kept])
        pairs = pairs[np.lexsort((pairs["row"], pairs["head"]))]
        same = (pairs["head"][1:] == pairs["head"][:-1]) & (pairs["row"][1:] == pairs["row"][:-1])
        self.pairs = sort_pairs(pairs[np.concatenate([[True], ~same])]) if len(pairs) else pairs
        self.changed = np.zeros(len(self.counts), np.bool_)
        self.changed[targets] = True
        moved = np.flatnonzero(in_list)
        location[moved[self.changed[location[moved] >> files.SLOT_BITS]]] = -1

    def _take(self, rows: NDArray[np.int64]) -> NDArray[Any]:
        if self.source is None:
            raise DataError("no vectors were given")  # nothing is written without them
        return self.source.take(rows).astype(self.g.manifest.dtype)

    def write_lists(self) -> None:
        """The lists that changed, to a segment of their own."""
        with writing(
            self.index._folder.create(self.segment),
            len(self.segments) - 1,
            self.directory,
            self.location,
            shape_of(self.g),
            centres_of(self.g, self.g.heads),
        ) as lists:
            if len(self.pairs):
                chosen = np.unique(self.pairs["head"]).astype(np.int64)
                counts = np.bincount(self.pairs["head"], minlength=len(self.counts))[chosen]
                lists.write(chosen, counts, self.pairs, self._take)
        self.size = lists.offset

    def find_other_copies(self) -> None:
        """Rows that lost the place they were known by and have a copy in a list that was not written."""
        gone = np.flatnonzero((self.location < 0) & self.live & self.held)
        if not len(gone):
            return
        wanted = np.zeros(len(self.live), np.bool_)
        wanted[gone] = True
        for h in np.flatnonzero((self.counts > 0) & ~self.changed):
            _, rows = files.read_list(self.g, int(h))
            hit = np.flatnonzero(wanted[rows])
            self.location[rows[hit]] = (int(h) << files.SLOT_BITS) | hit
            wanted[rows[hit]] = False

    def commit(self) -> None:
        """Write the other files, make the generation current and open it."""
        index, g, m, folder = self.index, self.g, self.g.manifest, self.index._folder
        entries = {k: dict(v) for k, v in m.files.items() if k not in m.roles.values() or k == m.roles["heads"]}
        for name, data in zip(m.segments, g.segments, strict=True):
            behind = map_behind(data)
            if behind is not None:
                entries[name]["bytes"] = behind.size()  # it may have been cut
        entries[self.segment] = {"bytes": self.size}
        names = dict(m.roles)
        for role, array in (("directory", self.directory), ("location", self.location)):
            names[role] = f"{role}-{self.number}.bin"
            entries[names[role]] = files.put(folder, names[role], array.view(np.uint8))
        for role in ("ids", "order", "attributes"):
            if role in names:
                entries[names[role]] = m.files[names[role]]
        dead = np.zeros(m.rows // 8 + 1, np.uint8)
        dead[: len(self.view.dead)] = self.view.dead
        for row in self.lost:
            dead[row >> 3] |= np.uint8(1 << (row & 7))
        if dead.any():
            names["tombstones"] = f"tombstones-{self.number}.bin"
            entries[names["tombstones"]] = files.put(folder, names["tombstones"], dead)
        manifest = replace(
            m,
            generation=self.number,
            files=entries,
            segments=self.segments,
            wal=f"wal-{self.number}.log",
            roles=names,
        )
        assert index._log is not None
        files.put(folder, manifest.wal, folder.read(index._log.name)[: index._log.size])
        files.commit(folder, manifest)
        index._log.close()
        index._open()


def _pairs_of_list(generation: files.Generation, head: int) -> NDArray[Any]:
    """Pairs of a readable list, with their distances."""
    g = generation
    rows, numbers = files.read_list(g, int(head))
    dtype = g.manifest.dtype
    centre = mapped(plain(g.heads[head : head + 1], dtype), g.metric, g.manifest.largest)
    left = mapped(plain(rows, dtype), g.metric, g.manifest.largest) - centre
    out = np.empty(len(numbers), PAIR)
    out["head"], out["row"], out["distance"] = head, numbers, np.einsum("ij,ij->i", left, left)
    return out
