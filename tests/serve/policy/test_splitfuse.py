import pytest

from hasten.serve import IterationCost, Observation, RequestSpec, Sequence
from hasten.serve.policy import SplitFuse
from hasten.serve.simulate import Simulator
from hasten.testing.policy_kit import PolicyKit


class TestSplitFuse(PolicyKit):
    policy = SplitFuse(token_budget=16, max_num_seqs=6, tile=4)
    token_budget = 16


class TestSplitFuseThatResetsAll(PolicyKit):
    policy = SplitFuse(token_budget=16, max_num_seqs=6, split="greedy", on_deadlock="reset_all")
    token_budget = 16


def test_short_prompts_are_fused_and_cut_to_hit_the_budget():
    waiting = [Sequence(i, float(i), 300, 4) for i in range(8)]
    plan = SplitFuse(token_budget=768, split="greedy").decide(Observation(0.0, waiting, [], 500, 500, 16))
    assert [c.length for c in plan.chunks] == [300, 300, 168]


def stuck():
    """Three half-done sequences hold the whole cache."""
    return [Sequence(i, float(i), 64, 4, computed=32, blocks=2) for i in range(3)]


@pytest.mark.parametrize(("rule", "released"), [("youngest", (2,)), ("reset_all", (2, 1, 0))])
def test_a_deadlock_is_broken(rule, released):
    plan = SplitFuse(token_budget=256, on_deadlock=rule).decide(Observation(0.0, [], stuck(), 0, 6, 16))
    assert plan.preempt == released
    assert [c.seq for c in plan.chunks] == ([0] if rule == "youngest" else [])


def test_a_cache_for_one_request_serves_fifty_and_the_gentle_rule_recomputes_less():
    load = [RequestSpec(0.0, 200, 20) for _ in range(50)]
    cost = IterationCost.preset("opt-13b/a100")
    wasted = {}
    for rule in ("youngest", "reset_all"):
        policy = SplitFuse(token_budget=128, on_deadlock=rule)
        report = Simulator(cost, policy, blocks=17).run(load)
        assert report.metrics.completed == 50
        wasted[rule] = report.metrics.recomputed_tokens
    assert wasted["youngest"] <= wasted["reset_all"]
