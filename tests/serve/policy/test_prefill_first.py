import pytest

from hasten.errors import ConfigurationError
from hasten.serve import Observation, Sequence
from hasten.serve.policy import PrefillFirst
from hasten.testing.policy_kit import PolicyKit


class TestPrefillFirst(PolicyKit):
    policy = PrefillFirst(max_num_seqs=6, max_batched_tokens=64)


def decoding(seq, known, blocks):
    return Sequence(seq, float(seq), known - 1, 99, known=known, computed=known - 1, blocks=blocks)


def test_prompts_go_first_and_alone():
    running = [decoding(0, 10, 1)]
    waiting = [Sequence(1, 1.0, 20, 4), Sequence(2, 2.0, 30, 4)]
    plan = PrefillFirst().decide(Observation(0.0, waiting, running, 50, 51, 16))
    assert [(c.seq, c.length) for c in plan.chunks] == [(1, 20), (2, 30)]


def test_the_token_limit_cuts_the_batch_but_a_long_prompt_goes_alone():
    waiting = [Sequence(1, 1.0, 50, 4), Sequence(2, 2.0, 60, 4), Sequence(3, 3.0, 5, 4)]
    policy = PrefillFirst(max_batched_tokens=56)
    assert [c.seq for c in policy.decide(Observation(0.0, waiting, [], 50, 50, 16)).chunks] == [1]
    assert [c.seq for c in policy.decide(Observation(0.0, waiting[1:], [], 50, 50, 16)).chunks] == [2]


def test_a_full_cache_preempts_the_last_arrival():
    running = [decoding(0, 17, 1), decoding(1, 17, 1), decoding(2, 5, 1)]
    plan = PrefillFirst().decide(Observation(0.0, [], running, 1, 4, 16))
    assert plan.preempt == (2,)
    assert [c.seq for c in plan.chunks] == [0, 1]


def test_the_victim_may_be_the_one_that_asks():
    running = [decoding(0, 5, 1), decoding(1, 17, 1)]
    plan = PrefillFirst().decide(Observation(0.0, [], running, 0, 2, 16))
    assert plan.preempt == (1,)
    assert [c.seq for c in plan.chunks] == [0]


def test_admission_leaves_the_watermark_while_others_run():
    waiting = [Sequence(1, 1.0, 16, 4)]
    policy = PrefillFirst(watermark=0.1)
    busy = policy.decide(Observation(0.0, waiting, [decoding(0, 5, 1)], 10, 100, 16))
    assert [c.seq for c in busy.chunks] == [0]
    assert [c.seq for c in policy.decide(Observation(0.0, waiting, [], 10, 100, 16)).chunks] == [1]


@pytest.mark.parametrize("knobs", [{"max_num_seqs": 0}, {"max_batched_tokens": 0}, {"watermark": 1.0}])
def test_bad_knobs_are_refused(knobs):
    with pytest.raises(ConfigurationError, match=next(iter(knobs))):
        PrefillFirst(**knobs)
