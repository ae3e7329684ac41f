"""Time is handed in.

Policies, engines, simulators and servers take a :class:`Clock` and never call ``time`` themselves, so the same
object runs on the wall clock, in a discrete-event simulator and in a test that advances time by hand.
Times are seconds on a monotonic scale whose zero is arbitrary; only differences mean anything.
"""

from __future__ import annotations

import time
from typing import Protocol, runtime_checkable

__all__ = ["Clock", "ManualClock", "MonotonicClock", "ProcessorClock"]


@runtime_checkable
class Clock(Protocol):
    """What hands out the time."""

    def now(self) -> float:
        """Seconds on a monotonic scale."""
        ...

    def sleep(self, seconds: float) -> None:
        """Let ``seconds`` pass; zero or less returns at once."""
        ...


class MonotonicClock:
    """The operating system's monotonic clock."""

    def now(self) -> float:
        return time.perf_counter()

    def sleep(self, seconds: float) -> None:
        if seconds > 0:
            time.sleep(seconds)


class ProcessorClock:
    """Processor time of this process: what other programs do on a busy machine does not count.

    Only for code that computes with one thread. ``sleep`` does not wait, it moves the clock on.
    """

    def __init__(self) -> None:
        self._slept = 0.0

    def now(self) -> float:
        return time.process_time() + self._slept

    def sleep(self, seconds: float) -> None:
        self._slept += max(0.0, seconds)


class ManualClock:
    """A clock that moves only when told, for tests and simulators.

    >>> clock = ManualClock()
    >>> clock.advance(1.5)
    >>> clock.now()
    1.5
    """

    def __init__(self, start: float = 0.0) -> None:
        self._now = start

    def now(self) -> float:
        return self._now

    def sleep(self, seconds: float) -> None:
        self.advance(max(0.0, seconds))

    def advance(self, seconds: float) -> None:
        """Move forward by ``seconds``; raises ``ValueError`` for a negative step."""
        if seconds < 0:
            raise ValueError(f"a monotonic clock cannot go back by {-seconds} s")
        self._now += seconds

    def advance_to(self, when: float) -> None:
        """Move to the absolute time ``when``; a moment already passed leaves the clock as it is."""
        self._now = max(self._now, when)
