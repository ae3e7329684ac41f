"""POST /v1/completions and /v1/chat/completions: one way through for both, whole or streamed.

Life of a request: body → schema → tokens and knobs → ticket → news → answers → JSON or server-sent events. The
connection is watched meanwhile: when the client goes, the ticket is cancelled and its blocks are free before the
next step.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hasten.errors import EngineDeadError, EngineError, HastenError, InvalidRequestError
from hasten.serve.http.answer import (
    Answer,
    Piece,
    apply,
    chat_logprobs,
    completion_logprobs,
    dumps,
    prompt_logprobs_body,
    usage_of,
)
from hasten.serve.http.errors import error_body, error_object
from hasten.serve.http.params import parse, sampling_params, slo_of
from hasten.serve.http.schemas import ChatMessage, ChatRequest, CompletionRequest
from hasten.serve.ticket import Ticket

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from hasten.language.params import SamplingParams
    from hasten.language.tokenizer import Tokenizer
    from hasten.serve.http.state import ServerState

    Receive = Callable[[], Awaitable[Any]]
    Send = Callable[[Any], Awaitable[None]]

__all__ = ["chat", "chat_tokens", "completions"]

_LONG = 1 << 14
"""characters from which tokenising leaves the event loop"""


@dataclass
class _Job:
    """A request that is ready to run."""

    chat: bool
    request: CompletionRequest | ChatRequest
    prompts: list[list[int]]
    params: SamplingParams
    copies: int
    wanted: int
    """answers per prompt that are returned, the best of ``copies``"""
    echo: bool
    logprobs: int | None
    id: str = ""
    created: int = 0


async def completions(state: ServerState, body: bytes, receive: Receive, send: Send) -> None:
    """Answer POST /v1/completions."""
    arrival = state.engine.clock.now()
    state.engine.check_open()
    request = parse(CompletionRequest, body)
    state.check_model(request.model)
    tokenizer = state.tokenizer
    prompts = await _prompts(request, tokenizer)
    wanted = request.n or 1
    copies = request.best_of or wanted
    echo = bool(request.echo)
    if copies < wanted:
        raise InvalidRequestError(f"best_of is {copies} and n is {wanted}; best_of must be n or more", "best_of")
    if request.stream and copies > wanted:
        raise InvalidRequestError("best_of cannot be streamed; leave stream or best_of out", "best_of")
    if request.max_tokens == 0 and not (echo or request.prompt_logprobs is not None):
        raise InvalidRequestError(
            "max_tokens is 0; it must be 1 or more, unless echo asks for the prompt", "max_tokens"
        )
    room = max(1, state.max_model_len - max(len(p) for p in prompts))
    params = sampling_params(
        request,
        max_tokens=room if request.max_tokens is None else request.max_tokens,
        logprobs=0 if copies > wanted and request.logprobs is None else request.logprobs,
        defaults=state.defaults,
    )
    if echo and request.logprobs is not None:
        params = _with_prompt_logprobs(params, request.logprobs)
    job = _Job(False, request, prompts, params, copies, wanted, echo, request.logprobs)
    await _run(state, job, arrival, receive, send)


async def chat(state: ServerState, body: bytes, receive: Receive, send: Send) -> None:
    """Answer POST /v1/chat/completions."""
    arrival = state.engine.clock.now()
    state.engine.check_open()
    request = parse(ChatRequest, body)
    state.check_model(request.model)
    if request.tools or request.tool_choice not in (None, "none"):
        raise InvalidRequestError("tools are not supported by this server; leave tools and tool_choice out", "tools")
    if request.chat_template is not None:
        raise InvalidRequestError(
            "a chat template is a program and is not taken from a request; start the server with --chat-template",
            "chat_template",
        )
    if request.top_logprobs and not request.logprobs:
        raise InvalidRequestError("top_logprobs needs logprobs to be true", "top_logprobs")
    prompt = await chat_tokens(
        state, request.messages, request.add_generation_prompt, request.chat_template_kwargs or {}
    )
    limit = request.max_completion_tokens if request.max_completion_tokens is not None else request.max_tokens
    if limit == 0:
        raise InvalidRequestError("max_tokens is 0; it must be 1 or more", "max_tokens")
    logprobs = (request.top_logprobs or 0) if request.logprobs else None
    params = sampling_params(
        request,
        max_tokens=max(1, state.max_model_len - len(prompt)) if limit is None else limit,
        logprobs=logprobs,
        defaults=state.defaults,
    )
    copies = request.n or 1
    job = _Job(True, request, [prompt], params, copies, copies, request.echo, logprobs)
    await _run(state, job, arrival, receive, send)


async def chat_tokens(
    state: ServerState, messages: list[ChatMessage], add_generation_prompt: bool, extra: dict[str, Any]
) -> list[int]:
    """Tokens of a chat; contents of several text parts are joined."""
    plain = []
    for message in messages:
        item = message.model_dump(exclude_none=True)
        if isinstance(message.content, list):
            texts = []
            for part in message.content:
                if part.get("type") != "text" or not isinstance(part.get("text"), str):
                    raise InvalidRequestError(
                        f"a message holds a part of type {part.get('type')!r}; this server takes text only", "messages"
                    )
                texts.append(part["text"])
            item["content"] = "".join(texts)
        item.setdefault("content", "")
        plain.append(item)
    reserved = {"messages", "add_generation_prompt", "tools", "strftime_now"}
    knobs = {k: v for k, v in extra.items() if k not in reserved}
    return await asyncio.to_thread(
        state.tokenizer.apply_chat_template,
        plain,
        add_generation_prompt=add_generation_prompt,
        template=state.chat_template,
        strftime_now=state.strftime,
        **knobs,
    )


def _with_prompt_logprobs(params: SamplingParams, count: int) -> SamplingParams:
    from dataclasses import replace

    return params if params.prompt_logprobs is not None else replace(params, prompt_logprobs=count)


async def _prompts(request: CompletionRequest, tokenizer: Tokenizer) -> list[list[int]]:
    prompt: Any = request.prompt
    if request.suffix is not None and (request.suffix or tokenizer.fim_tokens is not None):
        if not isinstance(prompt, str):
            raise InvalidRequestError("suffix needs a prompt that is one text", "suffix")
        if request.echo:
            raise InvalidRequestError("echo and suffix do not go together; leave one out", "echo")
        return [await asyncio.to_thread(tokenizer.infill, prompt, request.suffix)]
    if isinstance(prompt, str):
        prompt = [prompt]
    if isinstance(prompt[0], str):
        if sum(len(p) for p in prompt) < _LONG:
            return tokenizer.encode_batch(prompt, special=request.add_special_tokens)
        return await asyncio.to_thread(tokenizer.encode_batch, prompt, special=request.add_special_tokens)
    if isinstance(prompt[0], int):
        return [prompt]
    return [list(p) for p in prompt]


async def _run(state: ServerState, job: _Job, arrival: float, receive: Receive, send: Send) -> None:
    request = job.request
    job.id = ("chatcmpl-" if job.chat else "cmpl-") + secrets.token_hex(12)
    job.created = int(state.wall_clock())
    owners = [p for p in job.prompts for _ in range(job.copies)]
    slo = slo_of(request)
    for again in (False, True):
        ticket = state.engine.submit(
            job.prompts, job.params, copies=job.copies, arrival=arrival, priority=request.priority, slo=slo, retry=again
        )
        answers = [Answer(i, prompt, state.tokenizer, job.params) for i, prompt in enumerate(owners)]
        try:
            async with _watched(ticket, receive):
                if request.stream:
                    await _stream(state, job, ticket, answers, send)
                else:
                    await _whole(state, job, ticket, answers, send)
            return
        except EngineDeadError:  # neither lets it through once something was sent
            if again or not state.engine.may_retry():
                raise
        finally:
            ticket.cancel()


@asynccontextmanager
async def _watched(ticket: Ticket, receive: Receive) -> AsyncIterator[None]:
    """Cancel the ticket as soon as the client is gone."""

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        ticket.cancel()

    task = asyncio.create_task(watch())
    try:
        yield
    finally:
        task.cancel()


async def _whole(state: ServerState, job: _Job, ticket: Ticket, answers: list[Answer], send: Send) -> None:
    clock = state.engine.clock
    while news := await ticket.next():
        apply(news, answers, ticket, clock.now())
    if any(a.finish is None for a in answers):
        return  # the client is gone
    failed = next((a.error for a in answers if a.error is not None), None)
    if failed is not None:
        raise _failure(job, failed)
    chosen = answers
    if job.copies > job.wanted:
        chosen = []
        for at in range(0, len(answers), job.copies):
            group = sorted(answers[at : at + job.copies], key=lambda a: -a.score)
            chosen.extend(group[: job.wanted])
    choices = [_choice(state.tokenizer, job, index, answer) for index, answer in enumerate(chosen)]
    timing = chosen[0].timing
    body = {
        "id": job.id,
        "object": "chat.completion" if job.chat else "text_completion",
        "created": job.created,
        "model": state.name,
        "choices": choices,
        "usage": usage_of(job.prompts, answers),
        "timings": timing.to_dict() if timing is not None else {},
    }
    await respond(send, 200, dumps(body).encode())


def _failure(job: _Job, text: str) -> HastenError:
    """Whose fault it is that an answer has no next token: a grammar may allow none."""
    if job.params.grammar is not None:
        return InvalidRequestError("the grammar allows no token at some point of the answer", "response_format")
    return EngineError(text)


def _choice(tokenizer: Tokenizer, job: _Job, index: int, answer: Answer) -> dict[str, Any]:
    text = answer.text
    logprobs = None
    if job.chat:
        if job.logprobs is not None:
            logprobs = chat_logprobs(tokenizer, answer.tokens, answer.logprobs)
        return {
            "index": index,
            "message": {"role": "assistant", "content": text},
            "logprobs": logprobs,
            "finish_reason": answer.finish,
            "stop_reason": answer.stop_reason,
        }
    tokens: list[int] = answer.tokens
    entries: list[Any] = list(answer.logprobs)
    if job.echo:
        text = tokenizer.decode(answer.prompt, skip_special=job.params.skip_special_tokens) + text
        tokens = answer.prompt + tokens
        entries = list(answer.prompt_logprobs or []) + entries
    if job.logprobs is not None:
        logprobs, _ = completion_logprobs(tokenizer, tokens, entries, 0, job.logprobs > 0)
    return {
        "index": index,
        "text": text,
        "logprobs": logprobs,
        "finish_reason": answer.finish,
        "stop_reason": answer.stop_reason,
        "prompt_logprobs": None if job.request.prompt_logprobs is None else prompt_logprobs_body(tokenizer, answer),
    }


async def _stream(state: ServerState, job: _Job, ticket: Ticket, answers: list[Answer], send: Send) -> None:
    """Server-sent events; the status goes out with the first news, so that a refusal still has its own."""
    clock = state.engine.clock
    options = job.request.stream_options
    usage, always = bool(options and options.include_usage), bool(options and options.continuous_usage_stats)
    writer = _Events(state, job, answers, always)
    ticket.reader = asyncio.current_task()
    begun = False
    try:
        while news := await ticket.next():
            pieces = apply(news, answers, ticket, clock.now())
            data = b"".join([writer.event(answers[i], piece) for i, piece in pieces.items()])
            if not begun:
                begun = True
                await send({"type": "http.response.start", "status": 200, "headers": _SSE})
            if data:
                await send({"type": "http.response.body", "body": data, "more_body": True})
        if any(a.finish is None for a in answers):
            return  # the client is gone
        tail = writer.usage() if usage else b""
        await send({"type": "http.response.body", "body": tail + b"data: [DONE]\n\n", "more_body": False})
    except HastenError as error:
        if not begun:
            raise
        body = b"data: " + dumps({"error": error_object(error)}).encode() + b"\n\ndata: [DONE]\n\n"
        await send({"type": "http.response.body", "body": body, "more_body": False})
    except asyncio.CancelledError:
        if not ticket.overflowed:
            raise
    finally:
        ticket.reader = None


_SSE = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]


class _Events:
    """Writes the chunks of one stream; what all chunks share is written once."""

    def __init__(self, state: ServerState, job: _Job, answers: list[Answer], usage: bool) -> None:
        self._state = state
        self._job = job
        self._answers = answers
        self._always = usage
        kind = "chat.completion.chunk" if job.chat else "text_completion"
        head = dumps({"id": job.id, "object": kind, "created": job.created, "model": state.name})
        self._head = "data: " + head[:-1] + ',"choices":'
        self._begun: set[int] = set()

    def event(self, answer: Answer, piece: Piece) -> bytes:
        """One chunk for one answer."""
        job, tokenizer = self._job, self._state.tokenizer
        text, logprobs = piece.text, "null"
        first = answer.index not in self._begun
        self._begun.add(answer.index)
        if answer.error is not None:
            error = dumps({"error": error_object(_failure(job, answer.error))})
            return f"data: {error}\n\n".encode()
        if job.chat:
            if job.logprobs is not None:
                logprobs = dumps(chat_logprobs(tokenizer, piece.tokens, piece.logprobs))
            delta = ('{"role":"assistant","content":' if first else '{"content":') + dumps(text) + "}"
            content = f'"delta":{delta}'
        else:
            tokens, entries = piece.tokens, list(piece.logprobs)
            if first and job.echo:
                text = tokenizer.decode(answer.prompt, skip_special=job.params.skip_special_tokens) + text
                tokens = answer.prompt + tokens
                entries = list(answer.prompt_logprobs or []) + entries  # type: ignore[assignment]
            if job.logprobs is not None:
                body, answer.offset = completion_logprobs(
                    tokenizer,
                    tokens,
                    entries,  # type: ignore[arg-type]
                    answer.offset,
                    job.logprobs > 0,
                )
                logprobs = dumps(body)
            content = f'"text":{dumps(text)}'
        finish = "null" if piece.finish is None else f'"{piece.finish}"'
        stop = "null" if piece.stop_reason is None else dumps(piece.stop_reason)
        ends = f'"finish_reason":{finish},"stop_reason":{stop}'
        choice = f'[{{"index":{answer.index},{content},"logprobs":{logprobs},{ends}}}]'
        tail = ""
        if self._always:
            tail += ',"usage":' + dumps(usage_of(job.prompts, self._answers))
        if piece.finish is not None and answer.timing is not None:
            tail += ',"timings":' + dumps(answer.timing.to_dict())
        return f"{self._head}{choice}{tail}}}\n\n".encode()

    def usage(self) -> bytes:
        """The last chunk: no choice, the counts."""
        return f'{self._head}[],"usage":{dumps(usage_of(self._job.prompts, self._answers))}}}\n\n'.encode()


async def respond(send: Send, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
    """Send a whole JSON response."""
    lines = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    lines += [(k.encode(), v.encode()) for k, v in (headers or {}).items()]
    await send({"type": "http.response.start", "status": status, "headers": lines})
    await send({"type": "http.response.body", "body": body, "more_body": False})


async def respond_error(send: Send, error: HastenError) -> None:
    """Send an error in OpenAI's form."""
    status, headers, body = error_body(error)
    await respond(send, status, body, headers)
