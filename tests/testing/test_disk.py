"""The fault-injecting disk forgets what was not synced, and nothing else."""

import numpy as np
import pytest

from hasten.clock import ManualClock
from hasten.retrieve.index.io import Read
from hasten.retrieve.index.query import MappedReader
from hasten.testing.disk import CrashingFolder, PowerCutError, SlowReader


def write(folder, name, data, sync=True):
    writer = folder.create(name)
    writer.write(data)
    if sync:
        writer.sync()
    writer.close()


def test_what_was_synced_stays(tmp_path):
    folder = CrashingFolder(tmp_path)
    write(folder, "a", b"one")
    folder.sync()
    write(folder, "b", b"two")  # its name is not durable
    folder.settle()
    assert folder.names() == ["a"]


@pytest.mark.parametrize(("torn", "left"), [(0.0, b"1234"), (0.5, b"123456"), (1.0, b"12345678")])
def test_of_what_was_not_synced_a_prefix_may_stay(tmp_path, torn, left):
    (tmp_path / "log").write_bytes(b"1234")
    folder = CrashingFolder(tmp_path, torn=torn)
    writer = folder.append("log", 4)
    writer.write(b"5678")
    folder.settle()
    assert (tmp_path / "log").read_bytes() == left


def test_a_rename_is_undone_until_the_folder_is_synced(tmp_path):
    (tmp_path / "file").write_bytes(b"old")
    folder = CrashingFolder(tmp_path)
    write(folder, "file.tmp", b"new")
    folder.rename("file.tmp", "file")
    folder.settle()
    assert (tmp_path / "file").read_bytes() == b"old"
    again = CrashingFolder(tmp_path)
    write(again, "file.tmp", b"new")
    again.rename("file.tmp", "file")
    again.sync()
    again.settle()
    assert (tmp_path / "file").read_bytes() == b"new"


def test_the_cut_comes_at_its_operation_and_lasts(tmp_path):
    folder = CrashingFolder(tmp_path, stop=2, torn=1.0)
    writer = folder.create("a")
    writer.write(b"12")
    with pytest.raises(PowerCutError):
        writer.write(b"3456")
    assert (tmp_path / "a").read_bytes() == b"1234"  # half of the write at that moment
    with pytest.raises(PowerCutError):
        folder.sync()


def test_a_slow_disk_takes_its_time():
    clock = ManualClock()
    reader = SlowReader(MappedReader((np.arange(100, dtype=np.uint8),)), clock, 0.5)
    reads = [Read(0, 0, 10, (0, 1)), Read(0, 50, 10, (2,))]
    got = list(reader.fetch(reads, clock, None))
    assert clock.now() == 1.5
    assert got[1][1].tolist() == list(range(50, 60))
    assert len(list(reader.fetch(reads, clock, clock.now() + 0.7))) == 1
