"""Verification finds damage, repair undoes it, snapshots are whole; formats and filters."""

import io
import json
import os
import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import hasten.retrieve as hr
from hasten.errors import CorruptPostingError, DataError, InvalidRequestError
from hasten.retrieve.index import wal
from hasten.retrieve.index.filter import bitmap, evaluate
from hasten.retrieve.index.format import read_list
from hasten.retrieve.index.io import PAGE, merge_reads
from hasten.retrieve.index.snapshot import restore


def damage(folder, generation, lists):
    """Turn one bit of each list on the disk."""
    for h in lists:
        entry = generation.directory[h]
        path = folder / generation.manifest.segments[int(entry["segment"])]
        with path.open("r+b") as file:
            file.seek(int(entry["offset"]) + 5)
            byte = file.read(1)[0]
            file.seek(int(entry["offset"]) + 5)
            file.write(bytes([byte ^ 0x10]))


def test_a_good_index_is_good(index):
    found = index.verify()
    assert found.good
    assert found.rows == 2000
    assert found.copies >= 1
    assert json.loads(json.dumps(found.to_json()))["good"]


def test_damage_is_found_and_undone(index, collection, twin):
    rows, queries = collection
    g = index._view.generation
    folder = index._folder.path("")
    doomed = np.argsort(-g.counts)[:25]
    damage(folder, g, doomed)
    found = index.verify()
    assert sorted(found.corrupt) == sorted(doomed.tolist())
    with pytest.raises(CorruptPostingError, match=f"list {doomed[0]} ") as told:
        read_list(g, int(doomed[0]))
    assert told.value.lists == (doomed[0],)
    report = index.repair(rows)
    assert report["corrupt"] == 25
    assert report["lost"] == 0
    assert index.verify().good
    assert twin.same(index.search(queries, 10, lists=None), rows, queries, "l2", 10)


def test_a_file_that_is_cut_while_it_is_open_kills_nobody(tmp_path, twin):
    rows, queries = hr.clustered(1500, 8, 10)
    with hr.Spann.build(rows, tmp_path / "index") as index:
        path = tmp_path / "index" / index._generation.manifest.segments[0]
        os.truncate(path, path.stat().st_size // 2)
        for call in (
            lambda: index.search(queries, 5),
            lambda: index.search(queries[:1], 5, where=[1, 2]),
            lambda: index.range_search(queries, 1.0),
            lambda: index.get([0]),
            index.compact,
        ):
            with pytest.raises(CorruptPostingError, match="was cut from"):
                call()
        found = index.verify()
        assert 0 < len(found.corrupt) < found.lists
        report = index.repair(rows)
        assert report["corrupt"] == len(found.corrupt)
        assert index.verify().good
        assert twin.same(index.search(queries, 5, lists=None), rows, queries, "l2", 5)
        path = tmp_path / "index" / index._generation.manifest.roles["location"]
        os.truncate(path, 8)
        with pytest.raises(CorruptPostingError, match="location-2.bin' was cut"):
            index.verify()


@pytest.mark.parametrize("io", ["pread", "direct"])
def test_a_file_that_is_cut_is_said_by_readers(io, tmp_path):
    rows, queries = hr.clustered(1500, 8, 10)
    hr.Spann.build(rows, tmp_path / "index").close()
    with hr.Spann.open(tmp_path / "index", io=io, read_only=True) as index:
        path = tmp_path / "index" / index._generation.manifest.segments[0]
        os.truncate(path, 4096)
        with pytest.raises(DataError, match="bytes"):
            index.search(queries, 5, lists=32)


def test_without_vectors_lost_rows_are_counted_and_gone(tmp_path, twin):
    rows, queries = hr.clustered(1200, 8, 10)
    with hr.Spann.build(rows, tmp_path / "index", replicas=1) as index:
        g = index._view.generation
        worst = int(np.argmax(g.counts))
        lost = read_list(g, worst)[1].copy()
        damage(tmp_path / "index", g, [worst])
        index.add([5000], queries[:1])  # what is in the log survives a repair
        report = index.repair()
        assert report["lost"] == len(lost)
        assert index.verify().good
        assert len(index) == 1200 - len(lost) + 1
        assert 5000 in index
        keep = np.setdiff1d(np.arange(1200), lost)
        names = np.append(keep, 5000)
        everything = np.concatenate([rows[keep], queries[:1]])
        assert twin.same(index.search(queries, 5, lists=None), everything, queries, "l2", 5, names=names)


def test_a_good_index_needs_no_repair(index):
    assert index.repair() == {"corrupt": 0, "restored": 0, "lost": 0}
    assert index.generation == 1


def test_snapshots_to_a_directory_and_a_stream(index, collection, tmp_path):
    rows, queries = collection
    index.add([7000], queries[:1])
    index.delete([3])
    index.snapshot(tmp_path / "copy")
    stream = io.BytesIO()
    index.snapshot(stream)
    wanted = index.search(queries, 5).ids
    index.delete([7000])  # what happens later is not in them
    index.compact()
    restore(io.BytesIO(stream.getvalue()), tmp_path / "unpacked")
    for place in ("copy", "unpacked"):
        with hr.Spann.open(tmp_path / place) as again:
            assert again.verify().good
            np.testing.assert_array_equal(again.search(queries, 5).ids, wanted)
            assert 7000 in again
            assert 3 not in again
    with pytest.raises(DataError, match="not empty"):
        index.snapshot(tmp_path / "copy")
    with pytest.raises(DataError, match="again"):
        restore(io.BytesIO(stream.getvalue()[: len(stream.getvalue()) // 2]), tmp_path / "cut")


def test_damaged_manifests_and_files_are_one_line(built, tmp_path):
    def copy(name):
        shutil.copytree(built, tmp_path / name)
        return tmp_path / name

    place = copy("newer")
    body = json.loads((place / "MANIFEST.json").read_text())
    (place / "MANIFEST.json").write_text(json.dumps({**body, "format": 99}))
    with pytest.raises(DataError, match="format 99"):
        hr.Spann.open(place)
    place = copy("edited")
    (place / "MANIFEST.json").write_text(json.dumps({**body, "rows": 7}))
    with pytest.raises(DataError, match="checksum is wrong"):
        hr.Spann.open(place)
    place = copy("text")
    (place / "MANIFEST.json").write_text("{")
    with pytest.raises(DataError, match="not JSON"):
        hr.Spann.open(place)
    place = copy("cut")
    with (place / "heads-1.safetensors").open("r+b") as file:
        file.truncate(100)
    with pytest.raises(DataError, match="has 100 bytes"):
        hr.Spann.open(place)
    place = copy("flipped")
    data = bytearray((place / "directory-1.bin").read_bytes())
    data[40] ^= 1
    (place / "directory-1.bin").write_bytes(bytes(data))
    with pytest.raises(DataError, match="wrong checksum"):
        hr.Spann.open(place)
    with pytest.raises(DataError, match="no index"):
        hr.Spann.open(tmp_path)
    with pytest.raises(DataError, match="check the path"):
        hr.Spann.open(tmp_path / "nowhere")


def test_heads_are_plain_safetensors(built):
    from safetensors.numpy import load_file

    stored = load_file(str(built / "heads-1.safetensors"))
    with hr.Spann.open(built, read_only=True) as index:
        g = index._view.generation
        np.testing.assert_array_equal(stored["heads"], g.heads)
        np.testing.assert_array_equal(stored["graph"], g.graph)
        np.testing.assert_array_equal(stored["head_rows"], g.head_rows)


def test_memory_counts_every_part(built):
    with hr.Spann.open(built, read_only=True) as index:
        parts = index.memory()
        g = index._view.generation
        assert parts["total"] == sum(v for k, v in parts.items() if k != "total")
        assert parts["heads"] == g.heads.nbytes
        assert parts["graph"] == g.graph.nbytes
        assert parts["directory"] >= 16 * len(g.counts)


# --- the log ---------------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(sizes=st.lists(st.integers(0, 5), min_size=1, max_size=6), cut=st.integers(0, 400), seed=st.integers(0, 99))
def test_a_log_that_is_cut_anywhere_gives_its_whole_records(sizes, cut, seed):
    rng = np.random.default_rng(seed)
    records = [
        wal.Record(
            wal.ADD, np.arange(n), rng.normal(size=(n, 3)).astype(np.float32), {"a": list(range(n))} if n else {}
        )
        if n % 2
        else wal.Record(wal.DELETE, np.arange(n), None, {})
        for n in sizes
    ]
    ends = np.cumsum([len(r.encode()) for r in records])
    data = b"".join(r.encode() for r in records)[:cut]
    out = list(wal.replay(data, 3, np.float32))
    assert len(out) == int((ends <= cut).sum())
    for (found, end), record, wanted in zip(out, records, ends, strict=False):
        assert end == wanted
        assert found.operation == record.operation
        np.testing.assert_array_equal(found.ids, record.ids)
        assert found.attributes == record.attributes
        if record.rows is not None:
            np.testing.assert_array_equal(found.rows, record.rows)


# --- reads -----------------------------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(
    requests=st.lists(st.tuples(st.integers(0, 2), st.integers(0, 60), st.integers(1, 3 * PAGE)), max_size=12),
    gap=st.sampled_from([0, PAGE]),
)
def test_merged_reads_cover_every_request_once(requests, gap):
    files, pages, sizes = (np.array([r[i] for r in requests], np.int64) for i in range(3))
    reads = merge_reads(files, pages * PAGE, sizes, gap)
    assert sorted(p for r in reads for p in r.parts) == list(range(len(requests)))
    for read in reads:
        assert read.offset % PAGE == 0
        assert read.size % PAGE == 0
        for part in read.parts:
            assert files[part] == read.file
            assert read.offset <= pages[part] * PAGE
            assert pages[part] * PAGE + sizes[part] <= read.offset + read.size
    for a, b in zip(reads, reads[1:], strict=False):
        assert a.file != b.file or b.offset - (a.offset + a.size) > gap


# --- filters ---------------------------------------------------------------------------------------------------------

COLUMNS = {
    "year": np.array([1999, 2005, 2020]),
    "lang": np.array(["en", "de", "en"]),
    "draft": np.array([True, False, False]),
}


@pytest.mark.parametrize(
    ("where", "wanted"),
    [
        ({}, [1, 1, 1]),
        ({"lang": "en"}, [1, 0, 1]),
        ({"lang": ["de", "fr"]}, [0, 1, 0]),
        ({"year": {"min": 2005}}, [0, 1, 1]),
        ({"year": {"min": 2000, "max": 2010}}, [0, 1, 0]),
        ({"lang": {"in": ["en"]}, "draft": {"not": True}}, [0, 0, 1]),
        (lambda c: c["year"] % 5 == 0, [0, 1, 1]),
    ],
)
def test_conditions(where, wanted):
    assert evaluate(where, COLUMNS, 3).astype(int).tolist() == wanted


@pytest.mark.parametrize(
    ("where", "word"), [({"x": 1}, "year, lang, draft"), ({"year": {"over": 3}}, "min, max, in, not")]
)
def test_conditions_that_cannot_be_meant(where, word):
    with pytest.raises(InvalidRequestError, match=word):
        evaluate(where, COLUMNS, 3)


def test_bits_are_in_the_order_of_the_rows():
    bits = bitmap(np.array([True, False, False, True, False, False, False, False, True]))
    assert bits.tolist() == [0b1001, 1]
    assert bitmap(np.zeros(0, bool)).tolist() == [0]
