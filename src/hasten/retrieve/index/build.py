"""Vectors to an index directory, within a stated memory.

The rows are never all in memory: the tree takes what fits, assignment streams blocks, the (head, row) pairs are
spilled to one temporary file per range of heads, and lists are packed in batches. What must fit: the heads, their
graph, one byte and two numbers per row. Publication: SPANN: Highly-efficient Billion-scale Approximate Nearest
Neighbor Search, https://arxiv.org/abs/2111.08566; differs from the paper in: lists hold rows and row numbers apart,
no row loses its last copy, the graph's seeds are two levels of the tree, everything is deterministic by seed.
"""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hasten.budget import format_quantity, parse_quantity
from hasten.errors import ConfigurationError, DataError
from hasten.retrieve.index.assign import assign_rows, cut_lists, thin_copies
from hasten.retrieve.index.format import HEAD_BIT, Manifest, commit, put, seed_arrays, write_heads
from hasten.retrieve.index.heads import make_seeds, select_heads
from hasten.retrieve.index.io import DiskFolder, Folder
from hasten.retrieve.index.links import link_heads
from hasten.retrieve.index.lists import PAIR, ListWriter, empty_directory, sort_pairs
from hasten.retrieve.index.metric import (
    COSINE,
    NAMES,
    check_rows,
    code_of,
    factors,
    lanes,
    mapped,
    native,
    prepare,
)
from hasten.retrieve.index.sources import Source, open_source
from hasten.retrieve.index.tree import split_rows

__all__ = ["BuildOptions", "build"]

Progress = Callable[[str, float], None]


@dataclass(frozen=True)
class BuildOptions:
    """How an index is built.

    >>> BuildOptions(head_ratio=0.12).replicas
    8
    """

    metric: str = "l2"
    """l2, cosine or ip"""
    head_ratio: float = 0.16
    """share of the rows that become heads"""
    replicas: int = 8
    """most lists that hold a row"""
    list_bytes: float | str | None = None
    """a list holds as many rows as fit into this; default 12 KiB for byte rows, 48 KiB otherwise"""
    epsilon: float = 0.3
    """closure: a head may be this much farther than the nearest one. Farther copies fill lists and find nothing; 10
    leaves it to the RNG rule and ``replicas``, as published
    """
    rng_factor: float = 1.0
    """closure: how much farther than the heads taken a head may be from the row"""
    rng_rule: bool = True
    """False: the nearest heads, whatever their direction (for ablations)"""
    heads: str = "balanced"
    """balanced, kmeans (no penalty for crowded clusters) or random: how heads are chosen"""
    crowding: float = 1.8
    """closure: a list with this many times the mean takes a row only as its nearest or second nearest; 0: any"""
    candidates: int = 64
    """heads that closure looks at"""
    degree: int = 32
    """edges of a head in the graph"""
    build_beam: int = 64
    """beam when a head is linked"""
    alpha: float = 1.1
    """RNG rule of the graph: above 1 keeps more edges"""
    split_factor: int = 6
    """head selection: a crowded node gives ceil(count / split_factor) of its children"""
    branches: int = 16
    """children of a node of the tree: with fewer the lists are more even, with more the build is quicker"""
    leaf: int = 8
    """rows of a node that is not split"""
    codes: bool = True
    """lists of floats get byte codes behind them, a quarter of their size: mapped searches touch fewer rows"""
    seed: int = 0
    """every random draw of the build comes from it"""
    memory: float | str = "1GiB"
    """bytes that the build may take beyond what the process has already"""
    threads: int = 0
    """0: as many as the processor has cores"""

    def __post_init__(self) -> None:
        code_of(self.metric)
        if not 0 < self.head_ratio <= 1:
            raise ConfigurationError(
                f"head_ratio is {self.head_ratio}; choose a share of the rows within (0, 1], such as 0.12"
            )
        if not self.crowding >= 0:
            raise ConfigurationError(f"crowding is {self.crowding}; give times the mean list, such as 1.8, or 0")
        if not 1 <= self.replicas <= 32:
            raise ConfigurationError(f"replicas is {self.replicas}; a row may lie in 1 to 32 lists")
        if self.heads not in ("balanced", "kmeans", "random"):
            raise ConfigurationError(f"heads is {self.heads!r}; choose balanced, kmeans or random")
        if not 4 <= self.degree <= 128:
            raise ConfigurationError(f"degree is {self.degree}; the graph takes 4 to 128 edges")
        for name in ("memory", "list_bytes"):
            value = getattr(self, name)
            if isinstance(value, str):
                object.__setattr__(self, name, parse_quantity(value, "bytes"))

    def to_json(self) -> dict[str, Any]:
        """By name."""
        return {f.name: getattr(self, f.name) for f in fields(self)}

    def row_limit(self, width: int, itemsize: int) -> int:
        """Rows that a list may hold."""
        size = self.list_bytes or (12288.0 if itemsize == 1 else 49152.0)
        limit = int(float(size) // 4096 * 4096 // (width * itemsize + 8 + (4 if code_of(self.metric) == COSINE else 0)))
        return max(limit, 8)


def _silent(stage: str, share: float) -> None:
    """Progress that nobody watches."""


def build(
    vectors: Any,
    path: str | os.PathLike[str],
    options: BuildOptions | None = None,
    *,
    ids: Any = None,
    attributes: dict[str, Any] | None = None,
    column: str | None = None,
    progress: Progress = _silent,
    make_folder: Callable[[Path], Folder] | None = None,
) -> dict[str, Any]:
    """Build an index in the new directory ``path``; returns what was built, in numbers.

    ``vectors`` as :func:`~hasten.retrieve.index.sources.open_source` takes them; ``ids`` (n,) non-negative integers,
    default the row numbers; ``attributes`` columns (n,) for filters. The directory appears whole or not at all.
    Raises DataError naming the row at fault, ConfigurationError when ``memory`` does not suffice, with what would.
    """
    options = options or BuildOptions()
    target = Path(path)
    if target.exists() and any(target.iterdir() if target.is_dir() else [target]):
        raise DataError(f"{str(target)!r} exists already; choose another path, or delete it first")
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".part", dir=target.parent))
    try:
        folder = make_folder(partial) if make_folder is not None else DiskFolder(partial)
        source = open_source(vectors, column=column, spool=partial)
        try:
            told = _build(source, folder, options, ids, attributes or {}, progress)
        finally:
            source.close()
        for stray in partial.glob(".*"):
            stray.unlink()
        os.chmod(partial, 0o755)
        with contextlib.suppress(OSError):
            target.rmdir()
        os.rename(partial, target)
        DiskFolder(target.parent).sync()
        return told
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _survey(source: Source, options: BuildOptions, block: int, progress: Progress) -> float:
    """Check every row; the largest norm."""
    metric, largest = code_of(options.metric), 0.0
    for begin in range(0, len(source), block):
        rows = source.block(begin, min(begin + block, len(source)))
        largest = max(largest, check_rows(rows, metric, begin))
        progress("check", 0.03 * min(1.0, (begin + block) / len(source)))
    return largest


def _check_ids(ids: Any, count: int) -> NDArray[np.int64] | None:
    if ids is None:
        return None
    array = np.asarray(ids)
    if array.shape != (count,) or array.dtype.kind not in "iu":
        raise DataError(f"ids have the shape {array.shape} and type {array.dtype}; give {count} integers")
    array = array.astype(np.int64)
    if count and array.min() < 0:
        raise DataError(f"row {int(np.argmin(array))} has the id {int(array.min())}; ids are not negative")
    order = np.argsort(array, kind="stable")
    same = np.flatnonzero(array[order][1:] == array[order][:-1])
    if len(same):
        row = int(order[same[0] + 1])
        raise DataError(
            f"row {row} has the id {int(array[row])}, which row {int(order[same[0]])} has already; ids are unique"
        )
    return None if np.array_equal(array, np.arange(count)) else array


def needed(n: int, width: int, itemsize: int, options: BuildOptions) -> float:
    """Bytes that a build cannot do without, by the sizes of its parts."""
    heads = options.head_ratio * n
    per_head = width * itemsize * 1.2 + 4 * (width + 17) + 8 * options.degree + 64
    per_row = 4 + 1 + 8 + 8 + 40  # order, copies, location, marks, nodes of the tree
    return heads * per_head + n * per_row + (24 << 20)


def _build(
    source: Source, folder: Folder, options: BuildOptions, ids: Any, attributes: dict[str, Any], progress: Progress
) -> dict[str, Any]:
    n, width = len(source), source.width
    if n == 0:
        raise DataError("the collection is empty; an index needs at least one row")
    if n >= 1 << 40:
        raise DataError(f"{n} rows are more than the format holds (2^40); build shards")
    metric = code_of(options.metric)
    itemsize = source.dtype.itemsize
    threads = options.threads or os.cpu_count() or 1
    memory = float(options.memory)
    least = needed(n, width, itemsize, options)
    if memory < least:
        raise ConfigurationError(
            f"memory is {format_quantity(memory, 'bytes')}, {n} rows of {width} need "
            f"{format_quantity(least, 'bytes')}; "
            "give more, or lower head_ratio"
        )
    spare = memory - least
    row_floats = 4 * (lanes(width) + width)
    block = int(max(256, min(1 << 16, spare / 4 / row_floats / max(threads, 1), (16 << 20) / row_floats)))
    named = _check_ids(ids, n)
    columns = {k: _column(k, v, n) for k, v in attributes.items()}
    largest = _survey(source, options, block, progress)

    def take(rows: NDArray[Any]) -> NDArray[Any]:
        return source.take(rows)

    def take_mapped(rows: NDArray[Any]) -> NDArray[np.float32]:
        return mapped(take(rows), metric, largest)

    # heads
    split = (0, 0)
    if options.heads == "random":
        rng = np.random.default_rng(options.seed)
        head_rows = np.sort(rng.choice(n, max(1, round(options.head_ratio * n)), replace=False)).astype(np.int64)
    else:
        buffer = int(max(1024, min(1 << 20, spare / 3 / row_floats / threads)))
        tree = split_rows(
            n,
            take_mapped,
            k=options.branches,
            leaf=options.leaf,
            balanced=options.heads == "balanced",
            seed=options.seed,
            buffer_rows=buffer,
            threads=threads,
            progress=lambda share: progress("cluster", 0.03 + 0.15 * share),
        )
        head_rows, *thresholds = select_heads(tree, options.head_ratio, options.split_factor)
        split = (thresholds[0], thresholds[1])
        del tree
    count = len(head_rows)
    ascending = np.argsort(head_rows)
    vectors = np.empty((count, width), source.dtype)
    for begin in range(0, count, block):
        part = ascending[begin : begin + block]
        vectors[part] = take(head_rows[part])
    heads = native(vectors)
    extra = factors(vectors, metric, largest)
    groups = make_seeds(mapped(vectors, metric, largest), options.seed, threads)
    seeds = seed_arrays(heads, groups)
    graph = np.full((count, options.degree), -1, np.int32)
    nodes = np.random.default_rng(options.seed).permutation(count)
    link_heads(
        heads,
        extra,
        graph,
        seeds,
        metric,
        largest,
        nodes,
        beam=options.build_beam,
        alpha=options.alpha,
        threads=threads,
        progress=lambda share: progress("link heads", 0.2 + 0.2 * share),
    )

    # closure, spilled by range of heads
    is_head = np.zeros(n, np.bool_)
    is_head[head_rows] = True
    pairs_bytes = 16.0 * n * min(options.replicas, 8)
    partitions = int(max(1, min(256, np.ceil(pairs_bytes / max(spare / 6, 8 << 20)))))
    per_range = -(-count // partitions)
    spills = [Path(folder.path(f".pairs-{p}")) for p in range(partitions)]
    copies = np.zeros(n, np.uint8)
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(p.open("wb")) for p in spills]
        for pairs, done in _closure(
            source, take, heads, extra, graph, seeds, metric, largest, is_head, copies, options, block, threads
        ):
            if partitions == 1:
                pairs.tofile(files[0])
            else:
                which = pairs["head"] // per_range
                for p in np.unique(which):
                    pairs[which == p].tofile(files[p])
            progress("assign", 0.4 + 0.4 * done)
    before = np.zeros(count, np.int64)

    # lists
    limit = options.row_limit(width, itemsize)
    coded = options.codes and itemsize > 1  # bytes are their own codes
    location = np.full(n, -1, np.int64)
    location[head_rows] = HEAD_BIT | np.arange(count)
    directory = empty_directory(count)
    segment = "postings-1-0.bin"
    dropped = beyond = 0
    writer = folder.create(segment)
    try:
        lists = ListWriter(
            writer,
            0,
            directory,
            location,
            metric,
            largest,
            width,
            itemsize,
            (lambda which: mapped(vectors[which], metric, largest)) if coded else None,
            int(max(1 << 20, min(1 << 25, spare / 16))),
        )
        for p, spill in enumerate(spills):
            pairs = sort_pairs(np.fromfile(spill, PAIR))
            spill.unlink()
            low, high = p * per_range, min((p + 1) * per_range, count)
            if low >= high:
                continue
            counts = np.bincount(pairs["head"] - low, minlength=high - low)
            before[low:high] = counts
            keep = np.ones(len(pairs), np.bool_)
            begins = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
            lost, grown = cut_lists(begins, np.ascontiguousarray(pairs["row"]), limit, copies, keep)
            dropped, beyond = dropped + lost, beyond + grown
            pairs = pairs[keep]
            counts = np.bincount(pairs["head"] - low, minlength=high - low)
            lists.write(np.arange(low, high), counts, pairs, take)
            progress("write lists", 0.8 + 0.18 * (p + 1) / partitions)
        writer.sync()
        size = lists.offset
    finally:
        writer.close()
    zero = int(np.count_nonzero(location < 0))
    assert zero == 0, f"{zero} rows are in no list"  # the invariant of closure and cut

    roles = {"heads": "heads-1.safetensors", "directory": "directory-1.bin", "location": "location-1.bin"}
    entries: dict[str, dict[str, int]] = {segment: {"bytes": size}}
    entries[roles["heads"]] = write_heads(folder, roles["heads"], _tensors(vectors, extra, head_rows, graph, groups))
    entries[roles["directory"]] = put(folder, roles["directory"], directory.view(np.uint8))
    entries[roles["location"]] = put(folder, roles["location"], location.view(np.uint8))
    if named is not None:
        roles |= {"ids": "ids-1.bin", "order": "order-1.bin"}
        entries[roles["ids"]] = put(folder, roles["ids"], named.view(np.uint8))
        entries[roles["order"]] = put(
            folder, roles["order"], np.argsort(named, kind="stable").astype(np.int64).view(np.uint8)
        )
    if columns:
        roles["attributes"] = "attributes-1.npz"
        entries[roles["attributes"]] = put(folder, roles["attributes"], pack_attributes(columns))
    wal = "wal-1.log"
    empty = folder.create(wal)
    empty.sync()
    empty.close()
    filled = before[before > 0]
    radii = directory["radius"][directory["count"] > 0]
    told = {
        "rows": n,
        "width": width,
        "heads": count,
        "thresholds": list(split),
        "replicas": float((before.sum() - dropped) / max(1, n - count)),
        "list_mean": float(filled.mean()) if len(filled) else 0.0,
        "list_spread": float(before.std() / max(before.mean(), 1e-9)),
        "list_max": int(before.max(initial=0)),
        "list_limit": limit,
        "dropped": dropped,
        "beyond_limit": beyond,
        "edges": float((graph >= 0).sum() / count),
        "postings_bytes": size,
        "floor": float(np.quantile(radii.astype(np.float64) ** 2, 0.05)) if len(radii) else 0.0,
    }
    manifest = Manifest(
        generation=1,
        rows=n,
        width=width,
        dtype=source.dtype.name,
        metric=NAMES[metric],
        largest=largest,
        files=entries,
        segments=(segment,),
        wal=wal,
        parameters={"options": options.to_json(), "built": told, "coded": coded},
        roles=roles,
    )
    commit(folder, manifest)
    progress("done", 1.0)
    return told


def _tensors(vectors: Any, extra: Any, head_rows: Any, graph: Any, groups: Any) -> dict[str, NDArray[Any]]:
    return {
        "heads": vectors,
        "extra": extra,
        "head_rows": head_rows,
        "graph": graph,
        "group_heads": groups[0],
        "seed_heads": groups[1],
        "seed_begins": groups[2],
    }


def _closure(
    source: Source,
    take: Any,
    heads: Any,
    extra: Any,
    graph: Any,
    seeds: Any,
    metric: int,
    largest: float,
    is_head: Any,
    copies: Any,
    options: BuildOptions,
    block: int,
    threads: int,
) -> Any:
    """Yield (pairs, share done) of the rows that are not heads, in order; blocks are searched by several threads."""
    n, count = len(source), len(heads)
    linear = count <= 256
    knobs = closure_knobs(options, count)
    pool_scratch: list[tuple[Any, Any]] = [(np.zeros(count, np.uint16), np.zeros(1, np.int64)) for _ in range(threads)]

    def run(begin: int) -> tuple[Any, ...]:
        rows = begin + np.flatnonzero(~is_head[begin : begin + block])
        if len(rows) == 0:
            nothing = np.empty((0, options.replicas))
            return rows, nothing.astype(np.int32), nothing.astype(np.float32), np.zeros(0, np.int32)
        stamps, epoch = pool_scratch.pop()
        try:
            queries, consts, augs = prepare(take(rows), metric, largest, stored=True)
            found, distance, sizes = assign_rows(
                queries,
                consts,
                augs,
                (heads, extra, graph, seeds),
                metric,
                np.empty(0, np.uint8),
                knobs,
                linear,
                (stamps, epoch),
            )
        finally:
            pool_scratch.append((stamps, epoch))
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


def _column(name: str, values: Any, count: int) -> NDArray[Any]:
    array = np.asarray(values)
    if array.dtype == object:
        array = np.array([str(v) for v in array])
    if array.shape != (count,) or array.dtype.kind not in "biufU":
        raise DataError(
            f"attribute {name!r} has the shape {array.shape} and type {array.dtype}; give {count} numbers or texts"
        )
    return array


def pack_attributes(columns: dict[str, NDArray[Any]]) -> bytes:
    """Columns as one npz document."""
    buffer = io.BytesIO()
    np.savez(buffer, **columns)  # type: ignore[arg-type]
    return buffer.getvalue()
