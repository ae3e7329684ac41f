"""Memory for weights: aligned, zero, apart, and gone with its last user."""

import gc
import weakref

import numpy as np
import pytest

from hasten import huge_pages


@pytest.mark.parametrize("size", [0, 1, 100, huge_pages._LEAST - 1, huge_pages._LEAST, 3 * 2**20 + 7, 40 * 2**20])
def test_zeros_are_aligned_and_can_be_written(size: int) -> None:
    piece = huge_pages.zeros(size)
    assert piece.shape == (size,)
    assert size == 0 or piece.ctypes.data % 64 == 0
    assert not piece.any()
    piece[:] = 7


def test_pieces_do_not_overlap() -> None:
    arenas = huge_pages._Arenas()
    pieces = [arenas.take(2**20 + 3 * n) for n in range(70)]  # more than two arenas
    for number, piece in enumerate(pieces):
        piece[:] = number
    assert all((piece == number).all() for number, piece in enumerate(pieces))
    large = arenas.take(huge_pages._ARENA + 1)
    assert not large.any()
    assert large.ctypes.data % huge_pages.PAGE == 0


def test_an_arena_goes_with_its_last_piece() -> None:
    arenas = huge_pages._Arenas()
    piece = arenas.take(2**20)
    base = piece
    while isinstance(base.base, np.ndarray):
        base = base.base
    gone = weakref.ref(base)
    arenas.take(huge_pages._ARENA - 2**19)  # the next arena
    del base
    gc.collect()
    assert gone() is not None
    del piece
    gc.collect()
    assert gone() is None
