"""Searching is exact when everything is read, prunes as the rule says, and costs what it reports."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import hasten.retrieve as hr
from hasten.clock import ManualClock
from hasten.errors import ConfigurationError, DataError, InvalidRequestError
from hasten.retrieve.index.spann import Spann
from hasten.retrieve.index.tune import recall_of
from hasten.testing.disk import SlowReader


@pytest.mark.parametrize("metric", ["l2", "cosine", "ip"])
@pytest.mark.parametrize("dtype", ["float32", "uint8"])
def test_reading_everything_is_exact(metric, dtype, tmp_path, twin):
    rows, queries = hr.clustered(1500, 13, 500, dtype=dtype)
    with hr.Spann.build(rows, tmp_path / "index", metric=metric) as index:
        assert twin.same(index.search(queries, 10, lists=None), rows, queries, metric, 10)


@pytest.mark.slow
@pytest.mark.parametrize("metric", ["l2", "cosine", "ip"])
@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_the_other_dtypes_are_exact_too(metric, dtype, tmp_path, twin):
    rows, queries = hr.clustered(1200, 21, 50, dtype=np.float32 if dtype == "float16" else dtype)
    rows = rows.astype(dtype)
    with hr.Spann.build(rows, tmp_path / "index", metric=metric) as index:
        assert twin.same(index.search(queries, 10, lists=None), rows, queries, metric, 10)
        assert index.get([3]).dtype == np.dtype(dtype)
        np.testing.assert_array_equal(index.get([3, 700]), rows[[3, 700]])


def test_more_lists_find_more(index, collection, twin):
    _, queries = collection
    truth, _ = twin.brute(*collection, "l2", 10)
    recalls = [recall_of(index.search(queries, 10, lists=m, beam=64).ids, truth) for m in (1, 4, 16)]
    assert recalls == sorted(recalls)
    assert recalls[-1] > 0.97


@settings(max_examples=25, deadline=None)
@given(
    lists=st.integers(1, 24),
    epsilon=st.sampled_from([0.05, 0.3, 1.0, 7.0]),
    seed=st.integers(0, 10_000),
    k=st.integers(1, 12),
)
def test_the_kernel_follows_the_pruning_rule(built, lists, epsilon, seed, k):
    """The slow twin: nearest heads by brute force, the rule in words, every kept row scored in numpy."""
    from hasten.retrieve.index.format import read_list

    query = np.random.default_rng(seed).normal(size=(1, 12)).astype(np.float32)
    with hr.Spann.open(built, read_only=True) as index:
        g = index._view.generation
        hit = index.search(query, k, lists=lists, epsilon=epsilon, beam=len(g.counts))
        distance = ((g.heads - query) ** 2).sum(1)
        order = np.argsort(distance, kind="stable")
        reach = (1 + epsilon) ** 2 * max(distance[order[0]], index._view.floor)
        kept = [h for h in order if distance[h] <= reach and g.counts[h] > 0][:lists]
        candidates = {int(r): float(d) for r, d in zip(g.head_rows, distance, strict=True)}
        for h in kept:
            rows, numbers = read_list(g, int(h))
            candidates.update(zip(numbers.tolist(), ((rows - query) ** 2).sum(1).tolist(), strict=True))
        wanted = sorted(candidates.values())[:k]
        np.testing.assert_allclose(hit.distances[0], np.sqrt(wanted), rtol=1e-4, atol=1e-5)
        assert hit.stats.lists[0] == len(kept)


def test_a_query_that_equals_a_head_keeps_its_neighbours(index, collection):
    g = index._view.generation
    heads = g.head_rows[:50]
    hit = index.search(collection[0][heads], 5, lists=16, epsilon=0.6)
    assert (hit.ids[:, 0] == heads).all()
    assert (hit.stats.lists > 1).mean() > 0.9  # a head that lies alone has no neighbours to keep


def test_the_radius_rule_loses_nothing(index, collection):
    _, queries = collection
    plain = index.search(queries, 10, options=hr.SearchOptions(lists=24))
    ruled = index.search(queries, 10, options=hr.SearchOptions(lists=24, radius_rule=True))
    np.testing.assert_allclose(plain.distances, ruled.distances, rtol=1e-5)
    assert ruled.stats.lists.sum() <= plain.stats.lists.sum()


@pytest.mark.parametrize("io", ["pread", "direct"])
def test_reads_and_the_map_agree(built, collection, io, tmp_path):
    _, queries = collection
    with hr.Spann.open(built, read_only=True) as mapped:
        wanted = mapped.search(queries, 10, lists=12)
        everything = mapped.search(queries[:3], 10, lists=None)
    try:
        opened = hr.Spann.open(built, io=io, read_only=True, queue_depth=4)
    except DataError as error:
        if io == "direct" and "Invalid argument" in str(error):
            pytest.skip("this file system has no O_DIRECT")
        raise
    with opened as index:
        hit = index.search(queries, 10, lists=12)
        np.testing.assert_array_equal(hit.ids, wanted.ids)
        np.testing.assert_array_equal(hit.stats.lists, wanted.stats.lists)
        np.testing.assert_array_equal(hit.stats.reads, wanted.stats.reads)
        assert hit.complete
        np.testing.assert_array_equal(index.search(queries[:3], 10, lists=None).ids, everything.ids)


def test_threads_and_batches_agree(index, collection):
    _, queries = collection
    alone = np.concatenate([index.search(q, 7).ids for q in queries])
    np.testing.assert_array_equal(index.search(queries, 7).ids, alone)
    np.testing.assert_array_equal(index.search(queries, 7, threads=3).ids, alone)


def test_heads_may_stay_in_the_map(built, collection):
    with hr.Spann.open(built, read_only=True) as copied:
        wanted = copied.search(collection[1], 10).ids
        g = copied._generation
        least = 16 * len(g.counts) + sum(a.nbytes for a in g.groups) + sum(a.nbytes for a in g.seeds[:3:2])
        assert copied.memory()["heads"] == g.heads.nbytes
    with hr.Spann.open(built, read_only=True, memory=least) as mapped:
        told = mapped.memory()
        assert told["heads"] == told["graph"] == told["guide"] == 0
        assert told["total"] <= least
        np.testing.assert_array_equal(mapped.search(collection[1], 10).ids, wanted)
    with pytest.raises(ConfigurationError, match="takes at least"):
        hr.Spann.open(built, read_only=True, memory=least - 1)


def test_what_is_held_is_within_the_memory(built, collection):
    with hr.Spann.open(built, read_only=True) as copied:
        wanted, whole = copied.search(collection[1], 10).ids, copied.memory()["total"]
    held = []
    for share in (0.5, 0.7, 0.9, 1.0):
        with hr.Spann.open(built, read_only=True, memory=share * whole) as index:
            held.append(index.memory()["total"])
            assert held[-1] <= share * whole
            np.testing.assert_array_equal(index.search(collection[1], 10).ids, wanted)
    assert held == sorted(held)
    assert held[-1] == whole


@pytest.mark.parametrize("metric", ["l2", "cosine", "ip"])
def test_range_search_misses_nothing(metric, tmp_path, twin):
    rows, queries = hr.clustered(1000, 10, 20)
    with hr.Spann.build(rows, tmp_path / "index", metric=metric) as index:
        _, all_distances = twin.brute(rows, queries, metric, len(rows))
        radius = float((all_distances[:, 29].mean() + all_distances[:, 30].mean()) / 2)
        bounds, distances, ids = found = index.range_search(queries, radius)
        order, sorted_all = twin.brute(rows, queries, metric, len(rows))
        for q in range(len(queries)):
            near = np.abs(sorted_all[q] - radius) < 1e-5 * max(1, abs(radius))  # on the edge either is right
            wanted = set(order[q][(sorted_all[q] <= radius) & ~near].tolist())
            got = set(ids[bounds[q] : bounds[q + 1]].tolist())
            assert wanted <= got <= wanted | set(order[q][near].tolist())
            assert (np.diff(distances[bounds[q] : bounds[q + 1]]) >= 0).all()
        assert found.lists.mean() < len(index._view.generation.counts)


@pytest.mark.parametrize("io", ["mmap", "pread"])
def test_the_length_of_an_inner_product_query_changes_nothing(io, tmp_path):
    rows, queries = hr.clustered(2500, 12, 40, dtype=np.dtype("int8"))
    hr.Spann.build(rows, tmp_path / "a", metric="ip").close()
    with hr.Spann.open(tmp_path / "a", io=io, read_only=True) as index:
        long, truth = index.search(queries, 10, lists=4), index.exact(queries, 10)
        short = index.search(queries.astype(np.float32) * 2.0**-12, 10, lists=4)
        np.testing.assert_array_equal(short.ids, long.ids)
        np.testing.assert_array_equal(short.distances, long.distances * np.float32(2.0**-12))
        np.testing.assert_array_equal(short.stats.lists, long.stats.lists)
        assert recall_of(short.ids, truth.ids) > 0.7
        zero = index.search(np.zeros((1, 12)), 10)  # all products are equal
        assert (zero.distances == 0).all()
        assert (zero.ids >= 0).all()


def test_reading_everything_says_what_was_read(index, collection):
    told = index.search(collection[1][:2], 5, lists=None).stats
    generation = index._view.generation
    assert (told.bytes >= generation.counts.sum() * generation.row_bytes).all()
    assert (told.reads == 1).all()  # lists lie one behind the other


def test_range_search_grows_its_answer(index, collection):
    bounds, _, ids = index.range_search(collection[1][:1], 1e6)
    assert bounds.tolist() == [0, 2000]
    assert sorted(ids.tolist()) == list(range(2000))


# --- filters ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.5, 0.05, 0.005])
def test_filters_by_ids_and_by_attributes(share, tmp_path, monkeypatch, twin):
    monkeypatch.setattr("hasten.retrieve.index.spann.BRUTE_ROWS", 50)  # so that the wider ones go through the lists
    rows, queries = hr.clustered(4000, 8, 40)
    value = np.random.default_rng(3).random(4000)
    allowed = np.flatnonzero(value < share)
    with hr.Spann.build(rows, tmp_path / "index", attributes={"value": value}) as index:
        for where in (allowed, {"value": {"max": float(np.nextafter(share, 0))}}, lambda c: c["value"] < share):
            hit = index.search(queries, 10, where=where)
            assert np.isin(hit.ids, allowed).all()
            truth, _ = twin.brute(rows[allowed], queries, "l2", 10)
            assert recall_of(hit.ids, allowed[truth]) >= 0.9


def test_a_narrow_filter_is_exact_and_reads_no_list(index, collection, twin):
    rows, queries = collection
    allowed = np.arange(0, 2000, 100)
    hit = index.search(queries, 5, where=allowed)
    assert twin.same(hit, rows[allowed], queries, "l2", 5, names=allowed)
    assert hit.stats.lists.sum() == 0


def test_a_filter_that_leaves_too_few_gives_what_there_is(index, collection):
    hit = index.search(collection[1][:1], 5, where=[3, 8])
    assert sorted(hit.ids[0][:2].tolist()) == [3, 8]
    assert hit.ids[0][2:].tolist() == [-1] * 3
    assert np.isinf(hit.distances[0][2:]).all()
    assert (index.search(collection[1][:1], 5, where=[]).ids == -1).all()


# --- deadlines -------------------------------------------------------------------------------------------------------


def test_a_deadline_cuts_lists_and_says_so(built, collection):
    clock = ManualClock()
    delay = 1e-4
    index = Spann.open(built, read_only=True, clock=clock)
    index._wrap = lambda inner: SlowReader(inner, clock, delay)
    index._install(index._generation)
    with index:
        took, whole = [], []
        for query in collection[1]:
            begin = clock.now()
            hit = index.search(query, 10, lists=20, epsilon=100.0, deadline="1ms")
            took.append(clock.now() - begin)
            whole.append(hit.complete)
            assert hit.stats.lists[0] <= 20
        longest_read = 20 * delay  # neighbours may be merged into one read
        assert np.percentile(took, 99) <= 1e-3 + longest_read
        assert not any(whole)
        assert index.search(collection[1][0], 10, lists=4, deadline="1s").complete


def test_without_time_the_heads_still_answer(built, collection):
    with hr.Spann.open(built, read_only=True, clock=ManualClock()) as index:
        hit = index.search(collection[1][:2], 3, deadline=0.0)
        assert not hit.stats.complete.any()
        assert (hit.ids >= 0).all()


# --- what cannot be meant --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"k": 0}, "k is 0"),
        ({"k": 2001}, "2000 rows"),
        ({"queries": np.zeros((2, 5), np.float32)}, "shape"),
        ({"queries": np.full((2, 12), np.nan, np.float32)}, "query 0"),
        ({"queries": [["a"] * 12]}, "numbers"),
        ({"where": {"colour": "red"}}, "colour"),
        ({"where": np.array([0.5])}, "ids"),
        ({"where": lambda c: np.ones(3, bool)}, "2000"),
    ],
)
def test_bad_requests_are_one_line(index, change, word):
    given = {"queries": np.zeros((1, 12), np.float32), "k": 3} | change
    with pytest.raises(InvalidRequestError, match=word) as told:
        index.search(given.pop("queries"), **given)
    assert "\n" not in str(told.value)


def test_knobs_have_bounds():
    for bad in ({"lists": -1}, {"epsilon": -0.1}, {"beam": 0}, {"max_check": 0}, {"epsilon": float("nan")}):
        with pytest.raises(ConfigurationError):
            hr.SearchOptions(**bad)


def test_integers_are_fine_as_queries(index, collection):
    assert index.search(np.ones((1, 12), np.int64), 1).ids.shape == (1, 1)


def test_saved_options_come_back(index, tmp_path):
    index.save_options(hr.SearchOptions(lists=5, beam=33))
    index.close()
    with hr.Spann.open(tmp_path / "index") as again:
        assert again.options == hr.SearchOptions(lists=5, beam=33)


def test_one_row(tmp_path):
    with hr.Spann.build(np.ones((1, 3), np.float32), tmp_path / "one") as index:
        assert index.search(np.zeros((1, 3), np.float32), 1).ids.tolist() == [[0]]


def test_equal_rows(tmp_path):
    with hr.Spann.build(np.ones((700, 4), np.float32), tmp_path / "same") as index:
        assert index.verify().good
        hit = index.search(np.ones((1, 4), np.float32), 50, lists=None)
        assert len(set(hit.ids[0].tolist())) == 50
