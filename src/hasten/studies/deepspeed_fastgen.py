"""DeepSpeed-FastGen, rerun: Dynamic SplitFuse against prefill-first and Orca scheduling.

"DeepSpeed-FastGen: High-throughput Text Generation for LLMs via MII and DeepSpeed-Inference", Holmes et al., 2024,
arXiv:2401.08671. Their workload (closed-loop clients, normal lengths), their score (effective throughput), their load
balancer; in the simulator on a cost like Llama-2-70B's on four A100, and in the real engine on this machine.
Differs from the paper in: the baseline is our prefill-first policy, not vLLM itself; the cost is derived from data
sheets, not measured; the averaging factor of the score is ours (0.2).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from hasten.clock import MonotonicClock
from hasten.serve.balance import LeastTokens, RoundRobin
from hasten.serve.batch import Observation
from hasten.serve.cost import IterationCost
from hasten.serve.metrics import EffectiveThroughput, RequestRecord
from hasten.serve.policy import Orca, Policy, PrefillFirst, SplitFuse, StallFree, TokenBudget
from hasten.serve.request import Sequence
from hasten.serve.simulate import SimulationReport, Simulator
from hasten.serve.workload import Constant, Normal, RequestSpec, Workload
from hasten.studies._serving import answer_alone, closed_loop, gaps, one_thread, small_model, trace
from hasten.studies.study import Check, Scale, Study

__all__ = ["study"]

PRESET = "llama2-70b/a100-tp4"
BLOCKS = 24_000  # of 16 tokens: 126 GB of keys and values beside 137 GB of weights on four A100-80GB
BUDGET = 768


def run(scale: Scale) -> Iterator[Check]:
    """All checks of the card."""
    yield from constant_passes(scale)
    scale.progress("even split", 0.1)
    yield from even_split(scale)
    yield from no_deadlock(scale)
    scale.progress("latency in the simulator", 0.2)
    yield from latency(scale)
    scale.progress("replicas", 0.6)
    yield from scaling(scale)
    scale.progress("real engine", 0.75)
    with one_thread():
        yield from real_engine(scale)
    scale.progress("done", 1.0)


# --- 1. constant passes ----------------------------------------------------------------------------------------------


def constant_passes(scale: Scale) -> Iterator[Check]:
    """Tokens per pass on a backlog, up to the pass that takes the last prompt token."""
    load = Workload.random(
        requests=scale.choose(quick=100, full=400), prompt=Normal(2600, 0.3), output=Normal(60, 0.3), seed=scale.seed
    )
    cost = IterationCost.preset(PRESET)
    seats = 32  # of every policy: more than SplitFuse comes to use, so that the backlog lasts

    def passes(policy: Policy) -> np.ndarray:
        report = Simulator(cost, policy, blocks=BLOCKS).run(load)
        last = max(r.token_times[0] for r in report.records)  # the first token comes with the end of the prompt
        steps = report.steps
        return np.asarray(steps[steps[:, 0] + steps[:, 1] <= last + 1e-9, 2])

    even = passes(SplitFuse(token_budget=BUDGET, max_num_seqs=seats))
    greedy = passes(SplitFuse(token_budget=BUDGET, max_num_seqs=seats, split="greedy"))
    note = f"{len(load)} requests at once, {len(even)} passes; greedy split {_variation(greedy):.4f}"
    yield Check.at_most("tokens per pass, variation, splitfuse", _variation(even), 0.02, "", note)
    for policy in (PrefillFirst(max_num_seqs=seats), Orca(max_num_seqs=seats)):
        value = _variation(passes(policy))
        yield Check.at_least(f"tokens per pass, variation, {policy.name}", value, 0.5)
    odd = int((greedy[:-1] != BUDGET).sum())
    note = f"{len(greedy)} passes, greedy split; the even split differs on its last {int((even[:-1] != BUDGET).sum())}"
    yield Check.equal("passes before the last that are not exactly the budget", odd, 0, note=note)


def _variation(values: np.ndarray) -> float:
    return float(np.std(values) / np.mean(values))


# --- 2. the even split -----------------------------------------------------------------------------------------------


def even_split(scale: Scale) -> Iterator[Check]:
    """Brute force over all ways to cut P tokens into F passes, on the fitted curve of time against tokens."""
    cost = replace(IterationCost.preset(PRESET), m1=0.0, c=0.0)  # time as a function of tokens alone

    def seconds(tokens: int) -> float:
        return cost.time([(0, tokens)]) if tokens else 0.0

    grid = np.arange(1, 4096)
    throughput = np.array([n / seconds(int(n)) for n in grid])
    bend = float(np.max(np.diff(throughput, 2)))
    yield Check.at_most(
        "largest second difference of throughput against tokens",
        bend,
        1e-9 * float(throughput.max()),
        "",
        "concave: ≤ 0",
    )
    unit = 16
    worse = cases = chosen_worse = 0
    for pieces, passes in itertools.product(range(4, scale.choose(quick=25, full=49)), (2, 3, 4)):
        best = min(sum(seconds(unit * n) for n in parts) for parts in _compositions(pieces, passes))
        share, rest = divmod(pieces, passes)
        even = rest * seconds(unit * (share + 1)) + (passes - rest) * seconds(unit * share)
        cases += 1
        worse += even > best * (1 + 1e-9)
        room = unit * -(-pieces // passes)
        parts = _chosen(unit * pieces, room, unit)
        rounded = min(sum(seconds(unit * n) for n in p) for p in _compositions(pieces, len(parts)))
        chosen_worse += sum(seconds(n) for n in parts) > rounded * (1 + 1e-9) + unit * cost.b
    note = f"{cases} pairs of prompt length (in tiles of {unit}) and number of passes, all splits tried"
    yield Check.equal("pairs where some split beats the even one", int(worse), 0, note=note)
    yield Check.equal(
        "pairs where the scheduler's split is more than one tile's time from the best", int(chosen_worse), 0
    )


def _compositions(total: int, parts: int) -> Iterator[tuple[int, ...]]:
    """All ways to write ``total`` as an ascending sum of ``parts`` positive numbers; their order does not matter."""

    def extend(left: int, count: int, least: int) -> Iterator[tuple[int, ...]]:
        if count == 1:
            yield (left,)
            return
        for first in range(least, left // count + 1):
            for rest in extend(left - first, count - 1, first):
                yield (first, *rest)

    yield from extend(total, parts, 1)


def _chosen(prompt: int, room: int, tile: int) -> list[int]:
    """Pieces that the scheduler cuts a lone prompt into."""
    policy = TokenBudget(token_budget=room, max_num_seqs=1, split="even", tile=tile)
    seq = Sequence(0, 0.0, prompt, 2)
    pieces: list[int] = []
    while seq.computed < prompt:
        waiting, running = ([], [seq]) if pieces else ([seq], [])
        chunk = policy.decide(Observation(0.0, waiting, running, 10_000, 10_000, 16)).chunks[0]
        pieces.append(chunk.length)
        seq.computed += chunk.length
        seq.blocks = -(-seq.computed // 16)
    return pieces


# --- 3. latency in the simulator -------------------------------------------------------------------------------------


def latency(scale: Scale) -> Iterator[Check]:
    """Closed-loop clients with their lengths: tails between tokens at 16 clients, effective throughput at its best."""
    cost = IterationCost.preset(PRESET)
    score = EffectiveThroughput(prompt_rate=512, generation_rate=4)
    requests = scale.choose(quick=128, full=512)
    clients = scale.choose(quick=(1, 4, 8, 16, 24, 32), full=(1, 2, 4, 6, 8, 12, 16, 20, 24, 28, 32))
    for output in (60, 128):
        load = Workload.random(
            requests=requests, prompt=Normal(2600, 0.3), output=Normal(output, 0.3), seed=scale.seed + output
        )
        runs: dict[str, dict[int, SimulationReport]] = {}
        for policy in (SplitFuse(token_budget=BUDGET), PrefillFirst()):
            simulator = Simulator(cost, policy, blocks=BLOCKS)
            runs[policy.name] = {n: simulator.run_closed(load, n) for n in clients}
        ours, base = runs["splitfuse"], runs["prefill-first"]
        p95 = (base[16].tbt.p95, ours[16].tbt.p95)
        note = f"16 clients: {p95[0]:.3f} s against {p95[1]:.3f} s, longest {base[16].tbt.max:.2f} and "
        note += f"{ours[16].tbt.max:.2f} s"
        name = f"gen {output}: P95 inter-token latency, prefill-first / splitfuse"
        yield Check.at_least(name, p95[0] / p95[1], 2.0, "×", note)
        best = {name: max((score(r.records, r.duration), n) for n, r in by.items()) for name, by in runs.items()}
        failures = {
            name: 1 - sum(score.succeeds(r) for r in by[16].records) / len(by[16].records) for name, by in runs.items()
        }
        note = ", ".join(
            f"{name} {rate:.3f}/s at {n} clients ({failures[name]:.0%} fail at 16)" for name, (rate, n) in best.items()
        )
        ratio = best["splitfuse"][0] / best["prefill-first"][0] if best["prefill-first"][0] > 0 else math.inf
        yield Check.at_least(f"gen {output}: best effective throughput over prefill-first's", ratio, 1.5, "×", note)
        at = best["prefill-first"][1]  # the load that prefill-first serves best
        note = (
            f"at prefill-first's best point, {at} clients: {base[at].tbt.p50:.4f} s against {ours[at].tbt.p50:.4f} s; "
        )
        note += f"at 16 clients {base[16].tbt.p50:.4f} against {ours[16].tbt.p50:.4f} s, where most passes hold prompts"
        name = f"gen {output}: P50 inter-token latency, splitfuse / prefill-first"
        yield Check.within(name, ours[at].tbt.p50 / base[at].tbt.p50, 0.75, 1.25, "×", note)


# --- 5. no deadlock --------------------------------------------------------------------------------------------------


def no_deadlock(scale: Scale) -> Iterator[Check]:
    """A cache for 1.2 requests, 50 requests, both rules."""
    load = [RequestSpec(0.0, 400, 40) for _ in range(50)]
    blocks = math.ceil(1.2 * 440 / 16)
    cost = IterationCost.preset(PRESET)
    recomputed: dict[str, int] = {}
    for rule in ("youngest", "reset_all"):
        policy = SplitFuse(token_budget=256, on_deadlock=rule)
        metrics = Simulator(cost, policy, blocks=blocks).run(load).metrics
        recomputed[rule] = metrics.recomputed_tokens
        note = (
            f"{metrics.preemptions} releases, {metrics.recomputed_tokens} tokens recomputed in {metrics.duration:.0f} s"
        )
        yield Check.equal(f"requests finished in a cache for 1.2, rule {rule}", metrics.completed, 50, note=note)
    ratio = recomputed["youngest"] / max(1, recomputed["reset_all"])
    yield Check.at_most("recomputed tokens, youngest / reset_all", ratio, 1.0, "×")


# --- 6. replicas -----------------------------------------------------------------------------------------------------


def scaling(scale: Scale) -> Iterator[Check]:
    """16 replicas at 16 times the rate, and the balancers on a trace of unequal prompts."""
    cost = IterationCost.preset(PRESET)
    policy = SplitFuse(token_budget=BUDGET)
    requests = scale.choose(quick=100, full=400)
    rate = 4.0  # more than one replica can take, so that throughput is its own and not the offered one
    throughput = {}
    for replicas in (1, 16):
        load = Workload.random(
            requests=requests * replicas,
            prompt=Constant(2600),
            output=Constant(60),
            rate=rate * replicas,
            seed=scale.seed,
        )
        report = Simulator(cost, policy, blocks=BLOCKS, replicas=replicas).run(load)
        throughput[replicas] = report.metrics.request_throughput
    note = (
        f"{throughput[1]:.3f} to {throughput[16]:.2f} requests/s, round robin, equal lengths, {rate:g} requests/s each"
    )
    yield Check.within("throughput, 16 replicas / 1", throughput[16] / throughput[1], 15.5, 16.5, "×", note)

    full, source = trace(scale, "code")
    opt = IterationCost.preset("opt-13b/a100")
    ratios = []
    for seed in range(scale.seed, scale.seed + scale.choose(quick=3, full=10)):
        load = full.resampled(scale.choose(quick=1000, full=2000), seed=seed).at_rate(8.0, seed=seed + 1)
        tails = [
            Simulator(opt, StallFree(token_budget=512), blocks=2500, replicas=4, balancer=balancer).run(load).ttft.p99
            for balancer in (LeastTokens(), RoundRobin())
        ]
        ratios.append(tails[0] / tails[1])
    note = f"{source}; 4 replicas, 8 requests/s; per seed {', '.join(f'{r:.2f}' for r in ratios)}"
    yield Check.at_most("P99 TTFT, least tokens / round robin", float(np.mean(ratios)), 1.0, "×", note)


# --- 4. the real engine ----------------------------------------------------------------------------------------------


def real_engine(scale: Scale) -> Iterator[Check]:
    """Closed loop of 8 clients on a small decoder; the two policies take turns, so that both see the same machine."""
    from hasten.language.params import SamplingParams
    from hasten.measure.stats import paired_ratio
    from hasten.serve.engine import Engine

    model, name = small_model(scale, deterministic=True)
    context = model.config.max_position_embeddings
    rng = np.random.default_rng(scale.seed)
    load = Workload.random(
        requests=scale.choose(quick=24, full=64), prompt=Normal(256, 0.3), output=Normal(32, 0.3), seed=scale.seed
    ).clipped(max_prompt=context - 80, max_output=72)
    prompts = [rng.integers(3, model.config.vocab_size, r.prompt_len).tolist() for r in load]
    blocks = 8 * -(-context // 16) + 8
    contestants: dict[str, Policy] = {
        "splitfuse": SplitFuse(token_budget=64, max_num_seqs=8, tile=16),
        "prefill-first": PrefillFirst(max_num_seqs=8),
    }
    engines = {
        label: Engine(model, policy=p, num_blocks=blocks, max_num_seqs=8, deterministic=True, prefix_sharing=False)
        for label, p in contestants.items()
    }
    for engine in engines.values():  # kernels and memory, apart from what is measured
        closed_loop(engine, load.head(8), prompts[:8], clients=8)
    answers: dict[str, list[list[int]]] = {}
    tails: dict[str, list[float]] = {label: [] for label in engines}
    clock = MonotonicClock()
    begin, limit = clock.now(), scale.choose(quick=25.0, full=120.0)
    rounds = 0
    while rounds < 3 or (rounds < 15 and clock.now() - begin < limit):
        for label, engine in engines.items():
            records, answers[label] = closed_loop(engine, load, prompts, clients=8)
            tails[label].append(_p95(records))
        rounds += 1
        scale.progress(f"real engine, round {rounds}", 0.75 + 0.2 * min(1.0, (clock.now() - begin) / limit))
    estimate = paired_ratio(tails["splitfuse"], tails["prefill-first"], seed=scale.seed)
    medians = {label: float(np.median(t)) * 1e3 for label, t in tails.items()}
    note = (
        f"{name}; {rounds} interleaved rounds of {len(load)} requests; median P95 {medians['splitfuse']:.2f} against "
        f"{medians['prefill-first']:.2f} ms; 95 % CI of the ratio {estimate.low:.2f} to {estimate.high:.2f}"
    )
    holds = estimate.value < 1 and estimate.excludes(1.0)
    yield Check(
        "real engine: P95 token latency, splitfuse / prefill-first",
        estimate.value,
        "×",
        "< 1, CI excludes 1",
        holds,
        note,
    )
    few = scale.choose(quick=6, full=len(load))
    alone = [
        answer_alone(model, p, SamplingParams(max_tokens=r.output_len, temperature=0.0, ignore_eos=True))
        for p, r in zip(prompts[:few], load.requests[:few], strict=True)
    ]
    wrong = sum(answers[label][i] != alone[i] for label in engines for i in range(few))
    yield Check.equal(
        "real engine: answers that differ from the request served alone", wrong, 0, note=f"{few} of each policy"
    )


def _p95(records: list[RequestRecord]) -> float:
    return float(np.percentile(gaps(records), 95))


study = Study(
    system="deepspeed-fastgen",
    claim="Passes of one constant number of tokens, long prompts split and short ones fused, give higher effective "
    "throughput and lower token-level tail latency than serving whole prompts first.",
    published={
        "effective throughput": "up to 2.3x vLLM (abstract)",
        "latency, mean": "2x lower (abstract)",
        "token-level tail": "up to 3.7x lower: P95, Llama-2 70B on 4 A100, 16 clients, prompt 2600, generation 128",
        "SLA of 4 tokens/s": "1.42 against 0.63 queries/s; failures < 1 % against about 28 % (project blog)",
        "replicas 1 to 16": "1.46 to 23.7 queries/s (project blog)",
    },
    run=run,
)
