import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hasten.retrieve.index import format as files
from hasten.retrieve.index.codes import code_bytes, encode
from hasten.retrieve.index.hit import SearchOptions
from hasten.retrieve.index.spann import Spann
from hasten.retrieve.index.synthetic import clustered


@settings(max_examples=30, deadline=None)
@given(count=st.integers(1, 40), width=st.integers(1, 50), seed=st.integers(0, 1000), spread=st.floats(0, 1e4))
def test_every_row_is_within_the_error_of_its_code(count, width, seed, spread):
    rng = np.random.default_rng(seed)
    centre = rng.normal(size=(1, width)).astype(np.float32)
    rows = (centre + spread * rng.normal(size=(count, width))).astype(np.float32)
    size = int(code_bytes(count, width))
    out = np.zeros(size, np.uint8)
    encode(rows, centre, np.array([0, count]), np.array([0]), out)
    step, error, far = out[:12].view(np.float32)
    steps = (width + 3) // 4
    for r in range(count):
        block = out[64 + r // 16 * (64 + 64 * steps) :]
        norm = block[:64].view(np.float32)[r % 16]
        codes = block[64 : 64 + 64 * steps].reshape(steps, 16, 4)[:, r % 16].reshape(-1)[:width]
        back = step * (codes.astype(np.float64) - 128)
        assert np.linalg.norm(rows[r].astype(np.float64) - centre[0] - back) <= error * (1 + 1e-6) + 1e-30
        assert norm == pytest.approx((back**2).sum(), rel=1e-5, abs=1e-30)
        assert np.sqrt(norm) <= far * (1 + 1e-6)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("metric", ["l2", "cosine", "ip"])
def test_codes_change_no_answer(tmp_path, metric, dtype):
    rows, queries = clustered(3000, 20, 60, seed=3)
    rows, queries = (rows + 0.5).astype(dtype), (queries + 0.5).astype(np.float32)
    plain = Spann.build(rows, tmp_path / "plain", metric=metric, codes=False)
    coded = Spann.build(rows, tmp_path / "coded", metric=metric)
    assert plain._generation.coded == 0
    assert coded._generation.coded == 1
    allowed = np.arange(0, 3000, 2)[:-1].repeat(1)
    for lists in (1, 4, 30):
        for k in (1, 10):
            options = SearchOptions(lists=lists, beam=40)
            a, b = (index.search(queries, k, options=options) for index in (plain, coded))
            np.testing.assert_array_equal(a.ids, b.ids)
            np.testing.assert_array_equal(a.distances, b.distances)
            np.testing.assert_array_equal(a.stats.lists, b.stats.lists)
            np.testing.assert_array_equal(a.stats.bytes, b.stats.bytes)
    for index in (plain, coded):
        index.delete(range(0, 400, 3))
    rare = np.r_[allowed, np.arange(1, 3000, 2)][:5000]
    for where in (None, rare):
        a, b = (index.search(queries, 5, lists=6, where=where) for index in (plain, coded))
        np.testing.assert_array_equal(a.ids, b.ids)
    for index in (plain, coded):
        index.close()


def test_one_query_alone_and_in_a_batch(tmp_path):
    rows, queries = clustered(2500, 32, 40, seed=5)
    with Spann.build(rows, tmp_path / "a") as index:
        batch = index.search(queries, 10, lists=6)
        for q in range(40):
            alone = index.search(queries[q], 10, lists=6)
            np.testing.assert_array_equal(alone.ids[0], batch.ids[q])
        again = index.search(queries[::-1], 10, lists=6, threads=2)
        np.testing.assert_array_equal(again.ids[::-1], batch.ids)


def test_without_codes_the_format_is_the_older_one(tmp_path):
    rows, queries = clustered(600, 8, 5)
    for name, codes, version in (("old", False, 1), ("new", True, 2)):
        Spann.build(rows, tmp_path / name, codes=codes).close()
        body = json.loads((tmp_path / name / files.MANIFEST).read_text())
        assert body["format"] == version
    with Spann.open(tmp_path / "old") as index:
        index.add([5000, 5001], queries[:2])
        index.compact(everything=True)
        assert index._generation.coded == 0
        assert index.verify().good


def test_codes_follow_a_compaction(tmp_path):
    rows, queries = clustered(1500, 16, 200, seed=2)
    with Spann.build(rows, tmp_path / "a", list_bytes="4KiB") as index:
        index.add(np.arange(5000, 5200), queries)
        index.delete(range(0, 1500, 4))
        index.compact()
        assert index._generation.coded == 1
        assert index.verify().good
        hit = index.search(queries, 5, lists=len(index._generation.counts) - 1, beam=len(index._generation.counts))
        np.testing.assert_array_equal(hit.ids, index.exact(queries, 5).ids)


def test_a_rotten_code_is_found(tmp_path):
    rows, _ = clustered(1000, 16, seed=2)
    Spann.build(rows, tmp_path / "a").close()
    with Spann.open(tmp_path / "a") as index:
        entry = index._generation.directory[int(np.argmax(index._generation.counts))]
        place = int(entry["offset"]) + int(entry["bytes"]) - 1
        name = index._generation.manifest.segments[0]
    raw = bytearray((tmp_path / "a" / name).read_bytes())
    raw[place] ^= 1
    (tmp_path / "a" / name).write_bytes(raw)
    with Spann.open(tmp_path / "a") as index:
        assert len(index.verify().corrupt) == 1
        assert index.repair(rows)["restored"] >= 0
        assert index.verify().good
        assert index._generation.coded == 1
