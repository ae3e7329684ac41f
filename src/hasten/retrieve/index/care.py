"""Verification, repair and snapshots."""

from __future__ import annotations

import io
import json
import tarfile
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from hasten.errors import CorruptPostingError, DataError
from hasten.retrieve.index import format as files
from hasten.retrieve.index.delta import Delta
from hasten.retrieve.index.io import DiskFolder, Folder
from hasten.retrieve.index.lists import PAIR, ListWriter, sort_pairs
from hasten.retrieve.index.metric import mapped
from hasten.retrieve.index.query import View
from hasten.retrieve.index.sources import open_source

if TYPE_CHECKING:
    from hasten.retrieve.index.spann import Spann

__all__ = ["Verification", "repair", "restore", "snapshot", "verify"]


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
    live = np.ones(m.rows, np.bool_)
    if len(view.dead):
        live = ~np.unpackbits(view.dead, bitorder="little")[: m.rows].astype(np.bool_)
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


def repair(index: Spann, vectors: Any = None) -> dict[str, Any]:
    """Empty the corrupt lists and write a new generation in which every row can be found.

    ``vectors`` (rows by row number, as the index was built from; rows added later behind them) restore rows whose
    only copy was lost. Without them such rows are deleted and counted as lost. What was added since the last
    compaction stays in the log.
    """
    index._writable()
    view, folder = index._view, index._folder
    g = view.generation
    m = g.manifest
    found = verify(view, index._delta)
    if not found.corrupt and not found.num_missing:
        return {"corrupt": 0, "restored": 0, "lost": 0}
    bad = np.array(found.corrupt, np.int64)
    counts = g.counts.copy()
    counts[bad] = 0
    held = np.zeros(m.rows, np.bool_)
    held[g.head_rows] = True
    pairs = []
    for h in np.flatnonzero(counts > 0):
        _, rows = files.read_list(g, int(h))
        held[rows] = True
    live = np.ones(m.rows, np.bool_)
    if len(view.dead):
        live = ~np.unpackbits(view.dead, bitorder="little")[: m.rows].astype(np.bool_)
    homeless = np.flatnonzero(live & ~held)
    lost = homeless
    location = np.array(g.location)
    generation = m.generation + 1
    directory = np.array(g.directory)
    directory["count"][bad] = directory["bytes"][bad] = directory["crc32"][bad] = 0
    directory["radius"][bad] = 0
    segments = list(m.segments)
    entries = {k: dict(v) for k, v in m.files.items() if k not in m.roles.values() or k == m.roles["heads"]}
    changed = np.zeros(len(counts), np.bool_)
    changed[bad] = True
    if vectors is not None:
        from hasten.retrieve.index.update import put_back

        source = open_source(vectors)
        if source.width != m.width or len(source) < m.rows:
            raise DataError(
                f"vectors are ({len(source)}, {source.width}); repair needs ({m.rows}, {m.width}), by row number"
            )
        near = np.flatnonzero(live & (location >= 0) & (location & files.HEAD_BIT == 0))
        near = near[np.isin(location[near] >> files.SLOT_BITS, bad)]  # whose first copy lay in a lost list
        wanted = np.union1d(homeless, near)
        rows = source.take(wanted).astype(m.dtype)
        pairs.append(put_back(view, wanted, rows, index._usable))
        lost = np.zeros(0, np.int64)
    fresh = sort_pairs(np.concatenate(pairs)) if pairs else np.empty(0, PAIR)
    # the lists that get rows back are written again, with what they hold now
    targets = np.union1d(np.unique(fresh["head"]).astype(np.int64), bad)
    keep = np.concatenate([fresh, *(_existing(g, h) for h in targets if counts[h] > 0)]) if len(targets) else fresh
    order = np.lexsort((keep["row"], keep["head"]))
    keep = keep[order]
    same = (keep["head"][1:] == keep["head"][:-1]) & (keep["row"][1:] == keep["row"][:-1])
    keep = sort_pairs(keep[np.concatenate([[True], ~same])]) if len(keep) else keep
    changed[targets] = True
    in_list = (location >= 0) & (location & files.HEAD_BIT == 0)
    moved = np.flatnonzero(in_list)
    moved = moved[changed[location[moved] >> files.SLOT_BITS]]
    location[moved] = -1
    dead = np.zeros(m.rows // 8 + 1, np.uint8)
    dead[: len(view.dead)] = view.dead
    for row in lost:
        dead[row >> 3] |= np.uint8(1 << (row & 7))
    segment = f"postings-{generation}-0.bin"
    segments.append(segment)
    original = open_source(vectors) if vectors is not None else None

    def take(rows: NDArray[np.int64]) -> NDArray[Any]:
        if original is not None:
            return original.take(rows).astype(m.dtype)
        raise DataError("no vectors were given")  # nothing is written without them

    def centres(which: NDArray[Any]) -> NDArray[np.float32]:
        heads = g.heads[which]
        return mapped(heads.view(np.float16) if m.dtype == "float16" else heads, g.metric, m.largest)

    writer = folder.create(segment)
    try:
        out = ListWriter(
            writer,
            len(segments) - 1,
            directory,
            location,
            g.metric,
            m.largest,
            m.width,
            g.heads.itemsize,
            centres if m.coded else None,
        )
        if len(keep):
            chosen = np.unique(keep["head"]).astype(np.int64)
            out.write(chosen, np.bincount(keep["head"], minlength=len(counts))[chosen], keep, take)
        writer.sync()
        entries[segment] = {"bytes": out.offset}
    finally:
        writer.close()
    gone = np.flatnonzero((location < 0) & live & held)  # a copy lies in a list that was not written
    if len(gone):
        wanted = np.zeros(m.rows, np.bool_)
        wanted[gone] = True
        for h in np.flatnonzero((counts > 0) & ~changed):
            _, rows = files.read_list(g, int(h))
            hit = np.flatnonzero(wanted[rows])
            location[rows[hit]] = (int(h) << files.SLOT_BITS) | hit
            wanted[rows[hit]] = False
    names = dict(m.roles)
    for role, data in (("directory", directory), ("location", location)):
        names[role] = f"{role}-{generation}.bin"
        entries[names[role]] = files.put(folder, names[role], data.view(np.uint8))
    for role in ("ids", "order", "attributes"):
        if role in names:
            entries[names[role]] = m.files[names[role]]
    if dead.any():
        names["tombstones"] = f"tombstones-{generation}.bin"
        entries[names["tombstones"]] = files.put(folder, names["tombstones"], dead)
    manifest = replace(
        m, generation=generation, files=entries, segments=tuple(segments), wal=f"wal-{generation}.log", roles=names
    )
    assert index._log is not None
    tail = folder.read(index._log.name)[: index._log.size]
    files.put(folder, manifest.wal, tail)
    files.commit(folder, manifest)
    index._log.close()
    index._open()
    return {"corrupt": len(bad), "restored": len(homeless) - len(lost), "lost": len(lost)}


def _existing(generation: files.Generation, head: int) -> NDArray[Any]:
    """Pairs of a readable list, with their distances."""
    g = generation
    rows, numbers = files.read_list(g, int(head))
    dtype = g.manifest.dtype
    plain = rows.view(np.float16) if dtype == "float16" else rows
    centre = g.heads[head : head + 1].view(np.float16) if dtype == "float16" else g.heads[head : head + 1]
    left = mapped(plain, g.metric, g.manifest.largest) - mapped(centre, g.metric, g.manifest.largest)
    out = np.empty(len(numbers), PAIR)
    out["head"], out["row"], out["distance"] = head, numbers, np.einsum("ij,ij->i", left, left)
    return out


def snapshot(folder: Folder, manifest: files.Manifest, log_size: int, target: Any) -> None:
    """Copy one state to a new directory, or as a tar stream to an object with ``write``.

    Files of a generation never change, so a directory on the same disk gets hard links. The log is cut at its last
    whole record.
    """
    log = folder.read(manifest.wal)[:log_size]
    document = json.dumps(manifest.to_json(), indent=1, sort_keys=True).encode()
    if hasattr(target, "write"):
        with tarfile.open(fileobj=target, mode="w|") as tar:
            for name in sorted(manifest.files):
                tar.add(folder.path(name), arcname=name, recursive=False)
            for name, data in ((manifest.wal, log), (files.MANIFEST, document)):
                entry = tarfile.TarInfo(name)
                entry.size = len(data)
                tar.addfile(entry, io.BytesIO(data))
        return
    import os
    import shutil

    place = Path(target)
    if place.exists() and any(place.iterdir()):
        raise DataError(f"{str(place)!r} is not empty; name a new directory for the snapshot")
    out = DiskFolder(place, make=True)
    for name in sorted(manifest.files):
        try:
            os.link(folder.path(name), place / name)
        except OSError:  # another disk, or one without links
            shutil.copyfile(folder.path(name), place / name)
    files.put(out, manifest.wal, log)
    files.commit(out, manifest)


def restore(stream: Any, path: Any) -> None:
    """Unpack a tar stream of :func:`snapshot` into the new directory ``path``; raises DataError where it is cut
    short.
    """
    place = Path(path)
    if place.exists() and any(place.iterdir()):
        raise DataError(f"{str(place)!r} is not empty; name a new directory for the index")
    place.mkdir(parents=True, exist_ok=True)
    seen = set()
    try:
        with tarfile.open(fileobj=stream, mode="r|") as tar:
            for entry in tar:
                if not entry.isfile() or "/" in entry.name or entry.name.startswith("."):
                    raise DataError(
                        f"the stream holds {entry.name!r}, which is no file of an index; it is not a snapshot"
                    )
                source = tar.extractfile(entry)
                assert source is not None
                folder = DiskFolder(place)
                writer = folder.create(entry.name)
                while block := source.read(1 << 20):
                    writer.write(block)
                writer.sync()
                writer.close()
                seen.add(entry.name)
    except tarfile.TarError as error:
        raise DataError(f"the stream is cut short or not a tar ({error}); take the snapshot again") from error
    manifest = files.read_manifest(DiskFolder(place))
    for name, known in manifest.files.items():
        if name not in seen or DiskFolder(place).size(name) != known["bytes"]:
            raise DataError(f"the stream lacks {name!r}; take the snapshot again")
        if "crc32" in known and files.checksum(DiskFolder(place).map(name)) != known["crc32"]:
            raise DataError(f"{name!r} has a wrong checksum in the stream; take the snapshot again")
    DiskFolder(place).sync()
