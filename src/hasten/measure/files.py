"""Durable files, written whole or not at all.

Text goes to a temporary file in the same folder, is flushed to the disk and then takes the final name in one step. A
full disk or a file-size limit leaves the old file as it was and no half file behind.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import IO

from hasten.errors import DataError

__all__ = ["cache_folder", "write_text"]

Opener = Callable[[int], IO[str]]


def _open(descriptor: int) -> IO[str]:
    return os.fdopen(descriptor, "w", encoding="utf-8")


def write_text(path: str | os.PathLike[str], text: str, *, opener: Opener = _open) -> None:
    """Write ``text`` to ``path``, whole or not at all; folders on the way are made.

    ``opener`` turns a file descriptor into a text file; tests hand in one that fails. Raises
    :class:`~hasten.errors.DataError` with one line when the disk is full or the place cannot be written.
    """
    target = Path(path)
    temporary: str | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".part", dir=target.parent)
        with opener(descriptor) as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, target)
    except OSError as error:
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
        reason = error.strerror or str(error)
        raise DataError(
            f"{str(target)!r} was not written ({reason}); the old file, if any, is unchanged: free some space or name "
            "another place"
        ) from error


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def cache_folder() -> Path:
    """Where this user's measurements are kept.

    ``HASTEN_CACHE``, else ``XDG_CACHE_HOME/hasten``, else ``~/.cache/hasten``.
    """
    named = os.environ.get("HASTEN_CACHE")
    if named:
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hasten"
