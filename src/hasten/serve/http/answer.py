"""One answer as it grows: tokens come in, text, logprobs and the reason of its end come out."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from hasten.language.params import SamplingParams, TokenLogprobs
from hasten.language.tokenizer import Tokenizer
from hasten.serve.output import AnswerText, Timing
from hasten.serve.ticket import News, Ticket

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["Answer", "Piece", "apply", "chat_logprobs", "completion_logprobs", "token_label", "usage_of"]


class Piece:
    """What one batch of news adds to one answer."""

    __slots__ = ("finish", "logprobs", "stop_reason", "text", "tokens")

    def __init__(self) -> None:
        self.text = ""
        self.tokens: list[int] = []
        self.logprobs: list[TokenLogprobs] = []
        self.finish: str | None = None
        self.stop_reason: int | str | None = None


class Answer:
    """The state of one choice."""

    def __init__(self, index: int, prompt: list[int], tokenizer: Tokenizer, params: SamplingParams) -> None:
        self.index = index
        self.prompt = prompt
        self.pieces: list[str] = []
        self.tokens: list[int] = []
        self.logprobs: list[TokenLogprobs] = []
        self.prompt_logprobs: list[TokenLogprobs | None] | None = None
        self.finish: str | None = None
        self.stop_reason: int | str | None = None
        self.timing: Timing | None = None
        self.error: str | None = None
        self.offset = 0
        """characters so far, for text_offset"""
        self._text = AnswerText(tokenizer, params)

    @property
    def text(self) -> str:
        """All of the text so far."""
        return "".join(self.pieces)

    @property
    def score(self) -> float:
        """Mean log probability per token, which ranks ``best_of``."""
        return sum(p.chosen for p in self.logprobs) / max(1, len(self.logprobs))

    def take(self, token: int | None, output: Any, piece: Piece, now: float) -> bool:
        """Add one piece of news; True when a stop string ended the answer with it."""
        finish = stop_token = None
        if output is not None:
            if output.prompt_logprobs is not None:
                self.prompt_logprobs = output.prompt_logprobs
            if output.logprobs is not None:
                self.logprobs.append(output.logprobs)
                piece.logprobs.append(output.logprobs)
            if output.timing is not None:
                self.timing = output.timing
            finish, stop_token = output.finish, output.stop_token
            self.error = output.error
        new = [] if token is None else [token]
        self.tokens += new
        piece.tokens += new
        text = self._text.push(new, finish=finish, stop_token=stop_token)
        if text:
            self.pieces.append(text)
            piece.text += text
        if self._text.stopped is not None:
            self.finish, self.stop_reason = "stop", self._text.stopped
            if finish is None and self.timing is not None:
                self.timing = replace(self.timing, last_token=now, output_tokens=len(self.tokens))
        elif finish is not None:
            self.finish = finish.value
            self.stop_reason = stop_token
        else:
            return False
        piece.finish, piece.stop_reason = self.finish, self.stop_reason
        return self._text.stopped is not None and finish is None


def apply(news: Iterable[News], answers: list[Answer], ticket: Ticket, now: float) -> dict[int, Piece]:
    """Hand news to their answers; what is new, by index. Sequences that met a stop string are ended."""
    pieces: dict[int, Piece] = {}
    for index, token, output in news:
        answer = answers[index]
        if answer.finish is not None:
            continue
        piece = pieces.get(index)
        if piece is None:
            piece = pieces[index] = Piece()
        if answer.take(token, output, piece, now):
            ticket.stop(index)
    return pieces


def _finite(value: float) -> float:
    return value if value > -1e4 else -9999.0  # JSON has no infinity


def token_label(tokenizer: Tokenizer, token: int) -> str:
    """A token as text; bytes that are no text by themselves as ``bytes:\\xe2``, so that labels stay distinct."""
    text = tokenizer.token_text(token)
    table = tokenizer.token_bytes
    if "�" in text and table is not None:
        return "bytes:" + "".join(f"\\x{b:02x}" for b in table[token])
    return text


def completion_logprobs(
    tokenizer: Tokenizer, tokens: list[int], logprobs: list[TokenLogprobs | None], offset: int, top: bool
) -> tuple[dict[str, Any], int]:
    """The ``logprobs`` object of a completion for some of its tokens, and the text offset behind them."""
    labels, offsets = [], []
    for token in tokens:
        labels.append(token_label(tokenizer, token))
        offsets.append(offset)
        offset += len(tokenizer.token_text(token))
    tops: list[dict[str, float] | None] = []
    for entry, token, label in zip(logprobs, tokens, labels, strict=True):
        if entry is None:
            tops.append(None)
            continue
        best = {token_label(tokenizer, i): _finite(v) for i, v in zip(entry.top_ids, entry.top, strict=True)}
        if token not in entry.top_ids:
            best[label] = _finite(entry.chosen)
        tops.append(best)
    body: dict[str, Any] = {
        "text_offset": offsets,
        "token_logprobs": [None if e is None else _finite(e.chosen) for e in logprobs],
        "tokens": labels,
        "top_logprobs": tops if top else None,
    }
    return body, offset


def chat_logprobs(tokenizer: Tokenizer, tokens: list[int], logprobs: list[TokenLogprobs]) -> dict[str, Any]:
    """The ``logprobs`` object of a chat answer."""

    def entry(token: int, value: float) -> dict[str, Any]:
        table = tokenizer.token_bytes
        data = table[token] if table is not None and token < len(table) else tokenizer.token_text(token).encode()
        return {"token": token_label(tokenizer, token), "logprob": _finite(value), "bytes": list(data)}

    content = []
    for token, logs in zip(tokens, logprobs, strict=True):
        item = entry(token, logs.chosen)
        item["top_logprobs"] = [entry(i, v) for i, v in zip(logs.top_ids, logs.top, strict=True)]
        content.append(item)
    return {"content": content, "refusal": None}


def prompt_logprobs_body(tokenizer: Tokenizer, answer: Answer) -> list[Any] | None:
    """vLLM's ``prompt_logprobs``: for each prompt token a mapping of token id to its log probability."""
    if answer.prompt_logprobs is None:
        return None
    out: list[Any] = []
    for token, logs in zip(answer.prompt, answer.prompt_logprobs, strict=False):
        if logs is None:
            out.append(None)
            continue
        ranks = list(zip(logs.top_ids, logs.top, range(1, len(logs.top) + 1), strict=True))
        if token not in logs.top_ids:
            ranks.append((token, logs.chosen, logs.rank))
        out.append(
            {
                str(i): {"logprob": _finite(v), "rank": rank, "decoded_token": token_label(tokenizer, i)}
                for i, v, rank in ranks
            }
        )
    return out


def usage_of(prompts: list[list[int]], answers: list[Answer]) -> dict[str, Any]:
    """Token counts of a whole request."""
    prompt = sum(len(p) for p in prompts)
    generated = sum(len(a.tokens) for a in answers)
    cached = sum(a.timing.cached_tokens for a in answers if a.timing is not None)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": generated,
        "total_tokens": prompt + generated,
        "prompt_tokens_details": {"cached_tokens": min(cached, prompt)},
    }


def dumps(value: Any) -> str:
    """Compact JSON; lone surrogates cannot occur in text that came out of a decoder."""
    return json.dumps(value, separators=(",", ":"))
