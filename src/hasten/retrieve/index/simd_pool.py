"""A sorted pool of (distance, item) that takes a new pair without a branch.

Where a pair belongs is different each time, so a loop that looks for its place is mispredicted nearly each time.
Sixteen places are compared and moved at once instead: ``new_i = old_i`` where ``old_i <= value``, else ``value`` where
``old_{i-1} <= value``, else ``old_{i-1}``.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

__all__ = ["WIDE", "first_bit", "insert"]

WIDE = 16
"""places of a pool are a multiple of this"""
_I16, _I32, _I64, _F32 = ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType()
_FLOATS, _INTS = ir.VectorType(_F32, WIDE), ir.VectorType(_I32, WIDE)
_SHIFT = ir.Constant(_INTS, [WIDE, *range(WIDE - 1)])


def _splat(builder: Any, scalar: Any) -> Any:
    kind = ir.VectorType(scalar.type, WIDE)
    one = builder.insert_element(ir.Constant(kind, ir.Undefined), scalar, ir.Constant(_I32, 0))
    return builder.shuffle_vector(one, ir.Constant(kind, ir.Undefined), ir.Constant(_INTS, [0] * WIDE))


@intrinsic
def insert(typing: Any, distances: Any, items: Any, chunks: Any, value: Any, item: Any) -> Any:
    """Put (value, item) into the pool at the addresses ``distances`` (float32, ascending) and ``items`` (int32) of
    ``chunks`` times 16 places; behind those that are as near, the last one falls out. Returns its place.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        at_d, at_i, count, value, item = arguments
        wide_d, wide_i = _splat(builder, value), _splat(builder, item)
        place = cgutils.alloca_once_value(builder, ir.Constant(_I64, 0))

        def chunk(offset: Any, last_d: Any, last_i: Any) -> None:
            where_d = builder.inttoptr(builder.add(at_d, offset), _FLOATS.as_pointer())
            where_i = builder.inttoptr(builder.add(at_i, offset), _INTS.as_pointer())
            old_d, old_i = builder.load(where_d, align=4), builder.load(where_i, align=4)
            before_d = builder.shuffle_vector(old_d, _splat(builder, last_d), _SHIFT)
            before_i = builder.shuffle_vector(old_i, _splat(builder, last_i), _SHIFT)
            stays = builder.fcmp_ordered("<=", old_d, wide_d)
            here = builder.fcmp_ordered("<=", before_d, wide_d)
            builder.store(builder.select(stays, old_d, builder.select(here, wide_d, before_d)), where_d, align=4)
            builder.store(builder.select(stays, old_i, builder.select(here, wide_i, before_i)), where_i, align=4)
            bits = builder.zext(builder.bitcast(stays, _I16), _I64)
            kind = ir.FunctionType(_I64, [_I64])
            ones = builder.call(cgutils.get_or_insert_function(builder.module, kind, "llvm.ctpop.i64"), [bits])
            builder.store(builder.add(builder.load(place), ones), place)

        six = ir.Constant(_I64, 6)
        more = builder.sub(count, ir.Constant(_I64, 1))
        with cgutils.for_range(builder, more, intp=_I64) as loop:  # from the back
            offset = builder.shl(builder.sub(more, loop.index), six)
            last = builder.sub(offset, ir.Constant(_I64, 4))
            last_d = builder.load(builder.inttoptr(builder.add(at_d, last), _F32.as_pointer()), align=4)
            last_i = builder.load(builder.inttoptr(builder.add(at_i, last), _I32.as_pointer()), align=4)
            chunk(offset, last_d, last_i)
        chunk(ir.Constant(_I64, 0), ir.Constant(_F32, float("-inf")), ir.Constant(_I32, 0))
        return builder.load(place)

    whole = types.int64
    return whole(whole, whole, whole, types.float32, types.int32), generate


@intrinsic
def first_bit(typing: Any, bits: Any) -> Any:
    """Number of the lowest bit that is set; 64 where there is none."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kind = ir.FunctionType(_I64, [_I64, ir.IntType(1)])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.cttz.i64")
        return builder.call(function, [arguments[0], ir.Constant(ir.IntType(1), 0)])

    return types.int64(types.int64), generate
