"""What a benchmark asks: prompts as token ids (exact lengths) or as text, with the length of the answer."""

from __future__ import annotations

import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hasten.errors import DataError
from hasten.serve.workload import RequestSpec

__all__ = ["Prompt", "custom", "prompts_of", "random_specs"]

_BLOCK = 512
"""tokens that one name of a shared prefix stands for (Mooncake's traces)"""
_WORDS = ("the", "a", "of", "to", "and", "in", "is", "it", "you", "that", "he", "was", "for", "on", "are", "with", "as")


@dataclass(frozen=True, slots=True)
class Prompt:
    """One request of a benchmark."""

    arrival: float
    """seconds from the start"""
    prompt: str | list[int]
    prompt_len: int
    """tokens; 0 where only the server can count them"""
    output_len: int


def random_specs(count: int, input_len: int, output_len: int, range_ratio: float, seed: int) -> list[RequestSpec]:
    """Uniform lengths within ``(1 ± range_ratio)`` of the two means, all arriving at once (vLLM's random dataset)."""
    rng = np.random.default_rng(seed)

    def draw(mean: int) -> list[int]:
        low, high = max(1, int(mean * (1 - range_ratio))), max(1, int(mean * (1 + range_ratio)))
        return [int(n) for n in rng.integers(low, high + 1, count)]

    return [RequestSpec(0.0, p, o) for p, o in zip(draw(input_len), draw(output_len), strict=True)]


def prompts_of(
    specs: Sequence[RequestSpec], *, seed: int = 0, vocabulary: tuple[int, int] = (16, 256), as_text: bool = False
) -> list[Prompt]:
    """Prompts with the lengths of ``specs``: random tokens, equal where the specs share prefix names.

    ``vocabulary``: first and behind-the-last id to draw from; the default is valid for every common model.
    ``as_text`` writes as many common words instead, for endpoints that take no ids; the server's count is then the
    one that holds.
    """
    rng = np.random.default_rng(seed)
    low, high = vocabulary
    out = []
    for spec in specs:
        if as_text:
            text = " ".join(_WORDS[i] for i in rng.integers(0, len(_WORDS), spec.prompt_len))
            out.append(Prompt(spec.arrival, text, 0, spec.output_len))
            continue
        ids: list[int] = []
        for name in spec.prefix[:-1]:  # the last block is the request's own
            own = np.random.default_rng([seed, zlib.crc32(str(name).encode())])
            ids.extend(own.integers(low, high, _BLOCK).tolist())
        ids = ids[: spec.prompt_len]
        ids.extend(rng.integers(low, high, spec.prompt_len - len(ids)).tolist())
        out.append(Prompt(spec.arrival, ids, spec.prompt_len, spec.output_len))
    return out


def custom(path: Path, count: int, output_len: int) -> list[Prompt]:
    """JSON lines with ``prompt`` and, where known, ``output_tokens``; taken in turn until there are ``count``.

    Raises :class:`~hasten.errors.DataError`.
    """
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        prompts = [(str(row["prompt"]), int(row.get("output_tokens") or output_len)) for row in rows]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path} is no dataset ({error}); it needs one JSON object with a prompt on each line"
        ) from error
    if not prompts:
        raise DataError(f"{path} holds no prompt")
    return [Prompt(0.0, *pick) for pick in ((p, 0, o) for p, o in (prompts[i % len(prompts)] for i in range(count)))]
