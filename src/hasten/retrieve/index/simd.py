"""Distances between a float32 query and stored rows, written as vector instructions.

The compiler does not vectorise a short reduction well (its remainder is scalar), so the loops are emitted here:
sixteen lanes, fused multiply-add, one masked step for what is left, four rows at a time so that four chains hide the
latency. Rows are float32, float16 (kept as uint16), uint8 or int8; they are named by address, so that they may lie in
a memory map.
"""

from __future__ import annotations

from typing import Any

import numba
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from hasten.retrieve.index.kernel import hot

__all__ = ["address_of", "dot1", "dot4", "load_f32", "load_i64", "load_u8", "prefetch", "squared1", "squared4", "widen"]

LANES = 16
_F32 = ir.FloatType()
_I64 = ir.IntType(64)
_V32 = ir.VectorType(_F32, LANES)


def _element(array: Any) -> tuple[ir.Type, bool]:
    """Stored type of the elements of a numba array type, and whether an integer is signed."""
    kind = array.dtype
    if kind == types.float32:
        return _F32, True
    if kind == types.uint16:  # float16 travels as its bits
        return ir.HalfType(), True
    if kind in (types.uint8, types.int8):
        return ir.IntType(8), kind == types.int8
    raise TypeError(f"rows of {kind} have no distance; use float32, uint16 (float16), uint8 or int8")


def _pointer(builder: Any, address: Any, kind: ir.Type) -> Any:
    return builder.inttoptr(address, kind.as_pointer())


def _lanes(builder: Any, address: Any, index: Any, element: ir.Type, signed: bool, mask: Any = None) -> Any:
    """Sixteen elements at ``address + index`` as float32 lanes; lanes outside ``mask`` are zero and not touched."""
    vector = ir.VectorType(element, LANES)
    size = {"float": 4, "half": 2, "i8": 1}[str(element)]
    place = builder.add(address, builder.mul(index, ir.Constant(_I64, size)))
    pointer = _pointer(builder, place, vector)
    if mask is None:
        raw = builder.load(pointer, align=size)
    else:
        suffix = {"float": "v16f32", "half": "v16f16", "i8": "v16i8"}[str(element)]
        mask_type = ir.VectorType(ir.IntType(1), LANES)
        kind = ir.FunctionType(vector, [vector.as_pointer(), ir.IntType(32), mask_type, vector])
        load = cgutils.get_or_insert_function(builder.module, kind, f"llvm.masked.load.{suffix}.p0")
        raw = builder.call(load, [pointer, ir.Constant(ir.IntType(32), size), mask, ir.Constant(vector, None)])
    if str(element) == "float":
        return raw
    if str(element) == "half":
        return builder.fpext(raw, _V32)
    wide = (builder.sext if signed else builder.zext)(raw, ir.VectorType(ir.IntType(32), LANES))
    return builder.sitofp(wide, _V32)


def _first_lanes(builder: Any, count: Any) -> Any:
    """Mask of the lanes below ``count``."""
    i32 = ir.IntType(32)
    vector = ir.VectorType(i32, LANES)
    first = ir.Constant(vector, ir.Undefined)
    first = builder.insert_element(first, builder.trunc(count, i32), ir.Constant(i32, 0))
    limit = builder.shuffle_vector(first, first, ir.Constant(vector, [0] * LANES))
    return builder.icmp_signed("<", ir.Constant(vector, list(range(LANES))), limit)


def _emit(builder: Any, element: ir.Type, signed: bool, query: Any, rows: list[Any], width: Any, squares: bool) -> Any:
    """Sums over the width for one row or four; returns a scalar or a vector of four."""
    fma_type = ir.FunctionType(_V32, [_V32, _V32, _V32])
    fma = cgutils.get_or_insert_function(builder.module, fma_type, "llvm.fmuladd.v16f32")
    zero = ir.Constant(_V32, [0.0] * LANES)
    sums = [cgutils.alloca_once_value(builder, zero) for _ in rows]

    def step(index: Any, mask: Any) -> None:
        left = _lanes(builder, query, index, _F32, True, mask)
        for row, total in zip(rows, sums, strict=True):
            right = _lanes(builder, row, index, element, signed, mask)
            other = left
            if squares:
                right = other = builder.fsub(right, left)
            builder.store(builder.call(fma, [other, right, builder.load(total)]), total)

    whole = builder.lshr(width, ir.Constant(_I64, 4))
    with cgutils.for_range(builder, whole, intp=_I64) as loop:
        step(builder.shl(loop.index, ir.Constant(_I64, 4)), None)
    done = builder.shl(whole, ir.Constant(_I64, 4))
    rest = builder.sub(width, done)
    with builder.if_then(builder.icmp_unsigned("!=", rest, ir.Constant(_I64, 0))):
        step(done, _first_lanes(builder, rest))
    if len(sums) == 4:
        return four_sums(builder, [builder.load(t) for t in sums], builder.fadd)
    one = builder.load(sums[0])  # in the same order, so that a row has one distance whoever asks
    return builder.extract_element(four_sums(builder, [one] * 4, builder.fadd), ir.Constant(ir.IntType(32), 0))


def four_sums(builder: Any, vectors: list[Any], add: Any) -> Any:
    """The sums of four vectors of sixteen lanes, as a vector of four; a third of the instructions of four sums."""
    i32 = ir.IntType(32)

    def shuffled(a: Any, b: Any, lanes: list[int]) -> Any:
        return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(i32, len(lanes)), lanes))

    def halves(a: Any, b: Any, low: list[int], high: list[int]) -> Any:
        return add(shuffled(a, b, low), shuffled(a, b, high))

    # within each quarter: a0 b0 a1 b1 and a2 b2 a3 b3
    first = [q + i + LANES * side for q in (0, 4, 8, 12) for i in (0, 1) for side in (0, 1)]
    second = [lane + 2 for lane in first]
    ab = halves(vectors[0], vectors[1], first, second)
    cd = halves(vectors[2], vectors[3], first, second)
    # a b c d from the pairs of each quarter
    low = [q + i + LANES * side for q in (0, 4, 8, 12) for side in (0, 1) for i in (0, 1)]
    high = [lane + 2 for lane in low]
    quarters = halves(ab, cd, low, high)
    none = ir.Constant(quarters.type, ir.Undefined)
    eight = add(shuffled(quarters, none, list(range(8))), shuffled(quarters, none, list(range(8, 16))))
    none = ir.Constant(eight.type, ir.Undefined)
    return add(shuffled(eight, none, [0, 1, 2, 3]), shuffled(eight, none, [4, 5, 6, 7]))


def _function(builder: Any, element: ir.Type, signed: bool, count: int, squares: bool) -> Any:
    """The kernel as a function of its own, once per module: many call sites share it, which keeps compiling quick."""
    kind = {"float": "f32", "half": "f16", "i8": "i8" if signed else "u8"}[str(element)]
    name = f"hasten_{'squared' if squares else 'dot'}{count}_{kind}"
    module = builder.module
    if name in module.globals:
        return module.globals[name]
    result = ir.VectorType(_F32, 4) if count == 4 else _F32
    function = ir.Function(module, ir.FunctionType(result, [_I64] * (count + 2)), name)
    function.linkage = "internal"
    function.attributes.add("noinline")
    inner = ir.IRBuilder(function.append_basic_block("entry"))
    query, *rows, width = function.args
    inner.ret(_emit(inner, element, signed, query, rows, width, squares))
    return function


def _single(squares: bool) -> Any:
    def typed(typing: Any, sample: Any, query: Any, row: Any, width: Any) -> Any:
        element, signed = _element(sample)

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return builder.call(_function(builder, element, signed, 1, squares), arguments[1:])

        return types.float32(sample, types.int64, types.int64, types.int64), generate

    return typed


def _quadruple(squares: bool) -> Any:
    def typed(typing: Any, sample: Any, query: Any, a: Any, b: Any, c: Any, d: Any, width: Any) -> Any:
        element, signed = _element(sample)
        result = types.UniTuple(types.float32, 4)

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            packed = builder.call(_function(builder, element, signed, 4, squares), arguments[1:])
            place = [ir.Constant(ir.IntType(32), i) for i in range(4)]
            return cgutils.pack_array(builder, [builder.extract_element(packed, p) for p in place])

        return result(sample, *([types.int64] * 6)), generate

    return typed


squared1 = intrinsic(_single(True))
"""``squared1(sample, query, row, width)``: sum of squared differences; query and row are addresses."""
dot1 = intrinsic(_single(False))
"""``dot1(sample, query, row, width)``: inner product."""
squared4 = intrinsic(_quadruple(True))
"""``squared4(sample, query, a, b, c, d, width)``: four rows at once, a tuple of four."""
dot4 = intrinsic(_quadruple(False))
"""``dot4(sample, query, a, b, c, d, width)``: four rows at once, a tuple of four."""


@intrinsic
def prefetch(typing: Any, address: Any) -> Any:
    """Ask for the cache line at ``address``; an address that is not mapped does no harm."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        i32 = ir.IntType(32)
        byte = ir.IntType(8).as_pointer()
        kind = ir.FunctionType(ir.VoidType(), [byte, i32, i32, i32])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        place = builder.inttoptr(arguments[0], byte)
        builder.call(function, [place, ir.Constant(i32, 0), ir.Constant(i32, 3), ir.Constant(i32, 1)])
        return context.get_dummy_value()

    return types.void(types.int64), generate


def _loader(kind: Any, ir_kind: ir.Type) -> Any:
    def typed(typing: Any, address: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return builder.load(_pointer(builder, arguments[0], ir_kind), align=1)

        return kind(types.int64), generate

    return intrinsic(typed)


load_f32 = _loader(numba.float32, _F32)
"""The float32 at an address."""
load_u8 = _loader(numba.uint8, ir.IntType(8))
"""The byte at an address."""
load_i64 = _loader(numba.int64, _I64)
"""The 64-bit integer at an address."""


@intrinsic
def widen(typing: Any, sample: Any, row: Any, out: Any, width: Any) -> Any:
    """Write a stored row as float32 to the address ``out``; whole groups of 16 are written, the rest with zeros."""
    element, signed = _element(sample)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _, source, target, count = arguments
        four = ir.Constant(_I64, 4)

        def step(index: Any, mask: Any) -> None:
            place = _pointer(builder, builder.add(target, builder.mul(index, four)), _V32)
            builder.store(_lanes(builder, source, index, element, signed, mask), place, align=4)

        whole = builder.lshr(count, four)
        with cgutils.for_range(builder, whole, intp=_I64) as loop:
            step(builder.shl(loop.index, four), None)
        done = builder.shl(whole, four)
        rest = builder.sub(count, done)
        with builder.if_then(builder.icmp_unsigned("!=", rest, ir.Constant(_I64, 0))):
            step(done, _first_lanes(builder, rest))
        return context.get_dummy_value()

    return types.void(sample, types.int64, types.int64, types.int64), generate


@hot
def address_of(array: Any) -> int:
    """Address of the first element."""
    return numba.int64(array.ctypes.data)
