"""Building: every kind of source, within the memory that was stated, and nothing half done."""

import os
import subprocess
import sys

import numpy as np
import pytest

import hasten.retrieve as hr
from hasten.errors import ConfigurationError, DataError, MissingExtraError
from hasten.retrieve.index.build import BuildOptions, needed
from hasten.retrieve.index.sources import open_source, read_vectors


def write_bin(path, rows):
    with open(path, "wb") as file:
        np.array(rows.shape, "<u4").tofile(file)
        rows.tofile(file)


def write_vecs(path, rows):
    head = np.full((len(rows), 1), rows.shape[1], "<i4").view(np.uint8)
    np.concatenate([head, np.ascontiguousarray(rows).view(np.uint8).reshape(len(rows), -1)], axis=1).tofile(path)


@pytest.fixture(scope="module")
def small():
    rows, queries = hr.clustered(500, 8, 5)
    return rows, queries


def answers(index, queries):
    with index:
        return index.search(queries, 5, lists=None).ids.tolist()


def test_every_source_gives_the_same_index(small, tmp_path):
    rows, queries = small
    np.save(tmp_path / "rows.npy", rows)
    write_bin(tmp_path / "rows.fbin", rows)
    write_vecs(tmp_path / "rows.fvecs", rows)
    sources = {
        "array": rows,
        "double": rows.astype(np.float64),
        "map": np.load(tmp_path / "rows.npy", mmap_mode="r"),
        "npy": tmp_path / "rows.npy",
        "fbin": str(tmp_path / "rows.fbin"),
        "fvecs": tmp_path / "rows.fvecs",
        "blocks": (rows[i : i + 77] for i in range(0, 500, 77)),
        "single rows": list(rows),
    }
    found = {n: answers(hr.Spann.build(s, tmp_path / "out" / n), queries) for n, s in sources.items()}
    assert all(f == found["array"] for f in found.values())
    assert [p.name for p in (tmp_path / "out").iterdir() if p.name.startswith(".")] == []


def test_bytes_from_the_files_of_the_field(tmp_path):
    rows, queries = hr.clustered(500, 8, 5, dtype=np.uint8)
    write_bin(tmp_path / "rows.u8bin", rows)
    write_vecs(tmp_path / "rows.bvecs", rows)
    found = [
        answers(hr.Spann.build(tmp_path / n, tmp_path / f"{n}.spann"), queries) for n in ("rows.u8bin", "rows.bvecs")
    ]
    assert found[0] == found[1]
    np.testing.assert_array_equal(read_vectors(tmp_path / "rows.bvecs"), rows)


def test_hdf5_in_the_layout_of_ann_benchmarks(small, tmp_path):
    h5py = pytest.importorskip("h5py")
    rows, queries = small
    with h5py.File(tmp_path / "set.hdf5", "w") as file:
        file["train"], file["test"] = rows, queries
    assert answers(hr.Spann.build(tmp_path / "set.hdf5", tmp_path / "index"), queries)
    np.testing.assert_array_equal(read_vectors(tmp_path / "set.hdf5"), queries)
    with pytest.raises(DataError, match="no dataset 'rows'"):
        open_source(tmp_path / "set.hdf5", column="rows")


def test_parquet_columns(small, tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")

    rows, queries = small
    table = pyarrow.table({"v": list(rows), "n": np.arange(500)})
    parquet.write_table(table, tmp_path / "set.parquet")
    assert answers(hr.Spann.build(tmp_path / "set.parquet", tmp_path / "index", column="v"), queries)
    with pytest.raises(DataError, match="it has v, n"):
        open_source(tmp_path / "set.parquet")


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    (tmp_path / "set.hdf5").write_bytes(b"x")
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(MissingExtraError, match=r"hasten\[hdf5\]"):
        open_source(tmp_path / "set.hdf5")


@pytest.mark.parametrize(
    ("rows", "knobs", "word"),
    [
        (np.zeros((0, 4), np.float32), {}, "empty"),
        (np.zeros((4, 0), np.float32), {}, "width"),
        (np.zeros(4, np.float32), {}, "shape"),
        (np.zeros((4, 4), np.int64), {}, "int64"),
        (np.array([[1, 2], [np.nan, 1]], np.float32), {}, "row 1"),
        (np.array([[1, 2], [1, 1], [np.inf, 1]], np.float32), {}, "row 2"),
        (np.array([[1, 2], [0, 0]], np.float32), {"metric": "cosine"}, "row 1 is zero"),
        (np.ones((3, 2), np.float32), {"ids": [1, 2]}, "3 integers"),
        (np.ones((3, 2), np.float32), {"ids": [1, 2, 1]}, "row 2 has the id 1"),
        (np.ones((3, 2), np.float32), {"ids": [1, -2, 3]}, "row 1"),
        (np.ones((3, 2), np.float32), {"attributes": {"a": [1, 2]}}, "attribute 'a'"),
        (iter([]), {}, "at least one row"),
        (iter([np.ones((2, 3), np.float32), np.ones((2, 4), np.float32)]), {}, "row 2"),
        (3, {}, "int"),
        ("nowhere.fbin", {}, "not a file"),
    ],
)
def test_bad_collections_are_one_line_and_leave_nothing(rows, knobs, word, tmp_path):
    with pytest.raises(DataError, match=word) as told:
        hr.Spann.build(rows, tmp_path / "index", **knobs)
    assert "\n" not in str(told.value)
    assert list(tmp_path.iterdir()) == []


def test_damaged_files_are_refused(tmp_path):
    write_bin(tmp_path / "cut.fbin", np.ones((5, 4), np.float32))
    data = (tmp_path / "cut.fbin").read_bytes()
    (tmp_path / "cut.fbin").write_bytes(data[:-3])
    (tmp_path / "cut.fvecs").write_bytes(np.array([4, 0, 0], "<i4").tobytes())
    (tmp_path / "what.xyz").write_bytes(b"123")
    for name in ("cut.fbin", "cut.fvecs", "what.xyz"):
        with pytest.raises(DataError, match=name):
            hr.Spann.build(tmp_path / name, tmp_path / "index")


@pytest.mark.parametrize(
    "knobs",
    [
        {"metric": "hamming"},
        {"head_ratio": 0.0},
        {"replicas": 0},
        {"heads": "best"},
        {"degree": 2},
        {"memory": "3 apples"},
        {"speed": 9},
    ],
)
def test_options_that_cannot_be_meant(knobs, tmp_path):
    with pytest.raises(ValueError, match=r"\w"):
        hr.Spann.build(np.ones((10, 3), np.float32), tmp_path / "index", **knobs)
    assert list(tmp_path.iterdir()) == []


def test_an_existing_index_is_not_overwritten(small, tmp_path):
    hr.Spann.build(small[0], tmp_path / "index").close()
    with pytest.raises(DataError, match="exists already"):
        hr.Spann.build(small[0], tmp_path / "index")


def test_too_little_memory_says_how_much_is_needed(small, tmp_path):
    with pytest.raises(ConfigurationError, match="MiB; give more"):
        hr.Spann.build(small[0], tmp_path / "index", memory="1MiB")


def test_the_result_does_not_depend_on_memory_or_threads(tmp_path):
    """Spilling in many ranges, small blocks and several threads give the same lists."""
    rows, _ = hr.clustered(6000, 8)
    least = needed(6000, 8, 4, BuildOptions())
    one = hr.Spann.build(rows, tmp_path / "one", heads="random", threads=1)
    two = hr.Spann.build(rows, tmp_path / "two", heads="random", threads=2, memory=least + 1e5)
    with one, two:
        a, b = one._view.generation, two._view.generation
        np.testing.assert_array_equal(a.head_rows, b.head_rows)
        np.testing.assert_array_equal(a.directory["crc32"], b.directory["crc32"])


def test_lists_are_even_and_every_row_is_somewhere(tmp_path):
    rows, _ = hr.clustered(8000, 16)
    told = {}
    for heads in ("balanced", "kmeans"):
        with hr.Spann.build(
            rows, tmp_path / heads, heads=heads, head_ratio=0.12, epsilon=10.0, crowding=0.0, branches=32
        ) as index:
            told[heads] = index.describe()["built"]
            found = index.verify()
            assert found.good
            assert found.num_missing == 0
    assert told["balanced"]["list_spread"] < told["kmeans"]["list_spread"]


def test_a_small_limit_cuts_lists_but_loses_nothing(tmp_path):
    rows, _ = hr.clustered(3000, 16)
    with hr.Spann.build(rows, tmp_path / "index", list_bytes="4KiB", epsilon=10.0, crowding=0.0) as index:
        built = index.describe()["built"]
        assert built["dropped"] > 0
        assert index.verify().good
        assert index._view.generation.counts.max() <= built["list_limit"] + built["beyond_limit"]


MEASURE = """
import resource, sys, numpy as np
from hasten.retrieve.index.build import BuildOptions, build
def peak():
    return next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("VmHWM")) * 1024
build(np.random.default_rng(0).normal(size=(3000, 64)).astype("f4"), sys.argv[1] + "/warm")
rows = np.load(sys.argv[1] + "/rows.npy", mmap_mode="r")
before = peak()
build(rows, sys.argv[1] + "/index", BuildOptions(memory=float(sys.argv[2]), threads=2, head_ratio=0.1))
print(peak() - before)
"""


@pytest.mark.slow
def test_a_build_keeps_to_its_memory(tmp_path):
    """Peak resident memory of a build from a map that is larger than the memory; compiled kernels are not counted."""
    rows, _ = hr.clustered(120_000, 256)
    np.save(tmp_path / "rows.npy", rows)  # 117 MiB
    memory = 72 << 20
    out = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path), str(memory)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "2"},
    )
    assert int(out.stdout) <= 1.3 * memory


def test_the_index_needs_neither_torch_nor_the_other_rooms(tmp_path):
    code = (
        "import sys, numpy as np, hasten.retrieve as hr\n"
        "rows = np.random.default_rng(0).normal(size=(300, 4)).astype('f4')\n"
        f"i = hr.Spann.build(rows, {str(tmp_path / 'index')!r})\n"
        "i.search(np.zeros((1, 4), 'f4'), 3); i.verify(); i.close()\n"
        "heavy = ('torch', 'matplotlib', 'ray', 'h5py', 'pyarrow', 'uvicorn')\n"
        "bad = [m for m in sys.modules if m.split('.')[0] in heavy]\n"
        "bad += [m for m in sys.modules if m.startswith(('hasten.language', 'hasten.serve', 'hasten.nn'))]\n"
        "print(sorted(bad))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_crowded_lists_take_no_third_copies(tmp_path):
    rows, _ = hr.clustered(4000, 16)
    spread = []
    for crowding in (0.0, 1.5):
        with hr.Spann.build(rows, tmp_path / str(crowding), crowding=crowding, threads=1) as index:
            assert index.verify().num_missing == 0
            spread.append(index.describe()["built"]["list_spread"])
    assert spread[1] < spread[0]
    with pytest.raises(ConfigurationError, match="crowding is -1"):
        BuildOptions(crowding=-1)


def test_far_copies_do_not_switch_pruning_off(tmp_path):
    rows, queries = hr.clustered(4000, 16, 60)
    floors, lists = [], []
    for name, epsilon in (("near", 0.3), ("far", 10.0)):
        with hr.Spann.build(rows, tmp_path / name, epsilon=epsilon, crowding=0.0) as index:
            floors.append(index._view.floor)
            lists.append(index.search(queries, 5, lists=64, epsilon=0.1).stats.lists.mean())
    assert floors[0] == floors[1]  # the heads are the same
    assert lists[0] == lists[1] < 40
