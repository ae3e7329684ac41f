"""Writing at a bounded rate, so that searches keep their disk."""

from __future__ import annotations

from hasten.clock import Clock
from hasten.retrieve.index.io import Writer

__all__ = ["Throttled"]


class Throttled:
    """A writer that keeps to a rate by sleeping on the clock."""

    def __init__(self, writer: Writer, rate: float | None, clock: Clock) -> None:
        self._writer, self._rate, self._clock = writer, rate, clock
        self._began, self._done = clock.now(), 0

    def write(self, data: bytes | memoryview) -> int:
        view = memoryview(data).cast("B")
        step = len(view) if self._rate is None else max(4096, int(self._rate / 20))
        for begin in range(0, len(view), max(step, 1)):
            self._writer.write(view[begin : begin + step])
            self._done += min(step, len(view) - begin)
            if self._rate is not None:
                self._clock.sleep(self._began + self._done / self._rate - self._clock.now())
        return len(view)

    def sync(self) -> None:
        self._writer.sync()

    def tell(self) -> int:
        return self._writer.tell()

    def close(self) -> None:
        self._writer.close()
