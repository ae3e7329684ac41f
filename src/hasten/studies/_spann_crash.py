"""The disk stops at each operation of a vector index in turn; what opens then is a state that was acknowledged."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from hasten.retrieve.index.build import BuildOptions, build
from hasten.retrieve.index.io import DiskFolder, Writer
from hasten.retrieve.index.spann import Spann
from hasten.retrieve.index.synthetic import clustered
from hasten.studies.study import Check, Scale

__all__ = ["crash"]


class _StopError(Exception):
    """The disk stopped here."""


class _Stopping(DiskFolder):
    """A folder that fails at one operation and at every later one; the write at that moment is torn."""

    def __init__(self, path: Path, stop: int) -> None:
        super().__init__(path)
        self.left = stop

    def step(self) -> None:
        """Count one operation."""
        self.left -= 1
        if self.left < 0:
            raise _StopError

    def create(self, name: str) -> Writer:
        self.step()
        return _StoppingWriter(self, super().create(name))

    def append(self, name: str, size: int) -> Writer:
        self.step()
        return _StoppingWriter(self, super().append(name, size))

    def rename(self, old: str, new: str) -> None:
        self.step()
        super().rename(old, new)

    def remove(self, name: str) -> None:
        self.step()
        super().remove(name)

    def sync(self) -> None:
        self.step()
        super().sync()


class _StoppingWriter:
    def __init__(self, folder: _Stopping, inner: Writer) -> None:
        self._folder, self._inner = folder, inner

    def write(self, data: bytes | memoryview) -> int:
        view = memoryview(data).cast("B")
        if self._folder.left == 0:
            self._inner.write(view[: len(view) // 2])
        self._folder.step()
        return self._inner.write(view)

    def sync(self) -> None:
        self._folder.step()
        self._inner.sync()

    def tell(self) -> int:
        return self._inner.tell()

    def close(self) -> None:
        self._inner.close()


def crash(scale: Scale, folder: Path) -> Iterator[Check]:
    """Add, delete and compact with the disk stopping at every operation; what opens afterwards is a state that was
    acknowledged.
    """
    rows, _ = clustered(120, 6)
    build(rows, folder / "crash", BuildOptions(list_bytes="4KiB", replicas=3, threads=1))
    more = np.ones((20, 6), np.float32)
    mixed = lost = stops = 0
    while True:
        place = folder / f"crash-{stops}"
        shutil.copytree(folder / "crash", place)
        done, index = 0, None
        try:
            index = Spann(_Stopping(place, stops))
            index.add(np.arange(500, 520), more)
            done = 1
            index.delete(np.arange(50))
            done = 2
            index.compact()
            done = 3
            index.close()
            finished = True
        except _StopError:
            finished = False
            if index is not None:
                index._release_lock()
        states = [set(range(120)), set(range(120)) | set(range(500, 520))]
        states += [states[1] - set(range(50))] * 2
        with Spann.open(place) as again:
            live = set(again.search(np.zeros((1, 6), np.float32), len(again), lists=None).ids[0].tolist())
            good = again.verify().good
        mixed += live not in (states[done], states[min(done + 1, 3)]) or not good
        lost += not states[done] - set(range(50)) <= live
        shutil.rmtree(place)
        if finished:
            break
        stops += 1
    note = f"the disk stopped at each of {stops} operations, the write at that moment torn"
    yield Check.equal("crash: states that were never acknowledged", mixed, 0, "", note)
    yield Check.equal("crash: acknowledged changes that were lost", lost, 0, "", note)
