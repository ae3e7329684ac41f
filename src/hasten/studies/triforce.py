"""TriForce: a model drafts for itself with the part of its cache that matters, and keeps every token.

"TriForce: Lossless Acceleration of Long Sequence Generation with Hierarchical Speculative Decoding", Sun et al. 2024,
arXiv:2404.11912. Exactness by enumeration; acceptance with a small decoder that is trained here to recall records;
speed on the embedded 4 M model, whose 1,024 tokens of context are stretched by YaRN without training (so its text gets
worse with length, its cache does not get smaller), over library code.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from hasten.studies._recall import Question, question, recall_model
from hasten.studies._speculation import Table, first_two, law_gap, law_of_two
from hasten.studies.study import Check, Scale, Study

__all__ = ["long_model", "long_prompt", "study"]


def long_model(context: int = 16_384, *, dtype: str = "bf16") -> Any:
    """The embedded model with its rotation stretched to ``context`` tokens."""
    from hasten.language import load
    from hasten.language.loading import LanguageModel
    from hasten.nn import RotaryScaling

    model = load("pycode-4m")
    scaling = RotaryScaling(kind="yarn", factor=context / 1024, original_context=1024)
    config = replace(model.config, max_position_embeddings=context, rope_scaling=scaling)
    decoder = model.decoder
    decoder.config = config
    for layer in decoder.model.layers:
        layer.self_attn.config = config  # type: ignore[union-attr]
    return LanguageModel(f"pycode-4m-{context}", config, folder=model.folder, decoder=decoder, precision=dtype)


def long_prompt(tokenizer: Any, tokens: int, skip: int = 0) -> list[int]:
    """Held-out library files, end to end."""
    from hasten.language.corpus import documents

    out: list[int] = []
    for document in documents(suite=False):
        if document.split != "train" and len(document.text) > 4000:
            out += tokenizer.encode(document.text[:24_000])
        if len(out) >= tokens + skip:
            break
    return out[skip : skip + tokens]


def run(scale: Scale) -> Iterator[Check]:
    """The checks of the card."""
    yield from law(scale)
    scale.progress("model", 0.1)
    model = long_model()
    yield from identity(scale)
    scale.progress("retrieval", 0.3)
    yield from recalled(scale)
    yield from retrieval(model, scale)
    scale.progress("speed", 0.5)
    yield from speed(model, scale)
    yield Check.unavailable("7B shape at 128k on a GPU", "no GPU here", "s")
    scale.progress("done", 1.0)


def law(scale: Scale) -> Iterator[Check]:
    """Three levels of tables, every draw enumerated, and the rule of the public code as a control."""
    from hasten.language.speculate.law import outcomes
    from hasten.language.speculate.triforce import draft_middle
    from hasten.language.speculate.verify import verify_chain

    gaps = {"residual": 0.0, "middle": 0.0}
    for seed in range(scale.choose(quick=1, full=3)):
        target, middle, small = Table(3, seed), Table(3, 50 + seed, 0), Table(3, 90 + seed, 0)
        for rule in gaps:

            def one(
                head: tuple[int, ...],
                draw: Any,
                rule: str = rule,
                t: Table = target,
                m: Table = middle,
                s: Table = small,
            ) -> list[int]:
                tokens, laws, _, _ = draft_middle(
                    lambda path: s((*head, *path)),
                    lambda path, guess: (m((*head, *path)), None if guess is None else m((*head, *path, guess))),
                    2,
                    draw,
                    resample=rule,
                )
                rows = np.stack([t((*head, *tokens[:i])) for i in range(len(tokens) + 1)])
                stood, token = verify_chain(tokens, laws, rows, draw)
                return [*tokens[:stood], token]

            gaps[rule] = max(gaps[rule], law_gap(outcomes(partial(first_two, one)), law_of_two(target)))
    yield Check.at_most("gap of the output law to the target's, three levels", gaps["residual"], 1e-10)
    yield Check.at_least("gap when an inner rejection samples the middle law (must be caught)", gaps["middle"], 1e-3)


def identity(scale: Scale) -> Iterator[Check]:
    """Greedy tokens, with and without the small model, in fp32."""
    from hasten.language import load
    from hasten.language.speculate import TriForce, generate

    model = long_model(8192, dtype="fp32")
    small = load("pycode-draft-0.7m", dtype="fp32")
    count, wrong = scale.choose(quick=32, full=250), 0
    for context in scale.choose(quick=(1024,), full=(1024, 4096)):
        prompt = long_prompt(model.tokenizer, context)
        plain = generate(model, prompt, max_tokens=count).tokens
        for plan in (TriForce(None, budget=256), TriForce(small, budget=256)):
            found = generate(model, prompt, max_tokens=count, proposer=plan).tokens
            wrong += sum(a != b for a, b in zip(plain, found, strict=True))
    yield Check.equal("tokens that differ from plain greedy decoding", wrong, 0, note=f"{count} tokens a run")


def recalled(scale: Scale) -> Iterator[Check]:
    """Acceptance of the model with part of its cache, by how the part is chosen, where answers stand far back.

    Judged is the choice by attention; that by mean keys, as published, is in the notes: a record is one word among
    eight that the query means, and the mean of their keys hides it.
    """
    from hasten.language.speculate import TriForce, generate

    names = ("acceptance with retrieved chunks", "acceptance beyond sinks and recent tokens of the same budget")
    if scale.quick:
        for name in names:
            yield Check.unavailable(name, "needs a model trained on recall, some 6 minutes once; run without --quick")
        return
    model = recall_model(scale)
    plans: dict[str, dict[str, Any]] = {
        "mass": {},
        "mean keys": {"choose": "query", "follow": False},
        "recent": {"choose": "recent"},
        "random": {"choose": "random"},
    }
    for context, count in ((4096, 24), (8192, 12), (16_000, 6)):
        rng = np.random.default_rng(scale.seed + context)
        asked = [question(rng, context) for _ in range(count)]
        found: dict[str, list[int]] = {name: [] for name in plans}
        right = same = words = 0
        for number, one in enumerate(asked):
            for name, values in found.items():
                plan = TriForce(None, budget=512, **plans[name])
                given = generate(
                    model, one.prompt, max_tokens=len(one.answer), temperature=0.6, proposer=plan, seed=number
                )
                values += [given.accepted, given.proposed]
            plain = generate(model, one.prompt, max_tokens=len(one.answer)).tokens
            plan = TriForce(None, budget=512, **plans["mass"])
            greedy = generate(model, one.prompt, max_tokens=len(one.answer), proposer=plan)
            right += tuple(plain) == one.answer
            words += sum(a == b for a, b in zip(plain, one.answer, strict=True))
            same += greedy.tokens == plain
            scale.progress(f"recall at {context} tokens", 0.3 + 0.2 * number / len(asked))
        rates = {k: sum(v[::2]) / max(1, sum(v[1::2])) for k, v in found.items()}
        shown = ", ".join(f"{k} {v:.2f}" for k, v in rates.items())
        note = (
            f"{shown}; 512 of {context} tokens, {right} of {count} answers of 6 words right "
            f"({words / 6 / count:.0%} of the words), temperature 0.6"
        )
        yield Check.at_least(f"{names[0]}, {context} tokens", rates["mass"], 0.9, "", note)
        yield Check.at_least(f"{names[1]}, {context} tokens", rates["mass"] - rates["recent"], 0.1, "", note)
        least = min(rates["mass"], rates["recent"])
        name = f"acceptance with random chunks, no better than either, {context} tokens"
        yield Check.at_most(name, rates["random"], least, "", note)
        yield Check.equal(f"greedy answers equal to plain decoding, {context} tokens", same, count)
        yield from _served(model, asked, context)


def _served(model: Any, asked: list[Question], context: int) -> Iterator[Check]:
    """The same prompts through the engine, whose middle level draws with the sequence's own numbers."""
    from hasten.language.params import SamplingParams
    from hasten.language.speculate import RetrievalProposer
    from hasten.serve.engine import Engine
    from hasten.serve.policy import FixedSpeculation, make

    answers: dict[str, list[list[int]]] = {}
    rates: dict[str, float] = {}
    ways: dict[str, dict[str, Any] | None] = {
        "plain": None,
        "mass": {},
        "mean keys": {"choose": "query", "follow": False},
    }
    for name, knobs in ways.items():
        proposer = None if knobs is None else RetrievalProposer(None, budget=512, gamma=6, least=0.0, **knobs)
        engine = Engine(
            model, make("stall-free", token_budget=2048), num_blocks=context // 16 + 16, prefix_sharing=False,
            proposer=proposer, speculation=None if proposer is None else FixedSpeculation(6),
        )  # fmt: skip
        answers[name] = []
        for number, one in enumerate(asked):
            params = SamplingParams(max_tokens=len(one.answer), temperature=0.6, seed=number, ignore_eos=True)
            answers[name].append(engine.generate([list(one.prompt)], params)[0].tokens)
        if engine.speculation is not None:
            rates[name] = engine.speculation.acceptance
    same = sum(a == b for a, b in zip(answers["mass"], answers["plain"], strict=True))
    note = ", ".join(f"{k} {v:.2f}" for k, v in rates.items()) + "; temperature 0.6"
    yield Check.at_least(f"acceptance in the engine, {context} tokens", rates["mass"], 0.9, "", note)
    yield Check.equal(f"sampled answers of the engine equal to plain ones, {context} tokens", same, len(asked))


def retrieval(model: Any, scale: Scale) -> Iterator[Check]:
    """The same on library code, with the embedded model stretched to a context that it was not trained on."""
    from hasten.language.speculate import TriForce, generate

    context = scale.choose(quick=2048, full=8192)
    found: dict[str, list[float]] = {"mass": [], "query": [], "recent": [], "random": []}
    for number in range(scale.choose(quick=1, full=4)):
        prompt = long_prompt(model.tokenizer, context, 1500 * number)
        for choose, values in found.items():
            plan = TriForce(None, budget=512, choose=choose, follow=choose == "mass")
            answer = generate(model, prompt, max_tokens=48, temperature=0.6, proposer=plan, seed=number)
            values.append(answer.acceptance)
    means = {k: float(np.mean(v)) for k, v in found.items()}
    shown = ", ".join(f"{k} {v:.2f}" for k, v in means.items())
    note = f"{shown}; 512 of {context} tokens; not judged: the model never learned to look so far back"
    yield Check("acceptance with retrieved chunks, library code", means["mass"], "", "", None, note)


def speed(model: Any, scale: Scale) -> Iterator[Check]:
    """Bytes and time per token at growing contexts; four tokens are drafted, since three of five stand here."""
    from hasten.language import load
    from hasten.language.speculate import TriForce, generate

    def plan(small: Any = None) -> TriForce:
        return TriForce(small, budget=512, gamma=4)

    def cache_bytes(one: Any) -> float:
        """Of the cache, per token: what was read without the weights of each pass."""
        weights = model.executor.weight_bytes * (one.target_calls + one.draft_calls)
        return float((one.bytes_read - weights) / max(1, len(one.tokens) - 1))

    gains = {}
    contexts = scale.choose(quick=(2048, 4096), full=(4096, 8192, 15_872))
    for context in contexts:
        tokens = scale.choose(quick=32, full=96)
        runs, times = [], []
        for number in range(scale.choose(quick=1, full=3 if context == contexts[-1] else 5)):
            prompt = long_prompt(model.tokenizer, context, 1500 * number)
            pair, both = _in_turns(model, prompt, plan(), scale, max_tokens=tokens)
            runs.append(pair)
            times.append(both)
        seconds, shorter = (sum(t[i] for t in times) / len(times) for i in (0, 1))
        gains[context] = seconds / shorter
        if context == contexts[-1]:
            small, three = load("pycode-draft-0.7m"), []
            for number in range(len(runs)):
                prompt = long_prompt(model.tokenizer, context, 1500 * number)
                three.append((runs[number][0], generate(model, prompt, max_tokens=tokens, proposer=plan(small))))
            for name, count, pairs in (
                ("bytes of keys and values read", cache_bytes, runs),
                ("bytes read, weights too and with the small model,", lambda one: float(one.bytes_per_token), three),
            ):
                read, less = (sum(count(p[i]) for p in pairs) / len(pairs) for i in (0, 1))
                yield Check.at_most(
                    f"{name} per token over plain decoding, {context} tokens",
                    less / read,
                    0.5,
                    "×",
                    f"{read / 1e6:.1f} → {less / 1e6:.1f} MB, counted, views included",
                )
            yield Check.at_most(
                f"time per token over plain decoding, {context} tokens",
                1 / gains[context],
                0.75,
                "×",
                f"{seconds * 1e3:.2f} → {shorter * 1e3:.2f} ms, acceptance "
                + ", ".join(f"{r[1].acceptance:.2f}" for r in runs),
            )
    values = list(gains.values())
    yield Check(
        "speed-up by context",
        ", ".join(f"{k}: {v:.2f}" for k, v in gains.items()),
        "×",
        "rising",
        values == sorted(values),
    )
    rates, speeds = {}, {}
    prompt = long_prompt(model.tokenizer, contexts[-1])
    for temperature in (0.2, 0.6, 1.0):
        tokens = scale.choose(quick=24, full=64)
        (_, ours), (longer, shorter) = _in_turns(
            model, prompt, plan(), scale, max_tokens=tokens, temperature=temperature, seed=1
        )
        rates[temperature] = ours.acceptance
        speeds[temperature] = longer / shorter
    yield Check.at_least(
        "least acceptance at temperatures 0.2, 0.6, 1.0",
        min(rates.values()),
        0.5,
        "",
        ", ".join(f"{k:g}: {v:.2f}" for k, v in rates.items()),
    )
    yield Check.at_least(
        f"least speed-up at temperatures 0.2, 0.6, 1.0, {contexts[-1]} tokens",
        min(speeds.values()),
        1.0,
        "×",
        ", ".join(f"{k:g}: {v:.2f}" for k, v in speeds.items()),
    )


def _in_turns(
    model: Any, prompt: list[int], plan: Any, scale: Scale, **options: Any
) -> tuple[tuple[Any, Any], tuple[float, float]]:
    """One answer without and with ``plan``, and the medians of seconds per token over three turns of each.

    An answer takes a tenth of a second or two, so a single stall of the machine would decide.
    """
    from hasten.language.speculate import generate

    runs = []
    for turn in range(scale.choose(quick=1, full=3)):
        order = (None, plan) if turn % 2 == 0 else (plan, None)
        found = [generate(model, prompt, proposer=one, **options) for one in order]
        runs.append(found if turn % 2 == 0 else found[::-1])
    plain, ours = (float(np.median([r[i].seconds_per_token for r in runs])) for i in (0, 1))
    return (runs[0][0], runs[0][1]), (plain, ours)


study = Study(
    system="triforce",
    claim="Hierarchical speculation with a retrieval cache speeds up long-context decoding and loses nothing.",
    published={
        "Llama2-7B-128K, one A100": "up to 2.31x (abstract; prefill 124,928, budget 4096, gamma 6)",
        "offload, two RTX 4090": "0.108 s/token, 7.78x over their optimised offloading",
    },
    run=run,
)
