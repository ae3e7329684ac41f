"""SmartSpec: guess as many tokens as raise goodput, and none when the machine is full.

"Optimizing Speculative Decoding for Serving Large Language Models Using Goodput", Liu et al. 2024, arXiv:2406.14066.
The policy and the estimate are those of the engine. The sweep over load runs in the simulator on a 7B-like cost with a
knee, where the policy is never told the acceptance; the real engine runs the embedded pair.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np

from hasten.studies._speculation import prompts
from hasten.studies.study import Check, Scale, Study

__all__ = ["study"]

FIXED = (0, 1, 3, 5, 7)


def run(scale: Scale) -> Iterator[Check]:
    """The checks of the card."""
    yield from formula(scale)
    scale.progress("sweep over load", 0.1)
    yield from sweep(scale)
    scale.progress("steps of load and accuracy", 0.6)
    yield from adapts(scale)
    scale.progress("real engine", 0.7)
    yield from engine(scale)
    scale.progress("done", 1.0)


def formula(scale: Scale) -> Iterator[Check]:
    """The expected length, and the allocation against brute force."""
    from hasten.language.speculate.verify import accept_chain, expected_length
    from hasten.serve.cost import IterationCost
    from hasten.serve.policy import GoodputSpeculation, SpeculationObservation

    rng, worst = np.random.default_rng(scale.seed), 0.0
    for alpha, count in ((0.3, 2), (0.7, 5), (0.9, 10)):
        runs = scale.choose(quick=20_000, full=200_000)
        hits = rng.random((runs, count)) < alpha
        total = sum(accept_chain([1] * count, [*row, 0]) + 1 for row in hits.astype(int).tolist())
        worst = max(worst, abs(total / runs / expected_length(alpha, count) - 1))
    yield Check.at_most("largest relative error of the expected length", worst, scale.choose(quick=0.02, full=0.005))
    gap = 0.0
    for _ in range(scale.choose(quick=20, full=200)):
        alphas = rng.uniform(0.1, 0.95, int(rng.integers(1, 5))).tolist()
        cost = IterationCost(m0=4e-3, m2=1e-4, a=2e-3, b=float(rng.uniform(1e-5, 1e-3)))
        found = GoodputSpeculation(max_length=4, cost=cost).decide(SpeculationObservation(alphas, [50] * len(alphas)))

        def goodput(k: tuple[int, ...], alphas: list[float] = alphas, cost: IterationCost = cost) -> float:
            kept = sum(expected_length(a, n) for a, n in zip(alphas, k, strict=True))
            return kept / cost.seconds(0, len(alphas), sum(k) + len(alphas), 0)

        best = max(goodput(k) for k in itertools.product(range(5), repeat=len(alphas)))
        gap = max(gap, 1 - goodput(tuple(found)) / best)
    yield Check.at_most("goodput lost against the best of all length vectors", gap, 1e-9)


def _run(
    policy: Any, alpha: float, rate: float, requests: int, seed: int, at: float | None = None
) -> tuple[Any, float]:
    from hasten.serve.cost import IterationCost
    from hasten.serve.policy import DraftCost, StallFree
    from hasten.serve.simulate import Simulator
    from hasten.serve.simulated_guesses import SimulatedSpeculation
    from hasten.serve.workload import RequestSpec

    cost = IterationCost(m0=9e-3, m1=4e-8, m2=2e-5, a=3e-3, b=9e-5, c=4e-10)  # a 7B model on one accelerator
    rng = np.random.default_rng(seed)
    gaps = rng.exponential(1.0, requests)
    scale_at = (
        np.full(requests, 1 / rate) if at is None else np.where(np.arange(requests) < requests // 2, 1 / at, 1 / rate)
    )
    arrivals = np.cumsum(gaps * scale_at)
    load = [RequestSpec(float(t), 200, 100) for t in arrivals]
    change = float(arrivals[requests // 2])
    chance = (lambda t: alpha) if alpha > 0 else (lambda t: 0.9 if t < change else 0.3)
    guesses = SimulatedSpeculation(policy, chance, cost, DraftCost(per_round=1e-3), seed)
    report = Simulator(cost, StallFree(512), blocks=8000, speculation=guesses).run(load)
    return report, change


CAPACITY = 24.0
"""requests per second that the simulated server keeps up with, without speculation"""


def sweep(scale: Scale) -> Iterator[Check]:
    """Mean latency of the adaptive policy against every fixed length, in every cell."""
    from hasten.serve.policy import FixedSpeculation, GoodputSpeculation

    requests = scale.choose(quick=80, full=400)
    shares = scale.choose(quick=(0.1, 0.5, 1.0), full=(0.1, 0.25, 0.5, 0.75, 0.9, 1.0))
    worst_best = worst_off = 0.0
    low = paradox = 0.0
    cells = []
    for number, (share, alpha) in enumerate(itertools.product(shares, (0.3, 0.5, 0.7, 0.9))):
        scale.progress("sweep over load", 0.1 + 0.5 * number / (4 * len(shares)))
        means = {}
        policies: list[Any] = [*(FixedSpeculation(k) for k in FIXED), GoodputSpeculation()]
        for policy in policies:
            report, _ = _run(policy, alpha, share * CAPACITY, requests, scale.seed)
            means[policy.name] = report.metrics.e2e.mean
        off, best = means["fixed-0"], min(means[f"fixed-{k}"] for k in FIXED)
        worst_best = max(worst_best, means["goodput"] / best)
        worst_off = max(worst_off, means["goodput"] / off)
        paradox = max(paradox, means["fixed-5"] / off)
        cells.append(f"{share:g}/{alpha:g}: {means['goodput']:.2f} s, best fixed {best:.2f}, off {off:.2f}")
        if share == shares[0] and alpha == 0.9:
            low = off / means["goodput"]
    note = "; ".join(cells[:: max(1, len(cells) // 6)])
    yield Check.at_most("adaptive latency over no speculation, worst cell", worst_off, 1.05, "×", note)
    yield Check.at_most("adaptive latency over the best fixed length, worst cell", worst_best, 1.05, "×")
    yield Check.at_least(
        "latency without speculation over adaptive, low load, α = 0.9", low, 1.5, "×", "published: up to 3.2×"
    )
    yield Check(
        "latency with five guesses always over none, worst cell", paradox, "×", "> 1", paradox > 1, "the paradox"
    )


def adapts(scale: Scale) -> Iterator[Check]:
    """The load rises, and the draft gets worse: the mean length must fall below one within fifty steps."""
    from hasten.serve.policy import GoodputSpeculation

    requests = scale.choose(quick=160, full=600)
    for name, alpha, before in (
        ("load step 0.2 → 0.95 of capacity, α 0.5", 0.5, 0.2 * CAPACITY),
        ("α step 0.9 → 0.3 at 0.8 of capacity", 0.0, None),
    ):
        rate = 0.95 * CAPACITY if before is not None else 0.8 * CAPACITY
        report, change = _run(GoodputSpeculation(), alpha, rate, requests, scale.seed, before)
        rows = [(t, g / max(1, n)) for t, n, g in report.guesses]
        after = [k for t, k in rows if t >= change]
        early = [k for t, k in rows if t < change]
        window = [float(np.mean(after[i : i + 20])) for i in range(0, max(1, len(after) - 20), 5)]
        steps = next((5 * i for i, k in enumerate(window) if k < 1.0), -1)
        yield Check(
            f"steps until the mean length is below 1 after a {name}",
            steps,
            "",
            "0 … 50",
            0 <= steps <= 50,
            f"mean length {np.mean(early):.2f} before; -1 means never, least later window {min(window):.2f}",
        )


def engine(scale: Scale) -> Iterator[Check]:
    """The embedded pair in the real engine: adaptive against off, in turns, and the predicted goodput."""
    from hasten.language import load
    from hasten.language.speculate.choose import choose
    from hasten.serve.bench.speculate import measure_speculation

    model = load("pycode-4m")
    asked = prompts(model.tokenizer, 8, 200, scale.seed)
    for result in measure_speculation(
        model,
        lambda: choose(model, "auto"),
        asked,
        batches=scale.choose(quick=(1, 8), full=(1, 4, 16, 32)),
        max_tokens=scale.choose(quick=48, full=96),
        rounds=scale.choose(quick=3, full=7),
    ):
        yield Check.at_least(
            f"speed over no speculation, real engine, batch {result.batch}",
            result.speedup,
            0.95,
            "×",
            f"{result.plain:.0f} → {result.speculative:.0f} tokens/s, acceptance {result.acceptance:.2f}, "
            f"{result.tokens_per_pass:.2f} tokens a pass, interval {result.low:.2f}–{result.high:.2f}",
        )
        name = f"predicted over observed goodput, batch {result.batch}"
        if result.observed_goodput:
            yield Check.within(name, result.predicted_goodput / result.observed_goodput, 0.8, 1.25, "×")
        else:
            yield Check.unavailable(name, "nothing was guessed at this batch size", "×")


study = Study(
    system="smartspec",
    claim="Choosing the speculation length by goodput lowers latency at every load, where a fixed length can raise it.",
    published={"average request latency": "up to 3.2x lower than without speculation (abstract)"},
    run=run,
)
