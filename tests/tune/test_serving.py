from __future__ import annotations

import json
from pathlib import Path

import pytest

from hasten.budget import SLO
from hasten.clock import ManualClock
from hasten.errors import ConfigurationError
from hasten.tune import Knob, Space, serving_space, simulated, tune_serving
from hasten.tune.report import of_serving
from hasten.tune.serving import policy_for
from hasten.tune.space import Point

SPACE = Space((Knob("token_budget", (16, 32, 64, 128, 256)),))
SLO_ = SLO.parse("ttft<1s, tpot<100ms")
BASE = {"policy": "prefill-first"}


def _values(attainment: float, goodput: float = 1.0, tail: float = 1.0) -> dict[str, float]:
    return {
        "attainment": attainment,
        "goodput": goodput,
        "e2e@p99": tail,
        "ttft@p99": 0.1,
        "tpot@p99": 0.01,
        "itl@p99": 0.01,
    }


def _predict(point: Point) -> dict[str, float]:
    return _values(1.0 - abs(point["token_budget"] - 64) / 256)


def test_the_best_predictions_are_confirmed_and_the_measured_best_wins(tmp_path: Path) -> None:
    measured: list[Point] = []

    def measure(point: Point) -> dict[str, float]:
        measured.append(dict(point))
        # the simulator was too fond of 64: really 32 is better
        return _values({32: 0.99, 64: 0.9, 128: 0.8}.get(point.get("token_budget", 0), 0.5), 2.0)

    result = tune_serving(SPACE, _predict, measure, SLO_, baseline=BASE, confirm=3)
    assert [p.get("token_budget") for p in measured] == [None, 64, 32, 16, None]  # untuned first and last
    assert result.best.knobs == {"token_budget": 32}
    assert result.baseline.knobs == BASE
    assert result.improved
    assert "99.0% of requests instead of 50.0%" in result.verdict()
    assert result.best.predicted["attainment"] == pytest.approx(1 - 32 / 256)
    json.dumps(result.to_json(), allow_nan=False)
    of_serving(result).write(tmp_path / "report.html")
    assert "(untuned)" in (tmp_path / "report.html").read_text()


def test_the_better_run_of_the_untuned_counts() -> None:
    runs = iter([0.5, 0.8, 0.95])  # the machine was busy at first
    result = tune_serving(SPACE, _predict, lambda p: _values(next(runs)), SLO_, baseline=BASE, confirm=1)
    assert result.baseline.values["attainment"] == 0.95
    assert not result.improved


def test_a_difference_within_the_noise_is_not_claimed() -> None:
    def measure(point: Point) -> dict[str, float]:
        return _values(1.0, 3.0) if point == BASE else _values(1.0, 3.05)

    assert not tune_serving(SPACE, _predict, measure, SLO_, baseline=BASE, confirm=2).improved
    clear = tune_serving(
        SPACE, _predict, lambda p: _values(1.0, 3.0 if p == BASE else 3.3), SLO_, baseline=BASE, confirm=2
    )
    assert clear.improved


def test_if_nothing_beats_the_untuned_it_says_so() -> None:
    result = tune_serving(SPACE, _predict, lambda p: _values(0.9 if p == BASE else 0.7), SLO_, baseline=BASE, confirm=2)
    assert not result.improved
    assert result.verdict().startswith("tuning did not help")


def test_a_killed_search_goes_on(tmp_path: Path) -> None:
    calls: list[Point] = []

    def measure(point: Point) -> dict[str, float]:
        calls.append(point)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return _values(0.9)

    storage = tmp_path / "study.db"
    with pytest.raises(KeyboardInterrupt):
        tune_serving(SPACE, _predict, measure, SLO_, baseline=BASE, confirm=3, storage=storage)
    result = tune_serving(SPACE, _predict, measure, SLO_, baseline=BASE, confirm=3, storage=storage)
    assert len(result.confirmed) == 4
    assert len(calls) == 6  # two kept, the interrupted one again, one more, the untuned once more


def test_the_time_limit_leaves_the_baseline_and_one_candidate() -> None:
    clock = ManualClock()

    def measure(point: Point) -> dict[str, float]:
        clock.advance(60.0)
        return _values(0.9)

    result = tune_serving(SPACE, _predict, measure, SLO_, baseline=BASE, confirm=4, time_limit=100.0, clock=clock)
    assert len(result.confirmed) == 2


def test_a_server_that_completes_nothing_is_worst_not_an_error() -> None:
    nan = float("nan")

    def measure(point: Point) -> dict[str, float]:
        return _values(0.5) if point == BASE else {**_values(0.0, 0.0), "e2e@p99": nan, "ttft@p99": nan}

    result = tune_serving(SPACE, _predict, measure, SLO_, baseline=BASE, confirm=1)
    assert not result.improved


def test_confirm_must_be_positive() -> None:
    with pytest.raises(ConfigurationError, match="at least 1"):
        tune_serving(SPACE, _predict, _predict, SLO_, baseline=BASE, confirm=0)


def test_on_the_real_simulator() -> None:
    """The stall-free policy is predicted to do better than prefill-first on an SLO of the time between tokens."""
    from hasten.serve import workload
    from hasten.serve.cost import IterationCost

    slo = SLO.parse("ttft<10s, itl<150ms")
    load = workload.sample("conversation", rate=1.0, requests=60, seed=0)
    predict = simulated({"bf16": IterationCost.preset("opt-13b/a100")}, load, slo, blocks=2500)
    space = serving_space(token_budgets=(128, 512), precisions=("bf16",), max_num_seqs=(32,))
    baseline = {"policy": "prefill-first", "precision": "bf16", "max_num_seqs": 32}
    result = tune_serving(space, predict, predict, slo, baseline=baseline, confirm=2)
    assert result.best.values["attainment"] >= result.baseline.values["attainment"]
    with pytest.raises(ConfigurationError, match="no cost was fitted for 'int8'"):
        predict({"policy": "stall-free", "precision": "int8"})


def test_a_budget_for_each_step_is_found_where_one_for_the_worst_step_is_too_small() -> None:
    from hasten.serve import workload
    from hasten.serve.cost import IterationCost

    slo = SLO.parse("ttft<2s, tpot<45ms, p99")
    load = workload.sample("code", rate=1.0, requests=120, seed=0)
    cost = IterationCost.preset("opt-13b/a100")
    predict = simulated({"bf16": cost}, load, slo, blocks=2500)
    space = serving_space(precisions=("bf16",), max_num_seqs=(32,))
    baseline = {"policy": "prefill-first", "precision": "bf16", "max_num_seqs": 32}
    result = tune_serving(space, predict, predict, slo, baseline=baseline, confirm=2)
    assert result.best.knobs["token_budget"] == "slo"
    fixed = [c.predicted["attainment"] for c in result.predicted if c.knobs.get("token_budget") != "slo"]
    assert result.best.values["attainment"] > max(fixed) + 0.1
    with pytest.raises(ConfigurationError, match="hand in a fitted cost"):
        policy_for({"token_budget": "slo"}, slo, None)
