"""Where this user's measurements are kept."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["cache_folder"]


def cache_folder() -> Path:
    """``HASTEN_CACHE``, else ``XDG_CACHE_HOME/hasten``, else ``~/.cache/hasten``."""
    named = os.environ.get("HASTEN_CACHE")
    if named:
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hasten"
