"""Numbers too small to matter become 0 while a kernel runs.

The weight of a far key is often below 2**-126. A processor keeps such numbers at a hundred cycles each: in a layer of
sharp scores attention took three times as long for them. The switch belongs to the thread, so whoever sets it puts
back what was there.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from hasten.nn.product.tiles import run_assembly

__all__ = ["flush_small", "keep_small"]

_CONTROL = 0x8040
"""Bits of the control register: results below the normal numbers become 0, and such numbers are read as 0."""
_WORD = ir.IntType(64)
_INT = ir.IntType(32)


@intrinsic
def flush_small(typing: Any) -> Any:
    """From here on numbers below 2**-126 are 0; the control word that stood before.

    Far keys have weights of that size, and each costs the processor a hundred cycles where it is kept.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        word = cgutils.alloca_once(builder, _INT)  # type: ignore[no-untyped-call]
        address = builder.ptrtoint(word, _WORD)
        run_assembly(builder, "stmxcsr ($0)", address)
        before = builder.load(word, name="control")
        builder.store(builder.or_(before, ir.Constant(_INT, _CONTROL)), word)
        run_assembly(builder, "ldmxcsr ($0)", address)
        return before

    return types.int32(), generate


@intrinsic
def keep_small(typing: Any, before: Any) -> Any:
    """The control word is ``before`` again."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        word = cgutils.alloca_once_value(builder, arguments[0])  # type: ignore[no-untyped-call]
        run_assembly(builder, "ldmxcsr ($0)", builder.ptrtoint(word, _WORD))
        return context.get_dummy_value()

    return types.void(types.int32), generate
