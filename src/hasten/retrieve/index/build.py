"""Vectors to an index directory, within a stated memory.

The rows are never all in memory: the tree takes what fits, assignment streams blocks, the (head, row) pairs are
spilled to one temporary file per range of heads, and lists are packed in batches. What must fit: the heads, their
graph, one byte and two numbers per row. Publication: SPANN: Highly-efficient Billion-scale Approximate Nearest
Neighbor Search, https://arxiv.org/abs/2111.08566; differs from the paper in: lists hold rows and row numbers apart,
no row loses its last copy, the graph's seeds are two levels of the tree, everything is deterministic by seed.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hasten.budget import format_quantity
from hasten.errors import ConfigurationError, DataError
from hasten.retrieve.index.assign import cut_lists
from hasten.retrieve.index.closure import closure
from hasten.retrieve.index.format import HEAD_BIT, Manifest, commit, head_tensors, put, seed_arrays, write_heads
from hasten.retrieve.index.heads import make_seeds, select_heads
from hasten.retrieve.index.inputs import check_column, check_ids, largest_norm, pack_attributes
from hasten.retrieve.index.io import DiskFolder, Folder
from hasten.retrieve.index.links import link_heads
from hasten.retrieve.index.lists import PAIR, ListShape, empty_directory, sort_pairs, writing
from hasten.retrieve.index.metric import NAMES, code_of, factors, lanes, mapped, native
from hasten.retrieve.index.options import BuildOptions
from hasten.retrieve.index.sources import Source, open_source
from hasten.retrieve.index.tree import split_rows

__all__ = ["BuildOptions", "build", "needed"]

Progress = Callable[[str, float], None]
SEGMENT = "postings-1-0.bin"
SAMPLED = 200_000
"""rows whose distance to the nearest head is looked at for the floor of the pruning rule"""


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
            told = _Build(source, folder, options, ids, attributes or {}, progress).run()
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


def needed(n: int, width: int, itemsize: int, options: BuildOptions) -> float:
    """Bytes that a build cannot do without, by the sizes of its parts."""
    heads = options.head_ratio * n
    per_head = width * itemsize * 1.2 + 4 * (width + 17) + 8 * options.degree + 64
    per_row = 4 + 1 + 8 + 8 + 40  # order, copies, location, marks, nodes of the tree
    return heads * per_head + n * per_row + (24 << 20)


def _third(squares: NDArray[np.float32]) -> float:
    """Where the lower third of the squared distances that are not zero ends: how far pruning takes the nearest head to
    be at least, for a query that lies on it.

    The radii of lists would not do: copies far away make them long, and pruning would keep everything.
    """
    some = squares[squares > 0].astype(np.float64)
    return float(np.quantile(some, 1 / 3)) if len(some) else 0.0


class _Build:
    """One build, step by step."""

    def __init__(
        self,
        source: Source,
        folder: Folder,
        options: BuildOptions,
        ids: Any,
        attributes: dict[str, Any],
        progress: Progress,
    ) -> None:
        n, width = len(source), source.width
        if n == 0:
            raise DataError("the collection is empty; an index needs at least one row")
        if n >= 1 << 40:
            raise DataError(f"{n} rows are more than the format holds (2^40); build shards")
        memory, least = float(options.memory), needed(n, width, source.dtype.itemsize, options)
        if memory < least:
            raise ConfigurationError(
                f"memory is {format_quantity(memory, 'bytes')}, {n} rows of {width} need "
                f"{format_quantity(least, 'bytes')}; "
                "give more, or lower head_ratio"
            )
        self.source, self.folder, self.options, self.progress = source, folder, options, progress
        self.n, self.width, self.metric = n, width, code_of(options.metric)
        self.threads = options.threads or os.cpu_count() or 1
        self.spare = memory - least
        self.row_floats = 4 * (lanes(width) + width)
        share = self.spare / 4 / self.row_floats / max(self.threads, 1)
        self.block = int(max(256, min(1 << 16, share, (16 << 20) / self.row_floats)))
        self.ids = check_ids(ids, n)
        self.columns = {k: check_column(k, v, n) for k, v in attributes.items()}
        self.largest = largest_norm(source, self.metric, self.block, progress)
        self.thresholds = [0, 0]

    def run(self) -> dict[str, Any]:
        """Everything; returns what was built, in numbers."""
        self.head_rows = self._choose_heads()
        self._link()
        spills, per_range = self._spill()
        told = self._write_lists(spills, per_range)
        self._commit(told)
        self.progress("done", 1.0)
        return told

    def _mapped(self, rows: NDArray[Any]) -> NDArray[np.float32]:
        return mapped(rows, self.metric, self.largest)

    def _choose_heads(self) -> NDArray[np.int64]:
        """Row numbers of the heads."""
        o, n = self.options, self.n
        if o.heads == "random":
            rng = np.random.default_rng(o.seed)
            return np.sort(rng.choice(n, max(1, round(o.head_ratio * n)), replace=False)).astype(np.int64)
        tree = split_rows(
            n,
            lambda rows: self._mapped(self.source.take(rows)),
            k=o.branches,
            leaf=o.leaf,
            balanced=o.heads == "balanced",
            seed=o.seed,
            buffer_rows=int(max(1024, min(1 << 20, self.spare / 3 / self.row_floats / self.threads))),
            threads=self.threads,
            progress=lambda share: self.progress("cluster", 0.03 + 0.15 * share),
        )
        head_rows, *self.thresholds = select_heads(tree, o.head_ratio, o.split_factor)
        return head_rows

    def _link(self) -> None:
        """Take the heads into memory and link them."""
        o, count = self.options, len(self.head_rows)
        ascending = np.argsort(self.head_rows)
        self.vectors = np.empty((count, self.width), self.source.dtype)
        for begin in range(0, count, self.block):
            part = ascending[begin : begin + self.block]
            self.vectors[part] = self.source.take(self.head_rows[part])
        heads, extra = native(self.vectors), factors(self.vectors, self.metric, self.largest)
        self.groups = make_seeds(self._mapped(self.vectors), o.seed, self.threads)
        seeds = seed_arrays(heads, self.groups)
        graph = np.full((count, o.degree), -1, np.int32)
        link_heads(
            heads,
            extra,
            graph,
            seeds,
            self.metric,
            self.largest,
            np.random.default_rng(o.seed).permutation(count),
            beam=o.build_beam,
            alpha=o.alpha,
            threads=self.threads,
            progress=lambda share: self.progress("link heads", 0.2 + 0.2 * share),
        )
        self.state = (heads, extra, graph, seeds)

    def _spill(self) -> tuple[list[Path], int]:
        """Closure, spilled to one file per range of heads: the files, and heads per range."""
        is_head = np.zeros(self.n, np.bool_)
        is_head[self.head_rows] = True
        pairs_bytes = 16.0 * self.n * min(self.options.replicas, 8)
        partitions = int(max(1, min(256, np.ceil(pairs_bytes / max(self.spare / 6, 8 << 20)))))
        per_range = -(-len(self.head_rows) // partitions)
        spills = [Path(self.folder.path(f".pairs-{p}")) for p in range(partitions)]
        self.copies = np.zeros(self.n, np.uint8)
        own: list[NDArray[np.float32]] = []  # squared distances of some rows to their nearest heads
        with contextlib.ExitStack() as stack:
            files = [stack.enter_context(p.open("wb")) for p in spills]
            for pairs, done in closure(
                self.source,
                self.state,
                self.metric,
                self.largest,
                is_head,
                self.copies,
                self.options,
                self.block,
                self.threads,
            ):
                if partitions == 1:
                    pairs.tofile(files[0])
                else:
                    which = pairs["head"] // per_range
                    for p in np.unique(which):
                        pairs[which == p].tofile(files[p])
                nearest = np.flatnonzero(np.diff(pairs["row"], prepend=-1))
                own.append(pairs["distance"][nearest[:: max(1, self.n // SAMPLED)]])
                self.progress("assign", 0.4 + 0.4 * done)
        self.floor = _third(np.concatenate(own) if own else np.zeros(0, np.float32))
        return spills, per_range

    def _write_lists(self, spills: list[Path], per_range: int) -> dict[str, Any]:
        """Cut and pack the lists of every range; what was built, in numbers."""
        count, itemsize = len(self.head_rows), self.source.dtype.itemsize
        limit = self.options.row_limit(self.width, itemsize)
        self.coded = self.options.codes and itemsize > 1  # bytes are their own codes
        self.location = np.full(self.n, -1, np.int64)
        self.location[self.head_rows] = HEAD_BIT | np.arange(count)
        self.directory = empty_directory(count)
        shape = ListShape(self.metric, self.largest, self.width, itemsize)
        before = np.zeros(count, np.int64)
        dropped = beyond = 0
        with writing(
            self.folder.create(SEGMENT),
            0,
            self.directory,
            self.location,
            shape,
            (lambda which: self._mapped(self.vectors[which])) if self.coded else None,
            batch_bytes=int(max(1 << 20, min(1 << 25, self.spare / 16))),
        ) as lists:
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
                lost, grown = cut_lists(begins, np.ascontiguousarray(pairs["row"]), limit, self.copies, keep)
                dropped, beyond = dropped + lost, beyond + grown
                pairs = pairs[keep]
                counts = np.bincount(pairs["head"] - low, minlength=high - low)
                lists.write(np.arange(low, high), counts, pairs, self.source.take)
                self.progress("write lists", 0.8 + 0.18 * (p + 1) / len(spills))
        self.size = lists.offset
        zero = int(np.count_nonzero(self.location < 0))
        assert zero == 0, f"{zero} rows are in no list"  # the invariant of closure and cut
        filled = before[before > 0]
        return {
            "rows": self.n,
            "width": self.width,
            "heads": count,
            "thresholds": list(self.thresholds),
            "replicas": float((before.sum() - dropped) / max(1, self.n - count)),
            "list_mean": float(filled.mean()) if len(filled) else 0.0,
            "list_spread": float(before.std() / max(before.mean(), 1e-9)),
            "list_max": int(before.max(initial=0)),
            "list_limit": limit,
            "dropped": dropped,
            "beyond_limit": beyond,
            "edges": float((self.state[2] >= 0).sum() / count),
            "postings_bytes": self.size,
            "floor": self.floor,
        }

    def _commit(self, told: dict[str, Any]) -> None:
        """Write the other files and the manifest."""
        folder = self.folder
        roles = {"heads": "heads-1.safetensors", "directory": "directory-1.bin", "location": "location-1.bin"}
        tensors = head_tensors(self.vectors, self.state[1], self.head_rows, self.state[2], self.groups)
        entries = {SEGMENT: {"bytes": self.size}, roles["heads"]: write_heads(folder, roles["heads"], tensors)}
        entries[roles["directory"]] = put(folder, roles["directory"], self.directory.view(np.uint8))
        entries[roles["location"]] = put(folder, roles["location"], self.location.view(np.uint8))
        if self.ids is not None:
            roles |= {"ids": "ids-1.bin", "order": "order-1.bin"}
            order = np.argsort(self.ids, kind="stable").astype(np.int64)
            entries[roles["ids"]] = put(folder, roles["ids"], self.ids.view(np.uint8))
            entries[roles["order"]] = put(folder, roles["order"], order.view(np.uint8))
        if self.columns:
            roles["attributes"] = "attributes-1.npz"
            entries[roles["attributes"]] = put(folder, roles["attributes"], pack_attributes(self.columns))
        wal = "wal-1.log"
        put(folder, wal, b"")
        manifest = Manifest(
            generation=1,
            rows=self.n,
            width=self.width,
            dtype=self.source.dtype.name,
            metric=NAMES[self.metric],
            largest=self.largest,
            files=entries,
            segments=(SEGMENT,),
            wal=wal,
            parameters={"options": self.options.to_json(), "built": told, "coded": self.coded},
            roles=roles,
        )
        commit(folder, manifest)
