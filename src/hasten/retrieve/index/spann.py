"""The index: build, open, search, change, compact, check.

Contracts. Any number of threads may search while one changes the index: a search sees the state of one moment, calls
that change wait for each other. ``add``, ``upsert`` and ``delete`` are durable and visible when they return. One
process may open an index for writing, any number read-only. Answers are sorted; a row that lies in several lists is
returned once.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from hasten.budget import parse_quantity
from hasten.clock import Clock, MonotonicClock
from hasten.errors import ConfigurationError, DataError, InvalidRequestError
from hasten.retrieve.index import format as files
from hasten.retrieve.index import wal
from hasten.retrieve.index.build import BuildOptions, build
from hasten.retrieve.index.delta import Delta
from hasten.retrieve.index.filter import bitmap, evaluate
from hasten.retrieve.index.hit import Hit, RangeHit, SearchOptions
from hasten.retrieve.index.io import DiskFolder, Folder, PooledReader, Reader, told
from hasten.retrieve.index.metric import check_rows, distances, factors, native
from hasten.retrieve.index.query import MappedReader, Scratch, View, check_queries, run, run_read, run_rows, run_within
from hasten.retrieve.index.update import assign, compact_generation

if TYPE_CHECKING:
    from hasten.retrieve.index.care import Verification
    from hasten.retrieve.index.cost_model import Cost
    from hasten.retrieve.index.tune import Tuned

__all__ = ["Spann"]

_LOCK = "LOCK"
BRUTE_ROWS = 4096
"""a filter that leaves at most this many rows is answered by scoring them one by one"""


class Spann:
    """An index of vectors on disk.

    >>> import tempfile
    >>> rows = np.random.default_rng(0).normal(size=(500, 8)).astype(np.float32)
    >>> index = Spann.build(rows, tempfile.mkdtemp() + "/rows.spann")
    >>> scores, ids = index.search(rows[:2], k=3)
    >>> ids[:, 0].tolist()
    [0, 1]
    >>> index.close()
    """

    def __init__(
        self,
        folder: Folder,
        *,
        memory: float | None = None,
        io: str = "mmap",
        queue_depth: int = 32,
        threads: int = 1,
        read_only: bool = False,
        clock: Clock | None = None,
        reader: Callable[[Reader], Reader] | None = None,
        auto_compact: int | None = None,
    ) -> None:
        if io not in ("mmap", "pread", "direct"):
            raise ConfigurationError(f"io is {io!r}; choose mmap, pread or direct")
        self._folder = folder
        self._memory = memory
        self._io = io
        self._queue_depth = queue_depth
        self._clock = clock or MonotonicClock()
        self._wrap = reader
        self._write = threading.RLock()
        self._compacting = threading.Lock()
        self._pool: ThreadPoolExecutor | None = None
        self._scratch = Scratch()
        self._readers: list[Reader] = []
        self._columns: tuple[Any, dict[str, NDArray[Any]]] | None = None
        self._background: threading.Thread | None = None
        self._background_error: BaseException | None = None
        self.threads = threads
        self.auto_compact = auto_compact
        self.read_only = read_only
        self._lock_file = None if read_only else _take_lock(folder.path(_LOCK))
        try:
            self._open()
        except BaseException:
            self._release_lock()
            raise
        stored = self._generation.manifest.parameters.get("search")
        self.options = SearchOptions(**stored) if stored else SearchOptions()
        """the knobs of a search that names none"""

    # --- opening and closing ---------------------------------------------------------------------------------------

    @classmethod
    def build(
        cls,
        vectors: Any,
        path: str | os.PathLike[str],
        *,
        ids: Any = None,
        attributes: dict[str, Any] | None = None,
        column: str | None = None,
        progress: Callable[[str, float], None] | None = None,
        **options: Any,
    ) -> Spann:
        """Build an index in the new directory ``path`` and open it.

        ``vectors``: array (n, d), memory map, ``.npy .fvecs .bvecs .fbin .u8bin .i8bin .hdf5 .parquet`` file, or an
        iterable of arrays. ``options`` are the fields of :class:`~hasten.retrieve.index.build.BuildOptions`:
        ``metric``, ``head_ratio``, ``replicas``, ``memory`` … Raises DataError naming the row at fault,
        ConfigurationError for knobs that cannot be meant; a failed build leaves nothing.
        """
        chosen = _options(options)
        told: dict[str, Any] = {"progress": progress} if progress else {}
        build(vectors, path, chosen, ids=ids, attributes=attributes, column=column, **told)
        return cls.open(path)

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        *,
        memory: float | str | None = None,
        io: str = "mmap",
        queue_depth: int = 32,
        threads: int = 1,
        read_only: bool = False,
        clock: Clock | None = None,
        auto_compact: int | None = None,
    ) -> Spann:
        """Open an index.

        ``memory`` bounds what is copied into memory; beyond it the walk runs from the map. ``io``: ``mmap`` (page
        cache), ``pread`` (reads on a pool of ``queue_depth`` threads), ``direct`` (past the page cache).
        ``auto_compact``: rows added after which a compaction starts in the background. Raises DataError with one line
        where there is no good index.
        """
        limit = parse_quantity(memory, "bytes") if isinstance(memory, str) else memory
        return cls(
            DiskFolder(path),
            memory=limit,
            io=io,
            queue_depth=queue_depth,
            threads=threads,
            read_only=read_only,
            clock=clock,
            auto_compact=auto_compact,
        )

    def _open(self) -> None:
        manifest = files.read_manifest(self._folder)
        if not self.read_only:
            files.discard_strays(self._folder, replace(manifest, files={**manifest.files, _LOCK: {}}))
        self._install(files.load(self._folder, memory=self._memory))
        size = max(0, self._folder.size(manifest.wal))
        data = self._folder.read(manifest.wal) if size else b""
        end = 0
        for record, end in wal.replay(data, manifest.width, manifest.dtype):  # noqa: B007 - the last end is kept
            self._apply(record)
        self._log = None if self.read_only else wal.Log(self._folder, manifest.wal, end)
        self._log_end = end

    def _install(self, generation: files.Generation) -> None:
        """Make a generation current, with nothing added to it yet."""
        self._generation = generation
        g = generation
        self._delta = Delta(g.manifest.rows, len(g.counts), g.manifest.width, g.heads.dtype, g.metric)
        self._dead = g.dead
        self._num_dead = int(np.bitwise_count(g.dead).sum()) if len(g.dead) else 0
        usable = (g.directory["flags"] & 1) == 0
        self._usable = np.zeros(0, np.uint8) if usable.all() else usable.astype(np.uint8)
        self._scratch.clear()
        self._version = 0
        paths = [self._folder.path(n) for n in g.manifest.segments]
        reader: Reader = (
            MappedReader(g.segments)
            if self._io == "mmap"
            else PooledReader(paths, direct=self._io == "direct", queue_depth=self._queue_depth)
        )
        self._reader = self._wrap(reader) if self._wrap is not None else reader
        self._readers.append(self._reader)
        self._publish()

    def _publish(self) -> None:
        floor = float(self._generation.manifest.parameters.get("built", {}).get("floor", 0.0))
        self._version += 1
        self._view = View.of(self._generation, self._delta.view, self._dead, floor)
        self._state = (self._view, self._delta, self._reader)  # one assignment: a search sees one moment

    def close(self) -> None:
        """Wait for a compaction under way, close files and threads. Searching afterwards is an error."""
        if self._background is not None:
            self._background.join()
            self._background = None
        with self._write:
            if self._log is not None:
                self._log.close()
                self._log = None
            if self._pool is not None:
                self._pool.shutdown()
                self._pool = None
            for reader in self._readers:  # a search may hold an old one until now
                reader.close()
            self._readers = []
            self._release_lock()
            self.read_only = True

    def _release_lock(self) -> None:
        if self._lock_file is not None:
            os.close(self._lock_file)
            self._lock_file = None

    def __enter__(self) -> Spann:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- asking ----------------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        """Live rows."""
        return self._generation.manifest.rows - self._num_dead + len(self._delta.place)

    @property
    def width(self) -> int:
        """d."""
        return self._generation.manifest.width

    @property
    def metric(self) -> str:
        """l2, cosine or ip."""
        return self._generation.manifest.metric

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of the stored rows."""
        return np.dtype(self._generation.manifest.dtype)

    @property
    def generation(self) -> int:
        """Counts up with every compaction."""
        return self._generation.manifest.generation

    def memory(self) -> dict[str, int]:
        """Bytes in memory by part, ``total`` among them: heads, graph, seeds, directory, rows added since the last
        compaction.
        """
        parts = self._generation.memory()
        added = sum(int(a.nbytes) for a in self._delta.view[:6])
        return {**parts, "added": added, "total": parts["total"] + added}

    def describe(self) -> dict[str, Any]:
        """What the index is, as plain values."""
        m = self._generation.manifest
        disk = sum(e["bytes"] for e in m.files.values())
        return {
            "rows": len(self),
            "width": m.width,
            "dtype": m.dtype,
            "metric": m.metric,
            "generation": m.generation,
            "heads": len(self._generation.counts),
            "added": len(self._delta.place),
            "deleted": self._num_dead,
            "disk": disk,
            "memory": self.memory()["total"],
            "built": m.parameters.get("built", {}),
            "search": self.options.to_json(),
        }

    def __contains__(self, name: object) -> bool:
        return isinstance(name, (int, np.integer)) and self._row_of(int(name)) is not None

    def get(self, ids: Iterable[int]) -> NDArray[Any]:
        """The stored vectors (m, d) of these ids; raises DataError for an unknown one."""
        with self._write:
            rows = np.array([self._known(int(i)) for i in ids], np.int64)
            return self._take(rows)

    def search(
        self,
        queries: Any,
        k: int = 10,
        *,
        lists: int | None | str = "default",
        epsilon: float | None = None,
        beam: int | None = None,
        where: Any = None,
        deadline: float | str | None = None,
        threads: int | None = None,
        options: SearchOptions | None = None,
        detail: bool = True,
    ) -> Hit:
        """The ``k`` nearest rows of each query; ``scores, ids = index.search(queries)``.

        ``queries`` (Q, d) or (d,). ``lists`` reads at most so many lists, None all of them (exact). ``where``: ids, a
        mapping over attributes, or a function of the attribute columns (see ``filter``). ``deadline`` (seconds or
        ``"5ms"``) per query: lists that are not back in time are left out and ``complete`` is False for it.
        ``detail`` also counts pages and merged reads. Raises InvalidRequestError.
        """
        view, delta, reader = self._state
        knobs = options or self.options
        if lists != "default" or epsilon is not None or beam is not None:
            changes: dict[str, Any] = {} if lists == "default" else {"lists": lists}
            if epsilon is not None:
                changes["epsilon"] = float(epsilon)
            if beam is not None:
                changes["beam"] = beam
            knobs = replace(knobs, **changes)
        array = check_queries(queries, self.width)
        if not 1 <= k <= max(1, len(self)):
            raise InvalidRequestError(f"k is {k}; the index has {len(self)} rows, ask for 1 to that many", "k")
        if isinstance(deadline, str):
            deadline = parse_quantity(deadline, "time")
        chosen = None
        if where is not None:
            with self._write:  # the filter and the search see one moment
                view, delta, reader = self._state
                chosen = self._chosen(where, view, delta)
        if chosen is not None and int(chosen.sum()) <= BRUTE_ROWS and deadline is None:
            values, rows, stats = run_rows(view, array, k, np.flatnonzero(chosen))
        else:
            mask = bitmap(chosen) if chosen is not None else np.zeros(0, np.uint8)
            if chosen is not None and knobs.lists:  # as many survivors as a search without a filter scores
                wanted = int(np.ceil(knobs.lists * len(chosen) / max(1, int(chosen.sum()))))
                knobs = replace(knobs, filtered_lists=min(knobs.filtered_lists, wanted))
            if self._io == "mmap" and deadline is None:
                workers = self.threads if threads is None else threads
                pool = self._workers(workers) if workers > 1 and len(array) > 1 else None
                values, rows, stats = run(
                    view, array, k, knobs, mask, self._scratch, pool=pool, threads=workers, detail=detail
                )
            else:
                values, rows, stats = run_read(
                    view, array, k, knobs, mask, self._scratch, reader, self._clock, deadline
                )
        return Hit(distances(values, view.generation.metric), self._names(rows, view, delta), stats)

    def range_search(self, queries: Any, radius: float, *, where: Any = None) -> RangeHit:
        """Every row within ``radius`` (L2 distance, 1 - cosine, or minus the inner product) of each query; exact.

        A list is skipped only where the triangle inequality excludes all of its rows.
        """
        array = check_queries(queries, self.width)
        with self._write:
            view, delta, _ = self._state
            mask = bitmap(self._chosen(where, view, delta)) if where is not None else np.zeros(0, np.uint8)
        total = view.generation.manifest.rows + len(delta.alive)
        counts, values, rows, lists = run_within(view, array, radius, mask, total)
        joined = np.concatenate(values) if values else np.zeros(0, np.float32)
        numbers = np.concatenate(rows) if rows else np.zeros(0, np.int64)
        return RangeHit(
            np.concatenate([[0], np.cumsum(counts)]),
            distances(joined, view.generation.metric),
            self._names(numbers, view, delta),
            lists,
        )

    def exact(self, queries: Any, k: int = 10, *, threads: int | None = None) -> Hit:
        """The true neighbours, by reading everything: ground truth for tuning."""
        return self.search(queries, k, lists=None, threads=threads, detail=False)

    def tune(self, queries: Any, truth: Any = None, **budget: Any) -> Tuned:
        """Cheapest knobs that meet ``recall=0.95`` or ``p99="5ms"``; see
        :func:`~hasten.retrieve.index.tune.tune_search`.
        """
        from hasten.retrieve.index.tune import tune_search

        return tune_search(self, queries, truth, **budget)

    def cost(self, n: int, **knobs: Any) -> Cost:
        """What ``n`` rows of this kind would take; see :mod:`hasten.retrieve.index.cost_model`."""
        from hasten.retrieve.index.cost_model import cost_of_index

        return cost_of_index(self, n, **knobs)

    def _workers(self, count: int) -> ThreadPoolExecutor:
        if self._pool is None or self._pool._max_workers < count:
            self._pool = ThreadPoolExecutor(count, thread_name_prefix="hasten-search")
        return self._pool

    def _names(self, rows: NDArray[np.int64], view: View, delta: Delta) -> NDArray[np.int64]:
        """Ids of row numbers; -1 stays."""
        g = view.generation
        if g.ids is None and delta.count == 0:
            return rows
        base = g.manifest.rows
        old = np.clip(rows, 0, max(base - 1, 0))
        out = (g.ids[old] if g.ids is not None else old).astype(np.int64)
        if delta.count:
            out = np.where(rows >= base, delta.ids[np.clip(rows - base, 0, len(delta.ids) - 1)], out)
        return np.where(rows < 0, -1, out)

    def _chosen(self, where: Any, view: View, delta: Delta) -> NDArray[np.bool_]:
        """Which rows satisfy the filter and live."""
        with self._write:
            base = view.generation.manifest.rows
            total = base + delta.count
            live = np.ones(total, np.bool_)
            if len(view.dead):
                live[:base] = ~np.unpackbits(view.dead, bitorder="little")[:base].astype(np.bool_)
            live[base:] = delta.alive[: delta.count] != 0
            if isinstance(where, Mapping) or callable(where):
                return live & evaluate(where, self._attribute_columns(), total)
            wanted = np.asarray(list(where) if isinstance(where, (set, frozenset)) else where)
            if wanted.dtype.kind not in "iu" and wanted.size:
                raise InvalidRequestError(f"where holds {wanted.dtype}; give ids, a mapping or a function", "where")
            out = np.zeros(total, np.bool_)
            out[self._rows_of(np.unique(wanted.astype(np.int64)))] = True
            return out & live

    def _rows_of(self, names: NDArray[np.int64]) -> NDArray[np.int64]:
        """Row numbers of the ids that are known; of an id that was replaced the newest one. Dead rows are not left
        out."""
        g = self._generation
        added = np.fromiter(self._delta.place, np.int64, len(self._delta.place))
        here = np.isin(names, added)
        places = np.array([self._delta.place[n] for n in names[here].tolist()], np.int64) + g.manifest.rows
        older = names[~here]
        if g.ids is None:
            return np.concatenate([places, older[(older >= 0) & (older < g.manifest.rows)]])
        assert g.order is not None
        last = np.searchsorted(g.ids, older, "right", sorter=g.order) - 1
        rows = np.asarray(g.order)[np.maximum(last, 0)]
        return np.concatenate([places, rows[(last >= 0) & (g.ids[rows] == older)]])

    def _attribute_columns(self) -> dict[str, NDArray[Any]]:
        """Attributes of all rows; kept until something is added."""
        g, delta = self._generation, self._delta
        key = (g.manifest.generation, delta.count)
        if self._columns is None or self._columns[0] != key:
            added = delta.attributes[: delta.count]
            out = {}
            for name, values in g.attributes.items():
                extra = np.array([row.get(name, _missing(values.dtype)) for row in added]) if added else values[:0]
                out[name] = np.concatenate([values, extra.astype(values.dtype) if values.dtype.kind != "U" else extra])
            for name in {n for row in added for n in row} - set(g.attributes):
                kind = next(np.asarray(row[name]).dtype for row in added if name in row)
                front = np.full(g.manifest.rows, _missing(kind))
                out[name] = np.concatenate([front, np.array([row.get(name, _missing(kind)) for row in added])])
            self._columns = (key, out)
        return self._columns[1]

    def _row_of(self, name: int) -> int | None:
        """Row number of a live id."""
        place = self._delta.place.get(name)
        g = self._generation
        if place is not None:
            return g.manifest.rows + place
        if g.ids is None:
            row = name if 0 <= name < g.manifest.rows else None
        else:
            assert g.order is not None
            row = None
            low, high = 0, len(g.order)
            while low < high:
                middle = (low + high) // 2
                if g.ids[g.order[middle]] < name:
                    low = middle + 1
                else:
                    high = middle
            while low < len(g.order) and g.ids[g.order[low]] == name:  # an id that was replaced has several rows
                if not self._is_dead(int(g.order[low])):
                    row = int(g.order[low])
                low += 1
        return None if row is None or self._is_dead(row) else row

    def _known(self, name: int) -> int:
        row = self._row_of(name)
        if row is None:
            raise DataError(f"the index has no id {name}; it may have been deleted")
        return row

    def _is_dead(self, row: int) -> bool:
        return bool(len(self._dead)) and (row >> 3) < len(self._dead) and bool((self._dead[row >> 3] >> (row & 7)) & 1)

    def _take(self, rows: NDArray[np.int64]) -> NDArray[Any]:
        """Vectors of live rows, in the user's dtype."""
        from hasten.retrieve.index.update import gather

        out = gather(self._view, rows)
        return out.view(np.float16) if self.dtype == np.float16 else out

    # --- changing --------------------------------------------------------------------------------------------------

    def add(self, ids: Any, vectors: Any, attributes: Mapping[str, Any] | None = None) -> None:
        """Add rows under new ids; durable and visible when it returns, all or none.

        Raises DataError for an id that exists, a wrong width, a value that is not finite, a full disk.
        """
        self._change(wal.ADD, ids, vectors, attributes)

    def upsert(self, ids: Any, vectors: Any, attributes: Mapping[str, Any] | None = None) -> None:
        """Add rows, replacing those whose ids exist; durable and visible when it returns, all or none."""
        self._change(wal.UPSERT, ids, vectors, attributes)

    def delete(self, ids: Any) -> int:
        """Delete rows; unknown ids are passed over. Durable and visible when it returns; returns how many there
        were."""
        names = _names_of(ids)
        with self._write:
            log = self._writable()
            known = np.array(sorted({int(i) for i in names if self._row_of(int(i)) is not None}), np.int64)
            if len(known):
                record = wal.Record(wal.DELETE, known, None, {})
                log.append(record)
                self._apply(record)
            return len(known)

    def _change(self, operation: int, ids: Any, vectors: Any, attributes: Mapping[str, Any] | None) -> None:
        names = _names_of(ids)
        rows = np.atleast_2d(np.asarray(vectors))
        if rows.shape != (len(names), self.width):
            raise DataError(f"vectors have the shape {rows.shape}; {len(names)} ids need ({len(names)}, {self.width})")
        if len(np.unique(names)) != len(names):
            raise DataError("one id is given twice; ids of one call are unique")
        converted = rows.astype(self.dtype)
        if rows.dtype != self.dtype and self.dtype.kind != "f" and not np.array_equal(converted, rows):
            raise DataError(f"vectors are {rows.dtype} and do not fit {self.dtype} without loss; convert them first")
        check_rows(converted, self._generation.metric)
        columns = {k: np.asarray(v).tolist() for k, v in (attributes or {}).items()}
        for name, values in columns.items():
            if not isinstance(values, list) or len(values) != len(names):
                raise DataError(f"attribute {name!r} does not have {len(names)} values, one for each row")
        if not len(names):
            return
        with self._write:
            log = self._writable()
            if operation == wal.ADD:
                taken = next((int(i) for i in names if self._row_of(int(i)) is not None), None)
                if taken is not None:
                    raise DataError(f"id {taken} exists already; use upsert to replace it")
            record = wal.Record(operation, names, converted, columns)
            log.append(record)
            self._apply(record)
            full = self.auto_compact is not None and self._delta.count >= self.auto_compact
        if full:
            self.compact_in_background()

    def _writable(self) -> wal.Log:
        if self.read_only or self._log is None:
            raise DataError("the index is open read-only or closed; open it for writing")
        return self._log

    def _apply(self, record: wal.Record) -> None:
        """Do in memory what a record says."""
        doomed = []
        for name in record.ids.tolist():
            row = self._row_of(name) if record.operation != wal.ADD else None
            if row is not None:
                doomed.append((name, row))
        if record.rows is not None:
            g = self._generation
            rows = native(record.rows)
            heads, sizes = assign(self._generation, record.rows, self._usable)
            columns = [{k: v[i] for k, v in record.attributes.items()} for i in range(len(rows))]
            old_places = {name: self._delta.place.get(name) for name, _ in doomed}
            self._delta.add(rows, factors(record.rows, g.metric, g.manifest.largest), record.ids, heads, sizes, columns)
            self._publish()
            for name, row in doomed:  # the new row is visible; now the old one goes
                place = old_places[name]
                if place is not None:
                    self._delta.alive[place] = 0
                else:
                    self._bury(row)
        else:
            for name, row in doomed:
                if name in self._delta.place:
                    self._delta.kill(name)
                else:
                    self._bury(row)
        self._publish()

    def _bury(self, row: int) -> None:
        if not len(self._dead):
            self._dead = np.zeros(self._generation.manifest.rows // 8 + 1, np.uint8)
        self._dead[row >> 3] |= np.uint8(1 << (row & 7))
        self._num_dead += 1

    # --- care ------------------------------------------------------------------------------------------------------

    def compact(self, *, rate: float | str | None = None, everything: bool = False) -> dict[str, Any]:
        """Merge what was added and deleted into a new generation; split lists that grew, merge those that shrank.

        Searches and changes go on meanwhile; changes wait only for the last step. ``rate`` (bytes per second, or
        ``"50MB"``) bounds the writing. ``everything`` rewrites all lists, which also frees the space of deleted rows.
        Returns what was done, in numbers.
        """
        limit = parse_quantity(rate, "bytes") if isinstance(rate, str) else rate
        self._writable()
        with self._compacting:
            with self._write:
                log = self._writable()
                view, delta, mark = self._view, self._delta, log.size
                count = delta.count
                dead = view.dead.copy()
                alive = delta.alive[:count].copy()
                columns = {k: v[: view.generation.manifest.rows + count] for k, v in self._attribute_columns().items()}
            manifest, report = compact_generation(
                self._folder, view, delta, count, alive, dead, columns, self._clock, rate=limit, everything=everything
            )
            with self._write:
                tail = self._folder.read(log.name)[mark : log.size]
                files.put(self._folder, manifest.wal, tail)
                files.commit(self._folder, manifest)
                log.close()
                self._install(files.load(self._folder, memory=self._memory, check=False))
                for record, _ in wal.replay(tail, self.width, manifest.dtype):
                    self._apply(record)
                self._log = wal.Log(self._folder, manifest.wal, len(tail))
                files.discard_strays(self._folder, replace(manifest, files={**manifest.files, _LOCK: {}}))
        return report

    def compact_in_background(self, **options: Any) -> threading.Thread:
        """Start :meth:`compact` in a thread unless one runs; what it raises is raised by the next :meth:`wait`."""
        if self._background is not None and self._background.is_alive():
            return self._background

        def work() -> None:
            try:
                self.compact(**options)
            except BaseException as error:
                self._background_error = error

        self._background = threading.Thread(target=work, name="hasten-compact", daemon=True)
        self._background.start()
        return self._background

    def wait(self) -> None:
        """Wait for a compaction in the background and raise what it raised."""
        if self._background is not None:
            self._background.join()
        error, self._background_error = self._background_error, None
        if error is not None:
            raise error

    def verify(self) -> Verification:
        """Read everything and check it; see :func:`~hasten.retrieve.index.care.verify`."""
        from hasten.retrieve.index.care import verify

        with self._write:
            return verify(self._view, self._delta)

    def repair(self, vectors: Any = None) -> dict[str, Any]:
        """Drop corrupt lists and restore their rows from ``vectors`` (by row number); see
        :func:`~hasten.retrieve.index.care.repair`.
        """
        from hasten.retrieve.index.care import repair

        with self._compacting, self._write:
            return repair(self, vectors)

    def snapshot(self, target: Any) -> None:
        """Write the present state to a new directory, or as a tar stream to a binary file; searches and additions go
        on.
        """
        from hasten.retrieve.index.care import snapshot

        with self._write:
            snapshot(self._folder, self._generation.manifest, self._log.size if self._log else self._log_end, target)

    def save_options(self, options: SearchOptions) -> None:
        """Make these the default knobs, now and whenever the index is opened."""
        with self._compacting, self._write:
            self._writable()
            m = self._generation.manifest
            m = replace(m, parameters={**m.parameters, "search": options.to_json()})
            files.commit(self._folder, m)
            self._generation = replace(self._generation, manifest=m)
            self._publish()
            self.options = options


def _missing(kind: Any) -> Any:
    return "" if kind.kind == "U" else False if kind.kind == "b" else 0 if kind.kind in "iu" else np.nan


def _names_of(ids: Any) -> NDArray[np.int64]:
    array = np.atleast_1d(np.asarray(ids if not isinstance(ids, (set, frozenset, range)) else list(ids)))
    if array.size == 0:
        return np.zeros(0, np.int64)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise DataError(
            f"ids have the shape {array.shape} and type {array.dtype}; give whole numbers, one for each row"
        )
    out = array.astype(np.int64)
    if out.min() < 0:
        raise DataError(f"the id {int(out.min())} is negative; ids are 0 or more")
    return out


def _options(given: dict[str, Any]) -> BuildOptions:
    known = set(BuildOptions.__dataclass_fields__)
    unknown = sorted(set(given) - known)
    if unknown:
        raise ConfigurationError(f"a build has no option {', '.join(unknown)}; it has {', '.join(sorted(known))}")
    return BuildOptions(**given)


def _take_lock(path: Path) -> int:
    with told(path):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        with contextlib.suppress(OSError):
            os.close(descriptor)
        raise DataError(
            f"{str(path.parent)!r} is open for writing elsewhere; close it there, or open with read_only=True"
        ) from error
    return descriptor
