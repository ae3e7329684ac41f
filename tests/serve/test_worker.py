"""A real decoder in a real process: start-up in phases, knobs from the SLO, a calibration that is kept."""

import httpx
import pytest

from hasten.serve.cost import IterationCost
from hasten.serve.server import start

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
