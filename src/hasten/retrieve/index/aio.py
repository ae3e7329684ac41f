"""Reads past the page cache, all of a query's at once, by the kernel's asynchronous I/O.

A list lies anywhere on the disk, so what a query waits for is the latency of its reads: one after the other they add
up, at once they cost little more than one. ``io_submit`` hands all of them to the disk in one call and
``io_getevents`` gives them as they arrive, without a thread for each. Where a kernel refuses, ``PooledReader`` reads
with threads.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import platform
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hasten.clock import Clock
from hasten.errors import DataError
from hasten.retrieve.index.io import PAGE, PooledReader, Read, Reader, told

__all__ = ["AsyncReader", "direct_reader"]

_CALLS = {"x86_64": (206, 207, 208, 209), "aarch64": (0, 1, 4, 2)}
"""numbers of io_setup, io_destroy, io_getevents, io_submit"""
_REQUEST = np.dtype(
    [
        ("data", "<u8"),
        ("key", "<u4"),
        ("flags", "<i4"),
        ("operation", "<u2"),  # 0: pread
        ("priority", "<i2"),
        ("descriptor", "<u4"),
        ("buffer", "<u8"),
        ("size", "<u8"),
        ("offset", "<i8"),
        ("rest", "<u8", (2,)),
    ]
)
_EVENT = np.dtype([("data", "<u8"), ("request", "<u8"), ("result", "<i8"), ("second", "<i8")])


class _Time(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


def direct_reader(paths: list[Path], queue_depth: int) -> Reader:
    """Reads past the page cache: asynchronous where the kernel has it, else with threads."""
    try:
        return AsyncReader(paths, queue_depth)
    except OSError:
        return PooledReader(paths, direct=True, queue_depth=queue_depth)


class _Queue:
    """One context of the kernel with its requests and its buffer; serves one query at a time."""

    def __init__(self, depth: int) -> None:
        calls = _CALLS.get(platform.machine())
        if calls is None or not hasattr(os, "O_DIRECT"):
            raise OSError(errno.ENOSYS, "no asynchronous reads here")
        self._setup, self._destroy, self._events_of, self._submit = calls
        self._call = ctypes.CDLL(None, use_errno=True).syscall
        self._call.restype = ctypes.c_long
        self._context = ctypes.c_ulong(0)
        self._run(self._setup, ctypes.c_long(depth), ctypes.byref(self._context))
        self.depth = depth
        self.outstanding = 0
        self._requests = np.zeros(depth, _REQUEST)
        first = self._requests.ctypes.data
        self._pointers = first + _REQUEST.itemsize * np.arange(depth, dtype=np.uint64)
        self._events = np.zeros(depth, _EVENT)
        self._memory = mmap.mmap(-1, PAGE)
        self.buffer: NDArray[np.uint8] = np.frombuffer(self._memory, np.uint8)

    def _run(self, number: int, *arguments: object) -> int:
        got = int(self._call(ctypes.c_long(number), *arguments))
        if got < 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        return got

    def room(self, size: int) -> None:
        """Make the buffer hold so many bytes; nothing may be under way."""
        if size > len(self.buffer):
            self._memory = mmap.mmap(-1, 2 * size)
            self.buffer = np.frombuffer(self._memory, np.uint8)

    def submit(self, numbers: NDArray[np.int64], descriptors: list[int], reads: list[Read], places: list[int]) -> None:
        """Start the reads of these numbers, each into its place of the buffer."""
        for slot, number in enumerate(numbers.tolist()):
            read = reads[number]
            self._requests[slot] = (
                number,
                0,
                0,
                0,
                0,
                descriptors[read.file],
                self.buffer.ctypes.data + places[number],
                read.size,
                read.offset,
                0,
            )
        done = 0
        while done < len(numbers):
            pointers = ctypes.c_void_p(self._pointers[done:].ctypes.data)
            done += self._run(self._submit, self._context, ctypes.c_long(len(numbers) - done), pointers)
        self.outstanding += len(numbers)

    def arrived(self, seconds: float | None) -> list[tuple[int, int]]:
        """(number, bytes or minus an error) of what has come, at least one unless the time passes or a signal comes."""
        limit = None
        if seconds is not None:
            whole = int(seconds)
            limit = ctypes.byref(_Time(whole, int((seconds - whole) * 1e9)))
        place = ctypes.c_void_p(self._events.ctypes.data)
        try:
            count = self._run(self._events_of, self._context, ctypes.c_long(1), ctypes.c_long(self.depth), place, limit)
        except InterruptedError:
            return []  # Python runs the signal's handler now; whoever waits asks again
        self.outstanding -= count
        return [(int(e["data"]), int(e["result"])) for e in self._events[:count]]

    def drain(self) -> None:
        """Wait for what a deadline left behind."""
        while self.outstanding:
            self.arrived(None)

    def close(self) -> None:
        """Wait for what is under way and give the context back."""
        self._call(ctypes.c_long(self._destroy), self._context)


class AsyncReader:
    """Ranges of files past the page cache; safe to use from several threads, each of which takes a queue.

    The bytes of a range are those of a buffer that the next search overwrites. Raises OSError where the kernel or the
    file system has no such reads.
    """

    def __init__(self, paths: list[Path], queue_depth: int = 32) -> None:
        self._paths = paths
        self._depth = queue_depth
        self._lock = threading.Lock()
        self._free = [_Queue(queue_depth)]
        self._all = list(self._free)
        self._descriptors: list[int] = []
        try:
            for path in paths:
                with told(path):
                    self._descriptors.append(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT))
        except BaseException:
            self.close()
            raise

    def _take(self) -> _Queue:
        with self._lock:
            if self._free:
                return self._free.pop()
            made = _Queue(self._depth)
            self._all.append(made)
            return made

    def fetch(
        self, reads: list[Read], clock: Clock, deadline: float | None
    ) -> Iterator[tuple[Read, NDArray[np.uint8]]]:
        """Yield (range, bytes) as they arrive, until the deadline (seconds on ``clock``)."""
        queue = self._take()
        try:
            queue.drain()
            places, size = [], 0
            for read in reads:
                places.append(size)
                size += read.size
            queue.room(size)
            for first in range(0, len(reads), queue.depth):
                wave = np.arange(first, min(first + queue.depth, len(reads)))
                queue.submit(wave, self._descriptors, reads, places)
                while queue.outstanding:
                    left = None if deadline is None else deadline - clock.now()
                    if left is not None and left <= 0:
                        return
                    for number, got in queue.arrived(left):
                        read = reads[number]
                        if got < read.size - PAGE:  # the last page of a file may be cut
                            reason = os.strerror(-got) if got < 0 else f"{got} of {read.size} bytes came back"
                            raise DataError(f"{str(self._paths[read.file])!r} at {read.offset}: {reason}; run verify()")
                        yield read, queue.buffer[places[number] : places[number] + read.size]
        finally:
            with self._lock:
                self._free.append(queue)

    def close(self) -> None:
        """Wait for reads under way and close the files."""
        with self._lock:
            for queue in self._all:
                queue.close()
            self._all, self._free = [], []
        for descriptor in self._descriptors:
            os.close(descriptor)
        self._descriptors = []
