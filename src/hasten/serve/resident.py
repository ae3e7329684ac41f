"""Lets go of the memory that only start-up needed.

Importing torch and linking compiled kernels reads some 150 MiB of shared libraries that no step touches again. Such
pages are copies of a file: dropped, they cost one minor fault when they are needed after all. Packing weights leaves
some 40 MiB of freed pieces in the allocator, which it does not return by itself.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import linecache
import re
import sys
from collections.abc import Iterator
from pathlib import Path

__all__ = ["drop_library_pages", "import_numba_alone", "keep_heap_small", "return_freed_memory"]

_MADV_DONTNEED = 4  # of Linux, whatever the processor
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc
_HEAD = re.compile(r"([0-9a-f]+)-([0-9a-f]+) (\S{4}) \S+ \S+ \S+ +(/.*)")


def drop_library_pages(smaps: str | Path = "/proc/self/smaps") -> int:
    """Drop the resident pages of mapped files that this process cannot have changed; returns their bytes.

    Writable mappings and those that hold a page of the process's own (relocated data) stay as they are. Where the
    system has no ``smaps`` nothing is dropped.
    """
    dropped = 0
    with contextlib.suppress(OSError, AttributeError):
        advise = ctypes.CDLL(None, use_errno=True).madvise
        advise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
        for begin, end, resident in list(_clean(Path(smaps))):
            if advise(begin, end - begin, _MADV_DONTNEED) == 0:
                dropped += resident
    return dropped


def keep_heap_small(largest: int = 8 << 20) -> None:
    """Let glibc take pieces of more than ``largest`` bytes from the system and give them back when they are freed.

    By itself it raises that size with every large piece it sees freed, up to 32 MiB, and keeps twice that much.
    """
    with contextlib.suppress(OSError, AttributeError):
        change = ctypes.CDLL(None).mallopt
        change(_M_MMAP_THRESHOLD, largest)
        change(_M_TRIM_THRESHOLD, largest)


def import_numba_alone() -> None:
    """Import numba without scipy, which costs 9 MiB and lends it a BLAS that no kernel here calls.

    scipy can be imported afterwards; where it or numba is there already, nothing changes.
    """
    if "scipy" in sys.modules or "numba" in sys.modules:
        return
    sys.modules["scipy"] = None  # type: ignore[assignment]
    try:
        importlib.import_module("numba.np.arraymath")  # this is where it asks for scipy, once
    finally:
        del sys.modules["scipy"]


def return_freed_memory() -> None:
    """Let the C allocator give freed memory back to the system; nothing happens where it cannot (glibc can)."""
    linecache.clearcache()  # torch reads its own sources while it is imported
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def _clean(smaps: Path) -> Iterator[tuple[int, int, int]]:
    """Begin, end and resident bytes of the private, read-only mappings of libraries with no page of their own."""
    span: tuple[int, int] | None = None
    resident = 0
    for line in smaps.read_text().splitlines():
        if (head := _HEAD.match(line)) is not None:
            readable = head[3][0] == "r" and head[3][1] == "-" and head[3][3] == "p" and ".so" in Path(head[4]).name
            span = (int(head[1], 16), int(head[2], 16)) if readable else None
        elif not line[0].isupper():
            span = None  # a mapping of no file
        elif span is not None and line.startswith("Rss:"):
            resident = int(line.split()[1]) << 10
        elif span is not None and line.startswith("Anonymous:") and line.split()[1] == "0":
            yield (*span, resident)
