import math
import warnings

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hasten.errors import ConfigurationError
from hasten.serve import Observation, Sequence
from hasten.serve.policy import DynamicChunk, SplitFuse, StallFree, TokenBudget
from hasten.testing.policy_kit import PolicyKit


def decoding(seq, known=10, blocks=1):
    return Sequence(seq, float(seq), known - 1, 99, known=known, computed=known - 1, blocks=blocks)


class TestTokenBudget(PolicyKit):
    policy = TokenBudget(token_budget=24, max_num_seqs=6, dynamic=DynamicChunk(16, 4, 3, 48, 4))
    token_budget = 24
    stall_free = True


class TestPromptReservationThatWaits(PolicyKit):
    policy = TokenBudget(token_budget=24, max_num_seqs=6, when_full="wait", split="even", tile=4)
    token_budget = 24


def test_decodes_go_first_then_admitted_prompts_then_new_ones():
    running = [decoding(0), Sequence(1, 1.0, 40, 4, computed=16, blocks=1), decoding(2)]
    waiting = [Sequence(3, 3.0, 5, 4), Sequence(4, 4.0, 100, 4), Sequence(5, 5.0, 5, 4)]
    plan = TokenBudget(token_budget=40, max_num_seqs=8).decide(Observation(0.0, waiting, running, 50, 53, 16))
    assert [(c.seq, c.start, c.length) for c in plan.chunks] == [
        (0, 9, 1),
        (2, 9, 1),
        (1, 16, 24),
        (3, 0, 5),
        (4, 0, 9),
    ]


def test_a_waiting_sequence_starts_behind_its_shared_prefix():
    waiting = [Sequence(0, 0.0, 40, 4, computed=32)]
    plan = TokenBudget().decide(Observation(0.0, waiting, [], 50, 50, 16))
    assert [(c.start, c.length) for c in plan.chunks] == [(32, 8)]


def test_a_preempted_sequence_recomputes_prompt_and_answer():
    waiting = [Sequence(0, 0.0, 10, 40, known=25)]
    plan = TokenBudget(token_budget=128).decide(Observation(0.0, waiting, [], 50, 50, 16))
    assert [(c.start, c.length) for c in plan.chunks] == [(0, 25)]


def test_the_memory_of_an_admitted_prompt_is_not_given_away():
    running = [Sequence(0, 0.0, 64, 4, computed=16, blocks=1)]  # three blocks to come
    waiting = [Sequence(1, 1.0, 16, 4)]
    policy = TokenBudget(token_budget=40, max_num_seqs=8, watermark=0.0)
    assert [c.seq for c in policy.decide(Observation(0.0, waiting, running, 3, 4, 16)).chunks] == [0]
    assert [c.seq for c in policy.decide(Observation(0.0, waiting, running, 4, 5, 16)).chunks] == [0]  # budget: 40
    wide = TokenBudget(token_budget=80, max_num_seqs=8, watermark=0.0)
    assert [c.seq for c in wide.decide(Observation(0.0, waiting, running, 4, 5, 16)).chunks] == [0, 1]


def test_a_decode_without_a_block_preempts_the_last_arrival_even_if_that_is_a_prompt():
    running = [decoding(0, known=17), Sequence(1, 1.0, 64, 4, computed=16, blocks=1)]
    plan = TokenBudget(token_budget=128).decide(Observation(0.0, [], running, 0, 2, 16))
    assert plan.preempt == (1,)
    assert [c.seq for c in plan.chunks] == [0]


def test_priority_decides_who_is_preempted():
    first, second = decoding(0, known=17), decoding(1, known=17)
    first.priority = 5
    plan = TokenBudget(token_budget=128).decide(Observation(0.0, [], [first, second], 0, 2, 16))
    assert plan.preempt == (0,)


@pytest.mark.parametrize("count", [1, 7, 64])
def test_no_step_exceeds_even_a_tiny_budget(count):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        policy = TokenBudget(token_budget=count)
    waiting = [Sequence(i, float(i), 30, 4) for i in range(10)]
    assert policy.decide(Observation(0.0, waiting, [], 500, 500, 16)).num_tokens == count
    running = [decoding(i) for i in range(80)]
    plan = policy.decide(Observation(0.0, [], running, 500, 580, 16))
    assert [c.seq for c in plan.chunks] == list(range(min(count, 80)))


def test_a_budget_below_the_number_of_sequences_warns_of_starvation():
    with pytest.warns(UserWarning, match="starve"):
        StallFree(token_budget=64)
    with pytest.raises(ConfigurationError, match="max_num_seqs"):
        SplitFuse(token_budget=64)


@pytest.mark.parametrize(
    "knobs",
    [{"token_budget": 0}, {"max_num_seqs": 0}, {"tile": 0}, {"split": "odd"}, {"reserve": "all"}, {"when_full": "die"}],
)
def test_bad_knobs_are_refused_with_the_value(knobs):
    name, value = next(iter(knobs.items()))
    with pytest.raises(ConfigurationError, match=f"{name} is {value!r}|{name} is {value}"):
        TokenBudget(**knobs)


@given(st.integers(1, 400), st.integers(1, 2000), st.sampled_from((1, 8, 64)))
def test_the_even_split_takes_as_few_steps_as_the_greedy_one_in_equal_parts(budget, prompt, tile):
    policy = TokenBudget(token_budget=budget, max_num_seqs=1, split="even", tile=tile)
    seq = Sequence(0, 0.0, prompt, 4)
    parts = []
    while seq.computed < prompt:
        state = ([seq], []) if seq.blocks == 0 else ([], [seq])
        (chunk,) = policy.decide(Observation(0.0, *state, 4000, 4000, 16)).chunks
        parts.append(chunk.length)
        seq.computed += chunk.length
        seq.blocks = -(-seq.computed // 16)
    assert len(parts) == math.ceil(prompt / budget)
    if len(parts) <= 64:  # beyond, shares are the budget but for less than a tile
        assert max(parts[:-1], default=parts[0]) - min(parts[:-1], default=parts[0]) <= tile
    assert max(parts) <= budget


def test_dynamic_chunks_fall_linearly_in_whole_multiples():
    dynamic = DynamicChunk(high=2048, low=512, stages=4, span=4096, multiple=32)
    assert [dynamic.limit(n) for n in (0, 1024, 2048, 3072, 9999)] == [2048, 1536, 1024, 512, 512]
    with pytest.raises(ConfigurationError, match="high"):
        DynamicChunk(high=1, low=2)
