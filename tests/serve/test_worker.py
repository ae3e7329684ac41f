"""A real decoder in a real process: start-up in phases, knobs from the SLO, a calibration that is kept."""

from types import SimpleNamespace

import httpx
import pytest

from hasten.clock import ManualClock
from hasten.serve.cost import IterationCost
from hasten.serve.derive import derive_budget
from hasten.serve.server import start
from hasten.serve.worker import WorkerConfig

SETTINGS = {"loader": "fakes:load_tiny", "num_blocks": 64, "threads": 1, "calibration_seconds": 1.0, "max_num_seqs": 8}


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory):
    path = tmp_path_factory.mktemp("calibration") / "cost.json"
    with start("x", slo="ttft<5s, tpot<500ms, p99", calibration=str(path), timeout=120, **SETTINGS) as server:
        log = server.log.read_text()
        phases = {p["phase"]: p for p in server.phases}
        body = {"prompt": "def f(x):", "max_tokens": 8, "temperature": 0}
        first = httpx.post(f"{server.url}/v1/completions", json=body, timeout=20).json()
        again = httpx.post(f"{server.url}/v1/completions", json=body, timeout=20).json()
    return path, log, phases, first, again


def test_start_up_is_told_in_phases(calibrated):
    _, log, phases, _, _ = calibrated
    assert list(phases) == ["import", "load", "pack", "calibrate", "speculate", "cache", "warm-up"]
    assert all(p["seconds"] >= 0 for p in phases.values())
    assert "ready on http://127.0.0.1:" in log


def test_the_budget_follows_from_the_slo_and_says_why(calibrated):
    path, log, phases, _, _ = calibrated
    assert "token budget" in phases["calibrate"]["detail"]
    assert "chosen from the SLO: token budget" in log
    assert isinstance(IterationCost.read(path), IterationCost)


def test_a_kept_calibration_is_read(calibrated):
    path, *_ = calibrated
    with start("x", slo="tpot<500ms", calibration=str(path), timeout=120, **SETTINGS) as server:
        detail = next(p["detail"] for p in server.phases if p["phase"] == "calibrate")
    assert f"calibration read from {path}" in detail


def test_greedy_answers_repeat(calibrated):
    *_, first, again = calibrated
    assert first["choices"][0]["text"] == again["choices"][0]["text"]
    assert first["usage"]["completion_tokens"] == 8


def test_a_budget_for_each_step_or_one_for_the_worst(tmp_path):
    path = tmp_path / "cost.json"
    cost = IterationCost.preset("opt-13b/a100")
    cost.save(path)
    model = SimpleNamespace(executor=SimpleNamespace(max_context=4096))

    def derive(slo, paced=True):
        config = WorkerConfig(model="x", slo=slo, calibration=str(path), max_num_seqs=32)
        return derive_budget(model, config, ManualClock(), 4000, paced=paced)

    fixed, paced = derive("tpot<60ms", paced=False), derive("tpot<60ms")
    assert fixed.pace is None
    assert paced.token_budget > 3 * fixed.token_budget
    assert paced.pace.limit == 0.06
    assert f"token budget {paced.token_budget} at most" in paced.why
    assert f"worst step would be {fixed.token_budget}" in paced.why
    for slo in ("ttft<1s", "tpot<1ms"):  # nothing bounds a step; nothing keeps the limit
        assert derive(slo).token_budget == derive(slo, paced=False).token_budget
    assert "no token budget meets tpot 1 ms" in derive("tpot<1ms").why
