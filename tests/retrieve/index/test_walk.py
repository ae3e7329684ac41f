"""The walk over the heads, against brute force."""

import numpy as np
import pytest

import hasten.retrieve as hr
from hasten.retrieve.index.metric import mapped, prepare
from hasten.retrieve.index.walk import LANES, marks, walk_many

METRICS = {"l2": 0, "cosine": 1, "ip": 2}


def walk(prepared, heads, graph, beam, *, metric=0, most=1 << 30, state=None):
    """What the walk finds for each query: distances and heads (queries, beam), how many, and how many it looked at.

    ``prepared`` of :func:`prepare`; ``graph`` of the fixture ``linked``; ``state``: marks to go on with.
    """
    extra, edges, seeds, _ = graph
    count = len(prepared[0])
    out = np.empty((count, beam), np.float32), np.empty((count, beam), np.int32)
    told = np.zeros(count, np.int64), np.zeros(count, np.int64)
    state = marks(len(heads), edges.shape[1]) if state is None else state
    walk_many(*prepared, heads, extra, edges, seeds, metric, beam, most, state, *out, *told)
    return (*out, *told)


@pytest.mark.parametrize("metric", METRICS)
def test_the_walk_finds_the_nearest_heads(linked, squares, metric):
    heads, queries = hr.clustered(2500, 10, 100)
    code = METRICS[metric]
    graph = linked(heads, code)
    prepared = prepare(queries, code, graph[3])
    pool_d, pool_i, _, checks = walk(prepared, heads, graph, 64, metric=code)
    rows = mapped(heads, code, graph[3])
    asked = prepared[0][:, : rows.shape[1]].copy()
    if code == 2:
        asked[:, -1] = 0
    true = squares(asked, rows)
    np.testing.assert_allclose(pool_d, np.take_along_axis(true, pool_i, 1), rtol=1e-3, atol=1e-3)
    assert (np.diff(pool_d, axis=1) >= 0).all()
    nearest = np.argsort(true, axis=1)[:, :10]
    found = np.mean([len(set(a) & set(b[:10].tolist())) / 10 for a, b in zip(nearest.tolist(), pool_i, strict=True)])
    assert found > 0.97
    assert checks.max() < 2500
    assert all(len(set(row.tolist())) == 64 for row in pool_i)


def test_max_check_bounds_the_walk(linked):
    heads, queries = hr.clustered(2000, 10, 20)
    graph = linked(heads)
    checks = walk(prepare(queries, 0, 0.0), heads, graph, 64, most=150)[3]
    assert checks.max() <= 150 + graph[1].shape[1]


def test_marks_survive_their_wrap(linked):
    heads, queries = hr.clustered(300, 6, 1)
    graph, prepared, state = linked(heads), prepare(queries, 0, 0.0), marks(300, 16)
    answers = []
    for start in (0, 251, 252, 253):
        state[1][:] = start
        answers += [walk(prepared, heads, graph, 16, state=state)[1] for _ in range(3)]
    assert all(np.array_equal(a, answers[0]) for a in answers)


@pytest.mark.parametrize("beam", [5, 16, 40])
def test_queries_that_walk_in_turns_find_what_each_finds_alone(linked, beam):
    heads, queries = hr.clustered(1500, 9, 4 * LANES + 3)
    graph, prepared, state = linked(heads), prepare(queries, 0, 0.0), marks(1500, 16)

    def walked(cut):
        return walk([part[cut] for part in prepared], heads, graph, beam, state=state)

    together = walked(slice(None))
    alone = [np.concatenate(x) for x in zip(*(walked(slice(q, q + 1)) for q in range(len(queries))), strict=True)]
    for one, other in zip(together, alone, strict=True):
        np.testing.assert_array_equal(one, other)


def test_few_heads_are_all_found(linked):
    heads = np.random.default_rng(0).normal(size=(7, 5)).astype(np.float32)
    _, found, sizes, _ = walk(prepare(heads, 0, 0.0), heads, linked(heads), 20)
    assert (sizes == 7).all()
    assert (found[:, 0] == np.arange(7)).all()
    assert all(sorted(row[:7].tolist()) == list(range(7)) for row in found)
