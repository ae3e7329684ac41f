"""The news of a request on their way to its reader, in a bounded list: one who stops reading costs a fixed amount of
memory and is then cancelled."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from hasten.errors import HastenError, OverloadedError

if TYPE_CHECKING:
    from hasten.serve.output import Output

__all__ = ["Cancel", "News", "Ticket"]

News = tuple[int, int | None, "Output | None"]
"""(index of the sequence in its ticket, new token, everything else where there is more)"""
Cancel = Callable[[list[int], bool], None]
"""ends sequences by their numbers; true: a stop string was met"""


class Ticket:
    """The news of one request, for one reader."""

    def __init__(self, names: list[int], limit: int, cancel: Cancel) -> None:
        """``names``: the numbers of its sequences; ``limit``: news that may wait; ``cancel`` ends sequences."""
        self._cancel = cancel
        self._names = names
        self._open = dict(zip(names, range(len(names)), strict=True))
        self._news: list[News] = []
        self._waiter: asyncio.Future[None] | None = None
        self._limit = limit
        self._error: HastenError | None = None
        self.reader: asyncio.Task[Any] | None = None
        """the task that is cancelled when the reader is too far behind"""
        self.overflowed = False

    async def next(self) -> list[News]:
        """What has come since the last call; waits for something. Empty when every sequence has ended.

        Raises the error that ended the request. One caller at a time.
        """
        while not self._news:
            if self._error is not None:
                raise self._error
            if not self._open:
                return []
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        news, self._news = self._news, []
        return news

    def stop(self, index: int, *, met: bool = True) -> None:
        """End one sequence: its stop string was met (or, with ``met`` false, nobody wants it any more)."""
        name = self._names[index]
        if self._open.pop(name, None) is not None:
            self._cancel([name], met)
            self._wake()

    def cancel(self) -> None:
        """End what still runs; blocks are freed before the engine's next step. May be called again."""
        names = list(self._open)
        self._open.clear()
        if names:
            self._cancel(names, False)
        self._wake()

    # called by the engine

    def push(self, name: int, token: int | None, output: Output | None) -> bool:
        """Take one piece of news; False when the reader is too far behind and the ticket was cancelled."""
        index = self._open.get(name)
        if index is None:
            return True
        self._news.append((index, token, output))
        if output is not None and output.finish is not None:
            del self._open[name]
        elif len(self._news) > self._limit:
            self._news.clear()
            self.overflowed = True
            if self.reader is not None:
                self.reader.cancel()
            self.fail(OverloadedError(f"the client is {self._limit} tokens behind; the request was cancelled"))
            return False
        self._wake()
        return True

    def fail(self, error: HastenError) -> None:
        """End the request with ``error``."""
        self._error = error
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
