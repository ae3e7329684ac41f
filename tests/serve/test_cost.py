import itertools
import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hasten.budget import SLO
from hasten.errors import ConfigurationError, DataError
from hasten.serve.cost import PRESETS, IterationCost

OPT = IterationCost.preset("opt-13b/a100")
FULL = replace(OPT, d=3e-6)  # every term in use
batches = st.lists(st.tuples(st.integers(0, 4000), st.integers(1, 600)), min_size=1, max_size=12)


@given(batches)
def test_time_is_the_formula_and_all_ways_to_ask_agree(chunks):
    context = sum(c for c, _ in chunks)
    tokens = sum(n for _, n in chunks)
    pairs = sum(n * (2 * c + n) for c, n in chunks)
    gathered = sum(c for c, n in chunks if n > 1)
    memory = FULL.m0 + FULL.m1 * context + FULL.m2 * len(chunks)
    compute = FULL.a + FULL.b * tokens + FULL.c * pairs + FULL.m1 * context + FULL.d * gathered
    assert FULL.time(chunks) == pytest.approx(max(memory, compute), rel=1e-12)
    assert FULL.times(np.array([FULL.sums(chunks)], dtype=float))[0] == pytest.approx(FULL.time(chunks), rel=1e-12)


def test_published_prefill_and_decode_times_in_seconds():
    # DistServe's fit: 18.10 + 0.1019·1000 + 7.12e-6·1000² ms, and 19.93 + 6.27e-4·8000 + 0.0385·8 ms
    assert OPT.time([(0, 1000)]) == pytest.approx(0.12712, rel=1e-4)
    assert OPT.time([(1000, 1)] * 8) == pytest.approx(0.025254, rel=1e-3)


def test_an_empty_batch_takes_no_time():
    assert OPT.time([]) == 0.0
    assert OPT.times(np.zeros((2, 5))).tolist() == [0.0, 0.0]


def grid(cost, noise=0.0, seed=0):
    rng = np.random.default_rng(seed)
    shapes = [[(c, 1)] * n for n, c in itertools.product((1, 4, 16, 64), (10, 500, 2000))]
    shapes += [[(c, n)] for n, c in itertools.product((16, 128, 512, 2048), (0, 500, 2000))]
    shapes += [[(c, 1)] * 8 + [(c, n)] for n, c in itertools.product((16, 128, 512), (0, 1000))]
    return [(s, cost.time(s) * float(np.exp(rng.normal(0, noise)))) for s in shapes]


@pytest.mark.parametrize("true", [*PRESETS.values(), FULL], ids=[*PRESETS, "full"])
def test_fit_finds_a_known_cost_again(true):
    fitted = IterationCost.fit(grid(true))
    assert fitted.relative_errors(grid(true)).max() < 0.01
    assert fitted.report.median_relative_error < 0.005


def test_fit_survives_noise_and_reports_the_error_on_what_was_kept_apart():
    fitted = IterationCost.fit(grid(OPT, 0.05), holdout=grid(OPT, 0.05, seed=1), note="test")
    assert fitted.report.num_holdout == len(grid(OPT))
    assert fitted.report.holdout_median_relative_error < 0.08
    assert fitted.relative_errors(grid(OPT)).max() < 0.15


def test_fit_needs_enough_batches_with_a_time():
    with pytest.raises(DataError, match="at least 7"):
        IterationCost.fit([([(0, 1)], 0.1)] * 3 + [([(0, 1)], float("nan"))] * 9)


def test_a_negative_or_infinite_coefficient_is_refused():
    with pytest.raises(ConfigurationError, match="m1"):
        IterationCost(m1=-1.0)
    with pytest.raises(ConfigurationError, match="b is inf"):
        IterationCost(b=float("inf"))


@settings(deadline=None, max_examples=50)
@given(batches, st.integers(0, 4000), st.floats(0.01, 1))
def test_the_longest_piece_fits_and_one_token_more_does_not(chunks, past, limit):
    sums = FULL.sums(chunks)
    piece = FULL.piece_within(limit, sums, past)
    if piece > 1:
        assert FULL.time([*chunks, (past, piece)]) <= limit * (1 + 1e-9)
    assert FULL.time([*chunks, (past, piece + 2)]) > limit
    assert IterationCost(m0=limit / 2).piece_within(limit, sums, past) > 10**6  # arithmetic costs nothing
    assert IterationCost(m0=limit * 2).piece_within(limit, sums, past) == 0


def test_budget_is_the_largest_tile_multiple_within_the_limit():
    slo = SLO(tbt="100ms")
    setting = {"max_num_seqs": 128, "context": 2000, "cache_tokens": 40_000}
    choice = OPT.budget_for(slo, tile=64, **setting)
    assert choice.token_budget == 384
    assert choice.feasible
    assert OPT.worst_batch(384, **setting) == choice.predicted <= 0.1 < OPT.worst_batch(448, **setting)
    for word in ("384", "itl", "448", "128 sequences"):
        assert word in choice.why
    assert OPT.budget_for(slo, tile=1, **setting).token_budget > 384


def test_the_tighter_of_itl_and_tpot_decides():
    both = OPT.budget_for(SLO(tpot="80ms", itl="200ms"))
    assert both.token_budget == OPT.budget_for(SLO(tpot="80ms")).token_budget
    assert "tpot" in both.why


def test_an_impossible_limit_says_so_and_no_limit_takes_the_largest():
    choice = OPT.budget_for(SLO(tbt="10ms"))
    assert not choice.feasible
    assert choice.token_budget == 64  # with fewer some sequences would starve
    assert "relax" in choice.why
    assert OPT.budget_for(SLO(ttft="1s"), max_budget=2048).token_budget == 2048


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 600), st.integers(1, 64), st.integers(16, 3000), st.integers(64, 40_000))
def test_worst_batch_bounds_every_batch_within_the_budget(budget, seqs, context, cache):
    worst = FULL.worst_batch(budget, max_num_seqs=seqs, context=context, cache_tokens=cache)
    rng = np.random.default_rng(budget)
    for _ in range(10):
        decodes = int(rng.integers(0, min(seqs, budget) + 1))
        piece = budget - decodes
        each = min(context, cache)
        past = max(0, each - piece) if piece else 0
        fits = max(0, (cache - past) // max(1, each))
        chunks = [(each, 1)] * min(decodes, fits) + ([(past, piece)] if piece else [])
        assert FULL.time(chunks) <= worst * (1 + 1e-9)


def test_files_are_whole_or_absent_and_bad_ones_are_named(tmp_path):
    path = tmp_path / "cost.json"
    fitted = IterationCost.fit(grid(OPT), note="opt")
    fitted.save(path)
    again = IterationCost.read(path)
    assert again == fitted
    assert again.report.note == "opt"
    assert [p.name for p in tmp_path.iterdir()] == ["cost.json"]
    path.write_text(path.read_text()[:50])
    with pytest.raises(DataError, match="calibrate again"):
        IterationCost.read(path)
    path.write_text(json.dumps({"format": "other"}))
    with pytest.raises(DataError, match="other"):
        IterationCost.read(path)
    with pytest.raises(DataError, match="calibrate again"):
        IterationCost.from_dict({"format": "hasten/iteration-cost/2", "m0": "x"})
    with pytest.raises(DataError, match="cannot read"):
        IterationCost.read(tmp_path / "absent.json")


def test_presets_by_name_and_scaling():
    with pytest.raises(ConfigurationError, match="opt-13b/a100"):
        IterationCost.preset("gpt-5")
    assert OPT.scaled(2.0).time([(0, 100)]) == pytest.approx(2 * OPT.time([(0, 100)]))
