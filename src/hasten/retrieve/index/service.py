"""An index over HTTP: plain ASGI, JSON or binary vectors, Prometheus metrics, concurrent queries in one batch.

Queries that wait while a batch is under way form the next one, if their knobs agree; nothing waits for company.
``POST /search`` ``/add`` ``/upsert`` ``/delete`` ``/compact``; ``GET /health`` ``/stats`` ``/metrics``. A binary
search sends float32 rows (little endian) with its knobs in the query string, and gets (count u32, k u32), the ids
(int64), the distances (float32).
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import struct
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs

import numpy as np
from numpy.typing import NDArray

from hasten.budget import parse_quantity
from hasten.clock import Clock, MonotonicClock
from hasten.errors import DataError, HastenError, InvalidRequestError, OverloadedError
from hasten.retrieve.index.batcher import Batcher, Histogram

if TYPE_CHECKING:
    from hasten.retrieve.index.spann import Spann

__all__ = ["Batcher", "IndexApp", "serve"]

logger = logging.getLogger("hasten.retrieve")

Receive = Callable[[], Awaitable[Any]]
Send = Callable[[Any], Awaitable[None]]

BINARY = b"application/octet-stream"
_BOUNDS = (1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3, 1e-2, 2.5e-2, 5e-2, 0.1, 0.25, 0.5, 1.0)


class _TooLargeError(HastenError):
    """The body is over the limit."""


class _GoneError(Exception):
    """The client left before its request was read."""


class IndexApp:
    """The ASGI application over one index."""

    def __init__(
        self,
        index: Spann,
        *,
        clock: Clock | None = None,
        max_body: int = 1 << 26,
        max_batch: int = 256,
        max_queue: int = 4096,
        threads: int = 1,
    ) -> None:
        self.index = index
        self._clock = clock or MonotonicClock()
        self._max_body = max_body
        self.batcher = Batcher(index, max_batch, max_queue, threads)
        self._latency = Histogram(_BOUNDS)
        self._requests: dict[tuple[str, int], int] = {}
        self._queries = 0
        self._routes: dict[str, tuple[str, Callable[[Any, Receive, Send], Awaitable[int]]]] = {
            "/search": ("POST", self._search),
            "/add": ("POST", self._add),
            "/upsert": ("POST", self._upsert),
            "/delete": ("POST", self._delete),
            "/compact": ("POST", self._compact),
            "/health": ("GET", self._health),
            "/stats": ("GET", self._stats),
            "/metrics": ("GET", self._metrics),
        }

    async def __call__(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        """ASGI entry."""
        if scope["type"] == "lifespan":
            while True:
                message = await receive()
                await send({"type": f"{message['type']}.complete"})
                if message["type"] == "lifespan.shutdown":
                    return
        if scope["type"] != "http":
            return
        path = scope["path"]
        begin = self._clock.now()
        try:
            status = await self._route(scope, receive, send)
        except _GoneError:
            return
        except HastenError as error:
            status = _status_of(error)
            headers = {"retry-after": str(math.ceil(error.retry_after))} if isinstance(error, OverloadedError) else {}
            await _json(
                send, status, {"error": {"message": str(error), "param": getattr(error, "param", None)}}, headers
            )
        except Exception:
            logger.exception("%s failed", path)
            status = 500
            await _json(
                send, 500, {"error": {"message": "the server failed on this request; its log says why", "param": None}}
            )
        name = path if path in self._routes else "other"
        self._requests[name, status] = self._requests.get((name, status), 0) + 1
        if path == "/search" and status == 200:
            self._latency.observe(self._clock.now() - begin)

    async def _route(self, scope: dict[str, Any], receive: Receive, send: Send) -> int:
        entry = self._routes.get(scope["path"])
        if entry is None:
            message = f"{scope['path'][:200]} is not served; there are {', '.join(self._routes)}"
            return await _json(send, 404, {"error": {"message": message, "param": None}})
        if scope["method"] != entry[0]:
            message = f"{scope['method'][:20]} is not allowed on {scope['path']}; use {entry[0]}"
            return await _json(send, 405, {"error": {"message": message, "param": None}}, {"allow": entry[0]})
        return await entry[1](scope, receive, send)

    async def _body(self, receive: Receive) -> bytes:
        parts, size = [], 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise _GoneError
            part = message.get("body", b"")
            size += len(part)
            if size > self._max_body:
                raise _TooLargeError(f"the body has over {self._max_body} bytes, which is the limit of this server")
            parts.append(part)
            if not message.get("more_body"):
                return b"".join(parts)

    async def _search(self, scope: Any, receive: Receive, send: Send) -> int:
        body = await self._body(receive)
        headers = dict(scope["headers"])
        if headers.get(b"content-type", b"").split(b";")[0].strip() == BINARY:
            given = {k: v[-1] for k, v in parse_qs(scope.get("query_string", b"").decode()).items()}
            row = 4 * self.index.width
            if not body or len(body) % row:
                raise InvalidRequestError(
                    f"the body has {len(body)} bytes; send whole float32 rows of {row} bytes", "body"
                )
            queries = np.frombuffer(body, "<f4").reshape(-1, self.index.width)
        else:
            given = _object(body)
            rows = given.pop("vectors", None)
            if rows is None and "vector" in given:
                rows = [given.pop("vector")]
            queries = _matrix(rows, self.index.width, "vectors")
        knobs = _knobs(given)
        if not np.isfinite(queries).all():
            raise InvalidRequestError("the queries hold NaN or infinity; replace the values", "vectors")
        values, ids, complete = await self.batcher.search(queries, knobs)
        self._queries += len(queries)
        if headers.get(b"accept", b"").split(b";")[0].strip() == BINARY:
            data = struct.pack("<II", *ids.shape) + ids.astype("<i8").tobytes() + values.astype("<f4").tobytes()
            return await _respond(send, 200, data, {"content-type": BINARY.decode()})
        answers = {
            "ids": [[i for i in row if i >= 0] for row in ids.tolist()],
            "distances": [[d for d in row if math.isfinite(d)] for row in values.tolist()],
            "complete": complete.tolist(),
        }
        return await _json(send, 200, answers)

    async def _change(self, receive: Receive, send: Send, call: Callable[..., None]) -> int:
        given = _object(await self._body(receive))
        ids = given.get("ids")
        if not isinstance(ids, list):
            raise InvalidRequestError("ids is missing; give a list of whole numbers", "ids")
        rows = _matrix(given.get("vectors"), self.index.width, "vectors")
        attributes = given.get("attributes")
        if attributes is not None and not isinstance(attributes, dict):
            raise InvalidRequestError("attributes is no object; give lists by name", "attributes")
        await asyncio.get_running_loop().run_in_executor(None, lambda: call(_whole(ids), rows, attributes))
        return await _json(send, 200, {"rows": len(self.index)})

    async def _add(self, scope: Any, receive: Receive, send: Send) -> int:
        return await self._change(receive, send, self.index.add)

    async def _upsert(self, scope: Any, receive: Receive, send: Send) -> int:
        return await self._change(receive, send, self.index.upsert)

    async def _delete(self, scope: Any, receive: Receive, send: Send) -> int:
        given = _object(await self._body(receive))
        ids = given.get("ids")
        if not isinstance(ids, list):
            raise InvalidRequestError("ids is missing; give a list of whole numbers", "ids")
        count = await asyncio.get_running_loop().run_in_executor(None, self.index.delete, _whole(ids))
        return await _json(send, 200, {"deleted": count, "rows": len(self.index)})

    async def _compact(self, scope: Any, receive: Receive, send: Send) -> int:
        await self._body(receive)
        if self.index.read_only:
            raise DataError("the index is open read-only; serve it without --read-only")
        self.index.compact_in_background()
        return await _json(send, 202, {"generation": self.index.generation})

    async def _health(self, scope: Any, receive: Receive, send: Send) -> int:
        return await _json(send, 200, {"status": "ok", "rows": len(self.index), "generation": self.index.generation})

    async def _stats(self, scope: Any, receive: Receive, send: Send) -> int:
        return await _json(send, 200, {**self.index.describe(), "memory_parts": self.index.memory()})

    async def _metrics(self, scope: Any, receive: Receive, send: Send) -> int:
        text = self.metrics().encode()
        return await _respond(send, 200, text, {"content-type": "text/plain; version=0.0.4; charset=utf-8"})

    def metrics(self) -> str:
        """Prometheus text."""
        prefix = "hasten_index_"
        told = self.index.describe()
        lines = []
        for name, text, value in (
            ("rows", "Live rows.", told["rows"]),
            ("added_rows", "Rows added since the last compaction.", told["added"]),
            ("deleted_rows", "Rows deleted and still on the disk.", told["deleted"]),
            ("memory_bytes", "Heads, graph, directory and added rows in memory.", told["memory"]),
            ("disk_bytes", "Files of the current generation.", told["disk"]),
            ("generation", "Counts up with every compaction.", told["generation"]),
            ("queries_waiting", "Queries that wait for a batch.", self.batcher.depth),
        ):
            lines += [f"# HELP {prefix}{name} {text}", f"# TYPE {prefix}{name} gauge", f"{prefix}{name} {value}"]
        for name, text, value in (
            ("queries_total", "Queries answered.", self._queries),
            ("lists_read_total", "Posting lists read.", self.batcher.lists),
            ("bytes_read_total", "Bytes of the pages read.", self.batcher.bytes),
            ("incomplete_total", "Queries that a deadline cut.", self.batcher.incomplete),
        ):
            lines += [f"# HELP {prefix}{name} {text}", f"# TYPE {prefix}{name} counter", f"{prefix}{name} {value}"]
        name = f"{prefix}requests_total"
        lines += [f"# HELP {name} Requests by path and status.", f"# TYPE {name} counter"]
        lines += [f'{name}{{path="{p}",status="{s}"}} {c}' for (p, s), c in sorted(self._requests.items())]
        lines += self._latency.lines(f"{prefix}search_seconds", "Arrival of a search to its answer.")
        lines += self.batcher.batches.lines(f"{prefix}batch_queries", "Queries of one batch.")
        return "\n".join(lines) + "\n"


def _status_of(error: HastenError) -> int:
    if isinstance(error, OverloadedError):
        return 429
    if isinstance(error, _TooLargeError):
        return 413
    return 400 if isinstance(error, (InvalidRequestError, DataError, ValueError)) else 500


def _object(body: bytes) -> dict[str, Any]:
    try:
        given = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise InvalidRequestError(f"the body is not JSON ({error})", "body") from error
    if not isinstance(given, dict):
        raise InvalidRequestError("the body is not a JSON object", "body")
    return given


def _matrix(rows: Any, width: int, name: str) -> NDArray[Any]:
    if rows is None:
        raise InvalidRequestError(f"{name} is missing; give a list of rows of {width} numbers", name)
    try:
        array = np.array(rows, np.float32)
    except (TypeError, ValueError) as error:
        raise InvalidRequestError(f"{name} is no list of rows of {width} numbers", name) from error
    if array.ndim != 2 or array.shape[1] != width or not len(array):
        raise InvalidRequestError(f"{name} has the shape {array.shape}; this index takes (count, {width})", name)
    return array


def _whole(ids: list[Any]) -> list[int]:
    if not all(isinstance(i, int) and not isinstance(i, bool) and 0 <= i < 1 << 63 for i in ids):
        raise InvalidRequestError("ids holds something else than whole numbers of 0 or more", "ids")
    return ids


def _knobs(given: dict[str, Any]) -> dict[str, Any]:
    """What a request may ask for; text (of a query string) is read as numbers."""
    readers: dict[str, Callable[[Any], Any]] = {
        "k": int,
        "lists": int,
        "epsilon": float,
        "beam": int,
        "deadline": lambda v: parse_quantity(v, "time") if isinstance(v, str) else float(v),
        "where": lambda v: json.loads(v) if isinstance(v, str) else v,
    }
    out = {}
    for name, value in given.items():
        if name not in readers:
            raise InvalidRequestError(f"{name[:50]!r} is not known; a search takes {', '.join(readers)}", name)
        if value is None and name != "lists":
            continue
        try:
            out[name] = None if value in (None, "all") and name == "lists" else readers[name](value)
        except (TypeError, ValueError, OverflowError) as error:
            raise InvalidRequestError(f"{name} is {str(value)[:50]!r}, which cannot be read ({error})", name) from error
    if "where" in out and not isinstance(out["where"], (list, dict)):
        raise InvalidRequestError("where is neither a list of ids nor an object over attributes", "where")
    return out


async def _respond(send: Send, status: int, body: bytes, headers: dict[str, str]) -> int:
    lines = [(k.encode(), v.encode()) for k, v in {**headers, "content-length": str(len(body))}.items()]
    await send({"type": "http.response.start", "status": status, "headers": lines})
    await send({"type": "http.response.body", "body": body, "more_body": False})
    return status


async def _json(send: Send, status: int, value: Any, headers: dict[str, str] | None = None) -> int:
    return await _respond(
        send, status, json.dumps(value).encode(), {"content-type": "application/json", **(headers or {})}
    )


def serve(index: Spann, host: str = "127.0.0.1", port: int = 8000, *, threads: int = 1, max_batch: int = 256) -> None:
    """Serve until SIGINT or SIGTERM; running requests finish, then the index is closed."""
    import uvicorn

    app = IndexApp(index, threads=threads, max_batch=max_batch)
    settings = uvicorn.Config(
        app, host=host, port=port, log_config=None, access_log=False, lifespan="off", timeout_graceful_shutdown=10
    )
    try:
        uvicorn.Server(settings).run()
    finally:
        app.batcher.close()
        index.close()
