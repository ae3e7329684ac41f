"""The kit of the Policy contract: what every scheduling policy must do, as tests to inherit.

A new policy is one class attribute::

    class TestOrca(PolicyKit):
        policy = Orca(max_num_seqs=8)

The kit checks plans on random observations and drives whole random workloads through the simulated engine, whose books
are checked after every step. Needs pytest and hypothesis (``hasten[test]``).
"""

from __future__ import annotations

import builtins
import copy
import random
import socket
import time
from collections.abc import Iterator
from typing import Any, ClassVar

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hasten.serve.batch import Observation, StepPlan, blocks_for
from hasten.serve.cost import IterationCost
from hasten.serve.policy.base import Policy
from hasten.serve.request import Sequence, Status
from hasten.serve.simulate import SimulatedEngine
from hasten.serve.workload import RequestSpec

__all__ = ["PolicyKit", "check_plan", "observations", "served"]

_COST = IterationCost(m0=1e-3, m1=1e-8, m2=1e-6, a=5e-4, b=1e-5, c=1e-10)


def check_plan(observation: Observation, plan: StepPlan) -> None:
    """Assert that a plan keeps the contract on this observation."""
    running = {s.seq: s for s in observation.running}
    waiting = {s.seq: s for s in observation.waiting}
    seen: set[int] = set()
    free = observation.free_blocks
    assert len(set(plan.preempt)) == len(plan.preempt), "a sequence is preempted twice"
    for seq in plan.preempt:
        assert seq in running, f"sequence {seq} is preempted and does not run"
        free += running[seq].blocks
    for chunk in plan.chunks:
        assert chunk.seq not in seen, f"sequence {chunk.seq} has two chunks"
        assert chunk.seq not in plan.preempt, f"sequence {chunk.seq} is preempted and planned"
        seen.add(chunk.seq)
        target = running.get(chunk.seq) or waiting.get(chunk.seq)
        assert target is not None, f"sequence {chunk.seq} is unknown"
        assert chunk.start == target.computed, f"sequence {chunk.seq} starts at {chunk.start}, not {target.computed}"
        assert 1 <= chunk.length <= target.pending, f"sequence {chunk.seq} computes {chunk.length} of {target.pending}"
        free -= max(0, blocks_for(chunk.start + chunk.length, observation.block_size) - target.blocks)
    assert free >= 0, f"the plan needs {-free} blocks more than there are"
    admitted = [s.seq in seen for s in observation.waiting]
    assert admitted == sorted(admitted, reverse=True), "a later request overtakes an earlier one"
    assert not (plan.preempt and any(admitted)), "a request is admitted while another is preempted"


@st.composite
def observations(draw: st.DrawFn) -> Observation:
    """Random states of an engine that could have come about: the books balance."""
    size = draw(st.sampled_from((1, 4, 16)))
    running, waiting = [], []
    for number in range(draw(st.integers(0, 6))):
        prompt = draw(st.integers(1, 60))
        generated = draw(st.integers(0, 12))
        known = prompt + generated
        computed = known - 1 if generated and draw(st.booleans()) else draw(st.integers(0, known - 1))
        running.append(
            Sequence(
                number, float(number), prompt, 16, known, computed, blocks_for(computed, size), status=Status.RUNNING
            )
        )
    for number in range(10, 10 + draw(st.integers(0, 5))):
        prompt = draw(st.integers(1, 60))
        known = prompt + draw(st.sampled_from((0, 0, 3)))
        waiting.append(Sequence(number, float(number), prompt, 16, known, draw(st.sampled_from((0, 0, known - 1)))))
    free = draw(st.integers(0, 20))
    total = free + sum(s.blocks for s in running) + draw(st.integers(0, 4))
    total = max(total, max((blocks_for(s.prompt_len + s.max_tokens, size) for s in (*running, *waiting)), default=1))
    return Observation(draw(st.floats(0, 1e6)), waiting, running, free, total, size)


@st.composite
def served(draw: st.DrawFn) -> tuple[list[RequestSpec], int, int]:
    """A random workload, and a cache (blocks, block size) that can hold its largest request but not everything."""
    size = draw(st.sampled_from((1, 4, 16)))
    count = draw(st.integers(1, 14))
    specs = [
        RequestSpec(draw(st.floats(0, 0.05)), draw(st.integers(1, 70)), draw(st.integers(1, 12))) for _ in range(count)
    ]
    largest = max(blocks_for(s.prompt_len + s.output_len, size) for s in specs)
    return specs, largest + draw(st.integers(0, 2 * largest)), size


def steps(policy: Policy, specs: list[RequestSpec], blocks: int, size: int) -> Iterator[tuple[Observation, StepPlan]]:
    """Serve a workload with the policy; yields every observation with its plan and checks the books throughout."""
    engine = SimulatedEngine(_COST, policy, blocks=blocks, block_size=size)
    todo = sorted(specs, key=lambda s: s.arrival)
    now, count, limit = 0.0, 0, 40 * sum(s.prompt_len + s.output_len for s in specs) + 1000
    while todo or engine.has_work:
        while todo and todo[0].arrival <= now:
            engine.add(str(len(engine.records)), todo.pop(0), now)
        if not engine.has_work:
            now = todo[0].arrival
            continue
        seen = copy.deepcopy(engine.observe(now))
        plan = policy.decide(engine.observe(now))
        yield seen, plan
        end = engine.start(now)
        engine.check_integrity()
        if end is None:
            assert todo, "the policy has nothing to do although requests wait"
            now = todo[0].arrival
            continue
        if engine.busy_until is not None:
            engine.finish()
            engine.check_integrity()
        now = end
        count += 1
        assert count < limit, f"no end after {count} steps"
    assert engine.free == blocks, f"{blocks - engine.free} blocks leaked"
    for record in engine.records.values():
        assert record.ok, f"request {record.id} did not finish"
        assert record.output_tokens == specs_of(specs, record.id).output_len


def specs_of(specs: list[RequestSpec], name: str) -> RequestSpec:
    """The request that a record of :func:`steps` belongs to."""
    return sorted(specs, key=lambda s: s.arrival)[int(name)]


def _forbidden(*_: Any, **__: Any) -> Any:
    raise AssertionError("a policy does no I/O, reads no clock and draws no random number")


class PolicyKit:
    """Inherit and set ``policy``; a policy with a token budget also sets ``token_budget`` and ``stall_free``."""

    policy: ClassVar[Policy]
    """the policy under test"""
    token_budget: ClassVar[int | None] = None
    """tokens that no step exceeds"""
    stall_free: ClassVar[bool] = False
    """whether every running decode that has memory is in every step"""
    examples: ClassVar[int] = 60
    """random cases of each property"""

    def _settings(self) -> settings:
        return settings(
            max_examples=self.examples,
            deadline=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
        )

    def test_it_is_a_policy_with_a_name(self) -> None:
        assert isinstance(self.policy, Policy)
        assert self.policy.name

    def test_plans_keep_the_contract(self) -> None:
        @self._settings()
        @given(observations())
        def check(observation: Observation) -> None:
            plan = self.policy.decide(observation)
            check_plan(observation, plan)
            if self.token_budget is not None:
                assert plan.num_tokens <= self.token_budget

        check()

    def test_deciding_is_pure(self, monkeypatch: pytest.MonkeyPatch) -> None:
        @self._settings()
        @given(observations())
        def check(observation: Observation) -> None:
            before = copy.deepcopy(observation)
            with monkeypatch.context() as patch:
                for module, name in (
                    (time, "time"),
                    (time, "monotonic"),
                    (time, "perf_counter"),
                    (builtins, "open"),
                    (builtins, "print"),
                    (socket, "socket"),
                    (random, "random"),
                ):
                    patch.setattr(module, name, _forbidden)
                first, second = self.policy.decide(observation), self.policy.decide(observation)
            assert first == second == self.policy.decide(copy.deepcopy(before))
            for mine, theirs in zip(
                (*observation.waiting, *observation.running), (*before.waiting, *before.running), strict=True
            ):
                for name in Sequence.__slots__:
                    assert getattr(mine, name) == getattr(theirs, name), f"{name} of sequence {mine.seq} was written"

        check()

    def test_it_starts_what_fits_an_idle_engine(self) -> None:
        waiting = [Sequence(0, 0.0, 30, 4)]
        plan = self.policy.decide(Observation(0.0, waiting, [], 3, 3, 16))
        assert [c.seq for c in plan.chunks] == [0]

    def test_it_is_idle_when_there_is_nothing_to_do(self) -> None:
        assert self.policy.decide(Observation(0.0, [], [], 8, 8, 16)) == StepPlan()

    def test_it_survives_overload(self) -> None:
        """Every request of a random workload ends, whatever the cache; no block leaks; nobody overtakes."""

        @self._settings()
        @given(served())
        def check(case: tuple[list[RequestSpec], int, int]) -> None:
            for observation, plan in steps(self.policy, *case):
                check_plan(observation, plan)
                if self.token_budget is not None:
                    assert plan.num_tokens <= self.token_budget
                if self.stall_free:
                    planned = {c.seq for c in plan.chunks} | set(plan.preempt)
                    stalled = [s.seq for s in observation.running if s.decoding and s.seq not in planned]
                    assert not stalled, f"decodes {stalled} stall although nothing was in their way"

        check()
