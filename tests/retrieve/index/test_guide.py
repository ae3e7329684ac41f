import numpy as np
import pytest

from hasten.retrieve.index.guide import code_query, make_guide, query_lanes
from hasten.retrieve.index.hit import SearchOptions
from hasten.retrieve.index.metric import L2, lanes
from hasten.retrieve.index.spann import Spann
from hasten.retrieve.index.synthetic import clustered
from hasten.retrieve.index.tune import recall_of

NO_SEEDS = (np.zeros(0, np.int32), np.zeros(0, np.int32), np.zeros(1, np.int32))


def test_bytes_are_their_own_codes():
    heads = np.random.default_rng(0).integers(0, 256, (100, 7), dtype=np.uint8)
    guide = make_guide(heads, np.zeros((100, 4), np.int32), NO_SEEDS, L2, 0.0)
    assert guide[0] is heads
    assert guide[4] == 1


def test_heads_that_bytes_cannot_tell_apart_have_no_guide():
    rng = np.random.default_rng(0)
    heads = rng.normal(size=(200, 8)).astype(np.float32)
    graph = (np.arange(200)[:, None] + 1) % 200
    assert len(make_guide(heads, graph.astype(np.int32), NO_SEEDS, L2, 0.0)[0]) == 200
    heads[0] = 1e6  # one outlier takes the whole range
    assert len(make_guide(heads, graph.astype(np.int32), NO_SEEDS, L2, 0.0)[0]) == 0


def test_a_whole_query_is_known_as_such():
    out = np.zeros(query_lanes(5), np.int16)
    low, one = np.zeros(5, np.float32), np.float32(1)
    query = np.zeros(lanes(5), np.float32)
    query[:5] = [0, 255, 3, 4, 5]
    assert code_query(query, low, one, out)
    assert out[:5].tolist() == [0, 255, 3, 4, 5]
    query[0] = 0.5
    assert not code_query(query, low, one, out)
    query[0] = 1e9
    code_query(query, low, one, out)
    assert 5 * (int(out[0]) - 0) ** 2 < 1 << 31


@pytest.mark.parametrize("dtype", ["float32", "int8", "uint8"])
def test_the_walk_by_bytes_finds_as_much(tmp_path, dtype):
    rows, queries = clustered(4000, 24, 100, seed=4, dtype=np.dtype(dtype))
    with Spann.build(rows, tmp_path / "a") as index:
        assert len(index._view.heads[5][0])
        truth = index.exact(queries, 10).ids
        options = SearchOptions(lists=10, beam=24)
        guided = index.search(queries, 10, options=options)
        g = index._generation
        least = 16 * len(g.counts) + sum(a.nbytes for a in g.groups) + sum(a.nbytes for a in g.seeds[:3:2])
    with Spann.open(tmp_path / "a", memory=least, read_only=True) as index:  # all from the map
        assert not len(index._view.heads[5][0]) or dtype == "uint8"
        plain = index.search(queries, 10, options=options)
        assert index.memory()["heads"] == 0
    assert recall_of(guided.ids, truth) > recall_of(plain.ids, truth) - 0.01
    if dtype != "float32":  # whole numbers: not even the last digit differs
        np.testing.assert_array_equal(guided.ids, plain.ids)


def test_the_guide_comes_before_the_heads(tmp_path):
    rows, queries = clustered(3000, 32, 20, seed=4)
    Spann.build(rows, tmp_path / "a").close()
    with Spann.open(tmp_path / "a", read_only=True) as whole:
        parts = whole.memory()
        wanted = whole.search(queries, 5, lists=4)
    spare = parts["total"] - parts["heads"] + 5000
    with Spann.open(tmp_path / "a", memory=spare, read_only=True) as index:
        told = index.memory()
        assert told["heads"] == 0
        assert told["guide"] == parts["guide"]
        np.testing.assert_array_equal(index.search(queries, 5, lists=4).ids, wanted.ids)
