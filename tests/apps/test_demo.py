"""The demo asks a fair question, reports both columns, and admits a loss."""

import pytest

from hasten.apps.demo.objective import choose
from hasten.apps.demo.page import columns, verdict
from hasten.budget import SLO
from hasten.serve import workload
from hasten.serve.cost import IterationCost
from hasten.serve.metrics import RequestRecord, summarise
from hasten.serve.policy import make
from hasten.serve.simulate import Simulator

SMALL = IterationCost(m0=0.9e-3, m1=1e-8, m2=2e-5, a=0.9e-3, b=3e-5, c=1e-9)


def code(rate):
    return workload.sample("code", rate=rate, requests=150, seed=0).scaled(max_prompt=768, max_output=200)


def test_the_untuned_server_is_expected_to_miss_and_a_tuned_one_to_meet():
    objective = choose(SMALL, code, blocks=1536, overhead=5e-4)

    def simulate(policy):
        simulator = Simulator(SMALL, policy, blocks=1536, overhead=5e-4, slo=objective.slo)
        return simulator.run(objective.workload).metrics

    assert not simulate(make("prefill-first", max_num_seqs=64)).meets(objective.slo)
    assert simulate(make("stall-free", token_budget=64, max_num_seqs=64)).meets(objective.slo)
    assert objective.why.startswith(f"{objective.workload.rate:.2g}"[:1])


def records(gap, first=0.05):
    return [
        RequestRecord(str(i), float(i), float(i), [i + first + gap * k for k in range(5)], 8, 5, finish_reason="length")
        for i in range(20)
    ]


@pytest.mark.parametrize(("gap", "better"), [(0.002, True), (0.02, False), (0.03, False)])
def test_the_verdict_follows_the_numbers(gap, better):
    slo = SLO.parse("ttft<100ms, tpot<10ms, p99")
    untuned, tuned = summarise(records(0.02), slo), summarise(records(gap), slo)
    sentence, good = verdict(untuned, tuned, slo)
    assert good is better
    assert ("NOT better" in sentence) is not better


def test_columns_name_every_latency_at_three_percentiles():
    slo = SLO.parse("ttft<100ms, tpot<10ms, p99")
    rows = columns(summarise(records(0.02), slo), summarise(records(0.002), slo), slo)
    names = [name for name, _, _ in rows]
    for latency in ("TTFT", "TPOT", "inter-token latency", "end to end"):
        assert sum(n.startswith(latency) for n in names) == 3
    assert "TPOT p99 (limit 10 ms)" in names
    assert {n: (u, t) for n, u, t in rows}["TPOT p50"] == ("20 ms", "2 ms")
