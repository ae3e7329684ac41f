"""What an open index holds: a generation, what was added and deleted since, the log, the lock of the one writer."""

from __future__ import annotations

import contextlib
import fcntl
import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from hasten.clock import Clock, MonotonicClock
from hasten.errors import ConfigurationError, DataError
from hasten.retrieve.index import format as files
from hasten.retrieve.index import wal
from hasten.retrieve.index.aio import direct_reader
from hasten.retrieve.index.delta import Delta
from hasten.retrieve.index.hit import SearchOptions
from hasten.retrieve.index.io import Folder, PooledReader, Reader, told
from hasten.retrieve.index.opening import load
from hasten.retrieve.index.query import MappedReader, Scratch, View

__all__ = ["IndexState"]

LOCK = "LOCK"


class IndexState(ABC):
    """Opened files, and the one moment that a search sees."""

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
        self._lock_file = None if read_only else _take_lock(folder.path(LOCK))
        try:
            self._open()
        except BaseException:
            self._release_lock()
            raise
        stored = self._generation.manifest.parameters.get("search")
        self.options = SearchOptions(**stored) if stored else SearchOptions()
        """the knobs of a search that names none"""

    def _open(self) -> None:
        manifest = files.read_manifest(self._folder)
        if not self.read_only:
            files.discard_strays(self._folder, replace(manifest, files={**manifest.files, LOCK: {}}))
        self._install(load(self._folder, memory=self._memory))
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
            else direct_reader(paths, self._queue_depth)
            if self._io == "direct"
            else PooledReader(paths, queue_depth=self._queue_depth)
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

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @abstractmethod
    def _apply(self, record: wal.Record) -> None:
        """Do in memory what a record of the log says."""


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
