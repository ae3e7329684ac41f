"""The precision of the KV cache as a knob of a server: what it costs in quality, and what memory it leaves.

Quality is the perplexity of text behind a context, with the cache in a precision over that with the cache as the
activations are; a precision beyond the bound is no choice at all. Memory stays the same, so a narrower cache has more
blocks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hasten.tune.space import Point

__all__ = ["kv_loss", "runtime_of", "within"]


def runtime_of(point: Point) -> str:
    """What a cost was fitted for: the precision of the weights, and that of the cache where it is another.

    >>> runtime_of({"precision": "bf16"}), runtime_of({"precision": "bf16", "kv_precision": "int8"})
    ('bf16', 'bf16, kv int8')
    """
    precision, kv = str(point.get("precision", "")), str(point.get("kv_precision", "auto"))
    return precision if kv == "auto" else f"{precision}, kv {kv}"


def kv_loss(model: Any, precision: str, prompts: Sequence[Sequence[int]]) -> float:
    """By what share the perplexity of ``prompts`` rises with the cache in ``precision``; the executor is left as it
    was."""
    import torch

    from hasten.language.ragged import RaggedBatch

    executor = model.executor
    before, rises = executor.kv_precision, []
    try:
        for tokens in prompts:
            losses = []
            for kind in ("auto", precision):
                executor.keep_cache_in(kind)
                table = list(range(-(-len(tokens) // 16)))
                cache, logs = executor.new_cache(len(table), 16), []
                for begin in range(0, len(tokens) - 1, 64):  # in pieces, so that the cache is read
                    piece = list(tokens[begin : min(begin + 64, len(tokens) - 1)])
                    logits = executor.step(RaggedBatch.build([(piece, begin, table)], "all"), cache)
                    logs.append(torch.log_softmax(logits.double(), -1))
                wanted = torch.tensor(list(tokens[1:]))
                losses.append(float(-torch.cat(logs)[torch.arange(len(wanted)), wanted].mean()))
            rises.append(losses[1] - losses[0])
    finally:
        executor.keep_cache_in(before)
    return math.expm1(sum(rises) / len(rises))


def within(model: Any, precisions: Sequence[str], bound: float, *, seed: int = 0) -> dict[str, float]:
    """Those of ``precisions`` whose loss is at most ``bound`` (0.01 is one per cent), with it; ``auto`` has none.

    Executors whose cache has one form only keep ``auto``.
    """
    from hasten.errors import ConfigurationError
    from hasten.tune.guessing import prompts_for

    out: dict[str, float] = {}
    for precision in precisions:
        if precision == "auto":
            out[precision] = 0.0
        elif hasattr(model.executor, "keep_cache_in"):
            length = min(768, int(model.executor.max_context))
            try:
                loss = kv_loss(model, precision, prompts_for(model, [length] * 6, seed))
            except ConfigurationError:
                continue
            if loss <= bound:
                out[precision] = loss
    return out or {"auto": 0.0}
