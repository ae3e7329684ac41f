from __future__ import annotations

from typing import Any

import pytest

from hasten.testing.stream_kit import StreamKit


class _Pairs:
    """Sums of consecutive pairs; a lonely last value comes out at the end."""

    def __init__(self) -> None:
        self.left: list[int] = []

    def push(self, chunk: list[int]) -> list[int]:
        values = self.left + list(chunk)
        whole = len(values) // 2 * 2
        self.left = values[whole:]
        return [values[i] + values[i + 1] for i in range(0, whole, 2)]

    def flush(self) -> list[int]:
        out, self.left = self.left, []
        return out

    def reset(self) -> None:
        self.left = []


class _Forgetful(_Pairs):
    def push(self, chunk: list[int]) -> list[int]:
        self.left = []
        return super().push(chunk)


class TestPairs(StreamKit):
    def stream(self) -> Any:
        return _Pairs()

    def input(self) -> list[int]:
        return list(range(41))


def test_the_kit_catches_a_stream_that_depends_on_the_cut() -> None:
    class Kit(TestPairs):
        def stream(self) -> Any:
            return _Forgetful()

    with pytest.raises(AssertionError, match="differs"):
        Kit().test_any_cut_gives_the_offline_result()
