"""Reading everything and checking it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hasten.errors import CorruptPostingError
from hasten.retrieve.index import format as files
from hasten.retrieve.index.delta import Delta
from hasten.retrieve.index.query import View

__all__ = ["Verification", "live_rows", "verify"]


@dataclass(frozen=True)
class Verification:
    """What a full check found."""

    rows: int
    """live rows"""
    lists: int
    """lists read"""
    corrupt: tuple[int, ...] = ()
    """lists whose checksum is wrong"""
    missing: tuple[int, ...] = ()
    """live row numbers that no readable list and no head holds (the first thousand)"""
    num_missing: int = 0
    """how many there are"""
    copies: float = 0.0
    """mean number of lists that hold a row that is not a head"""
    problems: tuple[str, ...] = field(default_factory=tuple)
    """everything else that is wrong, one sentence each"""

    @property
    def good(self) -> bool:
        """Whether nothing is wrong."""
        return not (self.corrupt or self.num_missing or self.problems)

    def to_json(self) -> dict[str, Any]:
        """By name."""
        return {**asdict(self), "good": self.good}


def verify(view: View, delta: Delta) -> Verification:
    """Read every list and check checksums, row numbers, the graph, ids, and that every live row can be found."""
    g = view.generation
    g.check(lists=False)
    m = g.manifest
    problems: list[str] = []
    corrupt: list[int] = []
    copies = np.zeros(m.rows, np.int32)
    for h in range(len(g.counts)):
        try:
            _, rows = files.read_list(g, h)
        except CorruptPostingError:
            corrupt.append(h)
            continue
        if len(rows) and (rows.min() < 0 or rows.max() >= m.rows):
            problems.append(f"list {h} names a row outside 0 to {m.rows - 1}")
            continue
        if len(np.unique(rows)) != len(rows):
            problems.append(f"list {h} holds a row twice")
        copies[rows] += 1
    is_head = np.zeros(m.rows, np.bool_)
    is_head[g.head_rows] = True
    live = live_rows(view)
    lost = np.flatnonzero(live & ~is_head & (copies == 0))
    if g.graph.max(initial=-1) >= len(g.heads) or g.graph.min(initial=0) < -1:
        problems.append("the graph names a head that does not exist")
    if len(g.graph) > 1 and ((g.graph >= 0).sum(1) == 0).any():
        problems.append("the graph has a head without a neighbour")
    if g.ids is not None:
        alive_ids = np.concatenate([np.asarray(g.ids)[live], np.array(sorted(delta.place), np.int64)])
        if len(np.unique(alive_ids)) != len(alive_ids):
            problems.append("two live rows have one id")
    where = g.location[np.flatnonzero(live)]
    lists = where[(where >= 0) & (where & files.HEAD_BIT == 0)] >> files.SLOT_BITS
    if (where < 0).any() or (len(lists) and lists.max() >= len(g.counts)):
        problems.append("the map from rows to lists has gaps")
    for name, entry in m.files.items():
        if "crc32" in entry and entry["bytes"] > files.CHECKED:
            problems.append(f"{name} is over 1 GiB; its checksum was not read")
    held = copies[live & ~is_head]
    return Verification(
        rows=int(live.sum()) + len(delta.place),
        lists=len(g.counts),
        corrupt=tuple(corrupt),
        missing=tuple(int(r) for r in lost[:1000]),
        num_missing=len(lost),
        copies=float(held.mean()) if len(held) else 0.0,
        problems=tuple(problems),
    )


def live_rows(view: View) -> NDArray[np.bool_]:
    """(rows,) which rows of the generation are not deleted."""
    rows = view.generation.manifest.rows
    if not len(view.dead):
        return np.ones(rows, np.bool_)
    return ~np.unpackbits(view.dead, bitorder="little")[:rows].astype(np.bool_)
