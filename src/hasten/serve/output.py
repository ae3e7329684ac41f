"""What comes out of an engine, and how tokens become the text of an answer.

The engine knows tokens only. :class:`AnswerText` (in whichever process speaks to the user) turns them into text and
looks for stop strings, so that detokenising never delays a step.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from hasten.serve.request import FinishReason

if TYPE_CHECKING:
    from hasten.language.params import SamplingParams, TokenLogprobs
    from hasten.language.tokenizer import Tokenizer

__all__ = ["AnswerText", "Completion", "Output", "Timing"]


@dataclass(frozen=True, slots=True)
class Timing:
    """When things happened to one sequence; seconds on the engine's clock."""

    arrival: float
    first_scheduled: float | None
    """when the step that computed its first token of the prompt began"""
    first_token: float | None
    last_token: float | None
    prompt_tokens: int
    output_tokens: int
    cached_tokens: int
    """prompt tokens that a shared prefix gave, so that they were not computed"""
    preemptions: int

    def to_dict(self) -> dict[str, float | int | None]:
        """Durations in seconds and rates in tokens per second, as the ``timings`` of a response."""
        queue = None if self.first_scheduled is None else self.first_scheduled - self.arrival
        ttft = e2e = tpot = prompt_rate = rate = None
        if self.first_token is not None and self.last_token is not None:
            ttft = self.first_token - self.arrival
            e2e = self.last_token - self.arrival
            if self.first_scheduled is not None and self.first_token > self.first_scheduled:
                computed = self.prompt_tokens - self.cached_tokens
                prompt_rate = computed / (self.first_token - self.first_scheduled)
            if self.output_tokens > 1:
                tpot = (self.last_token - self.first_token) / (self.output_tokens - 1)
                rate = 1.0 / tpot if tpot > 0 else None
        return {
            "queue": queue,
            "ttft": ttft,
            "tpot": tpot,
            "e2e": e2e,
            "prompt_tokens": self.prompt_tokens,
            "cached_tokens": self.cached_tokens,
            "output_tokens": self.output_tokens,
            "prompt_tokens_per_second": prompt_rate,
            "tokens_per_second": rate,
            "preemptions": self.preemptions,
        }


@dataclass(slots=True)
class Output:
    """News of one sequence after one step."""

    seq: int
    token: int | None = None
    """the new token; None where there is news without one"""
    finish: FinishReason | None = None
    """why the sequence ended, with its last token"""
    logprobs: TokenLogprobs | None = None
    """of the new token, where asked"""
    stop_token: int | None = None
    """the token that ended the answer, when one did"""
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    """of the whole prompt, with the first output, where asked; the first token has none"""
    timing: Timing | None = None
    """with the first and with the last output"""
    error: str | None = None
    """one line, when the engine failed this sequence"""


@dataclass(slots=True)
class Completion:
    """One finished answer."""

    prompt_tokens: list[int]
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: str | None = None
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    timing: Timing | None = None
    error: str | None = None


class AnswerText:
    """Text of one answer as its tokens come in.

    ``push`` returns the text that is certain. ``stopped`` is set when a stop string was met: the caller then
    cancels the sequence and reports ``stop``. Tokens pushed after that give nothing.
    """

    __slots__ = ("_detokenizer", "_include", "_stops", "stopped")

    def __init__(self, tokenizer: Tokenizer, params: SamplingParams) -> None:
        from hasten.language.tokenizer import StopStrings

        self._detokenizer = tokenizer.detokenizer(skip_special=params.skip_special_tokens)
        self._include = params.include_stop_str_in_output
        self._stops = StopStrings(params.stop, include=self._include) if params.stop else None
        self.stopped: str | None = None

    def push(self, tokens: list[int], *, finish: FinishReason | None, stop_token: int | None = None) -> str:
        """New text for new tokens; with ``finish`` what was held back comes out too."""
        if self.stopped is not None:
            return ""
        if stop_token is not None and not self._include and tokens and tokens[-1] == stop_token:
            tokens = tokens[:-1]
        text = self._detokenizer.push(tokens)
        if finish is not None:
            text += self._detokenizer.flush()
        if self._stops is None:
            return text
        text = self._stops.push(text)
        if self._stops.stopped is not None:
            self.stopped = self._stops.stopped
        elif finish is not None:
            text += self._stops.flush()
        return text
