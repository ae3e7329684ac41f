"""A lean HTTP/1.1 client for streams: it shares the machine with the server it measures, so a token must cost little.

One asyncio protocol per connection, kept alive between requests. The arrival of bytes is stamped once per read, before
anything is parsed; tokens that arrive in one read share its time. Most events are recognised without parsing their
JSON.
"""

from __future__ import annotations

import asyncio
import json
import ssl
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

from hasten.errors import ConfigurationError

__all__ = ["Reply", "Wire"]


class Reply:
    """What came back for one request."""

    __slots__ = ("body", "error", "events", "finish_reason", "status", "timings", "usage")

    def __init__(self) -> None:
        self.status = 0
        self.events: list[float] = []
        """when each event that carried tokens was received"""
        self.finish_reason: str | None = None
        self.usage: dict[str, Any] | None = None
        self.timings: dict[str, Any] | None = None
        self.error: str | None = None
        self.body = b""
        """of a response that is no stream"""


class _Connection(asyncio.Protocol):
    """One connection; reads one response at a time."""

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self._buffer = bytearray()
        self._transport: asyncio.Transport | None = None
        self._reply: Reply | None = None
        self._done: asyncio.Future[Reply] | None = None
        self.reusable = True

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    async def send(self, request: bytes) -> Reply:
        """Send a request and wait for the end of its response."""
        assert self._transport is not None
        self._reply = Reply()
        self._head = True
        self._chunked = self._stream = False
        self._left: int | None = None
        self._events = bytearray()
        self._buffer.clear()
        self._done = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        try:
            return await self._done
        except asyncio.CancelledError:
            self.close()
            raise

    def close(self) -> None:
        """Drop the connection."""
        self.reusable = False
        if self._transport is not None:
            self._transport.abort()

    def data_received(self, data: bytes) -> None:
        now = self._now()
        self._buffer += data
        try:
            while self._reply is not None and self._advance(now):
                pass
        except (ValueError, KeyError, IndexError) as error:
            self._finish(f"the response cannot be read: {error}")

    def connection_lost(self, exc: Exception | None) -> None:
        self.reusable = False
        if self._reply is not None:
            whole = not self._head and not self._chunked and self._left is None
            self._finish(None if whole else f"the connection was lost{f': {exc}' if exc else ''}")

    def _advance(self, now: float) -> bool:
        reply, buffer = self._reply, self._buffer
        assert reply is not None
        if self._head:
            end = buffer.find(b"\r\n\r\n")
            if end < 0:
                return False
            self._read_head(bytes(buffer[:end]))
            del buffer[: end + 4]
            return True
        if not self._chunked:
            size = len(buffer) if self._left is None else min(self._left, len(buffer))
            self._take(bytes(buffer[:size]), now)
            del buffer[:size]
            if self._left is not None:
                self._left -= size
                if self._left == 0:
                    self._finish(None)
            return False
        line = buffer.find(b"\r\n")
        if line < 0:
            return False
        size = int(buffer[:line].split(b";")[0], 16)
        if len(buffer) < line + 4 + size:
            return False
        self._take(bytes(buffer[line + 2 : line + 2 + size]), now)
        del buffer[: line + 4 + size]
        if size == 0:
            self._finish(None)
            return False
        return True

    def _read_head(self, head: bytes) -> None:
        reply = self._reply
        assert reply is not None
        first, *lines = head.split(b"\r\n")
        reply.status = int(first.split(b" ", 2)[1])
        self._head = False
        for line in lines:
            name, _, value = line.partition(b":")
            name, value = name.strip().lower(), value.strip().lower()
            if name == b"content-length":
                self._left = int(value)
            elif name == b"transfer-encoding" and b"chunked" in value:
                self._chunked = True
            elif name == b"content-type":
                self._stream = value.startswith(b"text/event-stream")
            elif name == b"connection" and value == b"close":
                self.reusable = False
        if self._left == 0 and not self._chunked:
            self._finish(None)

    def _take(self, data: bytes, now: float) -> None:
        reply = self._reply
        assert reply is not None
        if not self._stream:
            reply.body += data
            return
        pending = self._events
        pending += data
        while True:
            end = pending.find(b"\n")
            if end < 0:
                return
            line = bytes(pending[:end]).rstrip(b"\r")
            del pending[: end + 1]
            if line.startswith(b"data:"):
                self._event(line[5:].strip(), now)

    def _event(self, data: bytes, now: float) -> None:
        reply = self._reply
        assert reply is not None
        if b'"finish_reason":null' in data and b'"usage"' not in data and b'"role"' not in data:
            reply.events.append(now)  # one more piece of text
            return
        if data == b"[DONE]":
            return
        event = json.loads(data)
        if event.get("error"):
            reply.error = str(event["error"].get("message", event["error"]))
            return
        reply.usage = event.get("usage") or reply.usage
        reply.timings = event.get("timings") or reply.timings
        for choice in event.get("choices") or ():
            delta = choice.get("delta")
            if delta is None or delta.get("content") or choice.get("finish_reason") is None and "role" not in delta:
                reply.events.append(now)
            reply.finish_reason = choice.get("finish_reason") or reply.finish_reason

    def _finish(self, error: str | None) -> None:
        reply, self._reply = self._reply, None
        assert reply is not None
        if error is not None:
            reply.error = error
            self.reusable = False
        if self._done is not None and not self._done.done():
            self._done.set_result(reply)


class Wire:
    """Connections to one server, kept for reuse."""

    def __init__(self, base_url: str, now: Callable[[], float], *, api_key: str | None = None) -> None:
        """``base_url`` such as ``http://127.0.0.1:8000``; a trailing ``/v1`` is ignored."""
        parts = urlsplit(base_url if "//" in base_url else f"http://{base_url}")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigurationError(f"base URL {base_url!r} is no address; write for example http://127.0.0.1:8000")
        self._host = parts.hostname
        self._port = parts.port or (443 if parts.scheme == "https" else 80)
        self._tls = ssl.create_default_context() if parts.scheme == "https" else None
        self._root = parts.path.rstrip("/").removesuffix("/v1")
        self._now = now
        self._free: list[_Connection] = []
        key = f"authorization: Bearer {api_key}\r\n" if api_key else ""
        self._headers = f"host: {parts.netloc}\r\naccept: */*\r\n{key}"

    async def call(self, method: str, path: str, body: dict[str, Any] | None = None) -> Reply:
        """Send one request; a failure to connect is a reply with an error. Cancelling closes the connection."""
        data = b"" if body is None else json.dumps(body).encode()
        kind = "content-type: application/json\r\n" if body is not None else ""
        head = f"{method} {self._root}{path} HTTP/1.1\r\n{self._headers}{kind}content-length: {len(data)}\r\n\r\n"
        while True:
            kept = bool(self._free)
            try:
                connection = self._free.pop() if kept else await self._connect()
            except OSError as error:
                reply = Reply()
                reply.error = f"no server answers at {self._host}:{self._port} ({error})"
                return reply
            if not connection.reusable:
                continue
            reply = await connection.send(head.encode() + data)
            if kept and reply.status == 0 and reply.error is not None:
                continue  # the server closed a kept connection at the same moment
            if connection.reusable:
                self._free.append(connection)
            return reply

    async def _connect(self) -> _Connection:
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_connection(
            lambda: _Connection(self._now), self._host, self._port, ssl=self._tls
        )
        return connection

    def close(self) -> None:
        """Drop all kept connections."""
        for connection in self._free:
            connection.close()
        self._free.clear()
