"""Durable files of an index, behind a small interface that has a fault-injecting twin (``hasten.testing.disk``).

A folder gives writers, renames, removals and the fsync of itself; nothing is durable before its own ``sync`` and, for
a new name, the folder's. A reader fetches byte ranges of one file: mapped, by ``pread``, or past the page cache with
``O_DIRECT`` into aligned memory. Ranges are sorted, merged across gaps of at most a page, and read by several
threads.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from hasten.clock import Clock
from hasten.errors import DataError

__all__ = [
    "PAGE",
    "DiskFolder",
    "Folder",
    "PooledReader",
    "Read",
    "Reader",
    "Writer",
    "map_behind",
    "merge_reads",
    "told",
]

PAGE = 4096


class Writer(Protocol):
    """A file that is being written; what was written is durable after ``sync``."""

    def write(self, data: bytes | memoryview) -> int: ...

    def sync(self) -> None: ...

    def tell(self) -> int: ...

    def close(self) -> None: ...


class Folder(Protocol):
    """The files of one index."""

    def create(self, name: str) -> Writer: ...

    def append(self, name: str, size: int) -> Writer: ...

    def rename(self, old: str, new: str) -> None: ...

    def remove(self, name: str) -> None: ...

    def sync(self) -> None: ...

    def read(self, name: str) -> bytes: ...

    def map(self, name: str) -> NDArray[np.uint8]: ...

    def names(self) -> list[str]: ...

    def size(self, name: str) -> int: ...

    def path(self, name: str) -> Path: ...


@contextlib.contextmanager
def told(path: Path) -> Iterator[None]:
    """Operating system errors as one line."""
    try:
        yield
    except OSError as error:
        hint = {
            errno.ENOSPC: "free some space; the index is as it was",
            errno.EROFS: "the disk is read-only; open with read_only=True or copy the index",
            errno.EACCES: "check the permissions",
            errno.ENOENT: "check the path",
        }.get(error.errno or 0, "the index is as it was")
        raise DataError(f"{str(path)!r}: {error.strerror or error}; {hint}") from error


class _DiskWriter:
    def __init__(self, path: Path, flags: int) -> None:
        self._path = path
        with told(path):
            self._descriptor = os.open(path, flags | os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)

    def write(self, data: bytes | memoryview) -> int:
        view = memoryview(data).cast("B")
        done = 0
        with told(self._path):
            while done < len(view):
                done += os.write(self._descriptor, view[done:])
        return done

    def sync(self) -> None:
        with told(self._path):
            os.fsync(self._descriptor)

    def tell(self) -> int:
        return os.lseek(self._descriptor, 0, os.SEEK_CUR)

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


class DiskFolder:
    """A real folder. Raises :class:`~hasten.errors.DataError` with one line for what the system refuses."""

    def __init__(self, path: str | os.PathLike[str], *, make: bool = False) -> None:
        self._path = Path(path)
        if make:
            with told(self._path):
                self._path.mkdir(parents=True, exist_ok=True)

    def path(self, name: str) -> Path:
        """Where a file lies."""
        return self._path / name

    def create(self, name: str) -> Writer:
        """A new, empty file."""
        return _DiskWriter(self._path / name, os.O_TRUNC)

    def append(self, name: str, size: int) -> Writer:
        """An existing (or new) file, cut to ``size`` bytes, written behind them."""
        writer = _DiskWriter(self._path / name, os.O_APPEND)
        with told(self._path / name):
            os.ftruncate(writer._descriptor, size)
            os.lseek(writer._descriptor, 0, os.SEEK_END)
        return writer

    def rename(self, old: str, new: str) -> None:
        """Give a file its final name in one step."""
        with told(self._path / new):
            os.replace(self._path / old, self._path / new)

    def remove(self, name: str) -> None:
        """Delete a file that may be gone already."""
        with told(self._path / name), contextlib.suppress(FileNotFoundError):
            os.unlink(self._path / name)

    def sync(self) -> None:
        """Make new names durable."""
        with told(self._path):
            descriptor = os.open(self._path, os.O_RDONLY | os.O_DIRECTORY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)

    def read(self, name: str) -> bytes:
        """All bytes of a file."""
        with told(self._path / name):
            return (self._path / name).read_bytes()

    def map(self, name: str) -> NDArray[np.uint8]:
        """A private memory map, to be read only; the array keeps it alive."""
        path = self._path / name
        with told(path), path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size == 0:
                return np.zeros(0, np.uint8)
            # a private map: nobody writes to it, and the kernels need no second form for read-only arrays
            mapping = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY)
        return np.frombuffer(mapping, np.uint8)

    def names(self) -> list[str]:
        """All files, sorted."""
        with told(self._path):
            return sorted(p.name for p in self._path.iterdir() if p.is_file())

    def size(self, name: str) -> int:
        """Bytes of a file; -1 where it is absent."""
        path = self._path / name
        return path.stat().st_size if path.is_file() else -1


def map_behind(array: NDArray[Any]) -> mmap.mmap | None:
    """The memory map that an array is a view of; None for an array in memory.

    To touch a map beyond the end of its file kills the process, so who reads one asks for its ``size()`` before.
    """
    base: Any = array
    while isinstance(base, np.ndarray):
        base = base.base
    if isinstance(base, memoryview):
        base = base.obj
    return base if isinstance(base, mmap.mmap) else None


@dataclass(frozen=True)
class Read:
    """One contiguous range of a file and the requests that it serves."""

    file: int
    """which file"""
    offset: int
    """bytes from its beginning, page aligned"""
    size: int
    """bytes, whole pages"""
    parts: tuple[int, ...]
    """numbers of the requests inside it"""


def merge_reads(files: NDArray[Any], offsets: NDArray[Any], sizes: NDArray[Any], gap: int = PAGE) -> list[Read]:
    """Whole pages for each request, sorted, merged where they lie within ``gap`` bytes of each other.

    >>> reads = merge_reads(np.zeros(3), np.array([0, 4096, 40960]), np.array([100, 5000, 1]))
    >>> [(r.offset, r.size, r.parts) for r in reads]
    [(0, 12288, (0, 1)), (40960, 4096, (2,))]
    """
    out: list[Read] = []
    for i in np.lexsort((offsets, files)):
        file, begin = int(files[i]), int(offsets[i]) // PAGE * PAGE
        end = -(-int(offsets[i] + sizes[i]) // PAGE) * PAGE
        if out and out[-1].file == file and begin - (out[-1].offset + out[-1].size) <= gap:
            last = out[-1]
            out[-1] = Read(file, last.offset, max(last.size, end - last.offset), (*last.parts, int(i)))
        else:
            out.append(Read(file, begin, end - begin, (int(i),)))
    return out


class Reader(Protocol):
    """Fetches ranges; yields each with its bytes as soon as it is there."""

    def fetch(
        self, reads: list[Read], clock: Clock, deadline: float | None
    ) -> Iterator[tuple[Read, NDArray[np.uint8]]]: ...

    def close(self) -> None: ...


class PooledReader:
    """``preadv`` on a pool of threads; ``direct`` bypasses the page cache.

    Ranges arrive in any order. With a deadline, what is not there when it passes is left out; reads under way are
    abandoned, their buffers stay theirs. Safe to use from several threads.
    """

    def __init__(self, paths: list[Path], *, direct: bool = False, queue_depth: int = 32) -> None:
        flags = os.O_RDONLY | os.O_CLOEXEC | (getattr(os, "O_DIRECT", 0) if direct else 0)
        self._descriptors: list[int] = []
        self._paths = paths
        self.direct = direct
        for path in paths:
            with told(path):
                self._descriptors.append(os.open(path, flags))
        self._pool = ThreadPoolExecutor(queue_depth, thread_name_prefix="hasten-read")

    def _read(self, read: Read) -> NDArray[np.uint8]:
        buffer = mmap.mmap(-1, read.size) if self.direct else bytearray(read.size)
        with told(self._paths[read.file]):
            got = os.preadv(self._descriptors[read.file], [buffer], read.offset)
        if got < read.size - PAGE:  # the last page of a file may be cut
            place = str(self._paths[read.file])
            raise DataError(f"{place!r} at {read.offset}: {got} of {read.size} bytes came back; run verify()")
        return np.frombuffer(buffer, np.uint8)

    def fetch(
        self, reads: list[Read], clock: Clock, deadline: float | None
    ) -> Iterator[tuple[Read, NDArray[np.uint8]]]:
        """Yield (range, bytes) as they arrive, until the deadline (seconds on ``clock``)."""
        waiting: dict[Future[NDArray[np.uint8]], Read] = {self._pool.submit(self._read, r): r for r in reads}
        try:
            while waiting:
                left = None if deadline is None else deadline - clock.now()
                if left is not None and left <= 0:
                    return
                done, _ = wait(waiting, timeout=left, return_when=FIRST_COMPLETED)
                if not done:
                    return
                for future in done:
                    yield waiting.pop(future), future.result()
        finally:
            for future in waiting:
                future.cancel()

    def close(self) -> None:
        """Wait for reads under way and close the files."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        for descriptor in self._descriptors:
            os.close(descriptor)
        self._descriptors = []
