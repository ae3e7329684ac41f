"""A small client of an OpenAI-compatible server, for scripts and examples; the standard library is all it needs."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

from hasten.errors import (
    ContextLengthError,
    EngineDeadError,
    EngineStoppingError,
    HastenError,
    InvalidRequestError,
    OverloadedError,
)

__all__ = ["Client", "client"]


class Client:
    """Speaks to one server; a connection per call.

    >>> client("http://127.0.0.1:8000").generate("def add(a, b):", max_tokens=8)      # doctest: +SKIP
    '\\n    return a + b'
    """

    def __init__(self, url: str, *, api_key: str | None = None, timeout: float = 600.0) -> None:
        parts = urlsplit(url if "//" in url else f"http://{url}")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise InvalidRequestError(f"{url!r} is no address of a server; write for example http://127.0.0.1:8000")
        self._secure = parts.scheme == "https"
        self._host, self._port = parts.hostname, parts.port
        self._root = parts.path.rstrip("/").removesuffix("/v1")
        self._key = api_key
        self._timeout = timeout

    def _request(self, method: str, path: str, body: dict[str, Any] | None = None) -> http.client.HTTPResponse:
        kind = http.client.HTTPSConnection if self._secure else http.client.HTTPConnection
        connection = kind(self._host, self._port, timeout=self._timeout)
        headers = {"content-type": "application/json", "connection": "close"}
        if self._key:
            headers["authorization"] = f"Bearer {self._key}"
        try:
            connection.request(method, self._root + path, None if body is None else json.dumps(body), headers)
            response = connection.getresponse()
        except OSError as error:
            raise EngineDeadError(
                f"no server answers at {self._host}:{self._port} ({error}); is it running?"
            ) from error
        if response.status >= 400:
            raise _error(response)
        return response

    def _call(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        with self._request(method, path, body) as response:
            data: dict[str, Any] = json.loads(response.read())
            return data

    def complete(self, prompt: str | list[int], max_tokens: int = 16, **fields: Any) -> dict[str, Any]:
        """POST /v1/completions; the whole response. Raises the error that the server names."""
        return self._call("POST", "/v1/completions", {"prompt": prompt, "max_tokens": max_tokens, **fields})

    def generate(self, prompt: str | list[int], max_tokens: int = 16, **fields: Any) -> str:
        """The text of one answer."""
        return str(self.complete(prompt, max_tokens, **fields)["choices"][0]["text"])

    def infill(self, prefix: str, suffix: str, max_tokens: int = 64, **fields: Any) -> str:
        """The text between ``prefix`` and ``suffix``."""
        return self.generate(prefix, max_tokens, suffix=suffix, **fields)

    def chat(self, messages: list[dict[str, str]], max_tokens: int | None = None, **fields: Any) -> str:
        """The text of the answer to a chat."""
        body = {"messages": messages, **fields} | ({} if max_tokens is None else {"max_tokens": max_tokens})
        return str(self._call("POST", "/v1/chat/completions", body)["choices"][0]["message"]["content"])

    def stream(self, prompt: str | list[int], max_tokens: int = 16, **fields: Any) -> Iterator[str]:
        """Pieces of one answer as they come."""
        body = {"prompt": prompt, "max_tokens": max_tokens, "stream": True, **fields}
        with self._request("POST", "/v1/completions", body) as response:
            for line in response:
                if not line.startswith(b"data: ") or line.startswith(b"data: [DONE]"):
                    continue
                event = json.loads(line[6:])
                if "error" in event:
                    raise EngineDeadError(event["error"]["message"])
                for choice in event["choices"]:
                    if choice["text"]:
                        yield choice["text"]

    def models(self) -> list[str]:
        """Names of the served models."""
        return [m["id"] for m in self._call("GET", "/v1/models")["data"]]

    def tokenize(self, text: str) -> list[int]:
        """Tokens of ``text``."""
        return list(self._call("POST", "/tokenize", {"prompt": text})["tokens"])

    def metrics(self) -> str:
        """The Prometheus text."""
        with self._request("GET", "/metrics") as response:
            return response.read().decode()

    def healthy(self) -> bool:
        """Whether the server would serve a request now."""
        try:
            self._request("GET", "/health").close()
        except HastenError:
            return False
        return True


def _error(response: http.client.HTTPResponse) -> HastenError:
    raw = response.read()
    try:
        error = json.loads(raw)["error"]
        text, param, code = error["message"], error.get("param"), error.get("code")
    except (ValueError, KeyError, TypeError):
        text, param, code = f"status {response.status}: {raw[:200]!r}", None, None
    if code == "context_length_exceeded":
        return ContextLengthError(text, param)
    if response.status == 429:
        return OverloadedError(text, float(response.headers.get("retry-after") or 1))
    if code in ("server_stopping", "draining"):
        return EngineStoppingError(text)
    return EngineDeadError(text) if response.status >= 500 else InvalidRequestError(text, param)


def client(url: str, *, api_key: str | None = None, timeout: float = 600.0) -> Client:
    """A client of the server at ``url``."""
    return Client(url, api_key=api_key, timeout=timeout)
