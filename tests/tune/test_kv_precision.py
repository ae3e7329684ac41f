"""The precision of the KV cache as a knob: judged on text, with the memory that it leaves, run on the engine."""

import pytest
import torch

from hasten.budget import SLO
from hasten.language import load
from hasten.serve import workload
from hasten.serve.cost import IterationCost
from hasten.tune.guessing import prompts_for
from hasten.tune.kv_precision import kv_loss, runtime_of, within
from hasten.tune.language import replay_in_engine, tune_server

torch.set_num_threads(1)


def test_codes_cost_little_and_a_bound_is_kept():
    model = load("pycode-4m", dtype="bf16")
    loss = kv_loss(model, "int8", prompts_for(model, [200, 150]))
    assert -0.01 < loss < 0.01
    assert model.executor.kv_precision == "auto"
    assert within(model, ["auto", "int8"], 0.02).keys() == {"auto", "int8"}
    assert within(model, ["auto", "int8"], -1.0) == {"auto": 0.0}
    assert within(type("Fake", (), {"executor": object()})(), ["int8"], 0.1) == {"auto": 0.0}


def test_a_search_tries_both_caches_in_the_same_memory():
    model = load("pycode-4m", dtype="bf16")
    cost = IterationCost.preset("opt-13b/a100")
    slo = SLO.parse("ttft<2s, tpot<1s, p99")
    offered = workload.sample("code", rate=100.0, requests=5, seed=0).scaled(max_prompt=60, max_output=8)
    result = tune_server(
        model, slo, offered, baseline={"policy": "prefill-first", "precision": "bf16", "max_num_seqs": 8},
        precisions=["bf16"], kv_precisions=("auto", "int8"), kv_quality=0.02,
        costs={"bf16": cost, "bf16, kv int8": cost}, confirm=1,
    )  # fmt: skip
    assert {c.knobs["kv_precision"] for c in result.predicted} == {"auto", "int8"}
    assert model.executor.kv_precision in ("auto", "int8")
    point = {"policy": "stall-free", "token_budget": 32, "max_num_seqs": 4, "kv_precision": "int8"}
    assert runtime_of({"precision": "bf16", **point}) == "bf16, kv int8"
    assert replay_in_engine(model, point, offered, slo, blocks=128)["attainment"] == pytest.approx(1.0)
    assert model.executor.kv_precision == "int8"
