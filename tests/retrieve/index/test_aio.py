"""Reads past the page cache, all at once."""

import numpy as np
import pytest

from hasten.clock import ManualClock, MonotonicClock
from hasten.errors import DataError
from hasten.retrieve.index.aio import AsyncReader, direct_reader
from hasten.retrieve.index.io import PAGE, PooledReader, merge_reads


@pytest.fixture
def file(tmp_path):
    data = np.random.default_rng(0).integers(0, 256, 40 * PAGE, dtype=np.uint8)
    path = tmp_path / "lists"
    path.write_bytes(data.tobytes())
    return path, data


def opened(path, depth):
    try:
        return AsyncReader([path], depth)
    except OSError as error:
        pytest.skip(f"no asynchronous reads here: {error}")


@pytest.mark.parametrize("depth", [1, 3, 32])
def test_every_range_arrives_whole(file, depth):
    path, data = file
    offsets = np.array([3, 9, 14, 21, 30, 36]) * PAGE
    reads = merge_reads(np.zeros(6), offsets, np.full(6, 2 * PAGE))
    reader = opened(path, depth)
    for _ in range(2):  # buffers are used again
        got = {r.offset: block.copy() for r, block in reader.fetch(reads, MonotonicClock(), None)}
        assert sorted(got) == offsets.tolist()
        for offset, block in got.items():
            np.testing.assert_array_equal(block, data[offset : offset + 2 * PAGE])
    reader.close()


def test_a_signal_while_it_waits_loses_nothing(file, monkeypatch):
    path, data = file
    reader = opened(path, 4)
    queue, left = reader._all[0], [2]
    run = queue._run

    def interrupted(number, *arguments):
        if number == queue._events_of and left[0]:
            left[0] -= 1
            raise InterruptedError
        return run(number, *arguments)

    monkeypatch.setattr(queue, "_run", interrupted)
    reads = merge_reads(np.zeros(2), np.array([0, 20 * PAGE]), np.full(2, PAGE))
    got = {r.offset: block.copy() for r, block in reader.fetch(reads, MonotonicClock(), None)}
    assert left == [0]
    np.testing.assert_array_equal(got[20 * PAGE], data[20 * PAGE : 21 * PAGE])
    reader.close()


def test_a_deadline_leaves_out_what_is_not_there(file):
    path, data = file
    reader = opened(path, 8)
    reads = merge_reads(np.zeros(2), np.array([0, 20 * PAGE]), np.full(2, PAGE))
    clock = ManualClock()
    assert list(reader.fetch(reads, clock, clock.now())) == []
    again = {r.offset: block.copy() for r, block in reader.fetch(reads, MonotonicClock(), None)}
    assert len(again) == 2  # what was left behind does not come in between
    np.testing.assert_array_equal(again[20 * PAGE], data[20 * PAGE : 21 * PAGE])
    reader.close()


def test_what_lies_beyond_the_end_is_an_error(file):
    path, _ = file
    reader = opened(path, 4)
    reads = merge_reads(np.zeros(1), np.array([39 * PAGE]), np.array([4 * PAGE]))
    with pytest.raises(DataError, match="bytes came back"):
        list(reader.fetch(reads, MonotonicClock(), None))
    reader.close()


def test_threads_read_where_the_kernel_does_not(file, monkeypatch):
    monkeypatch.setattr("hasten.retrieve.index.aio.platform.machine", lambda: "unheard of")
    reader = direct_reader([file[0]], 4)
    assert isinstance(reader, PooledReader)
    reader.close()
