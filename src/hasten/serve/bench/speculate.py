"""What speculation brings: the same prompts through the same engine with and without it, in turns.

Everything is in one process and greedy; prompts are computed before the clock starts counting, so the rate is that of
decoding. Turns alternate (A B, B A, …), the ratio is that of the medians with a paired bootstrap interval.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from hasten.clock import Clock, MonotonicClock
from hasten.errors import ConfigurationError
from hasten.language.params import SamplingParams
from hasten.language.speculate.proposal import Proposer
from hasten.measure.stats import paired_ratio
from hasten.serve.policy.speculation import SpeculationPolicy

__all__ = ["SpeculationResult", "measure_speculation", "python_prompts"]


@dataclass(frozen=True)
class SpeculationResult:
    """One batch size."""

    batch: int
    """sequences that decode together"""
    plain: float
    """tokens per second without speculation"""
    speculative: float
    """with it"""
    speedup: float
    """ratio of the two, with its 95 % interval"""
    low: float
    high: float
    acceptance: float
    """share of the verified guesses that stood"""
    mean_length: float
    """guesses per verification"""
    tokens_per_pass: float
    """tokens that a sequence got per forward pass it took part in"""
    per_position: list[float] = field(default_factory=list)
    """share of verifications whose guess at place j stood"""
    same_tokens: bool = True
    """whether both gave the same answers; without --deterministic a near tie may fall either way"""
    predicted_goodput: float = 0.0
    observed_goodput: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def python_prompts(tokenizer: Any, count: int, length: int = 256, seed: int = 0) -> list[list[int]]:
    """Beginnings out of files of the standard library that the embedded models have not seen."""
    import numpy as np

    from hasten.language.corpus import documents

    texts = [d.text for d in documents(suite=False) if d.split == "test" and len(d.text) > 8 * length]
    if not texts:
        raise ConfigurationError(f"no held-out file is long enough for prompts of {length} tokens; ask for less")
    rng = np.random.default_rng(seed)
    out = []
    for index in range(count):
        text = texts[index % len(texts)]
        at = int(rng.integers(4 * length, len(text) - 2 * length))
        out.append(list(tokenizer.encode(text[at - 4 * length : at]))[-length:])
    return out


def measure_speculation(
    model: Any,
    proposer: Callable[[], Proposer | None],
    prompts: Sequence[Sequence[int]],
    *,
    batches: Sequence[int] = (1, 4, 16),
    max_tokens: int = 64,
    rounds: int = 3,
    policy: SpeculationPolicy | None = None,
    clock: Clock | None = None,
    progress: Callable[[float], None] | None = None,
) -> list[SpeculationResult]:
    """Decode each batch with and without speculation, ``rounds`` times; ``prompts`` are used in turn."""
    from hasten.serve.engine import Engine
    from hasten.serve.policy.registry import make

    clock = clock or MonotonicClock()
    most = max(batches)
    params = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)

    def engine(guesses: Proposer | None) -> Any:
        return Engine(
            model, make("stall-free", token_budget=8192, max_num_seqs=most), max_num_seqs=most, clock=clock,
            prefix_sharing=False, seed=0, proposer=guesses, speculation=policy if guesses is not None else None,
        )  # fmt: skip

    engines = {"plain": engine(None), "speculative": engine(proposer())}

    def run(which: str, batch: int, turn: int) -> tuple[float, list[list[int]], int]:
        """Seconds of decoding, the answers, and forward passes."""
        one = engines[which]
        chosen = [prompts[(turn * batch + i) % len(prompts)] for i in range(batch)]
        seqs = [one.add(p, params) for p in chosen]
        answers: dict[int, list[int]] = {s: [] for s in seqs}
        while min(len(a) for a in answers.values()) == 0:  # prompts first
            for output in one.step():
                answers[output.seq].append(output.token)
        began, passes = clock.now(), one.counters.iterations
        head = sum(len(a) for a in answers.values())
        while one.has_work:
            for output in one.step():
                answers[output.seq].append(output.token)
        seconds = clock.now() - began
        total = sum(len(a) for a in answers.values())
        return seconds / max(1, total - head), list(answers.values()), one.counters.iterations - passes

    out = []
    for number, batch in enumerate(batches):
        times: dict[str, list[float]] = {"plain": [], "speculative": []}
        same, passes = True, 0
        for turn in range(-1, rounds):
            if turn == 0:
                engines["speculative"].reset()
            answers = {}
            for which in ("plain", "speculative") if turn % 2 == 0 else ("speculative", "plain"):
                seconds, answers[which], steps = run(which, batch, turn + 1)
                if turn >= 0:
                    times[which].append(seconds)
                    passes += steps if which == "speculative" else 0
            same = same and answers["plain"] == answers["speculative"]
            if progress is not None:
                progress((number + (turn + 2) / (rounds + 1)) / len(batches))
        ratio = paired_ratio(times["plain"], times["speculative"])
        stats = engines["speculative"].speculation
        middle = {k: sorted(v)[len(v) // 2] for k, v in times.items()}
        out.append(
            SpeculationResult(
                batch,
                1 / middle["plain"],
                1 / middle["speculative"],
                ratio.value,
                ratio.low,
                ratio.high,
                stats.acceptance,
                stats.mean_length,
                rounds * (max_tokens - 1) / max(1, passes),
                [n / max(1, stats.num_drafts) for n in stats.accepted_per_pos],
                same,
                stats.predicted_goodput,
                stats.observed_goodput,
            )  # fmt: skip
        )
    return out
