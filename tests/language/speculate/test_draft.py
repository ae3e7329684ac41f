"""Proposers: the fused draft against the executor, prompt lookup against a slow twin, and who is chosen."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hasten.errors import ConfigurationError
from hasten.language import DecoderConfig, load, random_model
from hasten.language.speculate import FirstOf, ModelDraft, PromptLookup
from hasten.language.speculate.choose import choose
from hasten.language.speculate.fused import FusedDecoder
from hasten.language.speculate.proposal import Ask, Proposal, Proposer

torch.set_num_threads(1)


def tiny(layers=2, vocab=40, seed=0, **options):
    config = DecoderConfig(
        vocab_size=vocab, hidden_size=32, num_layers=layers, num_heads=4, num_kv_heads=2, head_dim=8,
        intermediate_size=48, max_position_embeddings=128, **options,
    )  # fmt: skip
    torch.manual_seed(seed)
    model = random_model(config, name="tiny", dtype="fp32", weights=torch.float32)
    for p in model.decoder.parameters():
        p.data.mul_(6)
    return model


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("options", [{}, {"activation": "gelu_tanh"}, {"tie_embeddings": True}])
def test_fused_draft_is_the_plain_decoder(layers, options):
    model = tiny(layers, **options)
    fused, rng = FusedDecoder(model.decoder), np.random.default_rng(0)
    for count in (1, 5, 30):
        tokens = rng.integers(0, 40, count)
        got, chances, found = fused.guess([0], [tokens], [0], [6])
        line = tokens.tolist()
        for place in range(int(found[0])):
            with torch.no_grad():
                law = torch.softmax(model.decoder(torch.tensor([line]))[0, -1], -1)
            assert int(law.argmax()) == got[0, place]
            assert float(law.max()) == pytest.approx(float(chances[0, place]), rel=1e-3)
            line.append(int(got[0, place]))


def test_cache_of_the_draft_follows_whatever_becomes_of_the_sequence():
    """Accepted, rejected, preempted, shortened, another prompt in the same slot: as if computed anew each time."""
    model, rng = tiny(), np.random.default_rng(1)
    kept = ModelDraft(model, least=0.0, max_num_seqs=2)
    stepped = ModelDraft(model, least=0.0, fused=False)
    line = rng.integers(0, 40, 20).tolist()
    for turn in range(30):
        ask = Ask(turn % 3, np.array(line), 4)
        fresh = ModelDraft(model, least=0.0).propose([ask])[0].tokens
        guesses = kept.propose([ask, Ask(7, np.array(line[:5]), 2)])[0]
        assert guesses.tokens == fresh == stepped.propose([ask])[0].tokens
        stood = int(rng.integers(0, 5))
        kept.learn(guesses, stood)
        line = line + list(guesses.tokens[:stood]) + [int(rng.integers(0, 40))]
        if turn % 7 == 6:
            line = line[: int(rng.integers(1, len(line)))]
            kept.forget(turn % 3)


def test_a_full_context_gets_no_guess_and_an_unlikely_line_ends():
    model = tiny()
    draft = ModelDraft(model, least=0.9)
    assert draft.propose([Ask(0, np.zeros(127, np.int64), 4)])[0] == Proposal()
    assert len(draft.propose([Ask(0, np.array([1, 2, 3]), 8)])[0].tokens) < 8


def slow_lookup(tokens, least, most, count):
    best, where = 0, None
    for end in range(len(tokens) - 1, 0, -1):
        length = 0
        while length < most and length < end and tokens[end - 1 - length] == tokens[-1 - length]:
            length += 1
        if length > best:
            best, where = length, end
    if best < least:
        return ()
    out = list(tokens)
    for _ in range(count):
        out.append(out[where + len(out) - len(tokens)])
    return tuple(out[len(tokens) :])


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=40), st.integers(1, 3), st.integers(0, 4), st.integers(1, 9))
def test_lookup_is_the_slow_search(tokens, least, more, count):
    found = PromptLookup(least + more, least).propose([Ask(0, np.array(tokens), count)])[0]
    assert found.tokens == slow_lookup(tokens, least, least + more, count)
    assert all(0 < a <= 1 for a in found.survival)


def test_lookup_learns_how_far_to_go():
    lookup = PromptLookup(4)
    tokens = np.array([1, 2, 3, 4, 9, 1, 2, 3, 4])
    before = lookup.propose([Ask(0, tokens, 3)])[0]
    for _ in range(300):
        lookup.learn(before, 0)
    after = lookup.propose([Ask(0, tokens, 3)])[0]
    assert after.survival[0] < 0.1 < before.survival[0]


def test_first_of_passes_weak_answers_on():
    class Says:
        def __init__(self, name, tokens, chance):
            self.name, self.answer = name, Proposal(tokens, (chance,) * len(tokens), None, name, (0,) * len(tokens))
            self.learnt = 0

        def propose(self, asks):
            return [self.answer] * len(asks)

        def learn(self, proposal, accepted):
            self.learnt += 1

        def forget(self, seq):
            pass

    weak, strong, none = Says("a", (1,), 0.2), Says("b", (2,), 0.9), Says("c", (), 0.0)
    ask = Ask(0, np.array([1]), 2)
    assert FirstOf([weak, strong]).propose([ask])[0].source == "b"
    assert FirstOf([strong, weak]).propose([ask])[0].source == "b"
    assert FirstOf([weak, none]).propose([ask])[0].source == "a"
    both = FirstOf([weak, strong])
    both.learn(both.propose([ask])[0], 1)
    assert strong.learnt == 1
    assert isinstance(both, Proposer)


def test_words_become_proposers_and_bad_pairs_are_refused():
    model = load("pycode-4m")
    assert choose(model, "off") is None
    assert choose(model, "auto").name == "prompt-lookup+draft"
    assert choose(model, "ngram").name == "prompt-lookup"
    assert choose(SimpleNamespace(name="other"), "auto").name == "prompt-lookup"
    with pytest.raises(ConfigurationError, match="no draft of its own"):
        choose(SimpleNamespace(name="other"), "draft")
    assert choose(model, "tree:5").budget == 5
    assert choose(model, "triforce:256").name == "triforce+prompt-lookup+draft"
    for word, wanted in (("triforce:256", ("mass", True)), ("triforce-means:256", ("query", False))):
        view = choose(model, word).proposers[0]
        assert (view.choose, view.follow, view.budget) == (*wanted, 256)
    assert choose(SimpleNamespace(name="other"), "triforce").name == "triforce+prompt-lookup"
    with pytest.raises(ConfigurationError, match="choose one of"):
        choose(model, "bush")
    for bad in ("tree:x", "tree:0", "draft:3"):
        with pytest.raises(ConfigurationError, match="tree"):
            choose(model, bad)
    with pytest.raises(ConfigurationError, match="no draft of its own"):
        choose(SimpleNamespace(name="other"), "tree")
    with pytest.raises(ConfigurationError, match="vocabulary of 40 tokens, the model pycode-4m has 4096"):
        choose(model, "draft", "x", load=lambda name: tiny())
    with pytest.raises(ConfigurationError, match="uses no draft"):
        choose(model, "ngram", "x")
    with pytest.raises(ConfigurationError, match="fused"):
        ModelDraft(tiny(qk_norm=True), fused=True)
