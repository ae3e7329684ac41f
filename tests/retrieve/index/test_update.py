"""Adding, replacing, deleting and compacting, against a dictionary."""

import shutil
import tempfile
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

import hasten.retrieve as hr
from hasten.clock import ManualClock
from hasten.errors import DataError

WIDTH = 6


class AgainstADictionary(RuleBasedStateMachine):
    """After any calls and any reopening, searching everything is brute force over the live rows."""

    metric = "l2"

    @initialize(seed=st.integers(0, 1000))
    def build(self, seed):
        self.rng = np.random.default_rng(seed)
        self.folder = Path(tempfile.mkdtemp())
        rows = self.draw(60)
        self.live = dict(enumerate(rows))
        self.index = hr.Spann.build(rows, self.folder / "index", metric=self.metric, list_bytes="4KiB", replicas=3)
        self.next = 1000

    def draw(self, count):
        return self.rng.normal(size=(count, WIDTH)).astype(np.float32)

    @rule(count=st.integers(1, 40))
    def add(self, count):
        rows = self.draw(count)
        ids = np.arange(self.next, self.next + count)
        self.next += count
        self.index.add(ids, rows)
        self.live.update(zip(ids.tolist(), rows, strict=True))

    @rule(count=st.integers(1, 200))
    def add_near_each_other(self, count):
        """Many rows at one place: the list must be split."""
        rows = (self.draw(1) + 0.01 * self.draw(count)).astype(np.float32)
        ids = np.arange(self.next, self.next + count)
        self.next += count
        self.index.add(ids, rows)
        self.live.update(zip(ids.tolist(), rows, strict=True))

    @rule(count=st.integers(1, 10))
    def replace(self, count):
        known = sorted(self.live)
        ids = np.unique(self.rng.choice([*known, self.next], count))
        self.next += 1
        rows = self.draw(len(ids))
        self.index.upsert(ids, rows)
        self.live.update(zip(ids.tolist(), rows, strict=True))

    @rule(share=st.sampled_from([0.05, 0.5, 0.9]))
    def delete(self, share):
        doomed = [i for i in sorted(self.live) if self.rng.random() < share]
        if len(doomed) == len(self.live):
            doomed = doomed[1:]
        assert self.index.delete([*doomed, 10**9]) == len(doomed)
        for name in doomed:
            del self.live[name]

    @rule(everything=st.booleans())
    def compact(self, everything):
        self.index.compact(everything=everything)
        found = self.index.verify()
        assert found.good, found
        counts = self.index._view.generation.counts
        assert counts.max(initial=0) <= 4096

    @rule()
    def reopen(self):
        self.index.close()
        self.index = hr.Spann.open(self.folder / "index")

    @invariant()
    def answers_are_those_of_the_dictionary(self):
        if not hasattr(self, "index"):
            return
        ids, rows = np.array(sorted(self.live)), np.array([self.live[i] for i in sorted(self.live)])
        assert len(self.index) == len(ids)
        k = min(7, len(ids))
        queries = self.draw(3)
        hit = self.index.search(queries, k, lists=None)
        distance = np.sqrt(((queries[:, None] - rows[None]) ** 2).sum(-1))
        np.testing.assert_allclose(hit.distances, np.sort(distance, axis=1)[:, :k], rtol=1e-4, atol=1e-5)
        for q, names in enumerate(hit.ids):
            assert len(set(names.tolist())) == k
            own = distance[q, np.searchsorted(ids, names)]
            np.testing.assert_allclose(own, hit.distances[q], rtol=1e-4, atol=1e-5)
        some = self.rng.choice(ids, 3)
        near = self.index.search(queries[:1], 1, where=[*some.tolist(), 10**9]).ids[0]
        assert near[0] == min(some, key=lambda name: distance[0, np.searchsorted(ids, name)])
        np.testing.assert_array_equal(self.index.get(some), np.array([self.live[int(i)] for i in some]))
        assert -1 not in hit.ids

    def teardown(self):
        if hasattr(self, "index"):
            self.index.close()
            shutil.rmtree(self.folder)


TestAgainstADictionary = AgainstADictionary.TestCase
TestAgainstADictionary.settings = settings(
    max_examples=15, stateful_step_count=12, deadline=None, suppress_health_check=list(HealthCheck)
)


def test_added_rows_are_found_by_a_normal_search(index, collection):
    rows, queries = collection
    index.add(np.arange(5000, 5040), queries)
    hit = index.search(queries, 1, lists=8)
    assert hit.ids[:, 0].tolist() == list(range(5000, 5040))
    index.compact()
    again = index.search(queries, 1, lists=8)
    assert again.ids[:, 0].tolist() == list(range(5000, 5040))


@pytest.mark.parametrize("metric", ["cosine", "ip"])
def test_changes_under_other_metrics(metric, tmp_path, twin):
    rows, queries = hr.clustered(900, 9, 20)
    more = hr.clustered(300, 9, seed=5)[0] * 1.5  # longer than any row of the build
    with hr.Spann.build(rows, tmp_path / "index", metric=metric) as index:
        index.add(np.arange(900, 1200), more)
        index.delete(np.arange(0, 900, 3))
        keep = np.array([i for i in range(1200) if i >= 900 or i % 3])
        everything = np.concatenate([rows, more])[keep]
        assert twin.same(index.search(queries, 10, lists=None), everything, queries, metric, 10, names=keep)
        index.compact()
        assert index.verify().good
        assert twin.same(index.search(queries, 10, lists=None), everything, queries, metric, 10, names=keep)


def test_a_list_that_outgrew_its_limit_is_split(tmp_path):
    rows, _ = hr.clustered(1500, 8)
    with hr.Spann.build(rows, tmp_path / "index", list_bytes="4KiB") as index:
        limit = index.describe()["built"]["list_limit"]
        heads = index.describe()["heads"]
        centre = rows[:1]
        crowd = (centre + 0.05 * np.random.default_rng(0).normal(size=(6 * limit, 8))).astype(np.float32)
        index.add(np.arange(10_000, 10_000 + len(crowd)), crowd)
        report = index.compact()
        assert report["split"] >= 1
        assert index.describe()["heads"] > heads
        assert index._view.generation.counts.max() <= limit
        assert index.verify().good
        hit = index.search(crowd[:100], 1, lists=16)
        assert (hit.ids[:, 0] == np.arange(10_000, 10_100)).mean() > 0.95


def test_short_lists_are_merged_and_space_is_freed(index, collection):
    before = index.describe()["disk"]
    g = index._view.generation
    from hasten.retrieve.index.format import read_list

    target = int(np.argmax(g.counts))
    doomed = read_list(g, target)[1]
    index.delete(doomed[: len(doomed) - 1])
    report = index.compact()
    assert report["merged"] >= 1
    assert index.verify().good
    index.delete(np.arange(0, 2000, 2))
    index.compact(everything=True)
    assert index.describe()["disk"] < before


def test_few_changes_write_few_lists(index):
    lists = len(index._view.generation.counts)
    index.add([9000], np.zeros((1, 12), np.float32))
    report = index.compact()
    assert report["lists_written"] < lists / 4
    assert len(index._view.generation.segments) == 2


def test_writing_keeps_to_its_rate(index, collection):
    clock = ManualClock()
    index._clock = clock
    index.add(np.arange(9000, 9200), collection[0][:200])
    report = index.compact(rate=1e5)
    assert clock.now() == pytest.approx(report["bytes_written"] / 1e5, rel=0.1)


def test_searches_go_on_while_rows_come_and_go(index, collection):
    """Readers see only whole states: every id that was there all the time is found at each moment."""
    rows, _ = collection
    stop, wrong = threading.Event(), []

    def read():
        rng = np.random.default_rng(1)
        while not stop.is_set():
            place = rng.integers(0, 1000, 4)
            hit = index.search(rows[place], 1, lists=16, detail=False)
            if not np.array_equal(hit.ids[:, 0], place):
                wrong.append((place, hit.ids[:, 0]))

    readers = [threading.Thread(target=read) for _ in range(2)]
    for reader in readers:
        reader.start()
    for turn in range(6):
        ids = np.arange(10_000 + 100 * turn, 10_100 + 100 * turn)
        index.add(ids, rows[1000:1100] + np.float32(0.5 + turn))
        index.delete(ids[::2])
        index.upsert(ids[1::2], rows[1000:1050] - np.float32(0.5 + turn))
        if turn % 2:
            index.compact()
    stop.set()
    for reader in readers:
        reader.join()
    assert not wrong
    assert len(index) == 2000 + 300


def test_changes_during_a_compaction_are_kept(index, collection, monkeypatch):
    from hasten.retrieve.index import changes as module

    real = module.compact_generation

    def slow(*arguments, **named):
        out = real(*arguments, **named)
        index.add([7001], collection[1][:1])  # while the files of the next generation lie there
        index.delete([7000, 5])
        return out

    index.add([7000], collection[1][1:2])
    monkeypatch.setattr(module, "compact_generation", slow)
    index.compact()
    assert 7001 in index
    assert 7000 not in index
    assert 5 not in index
    folder = index._folder.path("")
    index.close()
    with hr.Spann.open(folder) as again:
        assert 7001 in again
        assert 7000 not in again
        assert 5 not in again
        assert len(again) == 2000


def test_compaction_in_the_background(built, tmp_path, collection):
    shutil.copytree(built, tmp_path / "index")
    with hr.Spann.open(tmp_path / "index", auto_compact=50) as index:
        index.add(np.arange(3000, 3060), collection[0][:60])
        index.wait()
        assert index.generation == 2
        assert index.describe()["added"] == 0


def test_what_fails_in_the_background_is_raised(index, monkeypatch):
    from hasten.retrieve.index import changes as module

    def broken(*arguments, **named):
        raise DataError("the disk is full")

    monkeypatch.setattr(module, "compact_generation", broken)
    index.compact_in_background()
    with pytest.raises(DataError, match="full"):
        index.wait()


@pytest.mark.parametrize(
    ("ids", "rows", "word"),
    [
        ([3], np.zeros((1, 12), np.float32), "id 3 exists"),
        ([3000, 3000], np.zeros((2, 12), np.float32), "twice"),
        ([-1], np.zeros((1, 12), np.float32), "negative"),
        ([3000], np.zeros((1, 5), np.float32), "shape"),
        ([3000], np.full((1, 12), np.inf, np.float32), "row 0"),
        ([0.5], np.zeros((1, 12), np.float32), "whole numbers"),
    ],
)
def test_bad_additions_change_nothing(index, ids, rows, word):
    with pytest.raises(DataError, match=word):
        index.add(ids, rows)
    assert len(index) == 2000
    assert index._log.size == 0


def test_rows_that_lose_by_conversion_are_refused(tmp_path):
    rows, _ = hr.clustered(400, 6, dtype=np.uint8)
    with hr.Spann.build(rows, tmp_path / "index") as index:
        with pytest.raises(DataError, match="uint8 without loss"):
            index.add([400], np.full((1, 6), 0.5))
        index.add([400], np.full((1, 6), 7.0))
        assert index.get([400]).tolist() == [[7] * 6]


def test_attributes_of_added_rows(tmp_path):
    rows, queries = hr.clustered(600, 6, 4)
    lang = np.array(["en", "de"])[np.arange(600) % 2]
    with hr.Spann.build(rows, tmp_path / "index", attributes={"lang": lang}) as index:
        index.add([600, 601], queries[:2], attributes={"lang": ["fr", "de"], "year": [2020, 2021]})
        for _ in range(2):
            assert index.search(queries[:1], 1, where={"lang": "fr"}).ids.tolist() == [[600]]
            assert index.search(queries[1:2], 1, where={"lang": "de", "year": {"min": 2021}}).ids.tolist() == [[601]]
            index.compact()
        index.close()
    with hr.Spann.open(tmp_path / "index") as index:
        assert index.search(queries[:1], 1, where={"lang": "fr"}).ids.tolist() == [[600]]


def test_one_writer_at_a_time(index):
    folder = index._folder.path("")
    with pytest.raises(DataError, match="read_only=True"):
        hr.Spann.open(folder)
    with hr.Spann.open(folder, read_only=True) as reader:
        assert len(reader) == 2000
        with pytest.raises(DataError, match="read-only"):
            reader.delete([1])


def test_ids_up_to_two_to_the_fortieth(tmp_path):
    rows, _ = hr.clustered(500, 6)
    ids = np.arange(500) * ((1 << 40) // 500)
    with hr.Spann.build(rows, tmp_path / "index", ids=ids) as index:
        assert index.search(rows[:20], 1).ids[:, 0].tolist() == ids[:20].tolist()
        index.add([(1 << 40) - 1], rows[:1] + 9)
        assert (1 << 40) - 1 in index
