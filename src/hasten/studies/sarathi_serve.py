"""Sarathi-Serve, rerun: stall-free batching against prefill-first and Orca scheduling.

"Taming Throughput-Latency Tradeoff in LLM Inference with Sarathi-Serve", Agrawal et al., OSDI 2024, arXiv:2403.02310.
The same policy objects run in the simulator (capacity and tails, on a published cost of OPT-13B on an A100) and in the
real engine on this machine (same tokens, honesty of the simulator).
Differs from the paper in: OPT-13B coefficients from DistServe's repository instead of Mistral-7B to Falcon-180B, Azure
traces of 2023 instead of openchat and arxiv summaries.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np

from hasten.budget import SLO
from hasten.clock import Clock, MonotonicClock, ProcessorClock
from hasten.errors import HastenError
from hasten.serve import workload
from hasten.serve.capacity import Capacity, capacity, simulated
from hasten.serve.cost import IterationCost
from hasten.serve.metrics import ServingMetrics
from hasten.serve.policy import Orca, Pace, Policy, PrefillFirst, RequestLevel, SplitFuse, StallFree
from hasten.serve.simulate import SimulatedEngine, Simulator
from hasten.serve.workload import RequestSpec, Workload
from hasten.studies._serving import (
    Watched,
    answer_alone,
    gaps,
    halves,
    one_thread,
    quiet,
    read_llama2c,
    replay,
    small_model,
    token_prompts,
    trace,
)
from hasten.studies.study import Check, Scale, Study

__all__ = ["study"]

PRESET = "opt-13b/a100"
BLOCKS = 2500  # of 16 tokens: 33 GB of keys and values beside 26 GB of weights
CACHE_TOKENS = BLOCKS * 16
CONTEXT = 2048


def run(scale: Scale) -> Iterator[Check]:
    """All checks of the card, cheapest first."""
    with one_thread():
        yield from same_tokens(scale)
    scale.progress("no stall", 0.1)
    yield from no_stall(scale)
    scale.progress("tail", 0.15)
    yield from tail(scale)
    yield from capacities(scale)
    scale.progress("honesty of the model", 0.85)
    with one_thread():
        yield from honesty(scale)
    yield from table_two(scale)
    scale.progress("done", 1.0)


# --- 1. same tokens --------------------------------------------------------------------------------------------------


def policies() -> list[tuple[str, Policy]]:
    """Every policy, and stall-free at the extremes of its budget."""
    return [
        *((f"stall-free τ={tau}", quiet(partial(StallFree, token_budget=tau))) for tau in (1, 7, 64, 1 << 20)),
        ("splitfuse", SplitFuse(token_budget=64, max_num_seqs=16)),
        ("splitfuse reset_all", SplitFuse(token_budget=64, max_num_seqs=16, on_deadlock="reset_all")),
        ("prefill-first", PrefillFirst()),
        ("orca", Orca()),
        ("orca, prompts reserved", Orca(reserve_answer=False)),
        ("request-level", RequestLevel()),
    ]


def same_tokens(scale: Scale) -> Iterator[Check]:
    """Streams of every policy, with room and without, against the plain decoder asked for one request at a time."""
    from hasten.language.params import SamplingParams
    from hasten.serve.engine import Engine

    model, name = small_model(scale, deterministic=True)
    lengths = scale.choose(quick=(3, 17, 40, 64, 90), full=(3, 17, 40, 64, 90, 121, 33, 75))
    length = scale.choose(quick=12, full=32)
    prompts = token_prompts(model, lengths, scale.seed)
    asked = [
        SamplingParams(max_tokens=length, temperature=0.0, ignore_eos=True)
        if i % 2
        else SamplingParams(max_tokens=length, temperature=0.8, top_p=0.95, seed=scale.seed + i, ignore_eos=True)
        for i in range(len(prompts))
    ]
    expected = [answer_alone(model, p, a) for p, a in zip(prompts, asked, strict=True)]
    size = 8
    largest = -(-(max(lengths) + length) // size)
    different: list[str] = []
    runs = preemptions = 0
    plans = policies()
    for done, (label, policy) in enumerate(plans):
        scale.progress(f"same tokens: {label}", 0.1 * done / len(plans))
        for blocks in (400, largest + 2):
            engine = Engine(
                model, policy=policy, num_blocks=blocks, block_size=size, max_num_seqs=16, deterministic=True
            )
            got = [c.tokens for c in engine.generate(prompts, asked)]
            engine.check_integrity()
            runs += 1
            preemptions += sum(r.preemptions for r in engine.records)
            if got != expected:
                wrong = sum(a != b for a, b in zip(got, expected, strict=True))
                different.append(f"{label} with {blocks} blocks: {wrong} of {len(prompts)}")
    note = f"{name}; {runs} runs of {len(prompts)} requests, greedy and seeded, against the plain decoder one by one"
    yield Check.equal("runs whose tokens differ", len(different), 0, note="; ".join([note, *different[:5]]))
    yield Check.at_least("preemptions forced in those runs", preemptions, 1, note="a small cache makes them happen")
    yield Check.at_most("largest logit difference over chunkings", _logit_gap(model, prompts), 1e-4, note=name)


def _logit_gap(model: Any, prompts: list[list[int]]) -> float:
    """Largest |difference| of the last logits: chunks of 1, 7, 64 and all at once against the plain decoder."""
    import torch

    from hasten.language.ragged import RaggedBatch

    executor, worst = model.executor, 0.0
    for prompt in prompts:
        with torch.inference_mode():
            dense = model.decoder(torch.tensor([prompt]))[0, -1].float()
        table = list(range(1, 1 + -(-len(prompt) // 16)))
        for chunk in (1, 7, 64, len(prompt)):
            cache = executor.new_cache(len(table) + 1, 16)
            logits = None
            for begin in range(0, len(prompt), chunk):
                logits = executor.step(RaggedBatch.build([(prompt[begin : begin + chunk], begin, table)]), cache)
            assert logits is not None
            worst = max(worst, float((logits[0] - dense).abs().max()))
    return worst


# --- 2. no stall -----------------------------------------------------------------------------------------------------


def no_stall(scale: Scale) -> Iterator[Check]:
    """Random workloads on caches from ample to tight; every decision is watched, the books are checked."""
    rng = np.random.default_rng(scale.seed)
    cost = IterationCost.preset(PRESET)
    cases = scale.choose(quick=60, full=600)
    totals = {"stalls": 0, "over_budget": 0, "overtakes": 0, "needless": 0, "steps": 0}
    leaked = unfinished = preemptions = 0
    for _ in range(cases):
        budget = int(rng.choice((1, 7, 64, 384)))
        watched = Watched(quiet(partial(StallFree, token_budget=budget, watermark=0.0)), budget)
        load = [
            RequestSpec(float(t), int(p), int(o))
            for t, p, o in zip(
                np.sort(rng.uniform(0, 2.0, 25)), rng.integers(1, 400, 25), rng.integers(1, 40, 25), strict=True
            )
        ]
        blocks = int(rng.choice((28, 60, 400)))
        engine = SimulatedEngine(cost, watched, blocks=blocks)
        for number, spec in enumerate(load):
            engine.add(str(number), spec, spec.arrival)
        now = 2.0
        while engine.has_work:
            end = engine.start(now)
            engine.check_integrity()
            if engine.busy_until is not None:
                engine.finish()
            now = end if end is not None else now + 1.0
        leaked += blocks - engine.free
        unfinished += sum(not r.ok for r in engine.records.values())
        preemptions += sum(r.preemptions for r in engine.records.values())
        for key in totals:
            totals[key] += getattr(watched, key)
    note = f"{cases} random traces, {totals['steps']} steps, {preemptions} preemptions, budgets 1, 7, 64, 384"
    yield Check.equal("decodes stalled", totals["stalls"], 0, note=note)
    yield Check.equal("steps over the budget", totals["over_budget"], 0)
    yield Check.equal("requests overtaken", totals["overtakes"], 0)
    yield Check.equal("preemptions although memory sufficed", totals["needless"], 0)
    yield Check.equal("blocks leaked", leaked, 0)
    yield Check.equal("requests unfinished", unfinished, 0)


# --- 3. and 4. capacity and tail -------------------------------------------------------------------------------------


def _serve(policy: Policy, rows: Workload, requests: int) -> Callable[[float, int], ServingMetrics]:
    return simulated(Simulator(IterationCost.preset(PRESET), policy, blocks=BLOCKS), rows, requests)


def tail(scale: Scale) -> Iterator[Check]:
    """P99 time between tokens and median TTFT at one rate, against prefill-first."""
    full, source = trace(scale, "conv")
    _, rows = halves(full)
    cost = IterationCost.preset(PRESET)
    budget = cost.budget_for(SLO(tbt="100ms"), context=CONTEXT, cache_tokens=CACHE_TOKENS).token_budget
    seeds = range(scale.seed, scale.seed + scale.choose(quick=3, full=10))
    ours = [_serve(StallFree(token_budget=budget), rows, 600)(1.5, s) for s in seeds]
    base = [_serve(PrefillFirst(), rows, 600)(1.5, s) for s in seeds]
    tbt = [(a.itl.p99, b.itl.p99) for a, b in zip(ours, base, strict=True)]
    ttft = [(a.ttft.p50, b.ttft.p50) for a, b in zip(ours, base, strict=True)]
    note = f"{source}; 1.5 requests/s, {len(tbt)} seeds; mean {_mean(a for a, _ in tbt):.3f} s against "
    note += f"{_mean(b for _, b in tbt):.3f} s"
    yield Check.at_most("conv: P99 TBT, stall-free / prefill-first", _mean(a / b for a, b in tbt), 0.45, "×", note)
    note = f"mean {_mean(a for a, _ in ttft):.3f} s against {_mean(b for _, b in ttft):.3f} s"
    yield Check.at_most("conv: median TTFT, stall-free / prefill-first", _mean(a / b for a, b in ttft), 2.0, "×", note)


def _mean(values: Any) -> float:
    return float(np.mean(list(values)))


def capacities(scale: Scale) -> Iterator[Check]:
    """Largest Poisson rate within P99 TBT and median delay limits, for each trace, limit and policy."""
    cost = IterationCost.preset(PRESET)
    seeds = range(scale.seed, scale.seed + scale.choose(quick=3, full=10))
    requests = scale.choose(quick=300, full=600)
    cases = [
        # trace, TBT limit, budget (None: derived from the cost), least ratio, and what the paper's claim asks of it
        ("conv", 0.1, None, 2.0),
        ("code", 0.1, None, 3.0),
        ("conv", 0.5, 2048, 1.0),
        ("code", 0.5, 2048, 2.0),
    ]
    for index, (name, limit, fixed, least) in enumerate(cases):
        full, source = trace(scale, name)
        _, rows = halves(full)
        slo = SLO(tbt=limit, queue="2s@p50")
        choice = cost.budget_for(slo, context=CONTEXT, cache_tokens=CACHE_TOKENS)
        budget = fixed or choice.token_budget
        if fixed is None:
            yield Check.equal(f"{name}: budget derived for {limit:g} s", budget, 384, "tokens", choice.why)
        contestants: dict[str, Policy] = {
            "stall-free": StallFree(token_budget=budget),
            "prefill-first": PrefillFirst(),
            "orca": Orca(),
        }
        if fixed is None:
            pace = Pace.for_slo(cost, slo)
            contestants["budget per step"] = StallFree(token_budget=pace.ceiling(128), pace=pace)
        found: dict[str, Capacity] = {}
        for place, (label, policy) in enumerate(contestants.items()):
            stage = f"capacity: {name}, {limit:g} s, {label}"

            def advance(share: float, stage: str = stage, before: float = index + place / len(contestants)) -> None:
                scale.progress(stage, 0.2 + 0.65 * (before + share / 4) / len(cases))

            found[label] = capacity(
                _serve(policy, rows, requests), slo, seeds=seeds, tolerance=0.02, start=1.0, progress=advance
            )
        ratios = np.array(
            [
                ours / max(first, orca) if max(first, orca) > 0 else math.inf
                for ours, first, orca in zip(
                    found["stall-free"].rates, found["prefill-first"].rates, found["orca"].rates, strict=True
                )
            ]
        )
        low, high = Capacity(tuple(ratios.tolist())).interval
        parts = ", ".join(f"{label} {c.mean:.2f}" for label, c in found.items())
        note = (
            f"{source}; {parts} requests/s; 95 % CI of the ratio {low:.2f} to {high:.2f} over {len(ratios)} seeds; "
            f"budget {budget}, judged on the half of the trace that nothing was chosen on"
        )
        kind = "strict" if limit < 0.2 else "loose"
        yield Check.at_least(
            f"{name}, {kind}: capacity over the better baseline", float(ratios.mean()), least, "×", note
        )
        if fixed is None:
            gain = np.divide(found["budget per step"].rates, found["stall-free"].rates)
            low, high = Capacity(tuple(gain.tolist())).interval
            yield Check.at_least(
                f"{name}, {kind}: a budget for each step over one for the worst",
                float(gain.mean()),
                1.0,
                "×",
                f"ours, not the paper's: prompts get what a step's decodes leave of the limit; 95 % CI {low:.2f} to "
                f"{high:.2f}",
            )


# --- 5. the model is honest ------------------------------------------------------------------------------------------


def honesty(scale: Scale) -> Iterator[Check]:
    """Predicted against measured: iterations of the real engine's executor, and the tail of a replay in real time."""
    from hasten.language.loading import load
    from hasten.serve.engine import Engine

    busy = os.getloadavg()[0] > 0.5 * (os.cpu_count() or 1)
    clock: Clock = ProcessorClock() if busy else MonotonicClock()
    timed = "processor time, since other programs keep the machine busy" if busy else "wall time"
    path = scale.find("weights/stories260K.bin")
    try:
        model, name = load("pycode-4m"), "pycode-4m"
        _ = model.executor
    except HastenError as error:  # the embedded model is not there
        if path is None:
            yield Check.unavailable("iteration time, median relative error held out", f"no small model: {error}")
            return
        model, name = read_llama2c(path), "stories260K"
    context = model.config.max_position_embeddings
    seconds = scale.choose(quick=8.0, full=30.0)
    cost = IterationCost.calibrate(
        model, clock, time_limit=seconds, max_tokens=256, max_num_seqs=16, progress=False, seed=scale.seed
    )
    report = cost.report
    assert report is not None
    yield Check.at_most(
        "iteration time, median relative error held out",
        report.holdout_median_relative_error,
        0.15,
        "",
        f"{name}, one thread, {timed}; fitted on {report.num_samples}, judged on {report.num_holdout} other batches, "
        f"p90 {report.holdout_p90_relative_error:.2f}",
    )
    budget = 64
    policy = StallFree(token_budget=budget, max_num_seqs=16)
    blocks = 16 * -(-context // 16)
    shape = workload.sample("conversation", requests=60, seed=scale.seed)
    shape = shape.scaled(max_prompt=context // 2, max_output=context // 16)
    alone = Simulator(cost, policy, blocks=blocks).run(shape.at_rate(1e6)).duration
    rate = 0.5 * len(shape) / alone  # half of what it can do at most
    load_ = shape.at_rate(rate, seed=scale.seed + 1)
    rng = np.random.default_rng(scale.seed)
    prompts = [rng.integers(3, model.config.vocab_size, r.prompt_len).tolist() for r in load_]
    engine = Engine(model, policy=policy, num_blocks=blocks, clock=clock, max_num_seqs=16, prefix_sharing=False)
    overhead = _overhead(engine, cost, prompts[:16], clock)
    predicted = Simulator(cost, policy, blocks=blocks, overhead=overhead).run(load_).tbt.p99
    measured = []
    for turn in range(scale.choose(quick=3, full=5)):
        scale.progress(f"replay {turn + 1}", 0.9)
        measured.append(float(np.percentile(gaps(replay(engine, load_, prompts, clock)), 99)))
    ratio = predicted / float(np.median(measured))
    note = (
        f"{name}, {timed}; {len(load_)} requests at {rate:.1f}/s, predicted {predicted * 1e3:.2f} ms, measured "
        f"{', '.join(f'{m * 1e3:.2f}' for m in measured)} ms, {overhead * 1e6:.0f} µs per step outside the model"
    )
    yield Check.within("P99 TBT of a replay, simulated / measured", ratio, 0.75, 1.25, "×", note)


def _overhead(engine: Any, cost: IterationCost, prompts: list[list[int]], clock: Clock) -> float:
    """Seconds of a step outside the executor: what the engine takes minus what its executor takes, in a warm-up."""
    executor = engine.executor
    inside = [0.0]

    class Timed:
        def __getattr__(self, name: str) -> Any:
            return getattr(executor, name)

        def step(self, batch: Any, cache: Any) -> Any:
            begin = clock.now()
            result = executor.step(batch, cache)
            inside[0] = clock.now() - begin
            return result

    from hasten.language.params import SamplingParams

    engine.executor = Timed()
    outside = []
    try:
        for prompt in prompts:
            engine.add(prompt, SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True))
        while engine.has_work:
            begin = clock.now()
            engine.step()
            outside.append(clock.now() - begin - inside[0])
    finally:
        engine.executor = executor
    return float(np.median(outside))


# --- 6. table 2 on a GPU ---------------------------------------------------------------------------------------------


def table_two(scale: Scale) -> Iterator[Check]:
    """Prefill of 1024 tokens, 1021 with three decodes, four decodes: on a 1B-class decoder where there is a GPU."""
    import torch

    name = "GPU: 1021 prefill + 3 decodes over 1024 prefill"
    if not torch.cuda.is_available():
        yield Check.unavailable(name, "torch sees no CUDA device", "×", "≤ 1.1")
        return
    from hasten.language.config import DecoderConfig
    from hasten.language.loading import random_model
    from hasten.language.ragged import RaggedBatch

    config = DecoderConfig(
        vocab_size=32_000,
        hidden_size=2048,
        num_layers=22,
        num_heads=32,
        num_kv_heads=4,
        head_dim=64,
        intermediate_size=5632,
        max_position_embeddings=4096,
    )
    executor = random_model(config, device="cuda").executor
    cache = executor.new_cache(1024, 16)
    clock = MonotonicClock()
    rng = np.random.default_rng(scale.seed)
    batches = {
        "prefill": [(0, 1024)],
        "mixed": [(0, 1021)] + [(1024, 1)] * 3,
        "decode": [(1024, 1)] * 4,
    }
    times: dict[str, list[float]] = {label: [] for label in batches}
    for turn in range(scale.choose(quick=20, full=100) + 5):
        for label, chunks in batches.items():
            width = [-(-(c + n) // 16) for c, n in chunks]
            begins = np.cumsum([0, *width])
            ragged = RaggedBatch.build(
                [
                    (rng.integers(0, 32_000, n).tolist(), c, list(range(int(b), int(b) + w)))
                    for (c, n), b, w in zip(chunks, begins, width, strict=False)
                ]
            )
            torch.cuda.synchronize()
            begin = clock.now()
            executor.step(ragged, cache)
            torch.cuda.synchronize()
            if turn >= 5:  # warm-up apart
                times[label].append(clock.now() - begin)
    medians = {label: float(np.median(t)) for label, t in times.items()}
    note = f"{torch.cuda.get_device_name()}; " + ", ".join(f"{k} {v * 1e3:.2f} ms" for k, v in medians.items())
    yield Check.at_most(name, medians["mixed"] / medians["prefill"], 1.1, "×", note)


study = Study(
    system="sarathi-serve",
    claim="Prompts cut into pieces that fill a token budget behind all running decodes raise the load that a server "
    "takes within a tail limit on the time between tokens, against prefill-first and Orca scheduling.",
    published={
        "Mistral-7B, 1 A100": "capacity within the SLO up to 2.6x Orca and vLLM (abstract)",
        "Falcon-180B, 8 A100": "up to 6.9x (abstract)",
        "Yi-34B, 2 A100": "1024 prefill / 1021 + 3 decodes / 4 decodes: 217.2 / 217.6 / 68.1 ms (repository, table 2)",
    },
    run=run,
)
