"""Queries of concurrent requests in one batch.

Queries that wait while a batch is under way form the next one, if their knobs agree; nothing waits for company.
"""

from __future__ import annotations

import asyncio
import json
from bisect import bisect_left
from collections import deque
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from hasten.errors import HastenError, OverloadedError

if TYPE_CHECKING:
    from hasten.retrieve.index.hit import Hit
    from hasten.retrieve.index.spann import Spann

__all__ = ["Batcher", "Histogram"]


@dataclass
class Histogram:
    """Counts below bounds, for Prometheus."""

    bounds: tuple[float, ...]
    counts: list[int] = field(default_factory=list)
    total: float = 0.0

    def __post_init__(self) -> None:
        self.counts = [0] * (len(self.bounds) + 1)

    def observe(self, value: float) -> None:
        """Count one value."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def lines(self, name: str, text: str) -> Iterable[str]:
        """As Prometheus text."""
        yield f"# HELP {name} {text}"
        yield f"# TYPE {name} histogram"
        running = 0
        for bound, count in zip([*self.bounds, "+Inf"], self.counts, strict=True):
            running += count
            yield f'{name}_bucket{{le="{bound}"}} {running}'
        yield f"{name}_sum {self.total}"
        yield f"{name}_count {running}"


@dataclass
class _Waiting:
    queries: NDArray[Any]
    knobs: dict[str, Any]
    key: str
    answer: asyncio.Future[tuple[Any, Any, Any]]


class Batcher:
    """Collects the queries of concurrent requests; one batch at a time runs in a thread.

    Raises OverloadedError from :meth:`search` when ``max_queue`` queries wait already. One event loop at a time.
    """

    def __init__(self, index: Spann, max_batch: int = 256, max_queue: int = 4096, threads: int = 1) -> None:
        self._index = index
        self._max_batch, self._max_queue, self._threads = max_batch, max_queue, threads
        self._waiting: deque[_Waiting] = deque()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="hasten-batch")
        self._task: asyncio.Task[None] | None = None
        self.batches = Histogram((1, 2, 4, 8, 16, 32, 64, 128, 256, 512))
        """queries per batch"""
        self.lists = 0
        """lists read so far"""
        self.bytes = 0
        """bytes of the pages read so far"""
        self.incomplete = 0
        """queries that a deadline cut"""

    @property
    def depth(self) -> int:
        """Queries that wait."""
        return sum(len(w.queries) for w in self._waiting)

    async def search(self, queries: NDArray[Any], knobs: dict[str, Any]) -> tuple[Any, Any, Any]:
        """(distances, ids, complete) of some queries, in whatever batch they travel."""
        if self.depth + len(queries) > self._max_queue and self._waiting:
            raise OverloadedError(f"{self.depth} queries wait already; retry later")
        answer: asyncio.Future[tuple[Any, Any, Any]] = asyncio.get_running_loop().create_future()
        self._waiting.append(_Waiting(queries, knobs, json.dumps(knobs, sort_keys=True, default=str), answer))
        if self._task is None or self._task.done():
            self._task = asyncio.get_running_loop().create_task(self._drain())
        return await answer

    def _next(self) -> list[_Waiting]:
        """The oldest request and those behind it whose knobs agree, up to the size of a batch."""
        first = self._waiting.popleft()
        batch, size, rest = [first], len(first.queries), deque[_Waiting]()
        while self._waiting:
            one = self._waiting.popleft()
            if one.key == first.key and size + len(one.queries) <= self._max_batch:
                batch.append(one)
                size += len(one.queries)
            else:
                rest.append(one)
        self._waiting = rest
        return batch

    async def _drain(self) -> None:
        loop = asyncio.get_running_loop()
        await asyncio.sleep(0)  # requests of this moment come along
        while self._waiting:
            batch = self._next()
            joined = np.concatenate([w.queries for w in batch])
            try:
                hit = await loop.run_in_executor(self._pool, self._run, joined, batch[0].knobs)
            except Exception as error:
                if len(batch) > 1 and isinstance(error, HastenError):  # find the one at fault
                    for one in batch:
                        await self._alone(loop, one)
                    continue
                for one in batch:
                    if not one.answer.done():
                        one.answer.set_exception(error)
                continue
            self._count(hit, len(joined))
            at = 0
            for one in batch:
                cut = slice(at, at + len(one.queries))
                at += len(one.queries)
                if not one.answer.done():  # its client may have gone
                    one.answer.set_result((hit.distances[cut], hit.ids[cut], hit.stats.complete[cut]))

    async def _alone(self, loop: asyncio.AbstractEventLoop, one: _Waiting) -> None:
        try:
            hit = await loop.run_in_executor(self._pool, self._run, one.queries, one.knobs)
        except Exception as error:
            if not one.answer.done():
                one.answer.set_exception(error)
            return
        self._count(hit, len(one.queries))
        if not one.answer.done():
            one.answer.set_result((hit.distances, hit.ids, hit.stats.complete))

    def _run(self, queries: NDArray[Any], knobs: dict[str, Any]) -> Hit:
        return self._index.search(queries, threads=self._threads, **knobs)

    def _count(self, hit: Hit, size: int) -> None:
        self.batches.observe(size)
        self.lists += int(hit.stats.lists.sum())
        self.bytes += int(hit.stats.bytes.sum())
        self.incomplete += int((~hit.stats.complete).sum())

    def close(self) -> None:
        """Finish the batch under way."""
        self._pool.shutdown()
