"""Lets go of the pages of libraries that only start-up needed.

Importing torch and linking compiled kernels reads some 150 MiB of shared libraries that no step touches again. Such
pages are copies of a file: dropped, they cost one minor fault when they are needed after all.
"""

from __future__ import annotations

import contextlib
import ctypes
import re
from collections.abc import Iterator
from pathlib import Path

__all__ = ["drop_library_pages"]

_MADV_DONTNEED = 4  # of Linux, whatever the processor
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
