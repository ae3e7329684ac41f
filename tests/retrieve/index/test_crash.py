"""A power cut at every operation, and a process that is killed: the old state or the new one, and nothing
acknowledged is lost.
"""

import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest

import hasten.retrieve as hr
from hasten.errors import DataError
from hasten.retrieve.index.build import BuildOptions, build
from hasten.retrieve.index.spann import Spann
from hasten.testing.disk import CrashingFolder, PowerCutError

OPTIONS = BuildOptions(list_bytes="4KiB", replicas=3, threads=1)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    rows, _ = hr.clustered(120, 6)
    path = tmp_path_factory.mktemp("small") / "index"
    build(rows, path, OPTIONS)
    return rows, path


def state(path):
    """(ids, vectors) of everything alive, by searching; the index must be good."""
    with Spann.open(path) as index:
        assert index.verify().good
        hit = index.search(np.zeros((1, 6), np.float32), len(index), lists=None)
        ids = sorted(hit.ids[0].tolist())
        return dict(zip(ids, [tuple(v) for v in index.get(ids).tolist()], strict=True))


def operations(path, work):
    """How many operations a script takes when nothing fails."""
    folder = CrashingFolder(path)
    work(Spann(folder))
    return folder.operations


def script(index, done):
    """Calls in order; ``done`` counts those that were acknowledged."""
    rng = np.random.default_rng(5)
    index.add(np.arange(200, 230), rng.normal(size=(30, 6)).astype(np.float32))
    done.append("add")
    index.delete(np.arange(0, 40))
    done.append("delete")
    index.compact()
    done.append("compact")
    index.upsert([200, 50], np.full((2, 6), 2.0, np.float32))
    done.append("upsert")
    index.compact(everything=True)
    done.append("compact all")


def expected(rows, count):
    """What a dictionary holds after ``count`` calls of the script."""
    live = {i: tuple(v) for i, v in enumerate(rows.tolist())}
    rng = np.random.default_rng(5)
    more = rng.normal(size=(30, 6)).astype(np.float32).tolist()
    if count >= 1:
        live.update({200 + i: tuple(v) for i, v in enumerate(more)})
    if count >= 2:
        live = {k: v for k, v in live.items() if k >= 40}
    if count >= 4:
        live[200] = live[50] = (2.0,) * 6
    return live


@pytest.mark.parametrize(
    "torn", [0.5, pytest.param(0.0, marks=pytest.mark.slow), pytest.param(1.0, marks=pytest.mark.slow)]
)
def test_a_power_cut_at_every_operation(small, tmp_path, torn):
    rows, path = small
    shutil.copytree(path, tmp_path / "whole")
    total = operations(tmp_path / "whole", lambda index: (script(index, []), index.close()))
    assert total > 60
    for stop in range(total):
        place = tmp_path / f"cut-{stop}"
        shutil.copytree(path, place)
        folder = CrashingFolder(place, stop=stop, torn=torn)
        done = []
        index = None
        try:
            index = Spann(folder)
            script(index, done)
            index.close()
            pytest.fail("the power was not cut")
        except PowerCutError:
            pass
        if index is not None:
            index._release_lock()
        folder.settle()
        found = state(place)
        # every acknowledged call is there; the one that was cut is there whole or not at all
        assert found in (expected(rows, len(done)), expected(rows, len(done) + 1)), (stop, done)
        shutil.rmtree(place)


@pytest.mark.parametrize("torn", [0.0, 1.0])
def test_a_power_cut_at_every_operation_of_a_build(tmp_path, torn):
    rows, _ = hr.clustered(60, 6)
    made = []

    def folder(stop):
        def make(path):
            made.append(CrashingFolder(path, stop=stop, torn=torn))
            return made[-1]

        return make

    build(rows, tmp_path / "whole", OPTIONS, make_folder=folder(None))
    total = made[-1].operations
    assert total > 15
    for stop in range(total):
        target = tmp_path / f"cut-{stop}"
        with pytest.raises(PowerCutError):
            build(rows, target, OPTIONS, make_folder=folder(stop))
        assert not target.exists()
        assert not list(tmp_path.glob(".cut-*")), "a failed build leaves nothing behind"


def test_a_full_disk_is_one_line_and_the_index_goes_on(small, tmp_path, monkeypatch):
    rows, path = small
    shutil.copytree(path, tmp_path / "index")
    with Spann.open(tmp_path / "index") as index:
        real = os.write

        def full(descriptor, data):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "write", full)
        with pytest.raises(DataError, match="No space left"):
            index.compact()
        monkeypatch.setattr(os, "write", real)
        assert index.generation == 1
        index.delete([3])
        index.compact()
        assert index.verify().good
    assert 3 not in state(tmp_path / "index")


def test_after_a_failed_log_write_nothing_more_is_taken(small, tmp_path, monkeypatch):
    _, path = small
    shutil.copytree(path, tmp_path / "index")
    with Spann.open(tmp_path / "index") as index:
        real = os.fsync

        def broken(descriptor):
            raise OSError(5, "Input/output error")

        monkeypatch.setattr(os, "fsync", broken)
        with pytest.raises(DataError, match="Input/output"):
            index.delete([1])
        monkeypatch.setattr(os, "fsync", real)
        with pytest.raises(DataError, match="open it again"):
            index.delete([2])
        assert index.search(np.zeros((1, 6), np.float32), 3).ids.shape == (1, 3)


@pytest.mark.parametrize("where", [0, 3, 9, 25, -1])
def test_a_damaged_log_ends_where_it_is_damaged(small, tmp_path, where):
    _, path = small
    shutil.copytree(path, tmp_path / "index")
    with Spann.open(tmp_path / "index") as index:
        index.delete([1])
        first = index._log.size
        index.delete([2])
        name = index._folder.path(index._log.name)
    data = bytearray(name.read_bytes())
    data[first + where if where >= 0 else len(data) - 1] ^= 0x40
    name.write_bytes(bytes(data))
    with Spann.open(tmp_path / "index") as index:
        assert 1 not in index
        assert 2 in index
        index.delete([7])
    with Spann.open(tmp_path / "index") as index:
        assert 1 not in index
        assert 2 in index
        assert 7 not in index


WRITER = """
    import sys, os, numpy as np
    from hasten.retrieve.index.spann import Spann
    path = sys.argv[1]
    warm = Spann.open(path, read_only=True)
    rng = np.random.default_rng(0)
    print("ready", flush=True)
    for line in sys.stdin:
        number = int(line)
        child = os.fork()
        if child == 0:
            with Spann.open(path) as index:
                print("child", os.getpid(), flush=True)
                for turn in range(10_000):
                    first = number * 100_000 + 10 * turn
                    index.add(np.arange(first, first + 3), np.full((3, 6), float(first % 97), np.float32))
                    os.write(1, f"added {first}\\n".encode())
                    if turn % 3 == 2:
                        index.delete([first])
                        os.write(1, f"gone {first}\\n".encode())
                    if turn % 7 == 6:
                        index.compact()
        os.waitpid(child, 0)
        print("dead", flush=True)
"""


@pytest.mark.slow
def test_fifty_kills(small, tmp_path):
    """A process is killed (SIGKILL) at a random moment, fifty times; whatever it said was done is there afterwards."""
    _, path = small
    shutil.copytree(path, tmp_path / "index")
    target = tmp_path / "index"
    command = [sys.executable, "-c", textwrap.dedent(WRITER), str(target)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    rng = np.random.default_rng(0)
    there, gone, unsure, acknowledged = set(), set(), set(), 0
    last = 0
    try:
        for number in range(1, 51):
            process.stdin.write(f"{number}\n")
            process.stdin.flush()
            word, child = process.stdout.readline().split()
            assert word == "child"
            said = [process.stdout.readline() for _ in range(int(rng.integers(0, 12)))]  # however slow the machine is
            time.sleep(float(rng.uniform(0.0, 0.01)))
            os.kill(int(child), signal.SIGKILL)
            said += iter(process.stdout.readline, "dead\n")
            for line in said:
                word, first = line.split()
                acknowledged += 1
                if word == "added":
                    there |= set(range(int(first), int(first) + 3))
                    last = int(first)
                else:
                    gone.add(int(first))
            if last not in gone:  # its deletion may be durable, and the process killed before it said so
                unsure.add(last)
            if number % 10 == 0:
                with Spann.open(target) as index:
                    assert index.verify().good
                    live = set(index.search(np.zeros((1, 6), np.float32), len(index), lists=None).ids[0].tolist())
                    assert there - gone - unsure <= live
                    assert not gone & live
                    some = sorted(there - gone - unsure)[-20:]
                    again = index.get(some)
                    wanted = np.array([[float(i // 10 * 10 % 97)] * 6 for i in some], np.float32)
                    np.testing.assert_array_equal(again, wanted.reshape(-1, 6))
    finally:
        process.stdin.close()
        process.wait(20)
    assert acknowledged > 100
