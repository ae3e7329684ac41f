"""Whole answers out of an engine that hands out tokens: texts in, completions or pieces of text out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from hasten.errors import ConfigurationError, InvalidRequestError
from hasten.language.params import SamplingParams
from hasten.serve.output import AnswerText, Completion, Output
from hasten.serve.request import FinishReason

if TYPE_CHECKING:
    from hasten.serve.engine import Engine

__all__ = ["generate", "stream"]


def generate(
    engine: Engine,
    prompts: Sequence[str] | Sequence[Sequence[int]],
    params: SamplingParams | Sequence[SamplingParams] | None = None,
) -> list[Completion]:
    """See :meth:`hasten.serve.engine.Engine.generate`."""
    tokens = [engine.tokenize(p) if isinstance(p, str) else list(p) for p in prompts]
    choices = [params or SamplingParams()] * len(tokens) if not isinstance(params, Sequence) else list(params)
    if len(choices) != len(tokens):
        raise InvalidRequestError(f"{len(tokens)} prompts and {len(choices)} params were given; give one per prompt")
    for prompt, choice in zip(tokens, choices, strict=True):
        engine.check(prompt, choice)
    live: dict[int, tuple[Completion, AnswerText | None]] = {}
    out: list[Completion] = []
    for prompt, choice in zip(tokens, choices, strict=True):
        completion = Completion(prompt)
        out.append(completion)
        text = AnswerText(engine.tokenizer, choice) if engine.tokenizer is not None else None
        live[engine.add(prompt, choice)] = (completion, text)
    while live:
        for output in engine.step():
            if output.seq in live and _take(engine, output, *live[output.seq]):
                del live[output.seq]
    return out


def _take(engine: Engine, output: Output, completion: Completion, text: AnswerText | None) -> bool:
    """Add an output to a completion; whether that was the last."""
    new = [] if output.token is None else [output.token]
    completion.tokens += new
    if output.prompt_logprobs is not None:
        completion.prompt_logprobs = output.prompt_logprobs
    if output.logprobs is not None:
        completion.logprobs.append(output.logprobs)
    if text is not None:
        completion.text += text.push(new, finish=output.finish, stop_token=output.stop_token)
        if text.stopped is not None and output.finish is None:
            engine.cancel(output.seq, FinishReason.STOP)
            output.finish = FinishReason.STOP
    if output.finish is None:
        return False
    stopped = text is not None and text.stopped is not None
    completion.finish_reason = "stop" if stopped else output.finish.value
    completion.timing = output.timing
    completion.error = output.error
    return True


def stream(engine: Engine, prompt: str | Sequence[int], params: SamplingParams | None = None) -> Iterator[str]:
    """See :meth:`hasten.serve.engine.Engine.stream`."""
    params = params or SamplingParams()
    if engine.tokenizer is None:
        raise ConfigurationError("text needs a model with a tokenizer; use add and step")
    seq = engine.add(engine.tokenize(prompt) if isinstance(prompt, str) else prompt, params)
    text = AnswerText(engine.tokenizer, params)
    try:
        while engine.has_news_of(seq):
            for output in engine.step():
                if output.seq != seq:
                    continue
                new = [] if output.token is None else [output.token]
                piece = text.push(new, finish=output.finish, stop_token=output.stop_token)
                if piece:
                    yield piece
                if text.stopped is not None:
                    engine.cancel(seq, FinishReason.STOP)
                    return
    finally:
        engine.cancel(seq)
