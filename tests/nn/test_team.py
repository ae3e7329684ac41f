"""Teams of threads: members meet, shares cover everything, nobody waits for who never comes."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numba import njit, prange

from hasten.nn.team import LATE, join, meet, new_team, share_of

TURNS = 200


@njit(parallel=True)
def _rounds(threads: int, turns: int, seen: Any) -> Any:
    """Each turn every member adds one to its number, and reads all numbers behind the barrier."""
    team = new_team()
    count = np.zeros((threads, 8), np.int64)
    sizes = np.zeros(threads, np.int64)
    for place in prange(threads):
        me, size = join(team, threads)
        sizes[place] = size if me != LATE else 0
        if me != LATE:
            for turn in range(turns):
                count[me, 0] += 1
                meet(team, size)
                seen[me, turn] = count[:size, 0].sum()
                meet(team, size)
    return sizes


@pytest.mark.parametrize("threads", range(1, numba.get_num_threads() + 1))
def test_what_was_written_is_seen_behind_the_barrier(threads: int) -> None:
    before = numba.get_num_threads()
    numba.set_num_threads(threads)
    try:
        seen = np.zeros((threads, TURNS), np.int64)
        sizes = _rounds(threads, TURNS, seen)
    finally:
        numba.set_num_threads(before)
    size = sizes.max()
    assert (sizes == size).sum() == size  # every member knows it; a late one, which may be, has no turns
    assert np.array_equal(seen[:size], np.tile(size * np.arange(1, TURNS + 1), (size, 1)))


@njit
def _one_after_the_other(most: int) -> Any:
    """As a runtime does that has one thread only."""
    team = new_team()
    first = join(team, most)
    meet(team, first[1])
    return first, join(team, most)


def test_who_never_comes_is_not_waited_for_and_who_comes_late_has_nothing_to_do() -> None:
    first, second = _one_after_the_other(2)
    assert first == (0, 1)
    assert second[0] == LATE


@given(st.integers(0, 10_000), st.integers(1, 64))
def test_shares_cover_everything_once(count: int, size: int) -> None:
    shares = [share_of(count, number, size) for number in range(size)]
    assert shares[0][0] == 0
    assert shares[-1][1] == count
    assert all(one[1] == other[0] for one, other in zip(shares, shares[1:], strict=False))
    assert max(b - a for a, b in shares) - min(b - a for a, b in shares) <= 1
