"""The graph over the heads, the RNG rule and closure, against their definitions in numpy."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import hasten.retrieve as hr
from hasten.retrieve.index.assign import assign_rows, cut_lists
from hasten.retrieve.index.format import seed_arrays
from hasten.retrieve.index.heads import make_seeds
from hasten.retrieve.index.links import open_ways, prune
from hasten.retrieve.index.metric import factors, mapped, prepare
from hasten.retrieve.index.walk import marks

METRICS = {"l2": 0, "cosine": 1, "ip": 2}


def test_the_graph_does_not_depend_on_the_number_of_threads(linked):
    heads, _ = hr.clustered(1500, 8)
    np.testing.assert_array_equal(linked(heads)[1], linked(heads, threads=3)[1])


def test_edges_are_heads_and_no_head_is_its_own_neighbour(linked):
    heads, _ = hr.clustered(800, 8)
    _, graph, _, _ = linked(heads, degree=8)
    assert graph.max() < 800
    assert (graph != np.arange(800)[:, None]).all()
    for row in graph:
        row = row[row >= 0]
        assert len(set(row.tolist())) == len(row) > 0


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 500), degree=st.integers(1, 10), alpha=st.sampled_from([1.0, 1.2]))
def test_the_rng_rule_in_words(squares, seed, degree, alpha):
    rng = np.random.default_rng(seed)
    heads = rng.normal(size=(40, 5)).astype(np.float32)
    point = rng.normal(size=(1, 5)).astype(np.float32)
    distance = squares(point, heads)[0].astype(np.float32)
    order = np.argsort(distance).astype(np.int32)
    kept = np.empty(degree, np.int32)
    count = prune(
        heads,
        np.zeros(0, np.float32),
        0,
        order,
        distance[order],
        40,
        degree,
        alpha,
        kept,
        np.zeros((degree + 1, 16), np.float32),
        -1,
    )
    wanted = []
    between = squares(heads, heads)
    for c in order:
        if len(wanted) < degree and all(alpha**2 * between[c, a] >= distance[c] for a in wanted):
            wanted.append(int(c))
    assert kept[:count].tolist() == wanted


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("rule", [True, False])
def test_closure_in_words(squares, metric, rule):
    rows, _ = hr.clustered(400, 7)
    code = METRICS[metric]
    heads, others = np.ascontiguousarray(rows[:120]), np.ascontiguousarray(rows[120:])
    largest = float(np.linalg.norm(rows, axis=1).max())
    extra = factors(heads, code, largest)
    queries, consts, augs = prepare(others, code, largest, stored=True)
    seeds = seed_arrays(heads, make_seeds(heads))
    usable = np.ones(120, np.uint8)
    usable[::7] = 0
    state = (heads, extra, np.full((120, 8), -1, np.int32), seeds)
    knobs = (64, 96, (1 + 0.8) ** 2, 1.1**2, rule, 4)
    found, distance, sizes = assign_rows(queries, consts, augs, state, code, usable, knobs, True, marks(120, 8))
    left, right = mapped(others, code, largest).astype(np.float64), mapped(heads, code, largest).astype(np.float64)
    true, between = np.sqrt(squares(left, right)), np.sqrt(squares(right, right))
    agree = 0
    for i in range(len(others)):
        wanted = []
        for c in [c for c in np.argsort(true[i], kind="stable") if usable[c]]:
            if wanted and true[i, c] > 1.8 * true[i, wanted[0]]:
                break
            if not rule or all(1.1 * between[c, a] >= true[i, c] for a in wanted):
                wanted.append(int(c))
            if len(wanted) == 4:
                break
        got = found[i, : sizes[i]].tolist()
        agree += got == wanted
        np.testing.assert_allclose(np.sqrt(distance[i, : sizes[i]]), true[i, got], rtol=1e-2, atol=1e-2)
        assert not set(got) & set(np.flatnonzero(usable == 0).tolist())
    assert agree >= 0.98 * len(others)  # float32 may order two that are nearly equal differently


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 1000), limit=st.integers(1, 6))
def test_cutting_never_drops_the_last_copy(seed, limit):
    rng = np.random.default_rng(seed)
    begins = np.concatenate([[0], np.cumsum(rng.integers(0, 9, 8))])
    rows = np.concatenate(
        [rng.choice(12, b - a, replace=False) for a, b in zip(begins, begins[1:], strict=False)]
    ).astype(np.int64)
    copies = np.bincount(rows, minlength=12).astype(np.uint8)
    before, keep = copies.copy(), np.ones(len(rows), bool)
    dropped, beyond = cut_lists(begins, rows, limit, copies, keep)
    left = np.bincount(rows[keep], minlength=12)
    assert ((left >= 1) == (before >= 1)).all()
    np.testing.assert_array_equal(left, copies)
    assert dropped == (~keep).sum()
    sizes = [keep[a:b].sum() for a, b in zip(begins, begins[1:], strict=False)]
    assert sum(max(0, s - limit) for s in sizes) == beyond
    for a, b in zip(begins, begins[1:], strict=False):
        if keep[a:b].sum() > limit:  # whatever is beyond the limit is somebody's last copy
            assert (left[rows[a:b][keep[a:b]]] == 1).sum() >= keep[a:b].sum() - limit


@given(seed=st.integers(0, 1000), heads=st.integers(2, 60), degree=st.integers(4, 8))
def test_ways_are_opened_without_closing_others(seed, heads, degree):
    rng = np.random.default_rng(seed)
    graph = np.full((heads, degree), -1, np.int32)
    for h in range(heads):  # few heads are the neighbours of all, as hubs are
        others = rng.permutation(np.delete(np.arange(heads), h))[: rng.integers(1, degree + 1)]
        graph[h, : len(others)] = np.minimum(others, others // 3) if seed % 2 else others
        edges = [o for o in dict.fromkeys(graph[h, : len(others)].tolist()) if o != h]
        graph[h] = -1
        graph[h, : len(edges)] = edges
    before = graph.copy()
    least, many = degree // 2, degree + degree // 4
    changed = open_ways(graph, least, many)

    def ways(g):
        return np.bincount(g[g >= 0], minlength=heads)

    gained = ways(graph) - ways(before)
    assert (gained[ways(before) < least] >= 0).all()
    assert (ways(graph)[ways(before) >= many] >= many - 1).all()  # what gave an edge had many
    assert changed >= gained.clip(0).sum() > -1
    for h, edges in enumerate(graph.tolist()):
        real = [e for e in edges if e >= 0]
        assert edges == real + [-1] * (degree - len(real))
        assert h not in real
        assert len(set(real)) == len(real)
        kept = [e for e in before[h].tolist() if e in real]
        assert real[: len(kept)] == kept  # nearest first, as before; new ones behind
    for h in np.flatnonzero(ways(graph) < least):  # whoever is still short has asked all of its neighbours
        for near in graph[h][graph[h] >= 0]:
            full = (graph[near] >= 0).all()
            assert h in graph[near] or (full and (ways(graph)[graph[near]] <= many).all())


def test_no_head_is_left_without_ways_in(linked):
    rows, _ = hr.clustered(3000, 16, 1)
    graph = linked(rows, degree=8, alpha=1.3)[1]
    ways = np.bincount(graph[graph >= 0], minlength=len(rows))
    assert ways.min() >= 4  # without it 47 heads have none, and 18 % fewer than four
