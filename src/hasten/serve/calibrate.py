"""Measure how long real batches take, so that :meth:`IterationCost.fit` can learn from them.

The batches cover what a server meets: decodes alone (few and many sequences, short and long contexts), prompts alone,
pieces of prompts at the end of a long context, and mixtures. Token ids are random, the cache is private, nothing is
sampled. Each shape runs once unmeasured, then ``repeats`` times in an order that interleaves all shapes; its time is
the median, or the minimum. Contexts need no real keys and values; the cache is filled with a constant.
"""

from __future__ import annotations

import itertools
import random
import statistics
from collections.abc import Callable
from typing import Any, Literal

import numpy as np

from hasten.clock import Clock
from hasten.errors import ConfigurationError
from hasten.serve.cost import Sample

__all__ = ["measure_batches", "shapes"]

_BLOCK = 16


def shapes(
    *, max_context: int, max_tokens: int, max_num_seqs: int, cache_tokens: int, seed: int = 0
) -> list[list[tuple[int, int]]]:
    """Batches to measure, each a list of ``(context, length)``; the most telling ones first."""
    rng = random.Random(seed)
    counts = [n for n in (1, 2, 4, 8, 16, 32, 64, 128, 256) if n <= max_num_seqs]
    contexts = sorted({max(1, int(max_context * f)) for f in (0.02, 0.1, 0.25, 0.5, 0.75, 0.95)})
    lengths = [n for n in (8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096) if n <= min(max_tokens, max_context)]
    decodes = [[(c, 1)] * n for n, c in itertools.product(counts, contexts)]
    prompts = [[(0, n)] for n in lengths]
    pieces = [[(c, n)] for c in contexts for n in lengths if c + n <= max_context]
    mixed: list[list[tuple[int, int]]] = []
    for count, length in itertools.product(counts, lengths):
        past = rng.choice([0, *contexts])
        if count + length <= max_tokens and past + length <= max_context:
            mixed.append([(rng.choice(contexts), 1) for _ in range(count)] + [(past, length)])
    for length, parts in itertools.product(lengths, (2, 4, 8)):
        if length >= 8 * parts and parts <= max_num_seqs:
            mixed.append([(0, length // parts)] * parts)
    for pool in (decodes, pieces, mixed):
        rng.shuffle(pool)
    corners = [[(contexts[0], 1)] * counts[-1], [(contexts[-1], 1)] * counts[-1], [(contexts[-1], 1)]]
    order = corners + prompts + [b for row in itertools.zip_longest(decodes, mixed, pieces) for b in row if b]
    seen: set[tuple[tuple[int, int], ...]] = set()
    out = []
    for batch in order:
        key = tuple(batch)
        blocks = sum(-(-(context + length) // _BLOCK) for context, length in batch)
        if key not in seen and blocks * _BLOCK <= cache_tokens:
            seen.add(key)
            out.append(batch)
    return out


def measure_batches(
    model: Any,
    clock: Clock,
    *,
    time_limit: float = 20.0,
    max_context: int | None = None,
    max_tokens: int = 512,
    max_num_seqs: int = 32,
    cache_tokens: int | None = None,
    repeats: int = 3,
    seed: int = 0,
    progress: bool | Callable[[float], None] = True,
    batches: list[list[tuple[int, int]]] | None = None,
    statistic: Literal["median", "minimum"] = "median",
) -> list[Sample]:
    """Run batches through ``model`` (an executor, or what has one) and return them with their seconds.

    ``max_context`` bounds context + length of one sequence (by default what the model allows, at most 4096),
    ``max_tokens`` the tokens of a batch, ``max_num_seqs`` its sequences, ``cache_tokens`` the private cache (by
    default at most 1 GiB). ``statistic`` of the times of a shape: the minimum where other work shares the machine,
    for that only ever adds time. ``progress`` shows a bar, or is called with the share done. Stops early when
    ``time_limit`` seconds are used; raises :class:`~hasten.errors.ConfigurationError` when that leaves fewer than
    eight shapes.
    """
    from hasten.language.cache import BlockPool

    executor = getattr(model, "executor", model)
    allowed = int(executor.max_context)
    max_context = min(max_context or 4096, allowed)
    wanted = max_num_seqs * max_context + max_tokens
    affordable = int(2**30 // max(1, int(executor.bytes_per_token)))
    tokens = min(cache_tokens or wanted, wanted, max(affordable, max_context))
    num_blocks = -(-tokens // _BLOCK) + 1
    plan = batches or shapes(
        max_context=max_context,
        max_tokens=max_tokens,
        max_num_seqs=max_num_seqs,
        cache_tokens=tokens,
        seed=seed,
    )
    if len(plan) < 8:
        raise ConfigurationError(
            f"only {len(plan)} batch shapes fit a context of {max_context} and {tokens} cache tokens; at least 8 are "
            "needed: give a larger max_context, max_tokens or cache_tokens"
        )
    cache = executor.new_cache(num_blocks, _BLOCK)
    for half in (getattr(cache, "keys", None), getattr(cache, "values", None)):
        if half is not None:
            half.fill_(0.25)  # memory that was never written reads faster than a cache in use
    pool = BlockPool(num_blocks, _BLOCK, prefix_sharing=False)
    rng = np.random.default_rng(seed)
    for batch in _first_of_each_kind(max_context, max_tokens, tokens):  # kernels are compiled before the time counts
        executor.step(_layout(batch, pool, executor.vocab_size, rng), cache)
        for seq in range(len(batch)):
            pool.free(seq)
    begin = clock.now()
    with _bar(progress, time_limit) as advance:

        def timed(batch: list[tuple[int, int]]) -> float:
            ragged = _layout(batch, pool, executor.vocab_size, rng)
            before = clock.now()
            executor.step(ragged, cache)
            after = clock.now()
            for seq in range(len(batch)):
                pool.free(seq)
            advance(min(1.0, (after - begin) / time_limit))
            return after - before

        runs: list[list[float]] = []
        for batch in plan:  # warm-up: kernels are chosen and memory is touched here, and too many shapes are cut off
            first = timed(batch)
            quick = min(first, timed(batch)) if first < 0.05 * time_limit else first
            runs.append([quick])
            expected = sum(r[0] for r in runs) * repeats
            if clock.now() - begin + expected > time_limit and len(runs) >= 8:
                break
        for r in runs:
            r.clear()
        for _ in range(repeats):
            if runs[0] and clock.now() - begin > 1.5 * time_limit:
                break
            for batch, times in zip(plan, runs, strict=False):
                times.append(timed(batch))
        advance(1.0)
    of = statistics.median if statistic == "median" else min
    return [(batch, of(times)) for batch, times in zip(plan, runs, strict=False)]


def _first_of_each_kind(max_context: int, max_tokens: int, cache_tokens: int) -> list[list[tuple[int, int]]]:
    """Batches that take every path of a runtime once: few and many keys, short and long chunks, and both together."""
    piece = max(1, min(100, max_tokens - 1, max_context))
    far = [(max_context - 1, 1)] * 2 if max_context > 1 else []
    kinds = [[(0, 1)], far, [(0, piece)], [(0, piece), (0, 1)]]
    return [kind for kind in kinds if kind and sum(-(-(c + n) // _BLOCK) * _BLOCK for c, n in kind) <= cache_tokens]


def _layout(batch: list[tuple[int, int]], pool: Any, vocab_size: int, rng: np.random.Generator) -> Any:
    from hasten.language.ragged import RaggedBatch

    chunks = []
    for seq, (context, length) in enumerate(batch):
        pool.open(seq, ())
        pool.grow(seq, context + length)
        ids: list[int] = rng.integers(0, vocab_size, size=length).tolist()
        chunks.append((ids, context, list(pool.table(seq))))
    return RaggedBatch.build(chunks)


class _bar:
    """A progress bar on the terminal, a callable, or nothing."""

    def __init__(self, progress: bool | Callable[[float], None], seconds: float) -> None:
        self._progress = progress
        self._shown: Any = None

    def __enter__(self) -> Callable[[float], None]:
        if callable(self._progress):
            return self._progress
        if not self._progress:
            return lambda share: None
        from rich.progress import Progress

        self._shown = Progress(transient=True)
        self._shown.start()
        task = self._shown.add_task("measuring iterations", total=1.0)
        return lambda share: self._shown.update(task, completed=share)

    def __exit__(self, *_: object) -> None:
        if self._shown is not None:
            self._shown.stop()
