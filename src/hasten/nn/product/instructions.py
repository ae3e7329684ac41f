"""Dot-product instructions of AVX-512 as pieces of numba kernels.

``vdpbf16ps`` adds two products of bfloat16 pairs to each of sixteen float32 sums, ``vpdpbusd`` four products of an
unsigned and a signed byte to each of sixteen int32 sums. numba has no name for either, so the kernels beside this file
are built from LLVM instructions, with these two as inline assembly: that form is the same in every version of LLVM.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir
from numba.core import cgutils

__all__ = [
    "FLOATS",
    "INTS",
    "LANES",
    "add_scaled",
    "broadcast",
    "dot_bfloat16",
    "dot_bytes",
    "has_bfloat16",
    "has_bytes",
    "has_tiles",
    "load",
    "multiply_add",
    "pairs_as_floats",
    "pointer",
    "prefetch",
    "splat",
    "store",
]

LANES = 16
"""float32 or int32 values in a register of 512 bits."""
FLOATS = ir.VectorType(ir.FloatType(), LANES)
INTS = ir.VectorType(ir.IntType(32), LANES)
_WORD = ir.IntType(32)
_ADDRESS = ir.IntType(64)


llvm.initialize_native_asmparser()


@lru_cache(maxsize=1)
def _features() -> dict[str, bool]:
    return dict(llvm.get_host_cpu_features())


def has_bfloat16() -> bool:
    """Whether this processor has ``vdpbf16ps`` on registers of 512 bits."""
    return _features().get("avx512bf16", False)


def has_bytes() -> bool:
    """Whether this processor has ``vpdpbusd`` on registers of 512 bits."""
    return _features().get("avx512vnni", False)


def has_tiles() -> bool:
    """Whether this processor multiplies whole tiles (AMX)."""
    return _features().get("amx-bf16", False) or _features().get("amx-int8", False)


@lru_cache(maxsize=1)
def pairs_as_floats() -> bool:
    """Whether bfloat16 is better multiplied as float32 here: Intel's cores do four fused multiply-adds in the time of
    one ``vdpbf16ps``, which is worth two (measured on Emerald Rapids), AMD's Zen 4 and 5 as many of either."""
    return not llvm.get_host_cpu_name().startswith("znver")


def _assembly(builder: Any, name: str, kind: Any, total: Any, a: Any, b: Any) -> Any:
    function = ir.FunctionType(kind, [kind, INTS, INTS])
    return builder.call(ir.InlineAsm(function, f"{name} $3, $2, $0", "=v,0,v,v"), [total, a, b])


def dot_bfloat16(builder: Any, total: Any, a: Any, b: Any) -> Any:
    """``total`` (16 float32) plus the products of the bfloat16 pairs in ``a`` and ``b`` (16 words each).

    A processor without the instruction compiles kernels that hold it, though it never runs them: nothing is added.
    """
    return _assembly(builder, "vdpbf16ps", FLOATS, total, a, b) if has_bfloat16() else total


def dot_bytes(builder: Any, total: Any, unsigned: Any, signed: Any) -> Any:
    """``total`` (16 int32) plus the products of the four bytes in each word of ``unsigned`` and ``signed``; as
    :func:`dot_bfloat16` where there is no such instruction."""
    return _assembly(builder, "vpdpbusd", INTS, total, unsigned, signed) if has_bytes() else total


def pointer(builder: Any, address: Any, offset: int | Any, kind: Any) -> Any:
    """``address + offset`` (bytes) as a pointer to ``kind``."""
    if isinstance(offset, int):
        offset = ir.Constant(_ADDRESS, offset)
    return builder.inttoptr(builder.add(address, offset), kind.as_pointer())


def load(builder: Any, address: Any, offset: int | Any, kind: Any, align: int = 4) -> Any:
    """The value of type ``kind`` at ``address + offset``."""
    value = builder.load(pointer(builder, address, offset, kind))
    value.align = align
    return value


def store(builder: Any, value: Any, address: Any, offset: int | Any, align: int = 4) -> None:
    """Write ``value`` to ``address + offset``."""
    builder.store(value, pointer(builder, address, offset, value.type)).align = align


def splat(builder: Any, scalar: Any) -> Any:
    """Sixteen copies of ``scalar`` (int32 or float32)."""
    kind = ir.VectorType(scalar.type, LANES)
    one = builder.insert_element(ir.Constant(kind, ir.Undefined), scalar, ir.Constant(_WORD, 0))
    same = ir.Constant(ir.VectorType(_WORD, LANES), [0] * LANES)
    return builder.shuffle_vector(one, ir.Constant(kind, ir.Undefined), same)


def broadcast(builder: Any, address: Any, offset: int | Any) -> Any:
    """Sixteen copies of the word at ``address + offset``."""
    return splat(builder, load(builder, address, offset, _WORD))


def prefetch(builder: Any, address: Any, offset: int | Any, level: int = 0) -> None:
    """Ask for the line of memory at ``address + offset``; it may lie beyond the end. ``level`` 1: into the second cache
    and not the first."""
    if not isinstance(offset, int):
        address, offset = builder.add(address, offset), 0
    function = ir.FunctionType(ir.VoidType(), [_ADDRESS])
    builder.call(ir.InlineAsm(function, f"prefetcht{level} {offset}($0)", "r", side_effect=True), [address])


def multiply_add(builder: Any, a: Any, b: Any, c: Any) -> Any:
    """``a * b + c`` of sixteen float32, rounded once."""
    kind = ir.FunctionType(FLOATS, [FLOATS] * 3)
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, f"llvm.fma.v{LANES}f32"), [a, b, c])


def add_scaled(
    builder: Any, rows: int, tiles: int, totals: list[Any], scales: Any, sides: list[Any], sums: Any
) -> None:
    """sums[row, tile] += scale[row] * total[row, tile], the totals being int32 in memory slots."""
    for r in range(rows):
        scale = splat(builder, load(builder, scales, sides[r], ir.FloatType()))
        for t in range(tiles):
            place = (r * tiles + t) * LANES * 4
            value = builder.sitofp(builder.load(totals[r * tiles + t]), FLOATS)
            before = load(builder, sums, place, FLOATS)
            store(builder, multiply_add(builder, value, scale, before), sums, place)
