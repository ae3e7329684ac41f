"""How kernels are compiled: without the GIL, kept on disk, and those on a hot path without reference counts.

A compiled function counts references of every array that it is handed or takes out of a tuple, with an atomic
operation each time; in kernels of a hundred nanoseconds that was two thirds of a search. ``hot`` switches it off: such
a kernel only borrows arrays that its caller keeps alive, and cannot make any.
"""

from __future__ import annotations

from typing import Any

import numba

__all__ = ["hot", "njit"]

njit = numba.njit(nogil=True, cache=True)
"""for kernels that make arrays"""
_BORROW: dict[str, Any] = {"nogil": True, "cache": True, "_nrt": False}
hot: Any = numba.njit(**_BORROW)
"""for kernels that only borrow arrays"""
