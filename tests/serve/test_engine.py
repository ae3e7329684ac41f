"""The engine with every policy against a plain loop over one request; the model is wrong as soon as the cache is."""

import random

import numpy as np
import pytest
import torch
from fakes import FakeExecutor, fake_logits, fake_model
from hypothesis import given, settings
from hypothesis import strategies as st

from hasten.budget import SLO
from hasten.clock import ManualClock
from hasten.errors import ConfigurationError, ContextLengthError, EngineError, InvalidRequestError
from hasten.language.params import GrammarSpec
from hasten.language.sampling import Sampler, SamplingParams, SamplingState
from hasten.serve.batch import StepPlan
from hasten.serve.engine import Engine
from hasten.serve.policy import make
from hasten.serve.request import FinishReason

torch.set_num_threads(1)
VOCAB = 64
GREEDY = SamplingParams(temperature=0.0, max_tokens=20)
POLICIES = [
    ("stall-free", {"token_budget": 1, "max_num_seqs": 1}),
    ("stall-free", {"token_budget": 7, "max_num_seqs": 7}),
    ("stall-free", {"token_budget": 64, "max_num_seqs": 16}),
    ("stall-free", {"token_budget": 8192, "max_num_seqs": 128}),
    ("splitfuse", {"token_budget": 64, "max_num_seqs": 16}),
    ("orca", {}),
    ("prefill-first", {}),
    ("request-level", {}),
]


def alone(prompt, params, seed=0):
    """One request, no cache, no batch."""
    tokens = list(prompt)
    state = SamplingState(params, params.seed if params.seed is not None else seed, prompt, VOCAB)
    sampler = Sampler(VOCAB)
    while state.generated < params.max_tokens:
        logits = torch.from_numpy(fake_logits(np.array(tokens), VOCAB))[None]
        token = sampler.sample(logits, [state]).tokens[0]
        state.observe(token)
        tokens.append(token)
        if token in state.stop_ids:
            break
    return tokens[len(prompt) :]


def some_prompts(count=24, seed=0):
    draw = random.Random(seed)
    prompts = [[draw.randrange(VOCAB) for _ in range(draw.randrange(1, 80))] for _ in range(count)]
    return prompts + [prompts[0][:40] + [3, 4, 5], prompts[1] + [9]]  # two that share a prefix


def engine(policy="stall-free", num_blocks=None, knobs=None, **options):
    return Engine(FakeExecutor(VOCAB), make(policy, **(knobs or {})), num_blocks=num_blocks, **options)


@pytest.mark.parametrize("num_blocks", [None, 12])  # 12 blocks hold two requests: preemption is forced
@pytest.mark.parametrize(("policy", "knobs"), POLICIES)
def test_every_policy_gives_the_tokens_of_a_plain_loop(policy, knobs, num_blocks):
    prompts = some_prompts()
    mixed = [
        GREEDY,
        SamplingParams(max_tokens=20, seed=5, top_p=0.9),
        SamplingParams(max_tokens=9, seed=6, presence_penalty=1),
    ]
    params = [mixed[i % 3] for i in range(len(prompts))]
    one = engine(policy, num_blocks, knobs)
    found = one.generate(prompts, params)
    assert [c.tokens for c in found] == [alone(p, k) for p, k in zip(prompts, params, strict=True)]
    one.check_integrity()
    assert one.pool.num_free == one.pool.num_blocks
    if num_blocks and policy == "stall-free" and knobs["token_budget"] >= 64:
        assert one.counters.num_preemptions > 0
        assert one.counters.recomputed_tokens > 0


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_random_lives_leave_the_pool_whole(data):
    """Arrivals, cancellations and steps in any order."""
    policy, knobs = data.draw(st.sampled_from(POLICIES))
    one = engine(policy, data.draw(st.sampled_from([8, 14, 64])), knobs, seed=1)
    expected, got = {}, {}
    for _ in range(data.draw(st.integers(1, 25))):
        action = data.draw(st.sampled_from(["add", "step", "step", "step", "cancel"]))
        if action == "add":
            prompt = data.draw(st.lists(st.integers(0, 3), min_size=1, max_size=60))
            params = SamplingParams(
                max_tokens=data.draw(st.integers(1, 30)),
                seed=data.draw(st.integers(0, 5)),
                temperature=data.draw(st.sampled_from([0.0, 1.0])),
                prompt_logprobs=data.draw(st.sampled_from([None, 1])),
                stop_token_ids=data.draw(st.sampled_from([(), (1, 2, 3, 4, 5, 6, 7)])),
            )
            seq = one.add(prompt, params, priority=data.draw(st.integers(0, 1)))
            expected[seq] = (prompt, params)
            got[seq] = []
        elif action == "cancel" and expected:
            seq = data.draw(st.sampled_from(sorted(expected)))
            if one.cancel(seq):
                del expected[seq], got[seq]
        else:
            for output in one.step():
                got[output.seq].append(output.token)
        one.check_integrity()
    while one.has_work:
        for output in one.step():
            got[output.seq].append(output.token)
        one.check_integrity()
    for seq, (prompt, params) in expected.items():
        assert got[seq] == alone(prompt, params)
    assert one.pool.num_free == one.pool.num_blocks


def test_seeds_hold_whatever_shares_the_batch():
    params = SamplingParams(max_tokens=15, seed=42)
    by_itself = engine().generate([[1, 2, 3]], params)[0].tokens
    crowd = engine(seed=9).generate([*some_prompts(6), [1, 2, 3]], params)[-1].tokens
    assert by_itself == crowd == alone([1, 2, 3], params)
    assert engine().generate([[1, 2, 3]], SamplingParams(max_tokens=15, seed=43))[0].tokens != by_itself


def test_an_engine_with_a_seed_repeats_itself():
    free = SamplingParams(max_tokens=10)
    runs = [[c.tokens for c in engine(seed=s).generate(some_prompts(4), free)] for s in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]


def test_prefixes_are_shared_and_counted():
    one = engine()
    prompt = list(range(50))
    one.generate([prompt], GREEDY)
    before = sum(one.executor.steps)
    found = one.generate([[*prompt, 7]], GREEDY)[0]
    assert found.timing.cached_tokens == 48
    assert sum(one.executor.steps) - before == 51 - 48 + GREEDY.max_tokens - 1
    assert found.tokens == alone([*prompt, 7], GREEDY)
    assert one.stats()["counters"]["prefix_cache_hits"] == 48


def test_followers_wait_for_the_prompt_and_share_it():
    one = engine()
    prompt = list(range(40))
    first = one.add(prompt, SamplingParams(max_tokens=4, seed=1))
    others = [one.add(prompt, SamplingParams(max_tokens=4, seed=s), follow=first) for s in (2, 3)]
    tokens = {s: [] for s in (first, *others)}
    while one.has_work:
        for output in one.step():
            tokens[output.seq].append(output.token)
        one.check_integrity()
    assert sum(one.executor.steps) == 40 + 2 * (40 - 32) + 3 * 3
    assert [tokens[s] for s in (first, *others)] == [
        alone(prompt, SamplingParams(max_tokens=4, seed=s)) for s in (1, 2, 3)
    ]


@pytest.mark.parametrize("steps", [0, 1])
def test_followers_outlive_their_leader(steps):
    one = engine(knobs={"token_budget": 8, "max_num_seqs": 8})
    first = one.add(list(range(40)), GREEDY)
    others = [one.add(list(range(40)), GREEDY, follow=first) for _ in range(3)]
    for _ in range(steps):
        one.step()
    one.cancel(others[0])
    one.cancel(first)
    one.check_integrity()
    ended = set()
    while one.has_work:
        ended |= {o.seq for o in one.step() if o.finish is not None}
    assert ended == set(others[1:])


def test_prompt_logprobs_are_those_of_the_whole_forward():
    prompt = [int(t) for t in np.random.default_rng(0).integers(0, VOCAB, 45)]
    one = engine(knobs={"token_budget": 7, "max_num_seqs": 7})
    one.generate([prompt], GREEDY)  # the cache knows the prompt, which must not matter
    params = SamplingParams(temperature=0.0, max_tokens=3, prompt_logprobs=2, logprobs=1)
    found = one.generate([prompt, [5]], params)
    logs = found[0].prompt_logprobs
    assert logs[0] is None
    assert len(logs) == len(prompt)
    for at in range(1, len(prompt)):
        reference = torch.log_softmax(torch.from_numpy(fake_logits(np.array(prompt[:at]), VOCAB)), -1)
        assert logs[at].chosen == pytest.approx(float(reference[prompt[at]]), abs=1e-5)
        assert logs[at].top[0] == pytest.approx(float(reference.max()), abs=1e-5)
    assert [p.chosen for p in found[0].logprobs] == [p.top[0] for p in found[0].logprobs]  # greedy
    assert found[1].prompt_logprobs == [None]


def test_max_tokens_zero_computes_the_prompt_only():
    found = engine().generate([[1, 2, 3]], SamplingParams(max_tokens=0, prompt_logprobs=0))[0]
    assert found.tokens == []
    assert found.finish_reason == "length"
    assert len(found.prompt_logprobs) == 3


class TestEnds:
    def test_a_stop_token_ends_the_answer(self):
        answer = alone([1], GREEDY)
        params = SamplingParams(temperature=0.0, max_tokens=20, stop_token_ids=(answer[3],))
        found = engine().generate([[1]], params)[0]
        assert found.tokens == answer[: answer.index(answer[3]) + 1]
        assert found.finish_reason == "stop"

    def test_the_end_token_may_be_ignored(self):
        model = fake_model()
        end = model.tokenizer.eos_token_ids[0]
        bias = SamplingParams(temperature=0.0, max_tokens=5, logit_bias=((end, 100.0),))
        one = Engine(model)
        assert one.generate([[1]], bias)[0].tokens == [end]
        bias = SamplingParams(temperature=0.0, max_tokens=5, logit_bias=((end, 100.0),), ignore_eos=True)
        assert one.generate([[1]], bias)[0].tokens == [end] * 5

    def test_a_stop_string_ends_the_answer_and_is_no_abort(self):
        one = Engine(fake_model())
        text = one.generate(["hello"], SamplingParams(temperature=0.0, max_tokens=40))[0].text
        stop = text[5:8]
        found = one.generate(["hello"], SamplingParams(temperature=0.0, max_tokens=40, stop=(stop,)))[0]
        assert found.text == text[: text.index(stop)]
        assert found.finish_reason == "stop"
        assert one.records[-1].finish_reason == "stop"
        assert one.pool.num_free == one.pool.num_blocks

    def test_a_grammar_ends_the_answer(self):
        pytest.importorskip("xgrammar")
        params = SamplingParams(max_tokens=20, grammar=GrammarSpec("regex", "[0-9]{4}"))
        found = Engine(fake_model()).generate(["year "], params)[0]
        assert found.text.isdigit()
        assert len(found.text) == 4
        assert found.finish_reason == "stop"

    def test_stream_gives_the_pieces_and_cancels_when_left(self):
        one = Engine(fake_model())
        params = SamplingParams(temperature=0.0, max_tokens=30)
        whole = one.generate(["hello"], params)[0].text
        assert "".join(one.stream("hello", params)) == whole
        pieces = one.stream("hello", params)
        next(pieces)
        pieces.close()
        assert not one.has_work
        one.check_integrity()


class TestRefusals:
    def test_a_prompt_over_the_context(self):
        with pytest.raises(ContextLengthError, match="256 tokens") as caught:
            engine().add([1] * 256, SamplingParams(max_tokens=1))
        assert caught.value.param == "prompt"

    def test_an_answer_over_the_cache(self):
        with pytest.raises(ContextLengthError) as caught:
            engine(num_blocks=2).add([1] * 10, SamplingParams(max_tokens=40))
        assert caught.value.param == "max_tokens"

    @pytest.mark.parametrize("prompt", [[], [-1], [VOCAB]])
    def test_prompts_that_are_none(self, prompt):
        one = engine()
        with pytest.raises(InvalidRequestError):
            one.add(prompt)
        assert not one.has_work

    def test_a_longest_request_runs(self):
        found = engine(num_blocks=16).generate([[1] * 200], SamplingParams(temperature=0.0, max_tokens=56))[0]
        assert len(found.tokens) == 56

    def test_an_executor_that_is_not_deterministic(self):
        with pytest.raises(ConfigurationError, match="deterministic=True"):
            engine(deterministic=True)

    def test_a_policy_that_never_plans(self):
        class Lazy:
            name = "lazy"

            def decide(self, observation):
                return StepPlan()

        one = Engine(FakeExecutor(VOCAB), Lazy())
        one.add([1])

        def run():
            for _ in range(100):
                one.step()

        with pytest.raises(EngineError, match="planned nothing"):
            run()


def test_logits_that_are_no_numbers_fail_their_sequence_only():
    class Broken(FakeExecutor):
        def step(self, batch, cache):
            logits = super().step(batch, cache)
            logits[batch.tokens[batch.logit_rows] == 13] = float("nan")
            return logits

    one = Engine(Broken(VOCAB))
    good, bad = one.generate([[1, 2], [1, 13]], GREEDY)
    assert good.tokens == alone([1, 2], GREEDY) or good.error
    assert "finite" in bad.error
    assert bad.finish_reason == "error"
    one.check_integrity()


def test_times_come_from_the_clock_that_was_handed_in():
    clock = ManualClock(100.0)
    one = Engine(FakeExecutor(VOCAB, clock=clock, cost=0.5), clock=clock)
    one.add([1, 2, 3], SamplingParams(max_tokens=3, seed=0), arrival=99.0, slo=SLO(ttft="1s"))
    while one.has_work:
        one.step()
    record = one.records[-1]
    assert record.first_scheduled == 100.0
    assert record.token_times == [100.5, 101.0, 101.5]
    assert record.ttft == 1.5
    assert record.queue == 1.0
    stats = one.stats()
    assert stats["counters"]["generation_tokens"] == 3
    assert stats["counters"]["prompt_tokens"] == 3
    assert stats["histograms"]["inter_token_latency_seconds"]["sum"] == pytest.approx(1.0)
    assert stats["finished"] == {"stop": 0, "length": 1, "abort": 0, "error": 0}
    assert stats["gauges"]["kv_cache_usage_perc"] == 0


def test_urgent_requests_overtake():
    one = engine(knobs={"token_budget": 4, "max_num_seqs": 1})
    late = one.add([1, 2], SamplingParams(max_tokens=2, seed=0), priority=1)
    soon = one.add([3, 4], SamplingParams(max_tokens=2, seed=0), priority=-1)
    order = []
    while one.has_work:
        order += [o.seq for o in one.step()]
    assert order == [soon, soon, late, late]


def test_cancel_is_idempotent_and_frees_at_once():
    one = engine()
    seq = one.add([1] * 40, GREEDY)
    one.step()
    assert one.pool.num_free < one.pool.num_blocks
    assert one.cancel(seq)
    assert one.pool.num_free == one.pool.num_blocks
    assert not one.cancel(seq)
    assert one.records[-1].finish_reason == FinishReason.ABORT.value
    assert one.step() == []


def test_reset_forgets_prefixes():
    one = engine()
    one.generate([list(range(40))], GREEDY)
    one.reset()
    assert one.generate([list(range(40))], GREEDY)[0].timing.cached_tokens == 0
    one.add([1], GREEDY)
    with pytest.raises(EngineError, match="live"):
        one.reset()
