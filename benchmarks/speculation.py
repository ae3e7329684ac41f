"""Speculation, attention in shares, KV caches as bitstreams: the bars of this part, each as a ratio in one run.

Rows with a bar: greedy decoding with the embedded pair at batch 1, prompt lookup on edits, the server's engine at batch
1 to 32, a 245 M target with a draft of a set acceptance against theory, coding a cache against computing it, and
TriForce from 8,192 tokens on, and trees by counts. `--only NAME` runs one part; a busy machine makes pieces of it with
`--contexts` and `--batches`.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from harness import Row, options, report

from hasten.clock import MonotonicClock
from hasten.measure.stats import paired_ratio

CLOCK = MonotonicClock()
PARTS = ("pair", "edit", "loads", "theory", "codec", "codes", "triforce", "dyspec", "lean")
CONTEXTS: tuple[int, ...] = (8192, 16_384, 32_768)
BATCHES: tuple[int, ...] = (2, 4, 8, 16, 32)


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", choices=PARTS, action="append")
    parser.add_argument("--contexts", help="of triforce, such as 8192,16384")
    parser.add_argument("--batches", help="of loads, such as 2,4")
    arguments = parser.parse_args()
    global CONTEXTS, BATCHES
    if arguments.contexts:
        CONTEXTS = tuple(int(c) for c in arguments.contexts.split(","))
    if arguments.batches:
        BATCHES = tuple(int(b) for b in arguments.batches.split(","))
    import numba
    import torch

    torch.set_num_threads(arguments.threads)
    numba.set_num_threads(arguments.threads)
    rows: list[Row] = []
    for part in arguments.only or PARTS:
        rows += globals()[part](arguments.rounds)
    report("speculation", rows, arguments.json, threads=arguments.threads)


def _answer(engine: Any, prompt: list[int], count: int) -> tuple[list[int], float]:
    """``count`` tokens, greedy and alone, and seconds per token behind the step that finished the prompt."""
    from hasten.language.params import SamplingParams

    engine.add(prompt, SamplingParams(max_tokens=count, temperature=0.0, ignore_eos=True))
    got: list[int] = []
    while not got:
        got += [o.token for o in engine.step()]
    head, began = len(got), CLOCK.now()
    while engine.has_work:
        got += [o.token for o in engine.step()]
    return got, (CLOCK.now() - began) / (len(got) - head)


def pair(rounds: int) -> list[Row]:
    """The embedded model and its draft, one sequence, held-out library code."""
    from hasten.language import load
    from hasten.language.speculate.choose import choose
    from hasten.serve.bench.speculate import measure_speculation, python_prompts

    model = load("pycode-4m")
    out = []
    for how, bar, aim in (("auto", 1.5, 2.2), ("draft", None, None)):
        found = measure_speculation(
            model,
            lambda how=how: choose(model, how),
            python_prompts(model.tokenizer, 24, 256),
            batches=(1,),
            max_tokens=128,
            rounds=2 * rounds,
        )[0]
        note = f"{found.tokens_per_pass:.2f} tokens a pass, {found.acceptance:.0%} of guesses stood"
        out.append(
            Row(
                f"greedy, batch 1, {how}",
                "without guesses",
                found.speculative,
                found.plain,
                "tokens/s",
                found.speedup,
                found.low,
                found.high,
                bar,
                aim,
                note=note,
            )
        )
    return out


def edits(tokenizer: Any, count: int, seed: int = 0) -> list[tuple[list[int], list[int]]]:
    """Pairs (prompt, answer): part of a file, and the same with one name changed, as an editor's model writes."""
    from hasten.language.corpus import documents

    rng, out = random.Random(seed), []
    texts = [d.text for d in documents(suite=False) if d.split == "test" and len(d.text) > 4000]
    for text in texts[:count]:
        piece = text[1000:2200]
        words = [w for w in piece.replace("(", " ").replace(".", " ").split() if w.isidentifier() and len(w) > 4]
        name = rng.choice(words or ["value"])
        prompt = f"# old\n{piece}\n# new: {name} is renamed to {name}_new\n"
        out.append((tokenizer.encode(prompt), tokenizer.encode(piece.replace(name, f"{name}_new"))))
    return out


def edit(rounds: int) -> list[Row]:
    """Prompt lookup where the answer repeats the prompt.

        The embedded model does not follow instructions, so its answer is forced to be the edited text: its logits are
        computed as always, the known token is raised above them. Steps cost what they cost; guesses stand or fall
    by the text.
    """
    from hasten.language import load
    from hasten.language.speculate import PromptLookup
    from hasten.serve.engine import Engine
    from hasten.serve.policy import make

    model = load("pycode-4m")
    cases = [(p[:560], a[:300]) for p, a in edits(model.tokenizer, 2 * rounds) if len(p) < 700 and len(a) > 100]
    engines = {}
    for name, proposer in (("plain", None), ("lookup", PromptLookup())):
        forced = _Forced(model.executor, 4096)
        engines[name] = (Engine(forced, make("stall-free"), prefix_sharing=False, proposer=proposer), forced)
    times: dict[str, list[float]] = {name: [] for name in engines}
    for turn, (prompt, answer) in enumerate(cases):
        for name in list(engines) if turn % 2 == 0 else list(engines)[::-1]:
            engine, forced = engines[name]
            forced.script = [*prompt, *answer]
            got, seconds = _answer(engine, prompt, len(answer))
            assert got == answer, "the answer was not the script"
            if turn:
                times[name].append(seconds)
    ratio = paired_ratio(times["plain"], times["lookup"])
    rates = [1 / float(np.median(times[n])) for n in ("lookup", "plain")]
    stats = engines["lookup"][0].speculation
    return [
        Row(
            "prompt lookup, edits",
            "without guesses",
            rates[0],
            rates[1],
            "tokens/s",
            ratio.value,
            ratio.low,
            ratio.high,
            2.0,
            note=f"{stats.acceptance:.0%} of guesses stood, {stats.mean_length:.1f} a pass",
        )
    ]


class _Forced:
    """An executor whose likeliest token is that of a script, whatever it computes."""

    def __init__(self, executor: Any, vocab: int) -> None:
        self._executor, self.script = executor, []
        self.vocab_size, self.max_context = vocab, executor.max_context
        self.bytes_per_token, self.weight_bytes = executor.bytes_per_token, executor.weight_bytes
        self.new_cache, self.precision, self.deterministic = executor.new_cache, executor.precision, False

    def step(self, batch: Any, cache: Any) -> Any:
        """Compute, then raise the scripted tokens."""
        logits = self._executor.step(batch, cache).clone()
        for row, at in enumerate(batch.positions[batch.logit_rows].tolist()):
            if at + 1 < len(self.script):
                logits[row, self.script[at + 1]] = 1e4
        return logits


def loads(rounds: int) -> list[Row]:
    """The engine at growing load: never more than 5 % slower."""
    from hasten.language import load
    from hasten.language.speculate.choose import choose
    from hasten.serve.bench.speculate import measure_speculation, python_prompts

    model = load("pycode-4m")
    found = measure_speculation(
        model,
        lambda: choose(model, "auto"),
        python_prompts(model.tokenizer, 48, 200),
        batches=BATCHES,
        max_tokens=96,
        rounds=rounds,
    )
    return [
        Row(
            f"greedy, batch {r.batch}, auto",
            "without guesses",
            r.speculative,
            r.plain,
            "tokens/s",
            r.speedup,
            r.low,
            r.high,
            0.95,
            note=f"{r.tokens_per_pass:.2f} tokens a pass",
        )
        for r in found
    ]


class _SetRate:
    """Guesses that stand with a set chance: it knows the scripted continuation and errs on purpose."""

    name = "set-rate"

    def __init__(self, script: Sequence[int], rate: float, seed: int = 0) -> None:
        self._script, self._rate, self._random = list(script), rate, random.Random(seed)

    def propose(self, asks: Sequence[Any]) -> list[Any]:
        from hasten.language.speculate import Proposal

        out = []
        for ask in asks:
            known = len(ask.tokens)
            right = self._script[known : known + ask.count]
            tokens = tuple(t if self._random.random() < self._rate else (t + 1) % 32_000 for t in right)
            chances = tuple(self._rate ** (i + 1) for i in range(len(tokens)))
            out.append(Proposal(tokens, chances, None, self.name))
        return out

    def learn(self, proposal: Any, accepted: int) -> None:
        pass

    def forget(self, seq: int) -> None:
        pass


def theory(rounds: int) -> list[Row]:
    """245 M random weights, guesses that stand at a rate of 0.8: against the expected length over the step's time."""
    from hasten.language import load
    from hasten.language.ragged import RaggedBatch
    from hasten.language.speculate.verify import expected_length
    from hasten.serve.engine import Engine
    from hasten.serve.policy import FixedSpeculation, make

    executor = load("random-245m").executor
    forced = _Forced(executor, executor.vocab_size)
    rng = np.random.default_rng(0)
    prompt = rng.integers(0, 32_000, 128).tolist()
    tokens, length, rate = 96, 4, 0.8
    script = [*prompt, *rng.integers(0, 32_000, tokens).tolist()]
    forced.script = script
    engines = {
        "plain": Engine(forced, make("stall-free"), num_blocks=64, prefix_sharing=False),
        "guesses": Engine(
            forced,
            make("stall-free"),
            num_blocks=64,
            prefix_sharing=False,
            proposer=_SetRate(script, rate),
            speculation=FixedSpeculation(length),
        ),
    }
    times: dict[str, list[float]] = {name: [] for name in engines}
    for turn in range(max(3, rounds) + 1):
        for name in list(engines) if turn % 2 == 0 else list(engines)[::-1]:
            _, seconds = _answer(engines[name], prompt, tokens)
            if turn:
                times[name].append(seconds)
    cache = executor.new_cache(16, 16)
    table = list(range(16))

    def step(rows: int) -> Callable[[], Any]:
        batch = RaggedBatch.build([([5] * rows, 176, table)], "all")
        return lambda: executor.step(batch, cache)

    steps: dict[int, list[float]] = {1: [], length + 1: []}
    for _ in range(9):
        for rows, taken in steps.items():
            began = CLOCK.now()
            step(rows)()
            taken.append(CLOCK.now() - began)
    cost = float(np.median(steps[length + 1][1:]) / np.median(steps[1][1:]))
    allowed = expected_length(rate, length) / cost
    ratio = paired_ratio(times["plain"], times["guesses"])
    rates = [1 / float(np.median(times[n])) for n in ("guesses", "plain")]
    note = f"speed-up {ratio.value:.2f}, theory {expected_length(rate, length):.2f} tokens at {cost:.2f} times the step"
    return [
        Row(
            "245 M, rate 0.8: speed-up over what theory allows",
            "theory",
            rates[0],
            rates[1],
            "tokens/s",
            ratio.value / allowed,
            ratio.low / allowed,
            ratio.high / allowed,
            0.85,
            note=note,
        )
    ]


def codec(rounds: int) -> list[Row]:
    """A cache of 2,000 tokens: encode and decode against prefill, bytes against 8-bit KV, perplexity."""
    from hasten.language import load
    from hasten.language.corpus import documents
    from hasten.language.kvfit import fit
    from hasten.language.kvvalues import capture, read_cache, write_cache
    from hasten.language.speculate.session import Session

    out = []
    model = load("pycode-4m")
    texts: dict[str, list[list[int]]] = {"validation": [], "test": []}
    for document in documents(suite=False):
        if document.split in texts and len(document.text) > 6000:
            texts[document.split].append(model.tokenizer.encode(document.text[:8000])[:1000])
    coder = fit(model, texts["validation"][:9] + texts["test"][:3])
    level = coder.best_level(1.01)
    kv = capture(model, texts["test"][4])
    share = (len(coder.encode(kv, level)) * 8 / (2 * kv.keys.size)) / (8 + 16 / 64)
    out.append(
        Row(
            "bytes over 8-bit KV",
            "8 bits and a scale per token",
            score=share,
            limit=True,
            at_least=1 / 3,
            note=f"level {level}, perplexity x {coder.quality[level]:.4f} on held-out code, 1,000 tokens",
        )
    )
    out.append(
        Row(
            "perplexity of the decoded cache",
            "computed cache",
            score=coder.quality[level],
            limit=True,
            at_least=1.01,
            note=f"level {level}",
        )
    )
    for name, one, pieces in (
        ("pycode-4m", model, [texts["test"][4], texts["test"][5]]),
        ("random-245m", load("random-245m"), [list(range(9, 2009))]),
    ):
        tables = coder if one is model else fit(one, [pieces[0][:600]], levels=(2,), measure=False)
        sessions = [Session(one.executor, len(p)) for p in pieces]
        stages: dict[str, list[float]] = {n: [] for n in ("prefill", "read", "encode", "decode", "write")}
        for _ in range((max(3, rounds) if one is model else 2) + 1):
            now: list[float] = []
            for p, session in zip(pieces, sessions, strict=True):
                session.done = 0
                at = [CLOCK.now()]
                session.feed(p)
                at.append(CLOCK.now())
                kv = read_cache(session.cache, session.table, len(p))
                at.append(CLOCK.now())
                blob = tables.encode(kv, 2)
                at.append(CLOCK.now())
                back = tables.decode(blob)
                at.append(CLOCK.now())
                write_cache(session.cache, session.table, back)
                at.append(CLOCK.now())
                now = (np.diff(at) + (now or 0.0)).tolist()
            for name_, seconds in zip(stages, now, strict=True):
                stages[name_].append(seconds)
        computing = stages["prefill"][1:]
        coding = [sum(parts) for parts in zip(*(stages[n][1:] for n in stages if n != "prefill"), strict=True)]
        ratio = paired_ratio(computing, coding)
        symbols = 2 * kv.keys.size * len(pieces)
        shown = ", ".join(f"{n} {np.median(x[1:]) * 1e3:.1f} ms" for n, x in stages.items())
        rates = [symbols / float(np.median(stages[n][1:])) / 1e6 for n in ("encode", "decode")]
        out.append(
            Row(
                f"2,000 tokens, prefill over coding from cache to cache, {name}",
                "prefill",
                2000 / float(np.median(coding)),
                2000 / float(np.median(computing)),
                "tokens/s",
                ratio.value,
                ratio.low,
                ratio.high,
                1.0,
                note=f"{shown}; {symbols / 1e6:.1f} million symbols, {rates[0]:.0f} and {rates[1]:.0f} million/s",
            )
        )
    return out


def codes(rounds: int) -> list[Row]:
    """Decoding over a cache of 8-bit codes against one of bfloat16: tokens/s, and the perplexity that it costs."""
    import torch

    from hasten.language import load
    from hasten.language.ragged import RaggedBatch
    from hasten.studies.triforce import long_model
    from hasten.tune.guessing import prompts_for
    from hasten.tune.kv_precision import kv_loss

    model = load("pycode-4m")
    loss = kv_loss(model, "int8", prompts_for(model, [1000] * 12))
    row = Row("perplexity, cache of 8-bit codes", "bfloat16", score=1 + loss, limit=True, at_least=1.01,
              note="12 pieces of held-out code, 1,000 tokens each, read in pieces of 64")  # fmt: skip
    out = [row]
    cases = [("pycode-4m, stretched", long_model(17_000).executor, [(1, 2048), (1, 16_000), (8, 4096)]),
             ("random-245m", load("random-245m").executor, [(1, 4088), (8, 4088)])]  # fmt: skip
    for name, executor, loads_ in cases:
        for count, context in loads_:
            pages = context // 16 + 1
            order = torch.randperm(count * pages, generator=torch.Generator().manual_seed(0)).tolist()
            chunks = [([5], context, order[i * pages : (i + 1) * pages]) for i in range(count)]
            caches, sizes = {}, {}
            for kind in ("auto", "int8"):
                executor.keep_cache_in(kind)
                caches[kind], sizes[kind] = executor.new_cache(count * pages, 16), executor.bytes_per_token
                for half in (caches[kind].keys, caches[kind].values):
                    half.view(torch.uint8).random_(0, 60)  # positive numbers of moderate size, no page left untouched
            executor.keep_cache_in("auto")
            batch, times = RaggedBatch.build(chunks), {kind: [] for kind in caches}
            for turn in range(4 * rounds + 2):
                for kind in list(caches) if turn % 2 else list(caches)[::-1]:
                    began = CLOCK.now()
                    executor.step(batch, caches[kind])
                    if turn > 1:
                        times[kind].append(CLOCK.now() - began)
            ratio = paired_ratio(times["auto"], times["int8"])
            rates = [count / float(np.median(times[kind])) for kind in ("int8", "auto")]
            out.append(
                Row(
                    f"decode, {count} x {context} tokens of context, {name}",
                    "cache in bfloat16",
                    rates[0],
                    rates[1],
                    "tokens/s",
                    ratio.value,
                    ratio.low,
                    ratio.high,
                    note=f"{sizes['int8']} bytes of cache a token against {sizes['auto']}",
                )
            )
    return out


def triforce(rounds: int) -> list[Row]:
    """Long contexts: the stretched embedded model in the engine, library code, ``--speculate triforce:1024``."""
    from hasten.language.speculate.choose import choose
    from hasten.serve.engine import Engine
    from hasten.serve.policy import make
    from hasten.studies.triforce import long_model, long_prompt

    tokens = 256
    model = long_model(max(CONTEXTS) + 1024)
    out = []
    for context in CONTEXTS:
        blocks = -(-(context + tokens) // 16) + 16
        engines = {
            name: Engine(
                model,
                make("stall-free", token_budget=2048),
                num_blocks=blocks,
                prefix_sharing=False,
                proposer=choose(model, "triforce:1024", "pycode-draft-0.7m") if name == "triforce" else None,
            )
            for name in ("plain", "triforce")
        }
        times: dict[str, list[float]] = {name: [] for name in engines}
        same = 0
        for turn in range(rounds + 1):
            prompt = long_prompt(model.tokenizer, context, 700 * turn)
            answers = {}
            for name in list(engines) if turn % 2 == 0 else list(engines)[::-1]:
                answers[name], seconds = _answer(engines[name], prompt, tokens)
                if turn:
                    times[name].append(seconds)
            same += answers["plain"] == answers["triforce"]
        ratio = paired_ratio(times["plain"], times["triforce"])
        rates = [1 / float(np.median(times[n])) for n in ("triforce", "plain")]
        stats = engines["triforce"].speculation
        out.append(
            Row(
                f"TriForce, {context} tokens of context",
                "plain decoding",
                rates[0],
                rates[1],
                "tokens/s",
                ratio.value,
                ratio.low,
                ratio.high,
                1.3,
                note=f"{stats.acceptance:.0%} of guesses stood, {stats.mean_length:.1f} a pass, {same} of {rounds + 1} "
                "answers equal",
            )
        )
    return out


def dyspec(rounds: int) -> list[Row]:
    """Guesses that stand per pass: a dynamic tree against the chain and the fixed tree of its size, the same prompts.

    Counts, not times, so a busy machine does no harm. The fixed tree is fitted to other prompts.
    """
    from hasten.language import load
    from hasten.language.speculate import Chain, DynamicTree, FixedTree, KAry
    from hasten.language.speculate.compare import compare
    from hasten.serve.bench.speculate import python_prompts

    target, draft = load("pycode-4m"), load("pycode-draft-0.7m")
    prompts = python_prompts(target.tokenizer, 8 * rounds + 12, 128, 3)
    size = 16
    fixed = FixedTree.fit(target, draft, prompts[-12:], size)
    shapes = [DynamicTree(size), Chain(size), fixed, KAry(2, 4, size)]
    found = compare(target, draft, prompts[:-12], shapes, max_tokens=64)
    ours = np.array(found[0].per_prompt)
    rng, out = np.random.default_rng(0), []
    for other in found[1:]:
        theirs = np.array(other.per_prompt)
        picks = rng.integers(0, len(ours), (4000, len(ours)))
        spread = ours[picks].mean(1) / theirs[picks].mean(1)
        out.append(
            Row(
                f"dynamic tree of {size}, guesses that stand a pass",
                other.name,
                float(ours.mean()),
                float(theirs.mean()),
                "guesses",
                float(ours.mean() / theirs.mean()),
                float(np.quantile(spread, 0.025)),
                float(np.quantile(spread, 0.975)),
                1.0,
                note=f"{len(ours)} prompts, greedy",
            )
        )
    return out


def lean(rounds: int) -> list[Row]:
    """One long context and three short ones, two threads."""
    import torch

    from hasten.language.attention import decode
    from hasten.studies._speculation import medians

    lengths = [32_768, 1024, 1024, 1024]
    blocks = [-(-n // 16) for n in lengths]
    tables = torch.zeros(4, max(blocks), dtype=torch.int32)
    at = 0
    for row, count in enumerate(blocks):
        tables[row, :count] = torch.arange(at, at + count)
        at += count
    cache, query = tuple(torch.randn(2, at, 1, 16, 64)), torch.randn(4, 1, 64)
    runs = {b: (lambda b=b: decode(query, cache, tables, lengths, backend=b)) for b in ("lean", "flash-2")}
    times = medians(runs, 40 * rounds)
    return [
        Row(
            "decode attention, ragged batch",
            "one task per head",
            1 / times["lean"],
            1 / times["flash-2"],
            "1/s",
            times["flash-2"] / times["lean"],
            at_least=1.5,
        )
    ]


if __name__ == "__main__":
    main()
