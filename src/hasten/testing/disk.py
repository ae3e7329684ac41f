"""Fault-injecting twins of an index's files: a disk that loses power, and a disk that is slow.

A power cut leaves what was synced, and of what was not synced any prefix; a new name or a rename is kept only if its
folder was synced. :class:`CrashingFolder` does this to a real folder at the operation with a given number.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hasten.clock import ManualClock
from hasten.retrieve.index.io import DiskFolder, Read, Reader, Writer

__all__ = ["CrashingFolder", "PowerCutError", "SlowReader"]


class PowerCutError(Exception):
    """The disk stopped here."""


class CrashingFolder(DiskFolder):
    """A folder whose operation number ``stop`` (from 0) is cut by a power failure; later ones fail too.

    ``torn`` is the share of unsynced bytes that reach the disk anyway. Call :meth:`settle` after the failure: it
    leaves the folder as a machine would find it at the next start.
    """

    def __init__(self, path: Path, stop: int | None = None, torn: float = 0.0, **options: Any) -> None:
        super().__init__(path, **options)
        self.stop = stop
        self.torn = torn
        self.operations = 0
        self.dead = False
        self._durable: dict[str, int] = {name: self.size(name) for name in self.names()}
        self._names: dict[str, bytes | None] = {}  # unsynced names: what stood there before, None for nothing
        self._removed: dict[str, bytes] = {}

    def step(self) -> None:
        """Count one operation; fail if it is the one."""
        if self.dead or self.operations == self.stop:
            self.dead = True
            raise PowerCutError(f"operation {self.operations}")
        self.operations += 1

    def create(self, name: str) -> Writer:
        self.step()
        if name not in self._names:
            self._names[name] = self._old(name)
        self._durable[name] = 0
        return _CrashingWriter(self, name, super().create(name))

    def append(self, name: str, size: int) -> Writer:
        self.step()
        if self.size(name) < 0 and name not in self._names:
            self._names[name] = None
        self._durable[name] = min(self._durable.get(name, 0), size)
        return _CrashingWriter(self, name, super().append(name, size))

    def rename(self, old: str, new: str) -> None:
        self.step()
        if new not in self._names:
            self._names[new] = self._old(new)
        super().rename(old, new)
        self._durable[new] = self._durable.pop(old, 0)
        self._names.pop(old, None)

    def remove(self, name: str) -> None:
        self.step()
        super().remove(name)
        self._durable.pop(name, None)
        self._names.pop(name, None)

    def sync(self) -> None:
        self.step()
        super().sync()
        self._names.clear()

    def _old(self, name: str) -> bytes | None:
        return self.path(name).read_bytes() if self.size(name) >= 0 else None

    def settle(self) -> None:
        """Take away what did not reach the disk."""
        self.dead = True
        for name, before in self._names.items():
            path = self.path(name)
            if before is None:
                path.unlink(missing_ok=True)
            else:
                path.write_bytes(before)
        for name, durable in self._durable.items():
            size = self.size(name)
            if name in self._names or size <= durable:
                continue
            os.truncate(self.path(name), durable + int((size - durable) * self.torn))


class _CrashingWriter:
    def __init__(self, folder: CrashingFolder, name: str, inner: Writer) -> None:
        self._folder, self._name, self._inner = folder, name, inner

    def write(self, data: bytes | memoryview) -> int:
        view = memoryview(data).cast("B")
        if self._folder.dead or self._folder.operations == self._folder.stop:
            if not self._folder.dead and self._folder.torn:
                self._inner.write(view[: max(1, len(view) // 2)])  # the write itself is torn
            self._folder.step()
        self._folder.step()
        return self._inner.write(view)

    def sync(self) -> None:
        self._folder.step()
        self._inner.sync()
        self._folder._durable[self._name] = self._folder.size(self._name)

    def tell(self) -> int:
        return self._inner.tell()

    def close(self) -> None:
        self._inner.close()


class SlowReader:
    """A reader that takes ``delay`` seconds of a :class:`~hasten.clock.ManualClock` for each list."""

    def __init__(self, inner: Reader, clock: ManualClock, delay: float) -> None:
        self._inner, self._clock, self._delay = inner, clock, delay

    def fetch(self, reads: list[Read], clock: Any, deadline: float | None) -> Iterator[tuple[Read, Any]]:
        """Yield what the inner reader yields, each after its delay."""
        for read, data in self._inner.fetch(reads, clock, deadline):
            self._clock.advance(self._delay * len(read.parts))
            yield read, data

    def close(self) -> None:
        """Close the inner one."""
        self._inner.close()
