"""The vectorised sampler against a slow one that follows the definitions row by row."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hasten.language.kernels_sampling import draw_cut
from hasten.language.sampling import Sampler, SamplingParams, SamplingState, top_logprobs, uniform

torch.set_num_threads(1)


def distribution(logits, params, prompt=(), answer=()):
    """Probabilities after penalties, bias, temperature, top-k, top-p and min-p, from the definitions."""
    x = np.array(logits, dtype=np.float64)
    for token in set(prompt) | set(answer):
        x[token] = x[token] / params.repetition_penalty if x[token] > 0 else x[token] * params.repetition_penalty
    for token in set(answer):
        x[token] -= params.presence_penalty + params.frequency_penalty * answer.count(token)
    for token, bias in params.logit_bias:
        x[token] += bias
    x = x / params.temperature
    p = np.exp(x - x.max())
    p /= p.sum()
    order = sorted(range(len(p)), key=lambda i: -p[i])
    if params.top_k > 0:
        order = order[: params.top_k]
    kept, total = [], 0.0
    mass = p[order].sum()
    for token in order:
        if total >= params.top_p * mass and kept:
            break
        kept.append(token)
        total += p[token]
    kept = [t for t in kept if p[t] >= params.min_p * p[order[0]]]
    out = np.zeros_like(p)
    out[kept] = p[kept]
    return out / out.sum()


def state(params, vocab, prompt=(0,), answer=(), seed=None):
    made = SamplingState(params, params.seed if seed is None else seed, list(prompt), vocab)
    for token in answer:
        made.observe(token)
    return made


def frequencies(logits, params, draws=4000, prompt=(0,), answer=()):
    vocab = len(logits)
    rows = torch.tensor([logits] * draws, dtype=torch.float32)
    states = [state(params, vocab, prompt, answer, seed=i) for i in range(draws)]
    tokens = Sampler(vocab).sample(rows, states).tokens
    return np.bincount(tokens, minlength=vocab) / draws


@pytest.mark.parametrize(
    "knobs",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 2.0},
        {"top_k": 3},
        {"top_p": 0.6},
        {"min_p": 0.2},
        {"top_k": 5, "top_p": 0.7, "min_p": 0.1},
        {"presence_penalty": 1.0, "frequency_penalty": 0.5},
        {"repetition_penalty": 1.7},
        {"logit_bias": ((3, 2.0), (4, -100.0))},
    ],
)
def test_frequencies_follow_the_definition(knobs):
    logits = np.random.default_rng(1).normal(size=12).tolist()
    params = SamplingParams(**knobs)
    prompt, answer = [1, 2, 2], [3, 3, 5]
    expected = distribution(logits, params, prompt, answer)
    found = frequencies(logits, params, prompt=prompt, answer=answer)
    assert (found[expected == 0] == 0).all()  # what was cut never comes
    assert np.abs(found - expected).max() < 4 * math.sqrt(0.25 / 4000)


@pytest.mark.parametrize("spread", [0.01, 1.0, 6.0])  # a flat row needs the whole sort, a steep one only its head
@pytest.mark.parametrize("knobs", [{"top_p": 0.9}, {"top_k": 300}, {"top_p": 0.99, "top_k": 1000}, {"top_p": 0.3}])
def test_cut_rows_draw_only_from_what_the_cut_leaves(spread, knobs):
    vocab = 1500
    logits = (np.random.default_rng(2).normal(size=(40, vocab)) * spread).astype(np.float32)
    params = SamplingParams(**knobs)
    states = [state(params, vocab, seed=i) for i in range(40)]
    tokens = Sampler(vocab).sample(torch.from_numpy(logits), states).tokens
    for row, token in zip(logits, tokens, strict=True):
        kept = distribution(row, params)
        rank = (kept > kept[token]).sum()
        assert kept[token] > 0 or rank >= (kept > 0).sum() - 2  # rounding may move the edge by one token


rows_of_params = st.lists(
    st.builds(
        SamplingParams,
        temperature=st.sampled_from([0.0, 0.7, 1.0]),
        top_k=st.sampled_from([0, 1, 3, 70]),
        top_p=st.sampled_from([1.0, 0.9, 0.3]),
        min_p=st.sampled_from([0.0, 0.1]),
        presence_penalty=st.sampled_from([0.0, 0.5]),
        repetition_penalty=st.sampled_from([1.0, 1.3]),
        logit_bias=st.sampled_from([(), ((2, 5.0),)]),
        logprobs=st.sampled_from([None, 0, 3]),
        seed=st.integers(0, 2**63),
    ),
    min_size=1,
    max_size=6,
)


@given(rows_of_params, st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_a_row_does_not_depend_on_the_others(params, seed):
    vocab = 90
    logits = torch.from_numpy(np.random.default_rng(seed).normal(size=(len(params), vocab)).astype(np.float32) * 3)
    kept = logits.clone()
    states = [state(p, vocab, prompt=[1, 2], answer=[3, 4, 4]) for p in params]
    together = Sampler(vocab).sample(logits, states)
    assert torch.equal(logits, kept)  # the logits are left alone
    for index, one in enumerate(states):
        alone = Sampler(vocab).sample(logits[index : index + 1], [one])
        assert alone.tokens[0] == together.tokens[index]
        assert (alone.logprobs or {}).get(0) == (together.logprobs or {}).get(index)


def test_seeds_and_counters_fix_the_draw():
    assert uniform(5, 1) == uniform(5, 1)
    draws = np.array([uniform(seed, counter) for seed in range(100) for counter in range(100)])
    assert 0 <= draws.min() < draws.max() < 1
    assert abs(draws.mean() - 0.5) < 0.01
    assert abs(np.corrcoef(draws[:-1], draws[1:])[0, 1]) < 0.03
    assert uniform(-1, 0) == uniform(2**64 - 1, 0)


def test_greedy_takes_the_likeliest_and_the_first_of_equals():
    logits = torch.tensor([[0.0, 2.0, 2.0], [5.0, 1.0, 0.0]])
    states = [state(SamplingParams(temperature=0.0), 3, seed=0) for _ in range(2)]
    assert Sampler(3).sample(logits, states).tokens == [1, 0]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_row_without_finite_logits_is_reported(bad, temperature):
    logits = torch.zeros(3, 4)
    logits[1, 2] = bad
    states = [state(SamplingParams(temperature=temperature), 4, seed=i) for i in range(3)]
    assert Sampler(4).sample(logits, states).finite == [True, False, True]


def test_end_tokens_are_impossible_before_min_tokens():
    params = SamplingParams(temperature=0.0, min_tokens=2, stop_token_ids=(0,), max_tokens=5)
    logits = torch.tensor([[9.0, 1.0, 0.0]])
    one = SamplingState(params, 0, [1], 3, eos_ids=(1,))
    sampler = Sampler(3)
    assert sampler.sample(logits, [one]).tokens == [2]
    one.observe(2)
    assert sampler.sample(logits, [one]).tokens == [2]
    one.observe(2)
    assert sampler.sample(logits, [one]).tokens == [0]


def test_top_logprobs_are_those_of_the_raw_distribution():
    logits = torch.randn(5, 20, generator=torch.Generator().manual_seed(0))
    chosen = torch.tensor([3, 0, 19, 7, 7])
    found = top_logprobs(logits, chosen, [0, 1, 5, 20, 3])
    reference = torch.log_softmax(logits.double(), -1)
    for row, entry in enumerate(found):
        assert entry.chosen == pytest.approx(float(reference[row, chosen[row]]), abs=1e-5)
        assert entry.rank == 1 + int((reference[row] > reference[row, chosen[row]]).sum())
        assert list(entry.top_ids) == reference[row].argsort(descending=True)[: len(entry.top)].tolist()
    assert [len(e.top) for e in found] == [0, 1, 5, 20, 3]
    assert sum(math.exp(v) for v in found[3].top) == pytest.approx(1.0, abs=1e-5)


def test_a_grammar_that_allows_only_the_end_beats_min_tokens():
    class OnlyTheEnd:
        done = False

        def mask(self, logits):
            logits[1:] = -math.inf

    params = SamplingParams(min_tokens=3)
    one = SamplingState(params, 0, [1], 4, eos_ids=(0,), grammar=OnlyTheEnd())
    sampled = Sampler(4).sample(torch.zeros(1, 4), [one])
    assert sampled.tokens == [0]
    assert sampled.finite is None


def cut_by_sorting(probability, k, p, min_p, draw):
    """What ``draw_cut`` promises: a whole sort by probability, then by id; sums in double precision."""
    order = np.lexsort((np.arange(len(probability)), -probability))
    kept = probability[order].astype(np.float64)[: min(k, len(probability))]
    order = order[: len(kept)]
    before = np.cumsum(kept) - kept
    kept = kept[(before < p * (kept.sum() if k < len(probability) else 1.0)) | (np.arange(len(kept)) == 0)]
    kept = kept[kept >= min_p * kept[0]]
    kept = kept[kept > 0]
    running = np.cumsum(kept)
    return order[min(np.searchsorted(running, draw * running[-1], side="right"), len(kept) - 1)]


@given(
    vocab=st.sampled_from([1, 2, 63, 64, 65, 700, 4096]),
    spread=st.sampled_from([0.0, 1e-3, 0.5, 2.0, 6.0, 30.0]),
    top_k=st.sampled_from([2**31, 1, 2, 50, 64, 500]),
    top_p=st.sampled_from([1.0, 0.95, 0.5, 0.01]),
    min_p=st.sampled_from([0.0, 0.02, 0.3, 1.0]),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=150, deadline=None)
def test_a_cut_without_sorting_draws_what_sorting_would(vocab, spread, top_k, top_p, min_p, seed):
    rows = 4
    rng = np.random.default_rng(seed)
    weights = np.exp(rng.normal(size=(rows, vocab)) * spread - 3)
    weights[:, : vocab // 3] *= rng.integers(0, 2, size=(rows, vocab // 3))  # a grammar leaves zeros
    weights[:, -1] += 1e-3
    probability = (weights / weights.sum(1, keepdims=True)).astype(np.float32)
    draws = rng.random(rows)
    out = np.empty(rows, dtype=np.int64)
    knobs = (np.full(rows, top_k), np.full(rows, top_p), np.full(rows, min_p))
    draw_cut(probability, probability.view(np.int32), *knobs, draws, out)
    for row in range(rows):
        expected = cut_by_sorting(probability[row], top_k, top_p, min_p, draws[row])
        if spread == 0.0:  # all alike: sums in another order may end one of them apart
            assert probability[row, out[row]] == probability[row, expected]
            assert abs(out[row] - expected) <= 1
        else:
            assert out[row] == expected


@pytest.mark.parametrize(("draw", "token"), [(0.0, 2), (0.49, 2), (0.5, 0), (0.74, 0), (0.75, 3), (0.999, 3)])
def test_equals_are_in_the_order_of_their_ids(draw, token):
    probability = np.array([[0.25, 0.0, 0.5, 0.25]], dtype=np.float32)
    out = np.empty(1, dtype=np.int64)
    cut = (np.array([2**31]), np.array([1.0]), np.array([0.0]), np.array([draw]))
    draw_cut(probability, probability.view(np.int32), *cut, out)
    assert out[0] == token
