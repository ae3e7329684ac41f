"""The files of an index: a manifest with a generation, heads, directory, postings, ids, write-ahead log.

``MANIFEST.json`` names every other file with its size and checksum; a new generation writes new files, syncs each,
and then replaces the manifest in one step, so a reader sees the old state or the new one. Lists are page aligned: all
rows, then (cosine) all factors, then all row numbers, so scoring is one contiguous block; byte codes may follow (see
``codes``). Little endian; row numbers and ids have 64 bits; everything is readable by mmap.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hasten.errors import CorruptPostingError, DataError
from hasten.retrieve.index.io import Folder, map_behind
from hasten.retrieve.index.metric import COSINE

__all__ = [
    "DIRECTORY",
    "FORMAT",
    "Generation",
    "HEAD_BIT",
    "MANIFEST",
    "Manifest",
    "bytes_of_list",
    "checksum",
    "commit",
    "discard_strays",
    "head_tensors",
    "put",
    "read_heads",
    "read_list",
    "read_manifest",
    "seed_arrays",
    "write_heads",
]

FORMAT = 2
"""the newest format that is read; an index whose lists have no codes is written as format 1"""
MANIFEST = "MANIFEST.json"
HEAD_BIT = 1 << 62
SLOT_BITS = 24
CHECKED = 1 << 30
"""files up to this size have their checksum read when an index opens; larger ones only on ``verify``"""

DIRECTORY = np.dtype(
    [
        ("offset", "<u8"),
        ("count", "<u4"),
        ("bytes", "<u4"),
        ("crc32", "<u4"),
        ("segment", "<u4"),
        ("radius", "<f4"),
        ("flags", "<u4"),
    ]
)
"""one record per head; bit 0 of ``flags``: retired, the head navigates but holds no list"""


@dataclass(frozen=True)
class Manifest:
    """What one generation consists of."""

    generation: int
    """counts up with every commit"""
    rows: int
    """row numbers given out so far; some may be deleted"""
    width: int
    """d"""
    dtype: str
    """of the stored rows"""
    metric: str
    """l2, cosine or ip"""
    largest: float
    """largest norm when the index was built: M of the inner-product mapping"""
    files: dict[str, dict[str, int]]
    """name -> {bytes, crc32}; a postings segment has no crc32 of its own, its lists have"""
    segments: tuple[str, ...]
    """postings files by number"""
    wal: str
    """the write-ahead log that continues this generation"""
    parameters: dict[str, Any] = field(default_factory=dict)
    """how it was built, and the default knobs of a search"""
    roles: dict[str, str] = field(default_factory=dict)
    """heads, directory, location, ids, order, tombstones, attributes -> file name"""

    @property
    def coded(self) -> bool:
        """Whether byte codes follow each list."""
        return bool(self.parameters.get("coded", False))

    def to_json(self) -> dict[str, Any]:
        """The document; ``crc32`` guards the rest."""
        body: dict[str, Any] = {
            "format": 2 if self.coded else 1,
            "generation": self.generation,
            "rows": self.rows,
            "width": self.width,
            "dtype": self.dtype,
            "metric": self.metric,
            "largest": self.largest,
            "files": self.files,
            "segments": list(self.segments),
            "wal": self.wal,
            "parameters": self.parameters,
            "roles": self.roles,
        }
        body["crc32"] = zlib.crc32(json.dumps(body, sort_keys=True).encode())
        return body

    @classmethod
    def from_json(cls, body: dict[str, Any], place: str) -> Manifest:
        """Raises DataError for a newer format or a document whose checksum is wrong."""
        if body.get("format", 0) > FORMAT:
            raise DataError(
                f"{place!r} has the format {body['format']}, this version reads up to {FORMAT}; update hasten"
            )
        given = body.pop("crc32", None)
        if given != zlib.crc32(json.dumps(body, sort_keys=True).encode()):
            raise DataError(f"{place!r} has a manifest whose checksum is wrong; restore it from a snapshot")
        body.pop("format")
        body["segments"] = tuple(body["segments"])
        return cls(**body)


@dataclass(frozen=True)
class Generation:
    """One generation, opened: what navigates is in memory, what is scored is mapped. Immutable, so readers share it."""

    manifest: Manifest
    metric: int
    """0 L2, 1 cosine, 2 inner product"""
    heads: NDArray[Any]
    """(H, d) rows, float16 as its bits"""
    extra: NDArray[np.float32]
    """(H,) factors; empty for L2"""
    head_rows: NDArray[np.int64]
    """(H,) row number of each head"""
    graph: NDArray[np.int32]
    """(H, degree) padded with -1"""
    groups: tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.int32]]
    """group heads, seed heads, begins of each group's seeds"""
    directory: NDArray[Any]
    """(H,) records, mapped"""
    segments: tuple[NDArray[np.uint8], ...]
    """mapped postings"""
    addresses: NDArray[np.int64]
    """(H,) address of each list in this process"""
    counts: NDArray[np.int32]
    """(H,) rows of each list"""
    radii: NDArray[np.float32]
    """(H,) distance of the farthest row of each list"""
    location: NDArray[np.int64]
    """(rows,) mapped: HEAD_BIT | head, list << 24 | slot, or -1"""
    ids: NDArray[np.int64] | None
    """(rows,) mapped; None: the id is the row number"""
    order: NDArray[np.int64] | None
    """(rows,) mapped: rows sorted by id"""
    dead: NDArray[np.uint8]
    """bitmap of deleted rows, empty where there are none"""
    attributes: dict[str, NDArray[Any]]
    """columns (rows,) that filters read"""
    guide: tuple[Any, ...]
    """byte copies of the heads for the walk; see ``guide``"""
    mapped: frozenset[str] = frozenset()
    """parts that are not held in memory but read from the map"""
    files: tuple[tuple[str, Callable[[], int], int], ...] = ()
    """(path, its present size, the size when it was opened) of every file that is mapped; first the segments"""

    @cached_property
    def seeds(self) -> tuple[Any, ...]:
        """Group vectors, group heads, seed vectors, seed heads, begins; gathered when first asked for, which a search
        by a guide does not.
        """
        return seed_arrays(self.heads, self.groups)

    @cached_property
    def _searched(self) -> tuple[tuple[Callable[[], int], int], ...]:
        """(present size, size when it was opened) of the maps that a search reads: lists, ids, heads not held."""
        others = (self.manifest.roles.get(role) for role in ("directory", "location"))
        skipped = {name for name in others if name is not None}
        return tuple((present, size) for path, present, size in self.files if path.rsplit("/", 1)[-1] not in skipped)

    def check_searched(self) -> None:
        """:meth:`check` for what a search reads, which is asked before each one."""
        for present, size in self._searched:
            if present() < size:
                self.check()

    def check(self, *, lists: bool = True) -> None:
        """Raise CorruptPostingError if a mapped file was cut after it was opened: to read beyond its end would kill the
        process. ``lists`` False looks at the other files only.
        """
        for path, present, size in self.files if lists else self.files[len(self.segments) :]:
            if present() < size:
                raise CorruptPostingError(
                    f"{path!r} was cut from {size} to {present()} bytes after the index was opened; restore it from a "
                    "snapshot, or run repair() with the vectors if it holds lists"
                )

    @property
    def coded(self) -> int:
        """1 where byte codes follow each list, else 0."""
        return int(self.manifest.coded)

    @property
    def row_bytes(self) -> int:
        """Bytes of one stored row."""
        return int(self.manifest.width) * int(self.heads.itemsize)

    def memory(self) -> dict[str, int]:
        """Bytes held in memory, by part; what is read from a map is not counted."""
        codes, (group_codes, _, seed_codes, _, _) = self.guide[0], self.guide[1]
        parts = {
            "heads": self.heads.nbytes,
            "factors": self.extra.nbytes,
            "head rows": self.head_rows.nbytes,
            "graph": self.graph.nbytes,
            "seeds": sum(a.nbytes for a in self.groups) + sum(a.nbytes for a in self.__dict__.get("seeds", ())[:3:2]),
            "guide": (0 if codes is self.heads else codes.nbytes) + group_codes.nbytes + seed_codes.nbytes,
            "directory": self.addresses.nbytes + self.counts.nbytes + self.radii.nbytes,
            "tombstones": self.dead.nbytes,
            "attributes": sum(a.nbytes for a in self.attributes.values()),
        }
        parts |= dict.fromkeys(self.mapped, 0)
        return {**parts, "total": sum(parts.values())}


def seed_arrays(heads: NDArray[Any], groups: tuple[Any, Any, Any]) -> tuple[Any, ...]:
    """The seeds as the walk reads them: contiguous copies of their vectors."""
    group_heads, seed_heads, begins = groups
    return (
        np.ascontiguousarray(heads[group_heads]),
        np.ascontiguousarray(group_heads, np.int32),
        np.ascontiguousarray(heads[seed_heads]),
        np.ascontiguousarray(seed_heads, np.int32),
        np.ascontiguousarray(begins, np.int32),
    )


def bytes_of_list(count: Any, row_bytes: int, metric: int) -> Any:
    """Bytes of lists of ``count`` rows, before padding to pages."""
    size = count * row_bytes
    if metric == COSINE:
        size = (size + 3) // 4 * 4 + 4 * count
    return (size + 7) // 8 * 8 + 8 * count


def checksum(data: Any, before: int = 0) -> int:
    """CRC-32 of anything that has bytes."""
    return zlib.crc32(data, before)


def put(folder: Folder, name: str, data: Any) -> dict[str, int]:
    """Write a new file and sync it; returns its entry in the manifest."""
    writer = folder.create(name)
    try:
        view: Any = memoryview(data).cast("B")
        for begin in range(0, max(len(view), 1), 1 << 24):
            writer.write(view[begin : begin + (1 << 24)])
        writer.sync()
    finally:
        writer.close()
    return {"bytes": len(view), "crc32": checksum(view)}


def write_heads(folder: Folder, name: str, tensors: dict[str, NDArray[Any]]) -> dict[str, int]:
    """Heads, graph and seeds as safetensors, written by hand so that no second copy is made."""
    header: dict[str, Any] = {}
    names = {"float32": "F32", "float16": "F16", "uint8": "U8", "int8": "I8", "int32": "I32", "int64": "I64"}
    offset = 0
    ordered = sorted(tensors.items(), key=lambda kv: (-kv[1].dtype.itemsize, kv[0]))
    for key, array in ordered:
        header[key] = {
            "dtype": names[array.dtype.name],
            "shape": list(array.shape),
            "data_offsets": [offset, offset + array.nbytes],
        }
        offset += array.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    writer = folder.create(name)
    crc, size = 0, 0
    arrays: list[Any] = [memoryview(np.ascontiguousarray(a)).cast("B") for _, a in ordered if a.size]  # type: ignore[arg-type]
    try:
        for part in (struct.pack("<Q", len(text)) + text, *arrays):
            writer.write(part)
            crc = checksum(part, crc)
            size += len(part)
        writer.sync()
    finally:
        writer.close()
    return {"bytes": size, "crc32": crc}


def head_tensors(vectors: Any, extra: Any, head_rows: Any, graph: Any, groups: Any) -> dict[str, NDArray[Any]]:
    """What the file of the heads holds, by name."""
    return {
        "heads": vectors,
        "extra": extra,
        "head_rows": head_rows,
        "graph": graph,
        "group_heads": groups[0],
        "seed_heads": groups[1],
        "seed_begins": groups[2],
    }


def read_heads(raw: NDArray[np.uint8]) -> dict[str, NDArray[Any]]:
    """Views into a mapped safetensors file."""
    kinds = {"F32": "<f4", "F16": "<f2", "U8": "u1", "I8": "i1", "I32": "<i4", "I64": "<i8"}
    (length,) = struct.unpack("<Q", raw[:8].tobytes())
    header = json.loads(raw[8 : 8 + length].tobytes())
    out = {}
    for key, entry in header.items():
        begin, end = entry["data_offsets"]
        data = raw[8 + length + begin : 8 + length + end]
        out[key] = data.view(kinds[entry["dtype"]]).reshape(entry["shape"])
    return out


def commit(folder: Folder, manifest: Manifest) -> None:
    """Make ``manifest`` the current one. Every file that it names must be synced already."""
    folder.sync()
    writer = folder.create(MANIFEST + ".tmp")
    try:
        writer.write(json.dumps(manifest.to_json(), indent=1, sort_keys=True).encode())
        writer.sync()
    finally:
        writer.close()
    folder.rename(MANIFEST + ".tmp", MANIFEST)
    folder.sync()


def read_manifest(folder: Folder) -> Manifest:
    """The current manifest; raises DataError with one line where there is none."""
    place = str(folder.path(""))
    if folder.size(MANIFEST) < 0:
        raise DataError(f"{place!r} holds no index (no {MANIFEST}); build one with hasten index build")
    try:
        body = json.loads(folder.read(MANIFEST))
    except ValueError as error:
        raise DataError(f"{place!r} has a manifest that is not JSON ({error}); restore it from a snapshot") from error
    return Manifest.from_json(body, place)


def discard_strays(folder: Folder, manifest: Manifest) -> list[str]:
    """Delete what no manifest names: what a crash left behind, or an older generation."""
    known = {MANIFEST, manifest.wal, *manifest.files}
    strays = [n for n in folder.names() if n not in known]
    for name in strays:
        folder.remove(name)
    return strays


def read_list(generation: Generation, number: int) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """(rows, row numbers) of one list, checked; raises :class:`~hasten.errors.CorruptPostingError`."""
    entry = generation.directory[number]
    count = int(entry["count"])
    width = generation.manifest.width
    if count == 0:
        return np.empty((0, width), generation.heads.dtype), np.empty(0, np.int64)
    begin = int(entry["offset"])
    segment = generation.segments[int(entry["segment"])]
    data = segment[begin : begin + int(entry["bytes"])]
    behind = map_behind(segment)
    cut = behind is not None and behind.size() < begin + len(data)  # to read it would kill the process
    if cut or checksum(data) != int(entry["crc32"]):
        raise CorruptPostingError(
            f"posting list {number} has a wrong checksum; run repair() with the vectors, or restore a snapshot",
            (number,),
        )
    rows = data[: count * generation.row_bytes].view(generation.heads.dtype).reshape(count, width)
    end = int(bytes_of_list(count, generation.row_bytes, generation.metric))
    numbers = data[end - 8 * count : end].view("<i8")
    return rows, numbers
