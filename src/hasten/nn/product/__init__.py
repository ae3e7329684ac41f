"""Products of a few rows with a packed matrix, at the speed at which memory hands out the matrix.

Kernels of our own for AVX-512: bfloat16, signed bytes, 4 bits. A decoding step reads every weight once for a handful
of rows, so the bound is bytes over bandwidth; the libraries' kernels lay weights out for many rows, or cost as much to
call as a small product takes. One layout serves one row and a thousand, and a row's bits do not depend on its
neighbours; where the processor has matrix tiles (AMX), many rows of bfloat16 may use them and give that up.
"""

from __future__ import annotations

from functools import lru_cache

__all__ = ["FORMATS", "supported"]

FORMATS = ("bf16", "int8", "int4")


@lru_cache(maxsize=8)
def supported(precision: str) -> bool:
    """Whether this processor has the instructions of the kernel for ``precision``."""
    from hasten.nn.product.instructions import has_bfloat16, has_bytes

    return {"bf16": has_bfloat16, "int8": has_bytes, "int4": has_bytes}.get(precision, lambda: False)()
