"""The ASGI application: routes, key, size of bodies, errors. Plain ASGI, since every token passes through it."""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

from hasten.errors import HastenError, InvalidRequestError
from hasten.serve.http import openapi
from hasten.serve.http.completions import chat, chat_tokens, completions, respond, respond_error
from hasten.serve.http.errors import error_object, status_of
from hasten.serve.http.metrics import render
from hasten.serve.http.params import parse
from hasten.serve.http.schemas import DetokenizeRequest, TokenizeRequest
from hasten.serve.http.state import ModelNotFoundError, ServerState

__all__ = ["App"]

logger = logging.getLogger("hasten.serve")

Receive = Callable[[], Awaitable[Any]]
Send = Callable[[Any], Awaitable[None]]

_OPEN = ("/health", "/metrics", "/openapi.json", "/version", "/ping")
"""paths that need no key"""


class _GoneError(Exception):
    """The client left before its request was read."""


class _TooLargeError(HastenError):
    """The body is over the limit."""


class App:
    """The server's interface over one :class:`ServerState`."""

    def __init__(self, state: ServerState) -> None:
        self.state = state
        self._routes: dict[str, dict[str, Callable[[Any, Receive, Send], Awaitable[None]]]] = {
            "/v1/completions": {"POST": self._completions},
            "/v1/chat/completions": {"POST": self._chat},
            "/v1/models": {"GET": self._models},
            "/tokenize": {"POST": self._tokenize},
            "/detokenize": {"POST": self._detokenize},
            "/health": {"GET": self._health},
            "/ping": {"GET": self._health},
            "/version": {"GET": self._version},
            "/metrics": {"GET": self._metrics},
            "/openapi.json": {"GET": self._openapi},
        }

    async def __call__(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        """ASGI entry."""
        if scope["type"] == "lifespan":
            await _lifespan(receive, send)
            return
        if scope["type"] != "http":
            return
        begun = False

        async def watch(message: Any) -> None:
            nonlocal begun
            begun = True
            await send(message)

        try:
            await self._route(scope, receive, watch)
        except _GoneError:
            return
        except HastenError as error:
            if not begun:
                await self._refuse(error, send)
        except Exception:
            logger.exception("%s %s failed", scope["method"], scope["path"])
            if begun:
                raise
            error_text = {"error": error_object(HastenError("the server failed on this request; its log says why"))}
            await respond(send, 500, json.dumps(error_text).encode())

    async def _refuse(self, error: HastenError, send: Send) -> None:
        if isinstance(error, ModelNotFoundError):
            body = error_object(error) | {"code": "model_not_found", "type": "not_found_error"}
            await respond(send, 404, json.dumps({"error": body}).encode())
        elif isinstance(error, _TooLargeError):
            body = error_object(error) | {"type": "invalid_request_error"}
            await respond(send, 413, json.dumps({"error": body}).encode(), {"connection": "close"})
        else:
            if status_of(error) >= 500:
                logger.warning("refused: %s", error)
            await respond_error(send, error)

    async def _route(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        path, method = scope["path"], scope["method"]
        if self.state.api_key is not None and path not in _OPEN and not self._authorised(scope):
            body = {
                "message": "the API key is missing or wrong; send it as 'Authorization: Bearer KEY'",
                "type": "authentication_error",
                "param": None,
                "code": "invalid_api_key",
            }
            headers = {"www-authenticate": "Bearer"}
            await respond(send, 401, json.dumps({"error": body}).encode(), headers)
            return
        methods = self._routes.get(path)
        if methods is None:
            error = {
                "message": f"{path[:200]} is not served; /openapi.json lists what is",
                "type": "not_found_error",
                "param": None,
                "code": "not_found",
            }
            await respond(send, 404, json.dumps({"error": error}).encode())
            return
        handler = methods.get("GET" if method == "HEAD" else method)
        if handler is None:
            allowed = ", ".join(methods)
            error = {
                "message": f"{method[:20]} is not allowed on {path}; use {allowed}",
                "type": "invalid_request_error",
                "param": None,
                "code": "method_not_allowed",
            }
            await respond(send, 405, json.dumps({"error": error}).encode(), {"allow": allowed})
            return
        await handler(scope, receive, send)

    def _authorised(self, scope: dict[str, Any]) -> bool:
        assert self.state.api_key is not None
        given = next((v for k, v in scope["headers"] if k == b"authorization"), b"")
        scheme, _, token = given.partition(b" ")
        return bool(scheme.lower() == b"bearer") and hmac.compare_digest(token.strip(), self.state.api_key.encode())

    async def _body(self, scope: dict[str, Any], receive: Receive) -> bytes:
        limit = self.state.max_body
        parts: list[bytes] = []
        size = 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise _GoneError
            part = message.get("body", b"")
            size += len(part)
            if size > limit:
                raise _TooLargeError(f"the body has over {limit} bytes, which is the limit of this server")
            parts.append(part)
            if not message.get("more_body"):
                return b"".join(parts)

    async def _completions(self, scope: Any, receive: Receive, send: Send) -> None:
        await completions(self.state, await self._body(scope, receive), receive, send)

    async def _chat(self, scope: Any, receive: Receive, send: Send) -> None:
        await chat(self.state, await self._body(scope, receive), receive, send)

    async def _models(self, scope: Any, receive: Receive, send: Send) -> None:
        state = self.state
        card = {
            "id": state.name,
            "object": "model",
            "created": state.begun,
            "owned_by": "hasten",
            "root": state.info.name,
            "max_model_len": state.max_model_len,
        }
        await respond(send, 200, json.dumps({"object": "list", "data": [card]}).encode())

    async def _tokenize(self, scope: Any, receive: Receive, send: Send) -> None:
        request = parse(TokenizeRequest, await self._body(scope, receive))
        self.state.check_model(request.model)
        tokenizer = self.state.tokenizer
        if (request.prompt is None) == (request.messages is None):
            raise InvalidRequestError("give either prompt or messages", "prompt")
        if request.messages is not None:
            tokens = await chat_tokens(self.state, request.messages, request.add_generation_prompt, {})
        else:
            assert request.prompt is not None
            encode = partial(tokenizer.encode, request.prompt, special=request.add_special_tokens)
            tokens = encode() if len(request.prompt) < 1 << 14 else await asyncio.to_thread(encode)
        body: dict[str, Any] = {"count": len(tokens), "max_model_len": self.state.max_model_len, "tokens": tokens}
        body["token_strs"] = [tokenizer.token_text(t) for t in tokens] if request.return_token_strs else None
        await respond(send, 200, json.dumps(body).encode())

    async def _detokenize(self, scope: Any, receive: Receive, send: Send) -> None:
        request = parse(DetokenizeRequest, await self._body(scope, receive))
        self.state.check_model(request.model)
        vocabulary = self.state.info.vocab_size
        if request.tokens and max(request.tokens) >= vocabulary:
            raise InvalidRequestError(
                f"tokens holds {max(request.tokens)}; ids of this model are 0 to {vocabulary - 1}", "tokens"
            )
        await respond(send, 200, json.dumps({"prompt": self.state.tokenizer.decode(request.tokens)}).encode())

    async def _health(self, scope: Any, receive: Receive, send: Send) -> None:
        engine = self.state.engine
        good = engine.state == "ready"
        body = engine.health()
        if not good:
            body["error"] = {
                "message": f"the server is {engine.state}",
                "type": "service_unavailable_error",
                "param": None,
                "code": engine.state,
            }
        await respond(send, 200 if good else 503, json.dumps(body).encode())

    async def _version(self, scope: Any, receive: Receive, send: Send) -> None:
        await respond(send, 200, json.dumps({"version": openapi.document()["info"]["version"]}).encode())

    async def _metrics(self, scope: Any, receive: Receive, send: Send) -> None:
        engine = self.state.engine
        snapshot = await engine.stats(check=b"check" in scope.get("query_string", b""))
        text = render(snapshot, engine.metrics(), prefix=self.state.metrics_prefix, model=self.state.name)
        lines = [(b"content-type", b"text/plain; version=0.0.4; charset=utf-8")]
        await send({"type": "http.response.start", "status": 200, "headers": lines})
        await send({"type": "http.response.body", "body": text.encode(), "more_body": False})

    async def _openapi(self, scope: Any, receive: Receive, send: Send) -> None:
        await respond(send, 200, json.dumps(openapi.document()).encode())


async def _lifespan(receive: Receive, send: Send) -> None:
    while True:
        message = await receive()
        if message["type"] == "lifespan.startup":
            await send({"type": "lifespan.startup.complete"})
        elif message["type"] == "lifespan.shutdown":
            await send({"type": "lifespan.shutdown.complete"})
            return
