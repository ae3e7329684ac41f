"""The fault-injecting twin of durable files: a disk that fills up."""

from __future__ import annotations

import errno
import io
import os

__all__ = ["FullDisk"]


class FullDisk(io.TextIOWrapper):
    """A text file on a disk that has room for ``room`` characters; what goes beyond raises ``ENOSPC``.

    Hand ``lambda descriptor: FullDisk(descriptor, room)`` to :func:`hasten.files.write_text` as its opener.
    """

    def __init__(self, descriptor: int, room: int) -> None:
        super().__init__(os.fdopen(descriptor, "wb"), encoding="utf-8")
        self._room = room

    def write(self, text: str) -> int:
        """Write what fits, then fail."""
        fits = text[: self._room]
        self._room -= len(fits)
        super().write(fits)
        if len(fits) < len(text):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return len(text)
