"""Speculation in the engine: never another token, under batching, preemption and shared prefixes."""

import random

import numpy as np
import pytest
import torch
from fakes import FakeExecutor, fake_logits
from hypothesis import given, settings
from hypothesis import strategies as st
from test_engine import POLICIES, VOCAB, alone, some_prompts

from hasten.clock import ManualClock
from hasten.errors import CacheError
from hasten.language.cache import BlockPool
from hasten.language.params import SamplingParams
from hasten.language.speculate import PromptLookup
from hasten.language.speculate.proposal import Proposal
from hasten.serve.acceptance import Acceptance
from hasten.serve.engine import Engine
from hasten.serve.guess_costs import StepTimes
from hasten.serve.http.metrics import render
from hasten.serve.policy import FixedSpeculation, GoodputSpeculation, make

torch.set_num_threads(1)


class Oracle:
    """Guesses what the fake model would take greedily, wrong every now and then; remembers what it was told."""

    name = "oracle"

    def __init__(self, wrong=0.3, seed=0):
        self.wrong, self.random = wrong, random.Random(seed)
        self.forgotten, self.told = set(), []

    def propose(self, asks):
        out = []
        for ask in asks:
            tokens = list(ask.tokens)
            for _ in range(self.random.randrange(ask.count + 1)):
                right = int(fake_logits(np.array(tokens), VOCAB).argmax())
                tokens.append(right if self.random.random() > self.wrong else self.random.randrange(VOCAB))
            new = tuple(tokens[len(ask.tokens) :])
            out.append(Proposal(new, tuple(0.9 ** (i + 1) for i in range(len(new))), None, self.name, new))
        return out

    def learn(self, proposal, accepted):
        self.told.append((len(proposal.tokens), accepted))

    def forget(self, seq):
        self.forgotten.add(seq)


class Bushes(Oracle):
    """Trees: the right token with wrong ones beside and below it, at any place."""

    def __init__(self, wrong=0.3, seed=0, most=7):
        super().__init__(wrong, seed)
        self.most = most

    def propose(self, asks):
        out = []
        for ask in asks:
            tokens, parents = [], []
            right, known = -1, list(ask.tokens)
            for _ in range(self.random.randrange(min(ask.count, self.most) + 1)):
                if self.random.random() < self.wrong:
                    tokens.append(self.random.randrange(VOCAB))
                    parents.append(self.random.randrange(-1, len(tokens) - 1))
                else:
                    tokens.append(int(fake_logits(np.array(known), VOCAB).argmax()))
                    parents.append(right)
                    right = len(tokens) - 1
                    known.append(tokens[-1])
            out.append(Proposal(tuple(tokens), (0.5,) * len(tokens), tuple(parents), self.name, tuple(tokens)))
        return out

    def learn_path(self, proposal, path):
        self.told.append((len(proposal.tokens), len(path)))


MIXED = [
    SamplingParams(max_tokens=20, temperature=0.0),
    SamplingParams(max_tokens=20, seed=5, top_p=0.9, temperature=0.2),
    SamplingParams(max_tokens=9, seed=6, presence_penalty=1, temperature=0.3),
    SamplingParams(max_tokens=12, temperature=0.0, stop_token_ids=(3, 7, 11), min_tokens=4),
]


def engine(policy="stall-free", num_blocks=None, knobs=None, proposer=None, length=4, **options):
    return Engine(
        FakeExecutor(VOCAB),
        make(policy, **(knobs or {})),
        num_blocks=num_blocks,
        proposer=proposer or Oracle(),
        speculation=length if not isinstance(length, int) else FixedSpeculation(length),
        **options,
    )


@pytest.mark.parametrize("num_blocks", [None, 12])
@pytest.mark.parametrize(("policy", "knobs"), POLICIES)
def test_every_policy_still_gives_the_tokens_of_a_plain_loop(policy, knobs, num_blocks):
    prompts = some_prompts()
    params = [MIXED[i % 4] for i in range(len(prompts))]
    one = engine(policy, num_blocks, knobs)
    found = one.generate(prompts, params)
    assert [c.tokens for c in found] == [alone(p, k) for p, k in zip(prompts, params, strict=True)]
    one.check_integrity()
    assert one.pool.num_free == one.pool.num_blocks
    stats = one.speculation
    if policy != "stall-free" or knobs["token_budget"] > 7:
        assert stats.num_accepted_tokens > 20
    assert stats.num_accepted_tokens <= stats.num_draft_tokens
    assert sum(stats.accepted_per_pos) == stats.num_accepted_tokens


@pytest.mark.parametrize("num_blocks", [None, 16])
@pytest.mark.parametrize(("policy", "knobs"), POLICIES)
def test_trees_give_the_tokens_of_a_plain_loop_under_every_policy(policy, knobs, num_blocks):
    prompts = some_prompts()
    params = [MIXED[i % 4] for i in range(len(prompts))]
    one = engine(policy, num_blocks, knobs, proposer=Bushes(), length=7)
    found = one.generate(prompts, params)
    assert [c.tokens for c in found] == [alone(p, k) for p, k in zip(prompts, params, strict=True)]
    one.check_integrity()
    assert one.pool.num_free == one.pool.num_blocks
    if policy != "stall-free" or knobs["token_budget"] > 7:
        assert one.speculation.num_accepted_tokens > 20
        assert max(n for _, n in one._guessing.speculator.proposer.told) > 1
    if num_blocks and policy == "stall-free" and knobs["token_budget"] >= 64:
        assert one.counters.num_preemptions > 0


def test_a_tree_that_finds_no_blocks_is_left_out():
    """Two blocks of four for a sequence that needs both: no page is left for a branch."""
    one = Engine(FakeExecutor(VOCAB), make("stall-free"), num_blocks=5, block_size=4, proposer=Bushes(0.0),
                 speculation=FixedSpeculation(7))  # fmt: skip
    params = SamplingParams(max_tokens=11, temperature=0.0)
    assert one.generate([[1, 2, 3, 4, 5, 6, 7]], params)[0].tokens == alone([1, 2, 3, 4, 5, 6, 7], params)
    one.check_integrity()


def test_trees_of_a_draft_give_the_tokens_of_plain_decoding_with_shared_prefixes_and_preemption():
    """The real kernels, in bfloat16: greedy and sampled, to the last token."""
    from hasten.language import load
    from hasten.language.speculate import FirstOf, TreeProposer

    model, draft = load("pycode-4m", deterministic=True), load("pycode-draft-0.7m")
    head = model.tokenizer.encode("class Stack:\n    def __init__(self):\n        self.items = []\n\n    def push(")
    prompts = [head, head + [5, 9], head[:20], head + [7], [3] * 60, [4] * 50]
    params = [MIXED[0], SamplingParams(max_tokens=30, temperature=0.8, top_p=0.9, seed=3)] * 3

    def run(blocks, proposer):
        one = Engine(model, make("stall-free", token_budget=256, max_num_seqs=8), num_blocks=blocks, proposer=proposer,
                     deterministic=True, speculation=FixedSpeculation(6) if proposer else None)  # fmt: skip
        found = one.generate(prompts[:1], params[:1]) + one.generate(prompts[1:], params[1:])
        one.check_integrity()
        return [c.tokens for c in found], one

    plain, _ = run(200, None)
    for blocks in (200, 12):
        trees = TreeProposer(draft, budget=5, depth=4, num_blocks=120)
        found, one = run(blocks, FirstOf([PromptLookup(min_ngram=3), trees]))
        assert found == plain
        assert one.speculation.num_accepted_tokens > 15
        assert one.pool.hits > 0 or blocks == 12
        assert (one.counters.num_preemptions > 0) == (blocks == 12)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    trees=st.booleans(),
    wrong=st.sampled_from([0.0, 0.2, 0.9]),
    length=st.sampled_from([0, 1, 3, 9]),
    blocks=st.sampled_from([12, 20, 200]),
    size=st.sampled_from([4, 16]),
    seed=st.integers(0, 1000),
)
def test_books_balance_after_every_step(trees, wrong, length, blocks, size, seed):
    draw = random.Random(seed)
    clock = ManualClock()
    one = Engine(
        FakeExecutor(VOCAB, clock=clock, cost=0.01),
        make("stall-free", token_budget=64, max_num_seqs=16),
        num_blocks=blocks * 16 // size,
        block_size=size,
        clock=clock,
        proposer=Bushes(wrong, seed) if trees else Oracle(wrong, seed),
        speculation=FixedSpeculation(length),
    )
    asked = {}
    for _ in range(6):
        prompt = [draw.randrange(VOCAB) for _ in range(draw.randrange(1, 60))]
        params = draw.choice(MIXED)
        asked[one.add(prompt, params)] = (prompt, params, [])
    cancelled = draw.choice(list(asked)) if draw.random() < 0.3 else None
    steps = 0
    while one.has_work:
        for output in one.step():
            asked[output.seq][2].append(output.token)
        one.check_integrity()
        steps += 1
        if steps == 5 and cancelled is not None:
            one.cancel(cancelled)
            one.check_integrity()
    for seq, (prompt, params, tokens) in asked.items():
        expected = alone(prompt, params, one._seed + seq * 0x9E3779B97F4A7C15)
        assert tokens == (expected if seq != cancelled else expected[: len(tokens)])


def test_a_right_guess_saves_steps_and_a_finished_sequence_is_forgotten():
    prompt = list(range(20))
    params = SamplingParams(max_tokens=40, temperature=0.0)
    plain = Engine(FakeExecutor(VOCAB), make("stall-free"))
    plain.generate([prompt], params)
    oracle = Oracle(0.0)
    one = engine(proposer=oracle, length=6)
    one.generate([prompt], params)
    assert one.counters.iterations < 0.6 * plain.counters.iterations
    assert oracle.forgotten == {0}
    assert one.counters.generation_tokens == 40
    assert one.speculation.acceptance == 1.0
    assert len(one.records[0].token_times) == 40


def test_logprobs_are_those_of_plain_decoding():
    params = SamplingParams(max_tokens=12, temperature=0.0, logprobs=3)
    prompt = [1, 2, 3]
    plain = Engine(FakeExecutor(VOCAB), make("stall-free")).generate([prompt], params)[0]
    found = engine().generate([prompt], params)[0]
    assert found.logprobs == plain.logprobs


def test_prompt_lookup_guesses_what_repeats():
    lookup = PromptLookup()
    one = engine(proposer=lookup, length=3)
    one.generate([list(range(VOCAB)) * 2], SamplingParams(max_tokens=8, temperature=0.0))
    assert one.speculation.num_draft_tokens > 0


def test_metrics_have_the_words_of_vllm():
    one = engine()
    one.generate([[1, 2, 3]], MIXED[0])
    text = render(one.stats(), {}, prefix="vllm:", model="m")
    assert 'vllm:spec_decode_num_draft_tokens_total{model_name="m"}' in text
    assert 'vllm:spec_decode_num_accepted_tokens_per_pos_total{model_name="m",position="0"}' in text


def test_shrinking_gives_back_what_guesses_took():
    pool = BlockPool(8, 4)
    pool.open(0, range(6))
    pool.grow(0, 15)
    pool.commit(0, range(6))
    pool.shrink(0, 7)
    assert len(pool.table(0)) == 2
    pool.check_integrity()
    with pytest.raises(CacheError, match="named"):
        pool.shrink(0, 0)


def test_goodput_speculates_where_there_is_room_and_stops_where_there_is_none():
    """A model whose step takes as long for 8 rows as for 1, and then in proportion."""
    clock = ManualClock()

    class Timed(FakeExecutor):
        def step(self, batch, cache):
            clock.sleep(1e-3 * max(1.0, batch.num_tokens / 8))
            return super().step(batch, cache)

    def run(seqs):
        one = Engine(
            Timed(VOCAB),
            make("stall-free", token_budget=512, max_num_seqs=64),
            clock=clock,
            proposer=Oracle(0.4),
            speculation=GoodputSpeculation(),
        )
        began = clock.now()
        params = SamplingParams(max_tokens=60, temperature=0.0, ignore_eos=True)
        one.generate([[i, 2, 3] for i in range(seqs)], params)
        return one.speculation, clock.now() - began

    few, quick = run(1)
    many, _ = run(48)
    assert few.num_draft_tokens > 20
    assert quick < 0.8 * 60e-3
    assert many.num_draft_tokens / 48 < 0.2 * few.num_draft_tokens


def test_step_times_learn_and_extend():
    times = StepTimes([1, 4, 16], [1e-3, 1.2e-3, 2e-3])
    for _ in range(200):
        times.learn(4, 2.4e-3)
    assert float(times.seconds(4)) == pytest.approx(2.4e-3, rel=0.05)
    assert float(times.seconds(64)) > float(times.seconds(16))


def test_acceptance_counts_only_what_was_tested():
    one, other = Acceptance(), Acceptance()
    one.learn(0, accepted=1, proposed=9)
    other.learn(0, accepted=1, proposed=2)
    assert one.alpha(0) == other.alpha(0)
