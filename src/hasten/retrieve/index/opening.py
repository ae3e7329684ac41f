"""Opening a generation within a stated memory.

Lists are always read from their map. Of the parts that navigate, those that a search touches most for each of their
bytes are held first: factors, graph, byte codes of the heads, row numbers; the heads themselves come last, since a
search by codes reads a few of them only. What does not fit stays mapped.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hasten import huge_pages
from hasten.budget import format_quantity
from hasten.errors import ConfigurationError, DataError
from hasten.retrieve.index.format import (
    CHECKED,
    DIRECTORY,
    Generation,
    Manifest,
    checksum,
    read_heads,
    read_manifest,
)
from hasten.retrieve.index.guide import guide_bytes, make_guide, no_guide
from hasten.retrieve.index.io import Folder, map_behind
from hasten.retrieve.index.metric import code_of, native

__all__ = ["load"]

_PER_LIST = 16
"""bytes of a list's address, count and radius"""


def load(folder: Folder, *, memory: float | None = None, check: bool = True) -> Generation:
    """Open the current generation.

    ``memory`` (bytes) bounds what is held in memory; what does not fit stays mapped. ``check`` compares the checksums
    of all files but the postings; sizes are compared always. Raises DataError with one line, ConfigurationError where
    ``memory`` is less than the least.
    """
    manifest = read_manifest(folder)
    _check_files(folder, manifest, check)
    roles = manifest.roles
    raw = folder.map(roles["heads"])
    tensors = read_heads(raw)
    attributes = _attributes(folder, manifest)
    dead = np.array(folder.map(roles["tombstones"])) if "tombstones" in roles else np.zeros(0, np.uint8)
    groups = tuple(np.array(tensors[n]) for n in ("group_heads", "seed_heads", "seed_begins"))
    metric, width = code_of(manifest.metric), manifest.width
    seeds = (len(groups[0]) + len(groups[1])) * width * tensors["heads"].dtype.itemsize
    fixed = _PER_LIST * len(tensors["heads"]) + dead.nbytes + sum(a.nbytes for a in (*groups, *attributes.values()))
    left = _spare(folder, memory, fixed + seeds)

    mapped = set()

    def hold(name: str) -> None:
        nonlocal left
        if tensors[name].nbytes > left:
            mapped.add(PARTS[name])
            return
        left -= tensors[name].nbytes
        tensors[name] = _copy(tensors[name])

    hold("extra")
    hold("graph")
    own = tensors["heads"].dtype == np.uint8 and manifest.metric == "l2"  # bytes are their own codes
    if own:
        hold("heads")
    heads = native(tensors["heads"])
    guide = no_guide(width)
    cost = guide_bytes(len(heads), groups, width, metric, own=own)
    if cost - seeds <= left:
        guide = make_guide(heads, tensors["graph"], groups, metric, manifest.largest)
        left -= cost - seeds if len(guide[0]) else 0
    hold("head_rows")
    if not own:
        hold("heads")
        heads = native(tensors["heads"])
    return _assembled(folder, manifest, metric, heads, tensors, groups, guide, dead, attributes, frozenset(mapped), raw)


PARTS = {"extra": "factors", "graph": "graph", "head_rows": "head rows", "heads": "heads"}
"""a tensor of the heads' file -> what :meth:`~hasten.retrieve.index.format.Generation.memory` calls it"""


def _check_files(folder: Folder, manifest: Manifest, check: bool) -> None:
    for name, entry in manifest.files.items():
        size = folder.size(name)
        if size != entry["bytes"]:
            raise DataError(
                f"{str(folder.path(name))!r} has {max(size, 0)} bytes, the manifest says {entry['bytes']}; "
                "restore it from a snapshot"
            )
        if check and "crc32" in entry and size <= CHECKED and checksum(folder.map(name)) != entry["crc32"]:
            raise DataError(f"{str(folder.path(name))!r} has a wrong checksum; restore it from a snapshot")


def _spare(folder: Folder, memory: float | None, least: int) -> float:
    """What is left beyond the least; raises ConfigurationError where it is less than nothing."""
    left = float("inf") if memory is None else memory - least
    if left < 0:
        raise ConfigurationError(
            f"memory is {format_quantity(float(memory or 0), 'bytes')}; {str(folder.path(''))!r} takes at least "
            f"{format_quantity(float(least), 'bytes')}; give that much, or build with a lower head_ratio"
        )
    return left


def _copy(tensor: NDArray[Any]) -> NDArray[Any]:
    """A copy in large pages where there are any: a walk jumps, and each page is looked up."""
    out: NDArray[Any] = huge_pages.zeros(tensor.nbytes).view(tensor.dtype).reshape(tensor.shape)
    out[...] = tensor
    return out


def _attributes(folder: Folder, manifest: Manifest) -> dict[str, NDArray[Any]]:
    if "attributes" not in manifest.roles:
        return {}
    with np.load(io.BytesIO(folder.read(manifest.roles["attributes"])), allow_pickle=False) as stored:
        return {k: stored[k] for k in stored.files}


def _guard(folder: Folder, name: str, data: NDArray[np.uint8]) -> tuple[str, Callable[[], int], int]:
    """Path of a mapped file, what tells its present size, and its size now."""
    behind = map_behind(data)
    return str(folder.path(name)), behind.size if behind is not None else lambda: 0, len(data) if behind else 0


def _assembled(
    folder: Folder,
    manifest: Manifest,
    metric: int,
    heads: NDArray[Any],
    tensors: dict[str, NDArray[Any]],
    groups: Any,
    guide: tuple[Any, ...],
    dead: NDArray[np.uint8],
    attributes: dict[str, NDArray[Any]],
    mapped: frozenset[str],
    raw: NDArray[np.uint8],
) -> Generation:
    roles = manifest.roles
    segments = tuple(folder.map(name) for name in manifest.segments)
    numbers = {role: folder.map(roles[role]) for role in ("directory", "location", "ids", "order") if role in roles}
    directory = numbers["directory"].view(DIRECTORY)
    files = [*zip(manifest.segments, segments, strict=True), *((roles[r], data) for r, data in numbers.items())]
    if mapped:
        files.append((roles["heads"], raw))
    addresses = np.zeros(len(directory), np.int64)
    if len(segments):
        bases = np.array([s.ctypes.data for s in segments], np.int64)
        addresses = bases[directory["segment"]] + directory["offset"].astype(np.int64)
    return Generation(
        manifest=manifest,
        metric=metric,
        heads=heads,
        extra=tensors["extra"],
        head_rows=tensors["head_rows"],
        graph=tensors["graph"],
        groups=groups,
        guide=guide,
        directory=directory,
        segments=segments,
        addresses=addresses,
        counts=directory["count"].astype(np.int32),
        radii=directory["radius"].astype(np.float32),
        location=numbers["location"].view("<i8"),
        ids=numbers["ids"].view("<i8") if "ids" in roles else None,
        order=numbers["order"].view("<i8") if "order" in roles else None,
        dead=dead,
        attributes=attributes,
        mapped=mapped,
        files=tuple(_guard(folder, name, data) for name, data in files),
    )
