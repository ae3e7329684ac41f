"""The walk over the heads, against brute force."""

import numpy as np
import pytest

import hasten.retrieve as hr
from hasten.retrieve.index.format import seed_arrays
from hasten.retrieve.index.heads import make_seeds
from hasten.retrieve.index.links import link_heads
from hasten.retrieve.index.metric import factors, mapped, prepare
from hasten.retrieve.index.walk import LANES, marks, walk_many

METRICS = {"l2": 0, "cosine": 1, "ip": 2}


def linked(heads, metric=0, degree=16, threads=1, alpha=1.0):
    largest = float(np.linalg.norm(heads, axis=1).max())
    extra = factors(heads, metric, largest)
    groups = make_seeds(mapped(heads, metric, largest))
    seeds = seed_arrays(heads, groups)
    graph = np.full((len(heads), degree), -1, np.int32)
    link_heads(
        heads,
        extra,
        graph,
        seeds,
        metric,
        largest,
        np.random.default_rng(0).permutation(len(heads)),
        alpha=alpha,
        threads=threads,
    )
    return extra, graph, seeds, largest


def squares(left, right):
    return ((left[:, None].astype(np.float64) - right[None]) ** 2).sum(-1)


@pytest.mark.parametrize("metric", METRICS)
def test_the_walk_finds_the_nearest_heads(metric):
    heads, queries = hr.clustered(2500, 10, 100)
    code = METRICS[metric]
    extra, graph, seeds, largest = linked(heads, code)
    prepared, consts, augs = prepare(queries, code, largest)
    pool_d, pool_i = np.empty((100, 64), np.float32), np.empty((100, 64), np.int32)
    sizes, checks = np.zeros(100, np.int64), np.zeros(100, np.int64)
    walk_many(
        prepared,
        consts,
        augs,
        heads,
        extra,
        graph,
        seeds,
        code,
        64,
        1 << 30,
        marks(2500, 16),
        pool_d,
        pool_i,
        sizes,
        checks,
    )
    rows = mapped(heads, code, largest)
    asked = prepared[:, : rows.shape[1]].copy()
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


def test_max_check_bounds_the_walk():
    heads, queries = hr.clustered(2000, 10, 20)
    extra, graph, seeds, _ = linked(heads)
    checks = np.zeros(20, np.int64)
    prepared, consts, augs = prepare(queries, 0, 0.0)
    walk_many(
        prepared,
        consts,
        augs,
        heads,
        extra,
        graph,
        seeds,
        0,
        64,
        150,
        marks(2000, 16),
        np.empty((20, 64), np.float32),
        np.empty((20, 64), np.int32),
        np.zeros(20, np.int64),
        checks,
    )
    assert checks.max() <= 150 + graph.shape[1]


def test_marks_survive_their_wrap():
    heads, queries = hr.clustered(300, 6, 1)
    extra, graph, seeds, _ = linked(heads)
    prepared, consts, augs = prepare(queries, 0, 0.0)
    state = marks(300, 16)
    answers = []
    for start in (0, 251, 252, 253):
        state[1][:] = start
        out = np.empty((1, 16), np.int32)
        for _ in range(3):
            walk_many(
                prepared,
                consts,
                augs,
                heads,
                extra,
                graph,
                seeds,
                0,
                16,
                1 << 30,
                state,
                np.empty((1, 16), np.float32),
                out,
                np.zeros(1, np.int64),
                np.zeros(1, np.int64),
            )
            answers.append(out.copy())
    assert all(np.array_equal(a, answers[0]) for a in answers)


@pytest.mark.parametrize("beam", [5, 16, 40])
def test_queries_that_walk_in_turns_find_what_each_finds_alone(beam):
    heads, queries = hr.clustered(1500, 9, 4 * LANES + 3)
    extra, graph, seeds, _ = linked(heads)
    prepared, consts, augs = prepare(queries, 0, 0.0)
    state = marks(1500, 16)

    def walked(cut):
        count = len(prepared[cut])
        out = np.empty((count, beam), np.float32), np.empty((count, beam), np.int32)
        told = np.zeros(count, np.int64), np.zeros(count, np.int64)
        walk_many(
            prepared[cut], consts[cut], augs[cut], heads, extra, graph, seeds, 0, beam, 1 << 30, state, *out, *told
        )
        return [*out, *told]

    together = walked(slice(None))
    alone = [np.concatenate(x) for x in zip(*(walked(slice(q, q + 1)) for q in range(len(queries))), strict=True)]
    for one, other in zip(together, alone, strict=True):
        np.testing.assert_array_equal(one, other)


def test_few_heads_are_all_found():
    heads = np.random.default_rng(0).normal(size=(7, 5)).astype(np.float32)
    extra, graph, seeds, _ = linked(heads)
    prepared, consts, augs = prepare(heads, 0, 0.0)
    out_d, out_i = np.empty((7, 20), np.float32), np.empty((7, 20), np.int32)
    sizes = np.zeros(7, np.int64)
    walk_many(
        prepared,
        consts,
        augs,
        heads,
        extra,
        graph,
        seeds,
        0,
        20,
        1 << 30,
        marks(7, 16),
        out_d,
        out_i,
        sizes,
        np.zeros(7, np.int64),
    )
    assert (sizes == 7).all()
    assert (out_i[:, 0] == np.arange(7)).all()
    assert all(sorted(row[:7].tolist()) == list(range(7)) for row in out_i)
