"""The kit must catch policies that break the contract, one defect each."""

import dataclasses

import pytest

from hasten.serve import Chunk, StepPlan
from hasten.serve.policy import Orca, PrefillFirst, StallFree
from hasten.testing.policy_kit import PolicyKit

KIT_TESTS = [name for name in dir(PolicyKit) if name.startswith("test_")]


def failures(kit, policy, **attributes):
    made = type("Kit", (PolicyKit,), {"policy": policy} | attributes)()
    failed = []
    for name in KIT_TESTS:
        test = getattr(made, name)
        with pytest.MonkeyPatch.context() as patch:
            try:
                test(patch) if "monkeypatch" in test.__code__.co_varnames else test()
            except Exception:
                failed.append(name)
    return failed


class Wrapped:
    name = "wrapped"
    inner = Orca(max_num_seqs=4)

    def decide(self, observation):
        return self.inner.decide(observation)


class Overtakes(Wrapped):
    def decide(self, observation):
        turned = dataclasses.replace(observation, waiting=observation.waiting[::-1])
        return self.inner.decide(turned)


class Overdraws(Wrapped):
    def decide(self, observation):
        return self.inner.decide(dataclasses.replace(observation, free_blocks=observation.free_blocks + 9))


class Writes(Wrapped):
    def decide(self, observation):
        for seq in observation.running:
            seq.priority += 1
        return self.inner.decide(observation)


class ReadsTheClock(Wrapped):
    def decide(self, observation):
        import time

        time.perf_counter()
        return self.inner.decide(observation)


class Remembers(Wrapped):
    calls = 0

    def decide(self, observation):
        Remembers.calls += 1
        return self.inner.decide(observation) if Remembers.calls % 2 else StepPlan()


class Idles(Wrapped):
    def decide(self, observation):
        return self.inner.decide(dataclasses.replace(observation, waiting=()))


class StartsLate(Wrapped):
    def decide(self, observation):
        plan = self.inner.decide(observation)
        return StepPlan(tuple(Chunk(c.seq, c.start + 1, c.length) for c in plan.chunks), plan.preempt)


def test_a_sound_policy_passes():
    assert failures(PolicyKit, Wrapped()) == []


@pytest.mark.parametrize("policy", [Overtakes, Overdraws, Writes, ReadsTheClock, Remembers, Idles, StartsLate])
def test_a_broken_policy_fails(policy):
    assert failures(PolicyKit, policy())


def test_broken_promises_about_the_budget_and_stalls_are_caught():
    assert failures(PolicyKit, StallFree(token_budget=16, max_num_seqs=4), token_budget=15)
    assert failures(PolicyKit, PrefillFirst(max_num_seqs=4), stall_free=True) == ["test_it_survives_overload"]
