"""Durable files, written whole or not at all.

The content goes to a temporary file in the same folder, is flushed to the disk and then takes the final name in one
step. A full disk or a file-size limit leaves the old file as it was and no half file behind.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import IO, Any

from hasten.errors import DataError

__all__ = ["check_place", "write_bytes", "write_text"]

Opener = Callable[[int], IO[Any]]
"""turns a file descriptor into a file; tests hand in one that fails"""


def write_text(path: str | os.PathLike[str], text: str, *, opener: Opener | None = None) -> None:
    """Write ``text`` to ``path`` in UTF-8, whole or not at all; folders on the way are made.

    Raises :class:`~hasten.errors.DataError` with one line when the disk is full or the place cannot be written.
    """
    _write(Path(path), (text,), opener or (lambda descriptor: os.fdopen(descriptor, "w", encoding="utf-8")))


def write_bytes(path: str | os.PathLike[str], *pieces: bytes, opener: Opener | None = None) -> int:
    """Write ``pieces``, one behind the other, as :func:`write_text` does; returns their bytes."""
    _write(Path(path), pieces, opener or (lambda descriptor: os.fdopen(descriptor, "wb")))
    return sum(map(len, pieces))


def check_place(path: str | os.PathLike[str], *, folder: bool = False) -> None:
    """Whether a file (or a ``folder``) could be written at ``path``, asked before long work and not after it.

    Raises :class:`~hasten.errors.DataError` on one line. Nothing is left behind.
    """
    target = Path(path)
    reason = None
    if folder and target.exists() and not target.is_dir():
        reason = "it is a file"
    elif not folder and target.is_dir():
        reason = "it is a folder"
    nearest = target if folder else target.parent
    while not nearest.exists() and nearest != nearest.parent:
        nearest = nearest.parent
    if reason is None:
        try:
            with tempfile.TemporaryFile(dir=nearest):
                pass
        except OSError as error:
            reason = error.strerror or str(error)
    if reason is not None:
        raise DataError(f"{str(target)!r} cannot be written ({reason}); name another place")


def _write(target: Path, pieces: Iterable[str] | Iterable[bytes], opener: Opener) -> None:
    temporary: str | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".part", dir=target.parent)
        with opener(descriptor) as file:
            for piece in pieces:
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())  # a temporary file is for its owner alone
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
