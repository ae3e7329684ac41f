"""Binary files, written whole or not at all: to a temporary file in the same folder, flushed, then renamed."""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path

from hasten.errors import DataError

__all__ = ["write_bytes"]


def write_bytes(path: str | Path, content: bytes) -> None:
    """Write ``content`` to ``path``; raises :class:`~hasten.errors.DataError` and leaves the old file if it cannot."""
    target, temporary = Path(path), None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".part", dir=target.parent)
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except OSError as error:
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
        raise DataError(
            f"{str(target)!r} was not written ({error.strerror or error}); free some space or name another place"
        ) from error
