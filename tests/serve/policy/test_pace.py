import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hasten.budget import SLO
from hasten.errors import ConfigurationError
from hasten.serve import IterationCost, Observation, Sequence, Simulator, workload
from hasten.serve.cost import FitReport
from hasten.serve.policy import Pace, SplitFuse, StallFree, TokenBudget
from hasten.testing.policy_kit import PolicyKit, observations

COST = IterationCost(m0=10e-3, m1=1e-6, m2=1e-5, a=8e-3, b=1e-4, c=1e-9, d=1e-7)


def decoding(seq, context=99, slo=None):
    return Sequence(
        seq, float(seq), context, 99, known=context + 1, computed=context, blocks=-(-context // 16), slo=slo
    )


def plan_of(policy, running, waiting=()):
    return policy.decide(Observation(0.0, list(waiting), list(running), 900, 999, 16))


def seconds(plan):
    return COST.time([(c.start, c.length) for c in plan.chunks])


class TestPacedTokenBudget(PolicyKit):
    policy = TokenBudget(token_budget=24, max_num_seqs=6, pace=Pace(COST, limit=0.0105, least=2, tile=4))
    token_budget = 24
    stall_free = True


class TestPacedSplitFuse(PolicyKit):
    policy = SplitFuse(token_budget=24, max_num_seqs=6, pace=Pace(COST, limit=0.0105, least=2, tile=4))
    token_budget = 24


def test_a_prompt_gets_what_the_decodes_leave():
    policy = StallFree(token_budget=2048, max_num_seqs=32, pace=Pace(COST, limit=0.05, tile=1))
    prompt = Sequence(99, 9.0, 3000, 4)
    lengths = []
    for count, context in ((1, 100), (8, 100), (8, 2000), (16, 2000)):
        plan = plan_of(policy, [decoding(n, context) for n in range(count)], [prompt])
        assert 0.0498 < seconds(plan) <= 0.05
        lengths.append(plan.chunks[-1].length)
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[0] > 400
    assert plan_of(policy, [], [prompt]).num_tokens == 2048  # nobody waits for a token


@given(observations(), st.floats(0.011, 0.03))
def test_no_step_is_longer_than_the_limit_but_by_the_least_piece(observation, limit):
    pace = Pace(COST, limit=limit, least=1, tile=4)
    plan = TokenBudget(token_budget=400, max_num_seqs=8, pace=pace).decide(observation)
    decodes = {s.seq for s in observation.running if s.decoding}
    pieces = [c for c in plan.chunks if c.seq not in decodes]
    if decodes.issubset({c.seq for c in plan.chunks}) and decodes and sum(c.length for c in pieces) > 1:
        assert seconds(plan) <= limit * (1 + 1e-9)


def test_the_tightest_objective_of_those_who_decode_sizes_the_step():
    policy = StallFree(token_budget=2048, max_num_seqs=32, pace=Pace(COST, limit=0.04, tile=1))
    prompt = Sequence(99, 9.0, 3000, 4)

    def took(*objectives):
        return seconds(plan_of(policy, [decoding(n, slo=o) for n, o in enumerate(objectives)], [prompt]))

    assert took(None, None) == pytest.approx(0.04, rel=0.01)
    assert took(SLO(tpot="100ms")) == pytest.approx(0.1, rel=0.01)
    assert took(None, SLO(tpot="20ms"), SLO(tpot="100ms")) == pytest.approx(0.02, rel=0.01)
    assert took(None, SLO(tpot="1ms")) == pytest.approx(0.04, rel=0.01)  # out of reach even alone: bounds nothing
    assert plan_of(policy, [decoding(0, slo=SLO(ttft="1s"))], [prompt]).num_tokens == 2048


def test_prompts_go_on_where_decodes_fill_the_step():
    policy = StallFree(token_budget=2048, max_num_seqs=99, pace=Pace(COST, limit=0.0145, least=32))
    running = [decoding(n, 90) for n in range(40)]
    started = Sequence(50, 50.0, 500, 4, computed=64, blocks=4)
    assert plan_of(policy, [*running, started]).chunks[-1].length == 32


def test_a_request_waits_while_its_decode_would_break_the_limit():
    pace = Pace(COST, limit=10e-3 + 1e-6 * 401 + 1e-5 * 4)
    policy = StallFree(token_budget=512, max_num_seqs=32, pace=pace)
    running = [decoding(n, 100) for n in range(3)]
    plan = plan_of(policy, running, [Sequence(8, 8.0, 100, 4), Sequence(9, 9.0, 100, 4)])
    assert [c.seq for c in plan.chunks] == [0, 1, 2, 8]
    assert [c.seq for c in plan_of(policy, running, [Sequence(8, 8.0, 900, 4)]).chunks] == [0, 1, 2]
    # Alone it would be over the limit as well: then there is no point in waiting.
    assert len(plan_of(policy, [], [Sequence(8, 8.0, 900, 4)]).chunks) == 1


def test_margins_are_what_the_fit_misses():
    cost = replace(COST, report=FitReport(40, 0.02, 10, 0.05, 0.25))
    assert Pace.for_slo(cost, SLO(itl="50ms")).limit == pytest.approx(0.04)
    assert Pace.for_slo(cost, SLO(itl="50ms", tpot="30ms")).limit == pytest.approx(0.03 / 1.05)
    pace = Pace.for_slo(cost, SLO(ttft="1s"))
    assert pace.share(99, [decoding(0, slo=SLO(tpot="42ms"))]).piece(0, 999) == 99
    assert Pace.for_slo(COST, SLO(itl="50ms")).limit == pytest.approx(0.05)
    assert Pace.for_slo(COST, SLO(ttft="1s")).limit == math.inf


def test_the_ceiling_is_a_prompt_alone_and_holds_a_token_for_each():
    assert Pace(COST, limit=0.05).ceiling(8) == 384
    assert Pace(COST, limit=0.0101).ceiling(32) == 32
    assert Pace(COST).ceiling(32) == 2048


@pytest.mark.parametrize("knobs", [{"limit": 0.0}, {"least": 0}, {"tile": 0}, {"margin": -0.1}, {"drift": -1.0}])
def test_bad_knobs(knobs):
    with pytest.raises(ConfigurationError, match=next(iter(knobs))):
        Pace(COST, **knobs)


def test_a_paced_server_keeps_the_limit_and_serves_more_than_a_budget_for_the_worst_step():
    cost = IterationCost.preset("opt-13b/a100")
    slo = SLO.parse("ttft<2s, tpot<50ms, p99")
    fixed = cost.budget_for(slo, max_num_seqs=64, context=4096, cache_tokens=40_000)
    load = workload.sample("conversation", rate=2.0, requests=120, seed=3)
    pace = Pace.for_slo(cost, slo)
    attained = {}
    for name, policy in (
        ("fixed", StallFree(fixed.token_budget, 64)),
        ("paced", StallFree(pace.ceiling(64), 64, pace=pace)),
    ):
        attained[name] = Simulator(cost, policy, blocks=2500, slo=slo).run(load).metrics.slo_attainment
    assert attained["paced"] > attained["fixed"] + 0.1
