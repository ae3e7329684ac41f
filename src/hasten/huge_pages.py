"""Memory in pages of 2 MiB, for weights and caches that are read from end to end.

A small page is 64 lines; reading a matrix of 10 MiB crosses 2,500 of them, and each costs a look-up of its address and
a restart of the processor's own prefetching. Linux gives large pages to whom asks (``madvise``) and is aligned to them.
Matrices are laid side by side in arenas, so that their ends waste nothing; an arena lives as long as any of them.
"""

from __future__ import annotations

import contextlib
import mmap
import threading
from typing import Any

import numpy as np

__all__ = ["zeros"]

PAGE = 2 * 2**20
"""Bytes of a huge page."""
_LINE = 64
_ARENA = 16 * PAGE
_LEAST = 2**18
"""Bytes below which it is not worth it."""
_HUGE = getattr(mmap, "MADV_HUGEPAGE", None)


class _Arenas:
    """Hands out pieces of the arena at hand."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._arena: Any = np.empty(0, np.uint8)
        self._used = 0

    def take(self, size: int) -> Any:
        room = -(-size // _LINE) * _LINE
        with self._lock:
            if self._used + room > len(self._arena):
                made = _mapped(max(room, _ARENA))
                if room >= _ARENA:  # of its own; what is left of the arena at hand stays of use
                    return made[:size]
                self._arena, self._used = made, 0
            piece = self._arena[self._used : self._used + size]
            self._used += room
        return piece


def _mapped(size: int) -> Any:
    """(size,) zeros that start at a huge page."""
    # private: memory that is shared with children gets small pages
    area = mmap.mmap(-1, size + PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if _HUGE is not None:
        with contextlib.suppress(OSError):  # a kernel without them: small pages do
            area.madvise(_HUGE)
    raw = np.frombuffer(area, np.uint8)
    start = -raw.ctypes.data % PAGE
    return raw[start : start + size]


_arenas = _Arenas()


def zeros(size: int) -> Any:
    """(size,) uint8 zeros, aligned to a line of 64 bytes, in huge pages where that pays and the system has them."""
    if size < _LEAST:
        raw = np.zeros(size + _LINE, np.uint8)
        start = -raw.ctypes.data % _LINE
        return raw[start : start + size]
    return _arenas.take(size)
