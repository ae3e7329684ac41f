"""The index: build, open, search, change, compact, check.

Contracts. Any number of threads may search while one changes the index: a search sees the state of one moment, calls
that change wait for each other. ``add``, ``upsert`` and ``delete`` are durable and visible when they return. One
process may open an index for writing, any number read-only. Answers are sorted; a row that lies in several lists is
returned once.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from hasten.budget import parse_quantity
from hasten.clock import Clock
from hasten.errors import ConfigurationError, InvalidRequestError
from hasten.retrieve.index import format as files
from hasten.retrieve.index.build import BuildOptions, build
from hasten.retrieve.index.changes import Changes
from hasten.retrieve.index.filter import bitmap
from hasten.retrieve.index.hit import Hit, RangeHit, SearchOptions
from hasten.retrieve.index.io import DiskFolder
from hasten.retrieve.index.metric import distances
from hasten.retrieve.index.query import NO_MASK, check_queries, run, run_read, run_rows, run_within

if TYPE_CHECKING:
    from hasten.retrieve.index.cost_model import Cost
    from hasten.retrieve.index.tune import Tuned
    from hasten.retrieve.index.verify import Verification

__all__ = ["Spann"]

BRUTE_ROWS = 4096
"""a filter that leaves at most this many rows is answered by scoring them one by one"""


class Spann(Changes):
    """An index of vectors on disk.

    >>> import tempfile
    >>> rows = np.random.default_rng(0).normal(size=(500, 8)).astype(np.float32)
    >>> index = Spann.build(rows, tempfile.mkdtemp() + "/rows.spann")
    >>> scores, ids = index.search(rows[:2], k=3)
    >>> ids[:, 0].tolist()
    [0, 1]
    >>> index.close()
    """

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
        plain = where is None and deadline is None and self._io == "mmap"
        (view.generation.check_searched if plain else view.generation.check)()
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
            mask = bitmap(chosen) if chosen is not None else NO_MASK
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
            view.generation.check()
            mask = bitmap(self._chosen(where, view, delta)) if where is not None else NO_MASK
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

    def verify(self) -> Verification:
        """Read everything and check it; see :func:`~hasten.retrieve.index.verify.verify`."""
        from hasten.retrieve.index.verify import verify

        with self._write:
            return verify(self._view, self._delta)

    def repair(self, vectors: Any = None) -> dict[str, Any]:
        """Drop corrupt lists and restore their rows from ``vectors`` (by row number); see
        :func:`~hasten.retrieve.index.repair.repair`.
        """
        from hasten.retrieve.index.repair import repair

        with self._compacting, self._write:
            return repair(self, vectors)

    def snapshot(self, target: Any) -> None:
        """Write the present state to a new directory, or as a tar stream to a binary file; searches and additions go
        on.
        """
        from hasten.retrieve.index.snapshot import snapshot

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


def _options(given: dict[str, Any]) -> BuildOptions:
    known = set(BuildOptions.__dataclass_fields__)
    unknown = sorted(set(given) - known)
    if unknown:
        raise ConfigurationError(f"a build has no option {', '.join(unknown)}; it has {', '.join(sorted(known))}")
    return BuildOptions(**given)
