"""The test kit of the Stream contract: any cut into chunks gives the offline result.

A stream has ``push(chunk) -> list``, ``flush() -> list`` and ``reset()``. Write ``stream()``, ``input()`` and, where
the input is not a sequence that slices, ``cut()``.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, Protocol

__all__ = ["Stream", "StreamKit"]


class Stream(Protocol):
    """Anything that lives in time."""

    def push(self, chunk: Any) -> list[Any]:
        """Take a chunk, give what is ready."""
        ...

    def flush(self) -> list[Any]:
        """Give what is left; nothing more comes."""
        ...

    def reset(self) -> None:
        """Forget everything; the next chunk begins a new stream."""
        ...


class StreamKit:
    """Inherit in a test module; override :meth:`stream` and :meth:`input`."""

    def stream(self) -> Stream:
        """A fresh stream."""
        raise NotImplementedError("override stream()")

    def input(self) -> Any:
        """Something to push, at least a few chunks long."""
        raise NotImplementedError("override input()")

    def cut(self, whole: Any, places: Sequence[int]) -> list[Any]:
        """``whole`` in pieces that begin at 0 and at ``places``."""
        edges = [0, *places, len(whole)]
        return [whole[a:b] for a, b in zip(edges, edges[1:], strict=False)]

    def same(self, a: list[Any], b: list[Any]) -> bool:
        """Whether two outputs are equal; override for a tolerance."""
        return a == b

    def run(self, stream: Stream, chunks: Sequence[Any]) -> list[Any]:
        """Everything that comes out."""
        out = [item for chunk in chunks for item in stream.push(chunk)]
        return [*out, *stream.flush()]

    def _offline(self) -> list[Any]:
        return self.run(self.stream(), [self.input()])

    def test_gives_something(self) -> None:
        assert self._offline()

    def test_any_cut_gives_the_offline_result(self) -> None:
        whole, expected = self.input(), self._offline()
        size = len(whole)
        rng = random.Random(0)
        cuts = [list(range(1, size))] if size <= 4096 else []
        cuts += [sorted(rng.sample(range(1, size), min(size - 1, rng.randint(1, 12)))) for _ in range(8)]
        for places in cuts:
            got = self.run(self.stream(), self.cut(whole, places))
            assert self.same(got, expected), f"cut at {places[:8]} differs"

    def test_empty_chunks_change_nothing(self) -> None:
        whole = self.input()
        empty = self.cut(whole, [0])[0]
        assert self.same(self.run(self.stream(), [empty, whole, empty]), self._offline())

    def test_reset_begins_anew(self) -> None:
        stream, whole = self.stream(), self.input()
        stream.push(self.cut(whole, [len(whole) // 2])[0])
        stream.reset()
        assert self.same(self.run(stream, [whole]), self._offline())
