"""The simulator and the real engine, driven by the same policy, must agree to the last token time.

The engine runs for real (block pool, layout, sampling); its forward is replaced by one that lets a manual clock pass.
"""

import random
from dataclasses import replace

import pytest
import torch

from hasten.budget import SLO
from hasten.clock import ManualClock
from hasten.serve import IterationCost, RequestSpec, workload
from hasten.serve.engine import Engine
from hasten.serve.policy import Orca, PrefillFirst, RequestLevel, SplitFuse, StallFree
from hasten.serve.simulate import Simulator
from hasten.studies._serving import replay

COST = IterationCost(m0=4e-3, m1=2e-7, m2=5e-5, a=1e-3, b=6e-5, c=3e-9, d=1e-6)


class TimedExecutor:
    """Takes the seconds that the cost model says, and likes token 7."""

    vocab_size, max_context, bytes_per_token = 32, 4096, 64

    def __init__(self, clock):
        self.clock = clock

    def new_cache(self, num_blocks, block_size=16):
        return None

    def step(self, batch, cache):
        chunks = zip(batch.contexts.tolist(), batch.starts.diff().tolist(), strict=True)
        self.clock.advance(COST.time(list(chunks)))
        logits = torch.zeros(len(batch.logit_rows), self.vocab_size)
        logits[:, 7] = 1.0
        return logits


POLICIES = [
    StallFree(token_budget=64, max_num_seqs=16),
    SplitFuse(token_budget=96, max_num_seqs=16, tile=16),
    SplitFuse(token_budget=96, max_num_seqs=16, on_deadlock="reset_all"),
    PrefillFirst(max_num_seqs=16, max_batched_tokens=256),
    Orca(max_num_seqs=16),
    Orca(max_num_seqs=16, reserve_answer=False),
    RequestLevel(max_num_seqs=16),
]


def agree(policy, blocks, load):
    """Run both; the records of the engine."""
    simulated = Simulator(COST, policy, blocks=blocks).run(load)
    clock = ManualClock()
    engine = Engine(
        TimedExecutor(clock), policy=policy, num_blocks=blocks, clock=clock, max_num_seqs=16, prefix_sharing=False
    )
    records = replay(engine, load, [[1] * r.prompt_len for r in load], clock)
    engine.check_integrity()
    records.sort(key=lambda r: int(r.id))
    assert len(records) == len(load)
    for real, predicted in zip(records, simulated.records, strict=True):
        assert real.token_times == pytest.approx(predicted.token_times, rel=1e-9)
        assert real.first_scheduled == pytest.approx(predicted.first_scheduled, rel=1e-9, abs=1e-12)
        assert real.preemptions == predicted.preemptions
    return records


@pytest.mark.parametrize("blocks", [600, 31])
@pytest.mark.parametrize("policy", POLICIES, ids=lambda p: p.name)
def test_engine_and_simulator_agree(policy, blocks):
    load = workload.sample("conversation", rate=60.0, requests=40, seed=3).scaled(max_prompt=400, max_output=60)
    records = agree(policy, blocks, load)
    assert all(len(r.token_times) == asked.output_len for r, asked in zip(records, load, strict=True))
    if blocks == 31 and policy.name != "request-level" and policy != Orca(max_num_seqs=16):
        assert sum(r.preemptions for r in records) > 0


@pytest.mark.parametrize("blocks", [600, 31])
@pytest.mark.parametrize("policy", [POLICIES[0], POLICIES[1], POLICIES[3]], ids=lambda p: p.name)
def test_they_agree_on_whose_turn_it_is(policy, blocks):
    draw = random.Random(5)
    objectives = [None, SLO(ttft=0.05), SLO(ttft=5.0, tpot=0.01), SLO(ttft=0.5)]
    plain = workload.sample("conversation", rate=60.0, requests=40, seed=4).scaled(max_prompt=400, max_output=60)
    load = [replace(r, slo=draw.choice(objectives), priority=draw.choice([0, 0, 1])) for r in plain]
    records = agree(policy, blocks, load)
    assert all(len(r.token_times) == asked.output_len for r, asked in zip(records, load, strict=True))


def test_an_urgent_request_overtakes_those_that_may_wait():
    patient = [RequestSpec(0.0, 300, 20, slo=SLO(ttft=10.0)) for _ in range(12)]
    urgent = RequestSpec(0.001, 60, 20, slo=SLO(ttft=0.1))
    records = Simulator(COST, StallFree(token_budget=64, max_num_seqs=16), blocks=600).run([*patient, urgent]).records
    first = [r.token_times[0] for r in records]
    assert first[-1] == min(first[1:])  # the first prompt had begun
    late = [replace(urgent, arrival=0.001 + n / 50, slo=SLO(ttft=0.1)) for n in range(400)]
    records = Simulator(COST, StallFree(token_budget=64, max_num_seqs=16), blocks=600).run([*patient, *late]).records
    assert max(r.token_times[0] for r in records[:12]) < 11.0  # who may wait for 10 s is not put off for ever


@pytest.mark.parametrize("policy", POLICIES, ids=lambda p: p.name)
def test_shared_prefixes_in_a_tight_cache_lose_nothing(policy):
    """Shared blocks free less than a policy counts on; the engine must still finish everything, for every policy."""
    for seed in range(12):
        rng = random.Random(seed)
        roots = [[rng.randint(0, 31) for _ in range(rng.randint(1, 120))] for _ in range(3)]
        size, load, prompts, when = rng.choice((4, 16)), [], [], 0.0
        for _ in range(rng.randint(2, 20)):
            root = rng.choice(roots)
            prompts.append(root[: rng.randint(1, len(root))] + [rng.randint(0, 31) for _ in range(rng.randint(0, 30))])
            when += rng.expovariate(200)
            load.append(RequestSpec(when, len(prompts[-1]), rng.randint(1, 40)))
        blocks = max(-(-(r.prompt_len + r.output_len) // size) for r in load) + rng.choice((0, 1, 8))
        clock = ManualClock()
        engine = Engine(
            TimedExecutor(clock), policy=policy, num_blocks=blocks, block_size=size, clock=clock, max_num_seqs=16
        )
        records = replay(engine, load, prompts, clock)
        engine.check_integrity()
        assert {int(r.id): r.output_tokens for r in records} == {i: r.output_len for i, r in enumerate(load)}
