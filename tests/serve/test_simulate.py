import numpy as np
import pytest

from hasten.budget import SLO
from hasten.errors import ConfigurationError, EngineError
from hasten.serve import Chunk, IterationCost, RequestSpec, StepPlan, Workload, workload
from hasten.serve.balance import LeastTokens
from hasten.serve.policy import Orca, PrefillFirst, RequestLevel, SplitFuse, StallFree, TokenBudget
from hasten.serve.simulate import SimulatedEngine, Simulator

COST = IterationCost.preset("opt-13b/a100")
SECOND = IterationCost(a=1.0)  # every step takes a second


def test_a_hand_computed_trace_of_stall_free_scheduling():
    load = [RequestSpec(0.0, 8, 3), RequestSpec(0.5, 10, 2)]
    report = Simulator(SECOND, TokenBudget(token_budget=8, max_num_seqs=4), blocks=10).run(load)
    first, second = report.records
    assert first.token_times == [1.0, 2.0, 3.0]
    # 7 prompt tokens ride along in the step at 1 s, the last 3 in that at 2 s, which yields the first token
    assert second.first_scheduled == 1.0
    assert second.token_times == [3.0, 4.0]
    assert report.steps.tolist() == [[0, 1, 8, 1], [1, 1, 8, 2], [2, 1, 4, 2], [3, 1, 1, 1]]
    assert report.duration == 4.0
    assert report.metrics.completed == 2


def test_the_same_trace_prefill_first_stalls_the_decode():
    load = [RequestSpec(0.0, 8, 3), RequestSpec(0.5, 10, 2)]
    report = Simulator(SECOND, PrefillFirst(), blocks=10).run(load)
    assert [r.token_times for r in report.records] == [[1.0, 3.0, 4.0], [2.0, 3.0]]
    assert report.tbt.max == 2.0


def test_request_level_lets_the_newcomer_wait():
    load = [RequestSpec(0.0, 8, 3), RequestSpec(0.5, 10, 2)]
    report = Simulator(SECOND, RequestLevel(), blocks=10).run(load)
    assert [r.token_times for r in report.records] == [[1.0, 2.0, 3.0], [4.0, 5.0]]
    assert report.queue.max == 2.5


def test_time_passes_while_nothing_is_asked():
    report = Simulator(SECOND, Orca(), blocks=10).run([RequestSpec(5.0, 4, 1), RequestSpec(9.0, 4, 1)])
    assert [r.token_times for r in report.records] == [[6.0], [10.0]]
    assert report.busy == 2.0
    assert report.duration == 5.0


def test_preemption_is_recomputed_and_counted():
    load = [RequestSpec(0.0, 16, 20), RequestSpec(0.0, 16, 20)]
    report = Simulator(SECOND, StallFree(token_budget=64, max_num_seqs=4, watermark=0.0), blocks=4).run(load)
    first, second = report.records
    assert (first.preemptions, second.preemptions) == (0, 1)
    assert second.recomputed_tokens > 16
    assert [r.output_tokens for r in report.records] == [20, 20]
    assert report.metrics.recomputed_tokens == second.recomputed_tokens


def test_what_can_never_fit_is_refused_and_counted_as_failed():
    report = Simulator(COST, StallFree(), blocks=4).run([RequestSpec(0.0, 60, 10), RequestSpec(0.0, 30, 4)])
    assert report.metrics.failed == 1
    assert report.metrics.completed == 1
    assert "64 tokens" in report.records[0].error


@pytest.mark.parametrize(
    "policy", [StallFree(token_budget=256), SplitFuse(), PrefillFirst(), Orca(), RequestLevel()], ids=lambda p: p.name
)
def test_every_policy_serves_a_real_shaped_workload_completely(policy):
    load = workload.sample("conversation", rate=1.0, requests=120, seed=2).clipped(max_prompt=4000, max_output=400)
    report = Simulator(COST, policy, blocks=1200).run(load)
    m = report.metrics
    assert m.completed == 120
    assert [r.output_tokens for r in report.records] == load.output_lens.tolist()
    assert all(a <= b for r in report.records for a, b in zip(r.token_times, r.token_times[1:], strict=False))
    tokens = load.prompt_lens.sum() + load.output_lens.sum() - 120  # the last token of an answer is never computed
    assert report.steps[:, 2].sum() == tokens + m.recomputed_tokens


def test_runs_are_reproducible():
    load = workload.sample("code", rate=2.0, requests=60, seed=2)
    one, two = (Simulator(COST, StallFree(), blocks=1200).run(load) for _ in range(2))
    assert one.records == two.records
    assert np.array_equal(one.steps, two.steps)


def test_iteration_time_comes_from_the_cost_plus_the_overhead():
    load = [RequestSpec(0.0, 100, 2)]
    report = Simulator(COST, Orca(), blocks=10, overhead=0.5).run(load)
    assert report.steps[:, 1].tolist() == pytest.approx([COST.time([(0, 100)]) + 0.5, COST.time([(100, 1)]) + 0.5])


def test_closed_loop_clients_wait_for_their_answer():
    load = Workload.random(requests=40, prompt=workload.Normal(100), output=workload.Constant(5), seed=1)
    report = Simulator(COST, StallFree(), blocks=500).run_closed(load, clients=4, think=0.25)
    assert report.metrics.completed == 40
    assert report.peak_running <= 4
    ends = sorted(r.token_times[-1] for r in report.records)
    later = sorted(r.arrival for r in report.records)[4:]
    assert later == pytest.approx([e + 0.25 for e in ends[:36]])
    with pytest.raises(ConfigurationError, match="clients"):
        Simulator(COST, StallFree()).run_closed(load, clients=0)


def test_a_refused_request_does_not_stop_its_client():
    load = [RequestSpec(0.0, 999, 1), RequestSpec(0.0, 10, 1), RequestSpec(0.0, 10, 1)]
    report = Simulator(COST, StallFree(), blocks=10).run_closed(load, clients=1)
    assert report.metrics.completed == 2


def test_one_replica_is_the_plain_engine_and_equal_load_spreads_evenly():
    load = Workload.random(requests=64, rate=50.0, prompt=workload.Constant(300), output=workload.Constant(10))
    sim = Simulator(COST, StallFree(), blocks=800, replicas=4)
    report = sim.run(load)
    alone = [Simulator(COST, StallFree(), blocks=800).run(load[i::4]) for i in range(4)]
    assert report.metrics.completed == 64
    for index, record in enumerate(report.records):
        assert record.token_times == alone[index % 4].records[index // 4].token_times


def test_least_tokens_avoids_the_replica_with_the_long_prompt():
    load = [RequestSpec(0.0, 4000, 5), *(RequestSpec(0.01 * i, 20, 5) for i in range(1, 9))]
    even = Simulator(COST, Orca(), blocks=800, replicas=2).run(load)
    aware = Simulator(COST, Orca(), blocks=800, replicas=2, balancer=LeastTokens()).run(load)
    assert aware.ttft.p90 < even.ttft.p90


class Fixed:
    name = "fixed"

    def __init__(self, plan):
        self.plan = plan

    def decide(self, observation):
        return self.plan


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (StepPlan((Chunk(0, 3, 5),)), "has computed 0"),
        (StepPlan((Chunk(0, 0, 99),)), "planned tokens 0 to 99"),
        (StepPlan((), (0,)), "does not run"),
        (StepPlan(), "nothing to do"),
    ],
)
def test_a_plan_that_breaks_the_contract_is_an_error(plan, message):
    sim = Simulator(COST, Fixed(plan), blocks=2, max_context=64)
    with pytest.raises(EngineError, match=message):
        sim.run([RequestSpec(0.0, 20, 1)])


def test_a_plan_that_overdraws_the_cache_is_an_error():
    engine = SimulatedEngine(COST, Fixed(StepPlan((Chunk(0, 0, 40),))), blocks=2)
    engine.max_context = 64
    engine.add("0", RequestSpec(0.0, 40, 1), 0.0)
    with pytest.raises(EngineError, match="1 cache blocks more"):
        engine.start(0.0)


def test_slo_counts_goodput():
    load = workload.sample("conversation", rate=0.5, requests=60)
    report = Simulator(COST, StallFree(), slo=SLO(ttft="1s", tpot="200ms")).run(load)
    assert 0 < report.metrics.slo_attainment <= 1
    assert report.metrics.goodput == pytest.approx(
        report.metrics.slo_attainment * report.metrics.request_throughput, rel=1e-9
    )


def test_a_cache_of_nothing_is_refused():
    with pytest.raises(ConfigurationError, match="0 blocks"):
        Simulator(COST, Orca(), blocks=0).run([RequestSpec(0.0, 1, 1)])
    with pytest.raises(ConfigurationError, match="replicas"):
        Simulator(COST, Orca(), replicas=0)
