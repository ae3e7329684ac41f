"""DySpec: trees of guesses that grow where the draft is sure are accepted more than fixed shapes.

"DySpec: Faster Speculative Decoding with Dynamic Token Tree Structure", Xiong et al. 2024, arXiv:2410.11744. Exactness
by enumeration of the real code; acceptance on the embedded pair (4 M target, 0.7 M draft) over held-out Python, and on
two further texts where they are at hand. The published targets are a hundred times as slow against their draft; time is
measured with a target made twenty times as slow.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np

from hasten.studies._speculation import Table, first_two, law_gap, law_of_two, prompts, rows_of
from hasten.studies.study import Check, Scale, Study

__all__ = ["study"]


def run(scale: Scale) -> Iterator[Check]:
    """The checks of the card."""
    yield from law(scale)
    scale.progress("models", 0.1)
    from hasten.language import load

    target, draft = load("pycode-4m", dtype="fp32"), load("pycode-draft-0.7m", dtype="fp32")
    texts = {"held-out Python": prompts(target.tokenizer, scale.choose(quick=4, full=36), 96, scale.seed)}
    texts |= _other_texts(target.tokenizer, scale)
    yield from greedy(target, draft, texts["held-out Python"], scale)
    scale.progress("correlation", 0.25)
    yield from correlation(target, draft, texts["held-out Python"])
    scale.progress("shapes", 0.3)
    yield from shapes(target, draft, texts, scale)
    scale.progress("tiles and time", 0.9)
    yield from tiles(draft, texts["held-out Python"][: scale.choose(quick=2, full=8)])
    yield from time(draft, texts["held-out Python"], scale)
    scale.progress("done", 1.0)


def law(scale: Scale) -> Iterator[Check]:
    """The law of the first two tokens by enumeration, and a control that must fail."""
    from hasten.language.speculate import DynamicTree, KAry, TokenTree
    from hasten.language.speculate.law import outcomes
    from hasten.language.speculate.verify import verify_tree

    worst, control = 0.0, 0.0
    for seed in range(scale.choose(quick=2, full=6)):
        target, draft = Table(3, seed), Table(3, 100 + seed)

        def one(head: tuple[int, ...], draw: Any, t: Table = target, d: Table = draft) -> list[int]:
            tree = DynamicTree(4).grow(d.distributions(head), draw)
            path, token = verify_tree(tree, rows_of(t, tree, head), draw)
            return [*(tree.tokens[i] for i in path), token]

        def biased(head: tuple[int, ...], draw: Any, t: Table = target, d: Table = draft) -> list[int]:
            tree = KAry(2, 1).grow(d.distributions(head), draw)
            kept = TokenTree()
            for i in range(len(tree)):
                if tree.values[i] > 0.4:
                    kept.add(tree.tokens[i], -1, tree.residuals[i])
            path, token = verify_tree(kept, rows_of(t, kept, head), draw)
            return [*(kept.tokens[i] for i in path), token]

        worst = max(worst, law_gap(outcomes(partial(first_two, one)), law_of_two(target)))
        control = max(control, law_gap(outcomes(partial(first_two, biased)), law_of_two(target)))
    yield Check.at_most("gap of the output law to the target's, every draw enumerated", worst, 1e-10)
    yield Check.at_least("gap when drawn tokens are dropped by their value (must be caught)", control, 1e-3)


def greedy(target: Any, draft: Any, asked: list[list[int]], scale: Scale) -> Iterator[Check]:
    """A thousand tokens, token for token."""
    from hasten.language.speculate import Chain, DynamicTree, FixedTree, TreeDraft, generate

    length = scale.choose(quick=64, full=128)
    count = scale.choose(quick=2, full=8)
    plain = [generate(target, p, max_tokens=length).tokens for p in asked[:count]]
    wrong = 0
    for shape in (Chain(5), FixedTree((-1, -1, 0, 0, 1)), DynamicTree(16), DynamicTree(16, 1 / 16)):
        for prompt, expected in zip(asked, plain, strict=False):
            found = generate(target, prompt, max_tokens=length, proposer=TreeDraft(draft, shape)).tokens
            wrong += found != expected
    yield Check.equal(
        "answers that differ from plain greedy decoding",
        wrong,
        0,
        note=f"{4 * count * length} tokens, four shapes, fp32",
    )


def correlation(target: Any, draft: Any, asked: list[list[int]]) -> Iterator[Check]:
    """The draft's probability of a token against how often the target has it."""
    from scipy.stats import spearmanr

    from hasten.language.speculate.compare import laws_of

    chances, stands = [], []
    for tokens in asked:
        t, q = laws_of(target, tokens, 0.6), laws_of(draft, tokens, 0.6)
        rng = np.random.default_rng(0)
        for a, b in zip(t[8:], q[8:], strict=True):
            token = int(rng.choice(len(b), p=b / b.sum()))
            chances.append(b[token])
            stands.append(min(1.0, a[token] / b[token]))
    order = np.argsort(chances)
    buckets = np.array_split(order, 10)
    means = [(np.mean(np.array(chances)[b]), np.mean(np.array(stands)[b])) for b in buckets]
    value = float(spearmanr([m[0] for m in means], [m[1] for m in means]).statistic)
    note = ", ".join(f"{q:.2f}→{s:.2f}" for q, s in means[::3])
    yield Check.at_least("rank correlation of draft probability and acceptance, ten buckets", value, 0.9, note=note)


def shapes(target: Any, draft: Any, texts: dict[str, list[list[int]]], scale: Scale) -> Iterator[Check]:
    """Guesses that stand per target pass, at equal size, with a paired bootstrap over prompts.

    A third of the prompts fits the fixed tree, and curves of acceptance. Greedily the published rule is judged, which
    takes the draft's probability for the chance to stand; drawn guesses stand far more often than that, so at a
    temperature the tree that uses the curves is. The note has both. Sampled texts go apart after a few tokens, so there
    a second check compares the best fixed shape and the dynamic tree at the same places of one sampled text.
    """
    from hasten.language.speculate import Chain, DynamicTree, FixedTree, KAry
    from hasten.language.speculate.calibrate import AcceptanceCurve
    from hasten.language.speculate.compare import compare

    rng = np.random.default_rng(scale.seed)

    def judged(name: str, gains: Any, note: str) -> Check:
        resampled = gains[rng.integers(0, len(gains), (2000, len(gains)))].mean(1)
        low = float(np.quantile(resampled, 0.025))
        note += f"; interval from {low:.3f}, {len(gains)} prompts"
        return Check(name, float(gains.mean()), "tokens", "> 0, 95 % interval above 0", bool(low > 0), note)

    todo = [(n, t, k) for n in scale.choose(quick=(16,), full=(16, 64)) for t in (0.0, 0.6) for k in texts]
    for number, (size, temperature, name) in enumerate(todo):
        scale.progress(f"shapes of {size}, temperature {temperature:g}, {name}", 0.3 + 0.6 * number / len(todo))
        asked = texts[name] if size == 16 else texts[name][: len(texts[name]) * 2 // 3]
        part = max(1, len(asked) // 3)
        fixed = FixedTree.fit(target, draft, asked[:part], size, temperature=temperature)
        curves = AcceptanceCurve.fit_ranks(target, draft, asked[:part], temperature=temperature)
        plans: list[Any] = [
            Chain(min(size, 12)),
            KAry(2, 9 if size == 64 else 4, budget=size),
            fixed,
            DynamicTree(size),
            DynamicTree(size, calibrate=curves[0], calibrate_siblings=curves[1:]),
        ]
        length = scale.choose(quick=32, full=48)
        rows = compare(
            target, draft, asked[part:], plans, max_tokens=length, temperature=temperature, seed=scale.seed
        )  # fmt: skip
        dynamic = np.array(rows[-1 if temperature > 0 else -2].per_prompt)
        best = max(range(3), key=lambda i: rows[i].accepted)
        shown = ", ".join(f"{r.name} {r.accepted:.2f}" for r in rows[:-1])
        shown += f", calibrated {rows[-1].accepted:.2f}"
        where = f"{name}, size {size}, temperature {temperature:g}"
        yield judged(f"accepted per pass beyond the best fixed shape, {where}", dynamic - rows[best].per_prompt, shown)
        if temperature > 0:
            found = same_places(target, draft, asked[part:], [plans[best], plans[-1]], temperature, length, scale.seed)
            shown = f"{plans[best].name} {found[:, 0].mean():.2f}, calibrated {found[:, 1].mean():.2f}, expected"
            yield judged(f"the same at the same places of a text, {where}", found[:, 1] - found[:, 0], shown)


def same_places(
    target: Any, draft: Any, asked: list[list[int]], plans: list[Any], temperature: float, length: int, seed: int,
    every: int = 4,
) -> Any:  # fmt: skip
    """Guesses expected to stand (prompts, plans), averaged over places of a text that the target samples."""
    from hasten.language.speculate import TreeDraft, generate
    from hasten.language.speculate.law import Dice
    from hasten.language.speculate.session import Session
    from hasten.language.speculate.verify import expected_accepted, probabilities

    found = np.zeros((len(asked), len(plans)))
    for number, prompt in enumerate(asked):
        more = generate(target, prompt, max_tokens=length, temperature=temperature, seed=seed + number).tokens
        known = [*prompt, *more]
        places = range(len(prompt) + 1, len(known), every)
        for column, plan in enumerate(plans):
            grower, session = TreeDraft(draft, plan), Session(target.executor, len(known) + 400)
            grower.begin(len(known) + 400)
            dice = Dice(seed + 1000 + number)
            for end in places:
                tree = grower.grow(known[:end], dice)
                grower.settle([])
                pending = known[session.done : end]
                logits = session.check(pending, tree.parents, tree.tokens)
                laws = probabilities(logits[len(pending) - 1 :].numpy(), temperature=temperature)
                found[number, column] += expected_accepted(tree, laws) / len(places)
                session.keep(len(pending), [])
    return found


def tiles(draft: Any, asked: list[list[int]]) -> Iterator[Check]:
    """Blocks of the attention mask, depth first against the order of growth: best place first, and level by level."""
    from hasten.language.speculate import DynamicTree, TreeDraft

    for name, shape in (("best first", DynamicTree(768)), ("level by level", DynamicTree(768, 1e-4))):
        found = []
        for prompt in asked:
            grower = TreeDraft(draft, shape)
            grower.begin(len(prompt) + 800)
            tree = grower.grow(prompt, None)
            found.append((tree.tiles(), tree.depth_first()[0].tiles()))
        grown, ordered = (sum(column) for column in zip(*found, strict=True))
        least = min(a / b for a, b in found)
        yield Check.at_least(
            f"32 × 32 tiles of the mask, order of growth over depth first, 768 nodes grown {name}",
            grown / ordered,
            1.5,
            "×",
            f"{grown} against {ordered} on {len(found)} prompts, {least:.2f} on the worst of them",
        )


def time(draft: Any, asked: list[list[int]], scale: Scale) -> Iterator[Check]:
    """Seconds per token with a target of at least twenty times the draft's cost.

    The target computes what the embedded model does, with feed-forward layers that are wide enough for that cost; what
    was added ends in zeros.
    """
    from hasten.language import load
    from hasten.language.loading import LanguageModel
    from hasten.language.speculate import DynamicTree, TreeDraft, generate
    from hasten.studies._grouped import widened

    model = load("pycode-4m")
    wide = widened(model.decoder.float(), scale.choose(quick=40_000_000, full=200_000_000))
    target = LanguageModel("pycode-4m, wide", wide.config, folder=model.folder, decoder=wide, precision="bf16")
    small = load("pycode-draft-0.7m", dtype="bf16")
    totals = {"plain": 0.0, "tree": 0.0, "draft": 0.0}
    calls = passes = tokens = 0
    some = asked[: scale.choose(quick=2, full=8)]
    for number, prompt in enumerate([some[0], *some]):
        for name, one, proposer in (
            ("plain", target, None),
            ("tree", target, TreeDraft(small, DynamicTree(15, 0.1))),
            ("draft", small, None),
        ):
            if number == 0:  # what is compiled or allocated once
                generate(one, prompt, max_tokens=8, proposer=proposer)
                continue
            found = generate(one, prompt, max_tokens=scale.choose(quick=24, full=64), proposer=proposer)
            totals[name] += found.seconds
            if proposer is not None:
                calls, passes = calls + found.draft_calls, passes + found.target_calls
                tokens += len(found.tokens) - 1
    yield Check.at_least("cost of a token of the target over the draft's", totals["plain"] / totals["draft"], 20, "×")
    yield Check.at_least(
        "speed over plain greedy decoding, one sequence",
        totals["plain"] / totals["tree"],
        1.5,
        "×",
        f"{tokens} tokens in {passes} target passes and {calls} draft calls, {totals['plain'] / tokens * 1e3:.1f} ms a "
        f"token without a tree; a tree of 15, since 16 rows are one matrix tile, by levels of at least 0.1",
    )


def _other_texts(tokenizer: Any, scale: Scale) -> dict[str, list[list[int]]]:
    out = {}
    rng = np.random.default_rng(scale.seed)
    path = scale.find("text/tinyshakespeare.txt.gz")
    if path is not None:
        text = gzip.decompress(path.read_bytes()).decode()
        starts = rng.integers(0, len(text) - 800, scale.choose(quick=4, full=24))
        out["Shakespeare"] = [tokenizer.encode(text[s : s + 800])[:96] for s in starts]
    path = scale.find("text/xquad_en.jsonl.gz")
    if path is not None:
        lines = [json.loads(line)["context"] for line in gzip.decompress(path.read_bytes()).decode().splitlines()]
        lines = [x for x in dict.fromkeys(lines) if len(x) > 500]
        out["XQuAD"] = [tokenizer.encode(lines[i])[:96] for i in range(scale.choose(quick=4, full=24))]
    return out


study = Study(
    system="dyspec",
    claim="Token trees grown by the draft's confidence have more guesses accepted than fixed trees of equal size.",
    published={
        "Llama2-70B, low temperature": "throughput up to 9.1x, latency up to 9.4x lower, against a very slow target",
        "high temperature": "throughput up to 6.21x",
        "acceptance": "higher than fixed trees (SpecInfer, Sequoia)",
    },
    run=run,
)
