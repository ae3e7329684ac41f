"""Shards: the same answers as one index, less work than asking all, and a lost machine is told."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import hasten.retrieve as hr
from hasten.errors import ConfigurationError, DataError, InvalidRequestError
from hasten.retrieve.index.build import BuildOptions
from hasten.retrieve.index.shards import LocalTransport, RayTransport, Shards, pack
from hasten.retrieve.index.tune import recall_of

EXACT = hr.SearchOptions(lists=None)


@pytest.fixture(scope="module")
def rows():
    return hr.clustered(3000, 10, 60)


@pytest.fixture(scope="module")
def place(rows, tmp_path_factory):
    path = tmp_path_factory.mktemp("shards") / "all"
    Shards.build(rows[0], path, machines=3).close()
    return path


class Losing(LocalTransport):
    """A machine that does not answer."""

    def __init__(self, machine):
        self.machine = machine

    def search(self, machine, jobs, k, options):
        if machine == self.machine:
            raise ConnectionError("no route")
        return super().search(machine, jobs, k, options)


def test_asking_every_part_is_exact(place, rows, twin):
    shards = Shards(place)
    hit = shards.search(rows[1], 10, epsilon=1e9, options=EXACT)
    assert twin.same(hit, *rows, "l2", 10)
    assert (hit.machines == 3).all()
    shards.close()


def test_pruning_asks_fewer_machines(place, rows, twin):
    shards = Shards(place)
    truth, _ = twin.brute(*rows, "l2", 10)
    hit = shards.search(rows[1], 10, epsilon=0.15, options=EXACT)
    assert hit.complete.all()
    assert hit.parts.mean() < 12
    everything = shards.search(rows[1], 10, epsilon=1e9, options=EXACT)
    assert recall_of(hit.ids, truth) > 0.8
    assert recall_of(everything.ids, truth) == pytest.approx(1.0, abs=0.01)
    assert shards.load.sum() == hit.parts.sum() + everything.parts.sum()
    shards.close()


@pytest.mark.parametrize("metric", ["cosine", "ip"])
def test_other_metrics(metric, rows, tmp_path, twin):
    shards = Shards.build(rows[0], tmp_path / "all", machines=2, options=BuildOptions(metric=metric))
    assert twin.same(shards.search(rows[1], 5, epsilon=1e9, options=EXACT), *rows, metric, 5)
    shards.close()


def test_a_lost_machine_is_told(place, rows):
    shards = Shards(place, Losing(1))
    hit = shards.search(rows[1], 5, epsilon=0.1, options=EXACT)
    assert hit.lost == (1,)
    assert 0 < (~hit.complete).sum() < len(hit.complete)  # those that did not need it are whole
    whole = Shards(place)
    wanted = whole.search(rows[1], 5, epsilon=0.1, options=EXACT)
    np.testing.assert_array_equal(hit.ids[hit.complete], wanted.ids[hit.complete])
    whole.close()
    shards.close()


@pytest.mark.parametrize(
    ("change", "word"),
    [({"queries": np.zeros((1, 3))}, "shape"), ({"queries": np.full((1, 10), np.nan)}, "NaN"), ({"k": 0}, "k is 0")],
)
def test_a_bad_request_is_no_lost_machine(change, word, place, rows):
    shards = Shards(place)
    with pytest.raises(InvalidRequestError, match=word):
        shards.search(**{"queries": rows[1], "k": 3, **change})
    shards.close()


def test_rebalancing_follows_the_load(place, rows):
    shards = Shards(place)
    loads = np.ones(len(shards.rows))
    loads[3] = 100
    shards.rebalance(loads)
    hot = shards.machine_of[3]
    assert sum(m == hot for m in shards.machine_of) == 1  # the hot part has a machine to itself
    assert shards.search(rows[1], 2, epsilon=1e9).lost == ()  # what runs is as it was
    shards.close()
    again = Shards(place)
    assert again.machine_of == shards.machine_of
    again.search(rows[1][:3], 2)
    again.close()


@given(loads=st.lists(st.floats(0, 100), min_size=1, max_size=30), machines=st.integers(1, 6))
def test_packing_is_within_one_part_of_even(loads, machines):
    out = pack(loads, machines)
    totals = [sum(w for w, m in zip(loads, out, strict=True) if m == i) for i in range(machines)]
    assert max(totals) - min(totals) <= max(loads) + 1e-9


def test_overlap_keeps_rows_of_the_border_twice(rows, tmp_path):
    alone = Shards.build(rows[0], tmp_path / "a", machines=2, overlap=0.0)
    both = Shards.build(rows[0], tmp_path / "b", machines=2, overlap=0.2)
    assert sum(alone.rows) == 3000
    assert 3000 < sum(both.rows) <= 6000
    alone.close()
    both.close()


def test_what_cannot_be_sharded(rows, tmp_path):
    with pytest.raises(ConfigurationError, match="too few"):
        Shards.build(rows[0][:20], tmp_path / "x", machines=4)
    with pytest.raises(DataError, match="no shards"):
        Shards(tmp_path)
    with pytest.raises(ConfigurationError, match="at least 1"):
        pack([1.0], 0)
    with pytest.raises(DataError, match="row 1 has the id 7"):
        Shards.build(rows[0][:40], tmp_path / "x", machines=1, ids=np.full(40, 7))
    assert list(tmp_path.iterdir()) == []


def test_shards_of_an_iterable_with_ids(rows, tmp_path):
    names = np.arange(400)[::-1] + 1000
    blocks = (rows[0][b : b + 100] for b in range(0, 400, 100))
    shards = Shards.build(blocks, tmp_path / "all", machines=1, ids=names)
    assert shards.search(rows[0][[3, 399]], 1, epsilon=1e9).ids[:, 0].tolist() == [names[3], names[399]]
    shards.close()


@pytest.mark.slow
def test_ray_actors_answer_and_a_killed_one_is_told(place, rows):
    ray = pytest.importorskip("ray")
    ray.init(num_cpus=3, include_dashboard=False, log_to_driver=False)
    try:
        local, shards = Shards(place), Shards(place, RayTransport(timeout=60))
        wanted = local.search(rows[1], 5, epsilon=0.2)
        np.testing.assert_array_equal(shards.search(rows[1], 5, epsilon=0.2).ids, wanted.ids)
        ray.kill(shards._transport.actors[0])
        hit = shards.search(rows[1], 5, epsilon=1e9)
        assert hit.lost == (0,)
        assert not hit.complete.any()
        assert (hit.ids >= 0).all()
        shards.close()
        local.close()
    finally:
        ray.shutdown()


def test_without_ray_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    with pytest.raises(ImportError, match=r"hasten\[ray\]"):
        RayTransport()
