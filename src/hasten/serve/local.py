"""A pipeline: an engine inside the caller's own process, gone when the caller is done."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any

from hasten.clock import Clock
from hasten.language.params import SamplingParams
from hasten.serve.engine import Engine
from hasten.serve.output import Completion
from hasten.serve.policy.registry import make

__all__ = ["Pipeline", "pipeline"]


class Pipeline:
    """Answers lists of prompts with one engine.

    >>> pipe = pipeline("pycode-4m", policy="splitfuse", token_budget=768)          # doctest: +SKIP
    >>> pipe(["def add(a, b):", "import"], max_new_tokens=16)[0].text               # doctest: +SKIP
    '\\n    return a + b'
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def __call__(
        self,
        prompts: str | Sequence[str] | Sequence[Sequence[int]],
        max_new_tokens: int = 16,
        **sampling: Any,
    ) -> list[Completion]:
        """Completions in the order of the prompts; ``sampling`` are fields of :class:`SamplingParams`."""
        texts = [prompts] if isinstance(prompts, str) else prompts
        return self.engine.generate(texts, SamplingParams.make(max_tokens=max_new_tokens, **sampling))

    def stream(self, prompt: str | Sequence[int], max_new_tokens: int = 16, **sampling: Any) -> Iterator[str]:
        """Text of one answer, piece by piece."""
        return self.engine.stream(prompt, SamplingParams.make(max_tokens=max_new_tokens, **sampling))


def pipeline(
    model: str | os.PathLike[str] | Any = "pycode-4m",
    *,
    policy: str = "stall-free",
    token_budget: int | None = None,
    max_num_seqs: int = 128,
    num_blocks: int | None = None,
    block_size: int = 16,
    dtype: str = "auto",
    device: str = "cpu",
    deterministic: bool = False,
    clock: Clock | None = None,
    **knobs: Any,
) -> Pipeline:
    """Load ``model`` (folder, name, or a model that is loaded) into an engine of its own.

    ``knobs`` are those of the policy. Raises what loading raises, and ``ConfigurationError`` for unknown knobs.
    """
    if isinstance(model, (str, os.PathLike)):
        from hasten.language.loading import load

        model = load(os.fspath(model), device=device, dtype=dtype, deterministic=deterministic)
    if policy != "request-level" or max_num_seqs != 128:
        knobs.setdefault("max_num_seqs", max_num_seqs)
    chosen = make(policy, token_budget=token_budget, **knobs)
    engine = Engine(model, chosen, num_blocks, block_size, clock, max_num_seqs, deterministic)
    return Pipeline(engine)
