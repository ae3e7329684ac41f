"""Which row an id is, which id a row has, what attributes a row carries, and what the index is as a whole."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hasten.errors import DataError, InvalidRequestError
from hasten.retrieve.index.delta import Delta
from hasten.retrieve.index.filter import evaluate
from hasten.retrieve.index.gather import gather, plain
from hasten.retrieve.index.query import View
from hasten.retrieve.index.state import IndexState

__all__ = ["Lookup"]


class Lookup(IndexState):
    """Questions that need no search."""

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
        self._generation.check()
        out = gather(self._view, rows)
        return plain(out, self.dtype.name)


def _missing(kind: Any) -> Any:
    return "" if kind.kind == "U" else False if kind.kind == "b" else 0 if kind.kind in "iu" else np.nan
