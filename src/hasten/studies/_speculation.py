"""What the studies of speculation share: models of tables, held-out prompts, medians of interleaved timings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hasten.clock import MonotonicClock

__all__ = ["Table", "first_two", "law_of_two", "law_gap", "medians", "prompts", "rows_of"]


class Table:
    """A random but fixed law for every path of tokens; some entries are zero."""

    def __init__(self, vocab: int, seed: int, zeros: float = 0.3) -> None:
        self.vocab, self.seed, self.zeros = vocab, seed, zeros
        self._known: dict[tuple[int, ...], NDArray[np.float64]] = {}

    def __call__(self, path: Sequence[int]) -> NDArray[np.float64]:
        key = tuple(path)
        if key not in self._known:
            rng = np.random.default_rng([self.seed, *[p + 1 for p in key]])
            law = rng.random(self.vocab) ** 3
            law[rng.random(self.vocab) < self.zeros] = 0.0
            if law.sum() == 0:
                law[int(rng.integers(self.vocab))] = 1.0
            self._known[key] = law / law.sum()
        return self._known[key]

    def distributions(self, head: tuple[int, ...]) -> Callable[[Any, Sequence[int]], NDArray[np.float64]]:
        """As a shape of guesses wants it, behind the tokens ``head``."""
        return lambda tree, nodes: np.stack([self((*head, *(tree.tokens[i] for i in tree.path(n)))) for n in nodes])


def rows_of(target: Table, tree: Any, head: tuple[int, ...]) -> NDArray[np.float64]:
    """The target's laws for a verification: after the root, then after each node."""
    return np.stack([target((*head, *(tree.tokens[i] for i in tree.path(n)))) for n in range(-1, len(tree))])


def first_two(run: Callable[[tuple[int, ...], Any], list[int]], draw: Any) -> tuple[int, ...]:
    """The first two tokens of passes that give at least one each."""
    out: list[int] = []
    while len(out) < 2:
        out += run(tuple(out), draw)
    return tuple(out[:2])


def law_of_two(target: Table) -> dict[tuple[int, ...], float]:
    """The law of the first two tokens of plain decoding."""
    return {(a, b): float(target(())[a] * target((a,))[b]) for a in range(target.vocab) for b in range(target.vocab)}


def law_gap(found: dict[tuple[int, ...], float], expected: dict[tuple[int, ...], float]) -> float:
    """Largest difference of two laws."""
    return max(abs(found.get(k, 0.0) - expected.get(k, 0.0)) for k in set(found) | set(expected))


def prompts(tokenizer: Any, count: int, length: int, seed: int = 0) -> list[list[int]]:
    """Held-out library code."""
    from hasten.serve.bench.speculate import python_prompts

    return python_prompts(tokenizer, count, length, seed)


def medians(runs: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median seconds of each, run in turns; the first turn does not count."""
    clock = MonotonicClock()
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds + 1):
        for name in list(runs) if turn % 2 == 0 else list(runs)[::-1]:
            began = clock.now()
            runs[name]()
            if turn:
                times[name].append(clock.now() - began)
    return {name: float(np.median(t)) for name, t in times.items()}
