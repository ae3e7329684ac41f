"""The plain loop: one sequence, one model, no scheduler. The answer that every engine must reproduce.

``prompt -> step -> sample -> step -> …`` with a private cache. For many sequences use :class:`hasten.serve.Engine`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from hasten.clock import Clock, MonotonicClock
from hasten.errors import ContextLengthError, InvalidRequestError
from hasten.language.executor import Executor
from hasten.language.params import SamplingParams
from hasten.language.ragged import RaggedBatch
from hasten.language.sampling import Sampler, SamplingState
from hasten.language.tokenizer import Tokenizer

__all__ = ["Answer", "generate", "infill"]

_BLOCK = 16


@dataclass(frozen=True)
class Answer:
    """What a prompt was answered with."""

    tokens: list[int]
    """ids of the answer, the end token not included"""
    text: str
    """the answer as text; empty without a tokeniser"""
    prompt_tokens: int
    times: list[float] = field(default_factory=list)
    """seconds from the call to each token"""
    dropped: int = 0
    """tokens of an infilling prompt that did not fit the context"""

    @property
    def ttft(self) -> float:
        """Time to the first token."""
        return self.times[0] if self.times else float("nan")

    @property
    def rate(self) -> float:
        """Tokens per second after the first."""
        spent = self.times[-1] - self.times[0] if len(self.times) > 1 else 0.0
        return (len(self.times) - 1) / spent if spent else float("nan")


def generate(
    executor: Executor,
    prompt: Sequence[int],
    params: SamplingParams,
    *,
    tokenizer: Tokenizer | None = None,
    eos: Sequence[int] = (),
    chunk: int | None = None,
    clock: Clock | None = None,
    on_token: Callable[[int], None] | None = None,
) -> Answer:
    """Answer one prompt of token ids.

    ``chunk`` cuts the prompt into pieces of that many tokens (the answer is the same). ``on_token`` is called with each
    token. Raises :class:`ContextLengthError`.
    """
    clock = clock or MonotonicClock()
    began = clock.now()
    if not prompt:
        raise InvalidRequestError("the prompt has no tokens; it needs at least one", "prompt")
    total = len(prompt) + params.max_tokens
    if total > executor.max_context:
        raise ContextLengthError(
            f"the prompt has {len(prompt)} tokens and max_tokens is {params.max_tokens}; "
            f"this model takes {executor.max_context} tokens of both together"
        )
    blocks = -(-total // _BLOCK)
    cache, table = executor.new_cache(blocks, _BLOCK), list(range(blocks))
    state = SamplingState(params, params.seed or 0, prompt, executor.vocab_size, tuple(eos))
    sampler = Sampler(executor.vocab_size)
    ends = set(params.stop_token_ids) | (set() if params.ignore_eos else set(eos))
    size = chunk or len(prompt)
    for start in range(0, len(prompt), size):
        piece = prompt[start : start + size]
        logits = executor.step(RaggedBatch.build([(piece, start, table)]), cache)
    tokens: list[int] = []
    times: list[float] = []
    while len(tokens) < params.max_tokens:
        token = sampler.sample(logits, [state]).tokens[0]
        state.observe(token)
        if token in ends:
            break
        tokens.append(token)
        times.append(clock.now() - began)
        if on_token is not None:
            on_token(token)
        if len(tokens) < params.max_tokens:
            logits = executor.step(RaggedBatch.build([([token], len(prompt) + len(tokens) - 1, table)]), cache)
    text = tokenizer.decode(tokens, skip_special=True) if tokenizer is not None else ""
    return Answer(tokens, text, len(prompt), times)


def infill(
    executor: Executor,
    tokenizer: Tokenizer,
    prefix: str,
    suffix: str,
    params: SamplingParams,
    *,
    eos: Sequence[int] = (),
    on_token: Callable[[int], None] | None = None,
) -> Answer:
    """The middle between ``prefix`` and ``suffix``. Raises :class:`InvalidRequestError` without FIM tokens."""
    prompt, dropped = tokenizer.infill_within(
        prefix, suffix, context=executor.max_context, max_tokens=params.max_tokens
    )
    answer = generate(executor, prompt, params, tokenizer=tokenizer, eos=eos, on_token=on_token)
    return replace(answer, dropped=dropped)
