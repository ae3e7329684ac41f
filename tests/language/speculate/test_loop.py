"""Whole answers: every proposer gives the tokens, or the law, of plain decoding."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from tables import Table, first_two, law_of_two, same_law  # noqa: E402
from test_draft import tiny  # noqa: E402

from hasten.errors import ConfigurationError, ContextLengthError, InvalidRequestError  # noqa: E402
from hasten.language import load  # noqa: E402
from hasten.language.speculate import (  # noqa: E402
    Chain,
    DynamicTree,
    FixedTree,
    KAry,
    ModelDraft,
    PromptLookup,
    TreeDraft,
    TriForce,
    generate,
)
from hasten.language.speculate.compare import compare, parse_shapes, rank_rates  # noqa: E402
from hasten.language.speculate.law import outcomes  # noqa: E402
from hasten.language.speculate.triforce import draft_middle  # noqa: E402
from hasten.language.speculate.verify import verify_chain  # noqa: E402

torch.set_num_threads(1)
PROMPT = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3, 1, 4]


@pytest.fixture(scope="module")
def models():
    target = load("pycode-4m", dtype="fp32")
    return target, load("pycode-draft-0.7m", dtype="fp32")


@pytest.fixture(scope="module")
def prompt(models):
    text = (
        "class Point:\n    def __init__(self, x, y):\n        self.x = x\n        self.y = y\n\n    def add(self, o):\n"
    )
    return models[0].tokenizer.encode(text)


def proposers(draft):
    return [
        PromptLookup(),
        ModelDraft(draft),
        TreeDraft(draft, Chain(4)),
        TreeDraft(draft, KAry(2, 3)),
        TreeDraft(draft, FixedTree((-1, -1, 0, 0, 2))),
        TreeDraft(draft, DynamicTree(12)),
        TreeDraft(draft, DynamicTree(12, 1 / 12)),
        TriForce(draft, budget=32, gamma=4, window=24, refresh=16),
        TriForce(None, budget=32, gamma=3, refresh=None),
        TriForce(None, budget=32, chunk=4, gamma=3, choose="random"),
    ]


def test_greedy_tokens_are_those_of_plain_decoding(models, prompt):
    target, draft = models
    plain = generate(target, prompt, max_tokens=48)
    assert plain.tokens == target.generate(prompt, max_tokens=48, ignore_eos=True).tokens
    for proposer in proposers(draft):
        found = generate(target, prompt, max_tokens=48, proposer=proposer)
        assert found.tokens == plain.tokens, proposer.name
        assert found.target_calls < plain.target_calls, proposer.name
        assert found.tokens_per_pass > 1


def test_sampled_chains_draw_what_plain_decoding_draws(models, prompt):
    target, draft = models
    for seed in range(3):
        knobs = {"max_tokens": 32, "temperature": 0.8, "top_p": 0.9, "seed": seed}
        plain = generate(target, prompt, **knobs)
        for proposer in (PromptLookup(), ModelDraft(draft)):
            assert generate(target, prompt, proposer=proposer, **knobs).tokens == plain.tokens


def test_sampled_trees_and_hierarchies_have_the_law_of_the_target():
    """A tiny model and draft, two tokens each time, counted against the model's own probabilities."""
    from scipy.stats import chisquare

    target, draft = tiny(1, vocab=5), tiny(1, vocab=5, seed=1)
    head = [0, 1, 2, 3, 4] * 8
    with torch.no_grad():
        one = torch.softmax(target.decoder(torch.tensor([head]))[0, -1].double(), -1)
        two = torch.stack(
            [torch.softmax(target.decoder(torch.tensor([[*head, a]]))[0, -1].double(), -1) for a in range(5)]
        )
    law = (one[:, None] * two).reshape(-1).numpy()
    for proposer in (
        TreeDraft(draft, DynamicTree(5), draft_temperature=1.0),
        TriForce(draft, budget=8, chunk=2, gamma=2, sinks=2, window=8, refresh=None),
    ):
        counts = np.zeros(25)
        for seed in range(500):
            a, b = generate(target, head, max_tokens=2, temperature=1.0, proposer=proposer, seed=seed).tokens
            counts[5 * a + b] += 1
        keep = law * 500 > 5
        found = np.append(counts[keep], counts[~keep].sum())
        expected = np.append(law[keep], law[~keep].sum()) * 500
        if expected[-1] == 0:
            found, expected = found[:-1], expected[:-1]
        assert chisquare(found, expected * found.sum() / expected.sum()).pvalue > 0.01, proposer.name


@pytest.mark.parametrize("levels", [2, 3])
@pytest.mark.parametrize("gamma", [1, 2, 3])
def test_hierarchy_has_the_law_of_the_target(levels, gamma):
    target, middle, small = Table(3, 1), Table(3, 2, zeros=0), Table(3, 3, zeros=0)

    def law(resample):
        def run(head, draw):
            tokens, laws, _, _ = draft_middle(
                (lambda path: small((*head, *path))) if levels == 3 else None,
                lambda path, guess: (
                    middle((*head, *path)),
                    None if guess is None else middle((*head, *path, guess)),
                ),
                gamma,
                draw,
                resample=resample,
            )
            rows = np.stack([target((*head, *tokens[:i])) for i in range(len(tokens) + 1)])
            stood, token = verify_chain(tokens, laws, rows, draw)
            return [*tokens[:stood], token]

        return outcomes(lambda draw: first_two(run, draw, target))

    assert same_law(law("residual"), law_of_two(target))
    if levels == 3:
        assert not same_law(law("middle"), law_of_two(target), 1e-3), "the biased rule must be caught"


def test_a_short_prompt_skips_the_hierarchy_and_bytes_fall_on_a_long_one(models):
    target, draft = models
    short = generate(target, PROMPT, max_tokens=8, proposer=TriForce(draft, budget=32))
    assert short.proposed == 0
    long = PROMPT * 30
    plain = generate(target, long, max_tokens=24)
    found = generate(target, long, max_tokens=24, proposer=TriForce(draft, budget=64, window=60))
    assert found.tokens == plain.tokens
    assert found.details["small_passes"] > 0
    assert 0 <= found.details["inner_acceptance"] <= 1


def test_shapes_are_compared_and_parsed(models, prompt):
    target, draft = models
    rates = rank_rates(target, draft, [prompt * 2], ranks=4)
    assert 0 <= sum(rates) <= 1
    sampled = rank_rates(target, draft, [prompt * 2], temperature=0.6, ranks=3)
    assert sampled[0] > 0
    shapes = parse_shapes("chain:3,kary:2x2,fixed:6,dynamic:6,layered:6", target, draft, [prompt])
    rows = compare(target, draft, [prompt], shapes, max_tokens=16)
    assert [r.name for r in rows] == ["chain 3", "2-ary 2", "fixed 6", "dynamic 6", f"dynamic 6 layered {1 / 6:g}"]
    assert all(r.accepted <= r.tokens_per_pass for r in rows)
    for bad in ("star:3", "chain:x"):
        with pytest.raises(ConfigurationError):
            parse_shapes(bad, target, draft, [prompt])


def test_bad_input_is_one_line(models):
    target, draft = models
    with pytest.raises(InvalidRequestError, match="no tokens"):
        generate(target, [])
    with pytest.raises(ContextLengthError, match="1024"):
        generate(target, PROMPT, max_tokens=2000)
    with pytest.raises(ConfigurationError, match="vocabulary"):
        generate(target, PROMPT, proposer=TreeDraft(tiny(), Chain(2)))
    with pytest.raises(ConfigurationError, match="vocabulary"):
        generate(target, PROMPT, proposer=TriForce(tiny()))
    with pytest.raises(ConfigurationError, match="multiple"):
        TriForce(budget=100, chunk=8)
    with pytest.raises(ConfigurationError, match="choose"):
        TriForce(choose="best")


def test_a_tree_beyond_the_cache_is_refused_before_it_is_written(models):
    """5,000 guesses once wrote past the end of the cache."""
    target, draft = models
    wide = FixedTree(tuple([-1] * 1200))
    with pytest.raises(ContextLengthError, match="smaller tree"):
        generate(target, PROMPT, max_tokens=4, proposer=TreeDraft(draft, wide))
    deep = TreeDraft(draft, Chain(40))
    deep.begin(40)
    with pytest.raises(ContextLengthError, match="cache for 40"):
        deep.grow(PROMPT, None)


def test_shapes_need_a_prompt_to_be_compared_on(models):
    with pytest.raises(ConfigurationError, match="at least 2"):
        compare(*models, [], [Chain(2)])


@pytest.mark.parametrize(("budget", "chunk", "said"), [(13, 8, "from 32 on"), (24, 8, "multiple of 8"), (8, 0, "give")])
def test_a_budget_is_whole_chunks(budget, chunk, said):
    with pytest.raises(ConfigurationError, match=said):
        TriForce(None, budget=budget, chunk=chunk)
