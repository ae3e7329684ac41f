"""Changing an index: add, upsert, delete, compact. What was acknowledged is durable and visible."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hasten.budget import parse_quantity
from hasten.errors import DataError
from hasten.retrieve.index import format as files
from hasten.retrieve.index import wal
from hasten.retrieve.index.compact import compact_generation
from hasten.retrieve.index.lookup import Lookup
from hasten.retrieve.index.metric import check_rows, factors, native
from hasten.retrieve.index.opening import load
from hasten.retrieve.index.placing import assign
from hasten.retrieve.index.state import LOCK

__all__ = ["Changes"]


class Changes(Lookup):
    """One writer at a time; searches go on."""

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
                view.generation.check()
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
                self._install(load(self._folder, memory=self._memory, check=False))
                for record, _ in wal.replay(tail, self.width, manifest.dtype):
                    self._apply(record)
                self._log = wal.Log(self._folder, manifest.wal, len(tail))
                files.discard_strays(self._folder, replace(manifest, files={**manifest.files, LOCK: {}}))
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
