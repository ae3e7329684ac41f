"""Distances between bytes, in whole numbers: sixteen or thirty-two at a time where the processor can.

``bytes1`` and ``bytes4`` sum squared differences of byte rows and a query of 16-bit numbers: exact. ``sift`` looks at
sixteen rows of a coded list at once (see ``codes``): their codes lie four dimensions by sixteen rows, so that
``vpdpbusd`` adds a row's products in a row's own lane and nothing is summed across lanes. ``centre`` codes the
difference of a query and a head. Without AVX-512 VNNI the same sums are written as plain vector operations.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from hasten.retrieve.index.simd import four_sums

__all__ = ["bytes1", "bytes4", "centre", "sift"]

_I8, _I16, _I32, _I64, _F32 = (ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType())
_INTS, _FLOATS = ir.VectorType(_I32, 16), ir.VectorType(_F32, 16)
_FAST = ("reassoc", "nsz", "contract")

llvm.initialize_native_asmparser()


@lru_cache(maxsize=1)
def _vnni() -> bool:
    return bool(dict(llvm.get_host_cpu_features()).get("avx512vnni", False))


def _at(builder: Any, address: Any, kind: ir.Type, align: int = 1) -> Any:
    return builder.load(builder.inttoptr(address, kind.as_pointer()), align=align)


def _number(value: int) -> ir.Constant:
    return ir.Constant(_I64, value)


def _splat(builder: Any, scalar: Any) -> Any:
    kind = ir.VectorType(scalar.type, 16)
    one = builder.insert_element(ir.Constant(kind, ir.Undefined), scalar, ir.Constant(_I32, 0))
    return builder.shuffle_vector(one, ir.Constant(kind, ir.Undefined), ir.Constant(ir.VectorType(_I32, 16), [0] * 16))


def _call(builder: Any, name: str, kind: ir.Type, arguments: list[Any], **more: Any) -> Any:
    signature = ir.FunctionType(kind, [a.type for a in arguments])
    return builder.call(cgutils.get_or_insert_function(builder.module, signature, name), arguments, **more)


def _private(builder: Any, name: str, result: ir.Type, arguments: list[ir.Type], body: Any) -> Any:
    """A function of its own per module, which many call sites share; ``body(builder, *arguments)`` gives its value."""
    module = builder.module
    if name in module.globals:
        return module.globals[name]
    function = ir.Function(module, ir.FunctionType(result, arguments), name)
    function.linkage = "internal"
    function.attributes.add("noinline")
    inner = ir.IRBuilder(function.append_basic_block("entry"))
    inner.ret(body(inner, *function.args))
    return function


def _pairs(builder: Any, total: Any, words: Any) -> Any:
    """``total`` (16 int32) plus the squares of 32 int16, two to a lane."""
    if _vnni():
        both = builder.bitcast(words, _INTS)
        kind = ir.FunctionType(_INTS, [_INTS] * 3)
        return builder.call(ir.InlineAsm(kind, "vpdpwssd $3, $2, $0", "=v,0,v,v"), [total, both, both])
    wide = builder.sext(words, ir.VectorType(_I32, 32))
    square = builder.mul(wide, wide)
    for first in (0, 16):
        lanes = ir.Constant(ir.VectorType(_I32, 16), list(range(first, first + 16)))
        total = builder.add(total, builder.shuffle_vector(square, ir.Constant(square.type, ir.Undefined), lanes))
    return total


def _bytes_body(builder: Any, query: Any, *rest: Any) -> Any:
    *rows, width = rest
    sums = [cgutils.alloca_once_value(builder, ir.Constant(_INTS, [0] * 16)) for _ in rows]
    narrow, wide = ir.VectorType(_I8, 32), ir.VectorType(_I16, 32)

    def step(index: Any, mask: Any) -> None:
        left = _at(builder, builder.add(query, builder.shl(index, _number(1))), wide, 2)
        for row, total in zip(rows, sums, strict=True):
            place = builder.add(row, index)
            if mask is None:
                raw = _at(builder, place, narrow)
            else:
                pointer = builder.inttoptr(place, narrow.as_pointer())
                nothing = ir.Constant(narrow, [0] * 32)
                raw = _call(
                    builder, "llvm.masked.load.v32i8.p0", narrow, [pointer, ir.Constant(_I32, 1), mask, nothing]
                )
            difference = builder.sub(builder.zext(raw, wide), left)
            builder.store(_pairs(builder, builder.load(total), difference), total)

    whole = builder.lshr(width, _number(5))
    with cgutils.for_range(builder, whole, intp=_I64) as loop:
        step(builder.shl(loop.index, _number(5)), None)
    done = builder.shl(whole, _number(5))
    left = builder.sub(width, done)
    with builder.if_then(builder.icmp_unsigned("!=", left, _number(0))):
        vector = ir.VectorType(_I32, 32)
        one = builder.insert_element(ir.Constant(vector, ir.Undefined), builder.trunc(left, _I32), ir.Constant(_I32, 0))
        limit = builder.shuffle_vector(one, one, ir.Constant(vector, [0] * 32))
        step(done, builder.icmp_signed("<", ir.Constant(vector, list(range(32))), limit))
    if len(sums) == 1:
        total = _call(builder, "llvm.vector.reduce.add.v16i32", _I32, [builder.load(sums[0])])
        return builder.sitofp(total, _F32)
    return builder.sitofp(four_sums(builder, [builder.load(t) for t in sums], builder.add), ir.VectorType(_F32, 4))


@intrinsic
def bytes1(typing: Any, query: Any, row: Any, width: Any) -> Any:
    """Sum of squared differences of a row of bytes and a query of int16 that is padded to 32 with zeros."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.call(_private(builder, "hasten_bytes1", _F32, [_I64] * 3, _bytes_body), arguments)

    return types.float32(types.int64, types.int64, types.int64), generate


@intrinsic
def bytes4(typing: Any, query: Any, a: Any, b: Any, c: Any, d: Any, width: Any) -> Any:
    """Four rows at once, a tuple of four."""
    result = types.UniTuple(types.float32, 4)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kind = ir.VectorType(_F32, 4)
        packed = builder.call(_private(builder, "hasten_bytes4", kind, [_I64] * 6, _bytes_body), arguments)
        return cgutils.pack_array(builder, [builder.extract_element(packed, ir.Constant(_I32, i)) for i in range(4)])

    return result(*([types.int64] * 6)), generate


def _quad(builder: Any, total: Any, codes: Any, words: Any) -> Any:
    """``total`` plus four products of an unsigned and a signed byte in each lane."""
    if _vnni():
        kind = ir.FunctionType(_INTS, [_INTS] * 3)
        return builder.call(ir.InlineAsm(kind, "vpdpbusd $3, $2, $0", "=v,0,v,v"), [total, codes, words])
    for shift in (0, 8, 16, 24):
        code = builder.and_(builder.lshr(codes, ir.Constant(_INTS, [shift] * 16)), ir.Constant(_INTS, [255] * 16))
        word = builder.ashr(builder.shl(words, ir.Constant(_INTS, [24 - shift] * 16)), ir.Constant(_INTS, [24] * 16))
        total = builder.add(total, builder.mul(code, word))
    return total


def _sift_body(builder: Any, block: Any, query: Any, steps: Any, base: Any, slope: Any, limit: Any, ahead: Any) -> Any:
    """Steps are taken four at a time (the query is padded), so that four sums hide the latency. Each step asks for one
    line of what comes later: a processor has a few such requests under way at most, and a burst of them stops it.
    """
    zero = ir.Constant(_INTS, [0] * 16)
    sums = [cgutils.alloca_once_value(builder, zero) for _ in range(4)]
    codes = builder.add(block, _number(64))

    def ask(place: Any) -> None:
        byte = _I8.as_pointer()
        where = builder.inttoptr(place, byte)
        kind = ir.FunctionType(ir.VoidType(), [byte, _I32, _I32, _I32])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        builder.call(function, [where, ir.Constant(_I32, 0), ir.Constant(_I32, 3), ir.Constant(_I32, 1)])

    ask(ahead)

    def step(index: Any, total: Any) -> None:
        ask(builder.add(builder.add(ahead, _number(64)), builder.shl(index, _number(6))))
        code = _at(builder, builder.add(codes, builder.shl(index, _number(6))), _INTS, 4)
        word = _splat(builder, _at(builder, builder.add(query, builder.shl(index, _number(2))), _I32, 4))
        builder.store(_quad(builder, builder.load(total), code, word), total)

    fours = builder.lshr(steps, _number(2))
    with cgutils.for_range(builder, fours, intp=_I64) as loop:
        first = builder.shl(loop.index, _number(2))
        for turn in range(4):
            step(builder.add(first, _number(turn)), sums[turn])
    done = builder.shl(fours, _number(2))
    with cgutils.for_range(builder, builder.sub(steps, done), intp=_I64) as loop:
        step(builder.add(done, loop.index), sums[0])
    total = builder.load(sums[0])
    for other in sums[1:]:
        total = builder.add(total, builder.load(other))
    norms = _at(builder, block, _FLOATS, 4)
    dots = builder.sitofp(total, _FLOATS)
    value = builder.fsub(builder.fadd(norms, _splat(builder, base)), builder.fmul(dots, _splat(builder, slope)))
    passed = builder.fcmp_ordered("<=", value, _splat(builder, limit))
    return builder.zext(builder.bitcast(passed, _I16), _I64)


@intrinsic
def sift(typing: Any, block: Any, query: Any, steps: Any, base: Any, slope: Any, limit: Any, ahead: Any) -> Any:
    """Which of sixteen coded rows may be near: bit ``r`` says norm_r + base - slope * <code_r, query> <= limit.

    ``block`` is the address of 16 norms (float32) and ``steps`` times 16 words of four codes; ``query`` that of
    ``4 * steps`` signed bytes. As many lines are asked for from ``ahead`` on.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kinds = [_I64, _I64, _I64, _F32, _F32, _F32, _I64]
        return builder.call(_private(builder, "hasten_sift", _I64, kinds, _sift_body), arguments)

    whole, real = types.int64, types.float32
    return whole(whole, whole, whole, real, real, real, whole), generate


def _centre_body(builder: Any, query: Any, head: Any, out: Any, lanes: Any) -> Any:
    """(step, squared error, sum of the codes, squared length) of query - head, coded as ``lanes`` signed bytes."""
    zero, one = ir.Constant(_FLOATS, [0.0] * 16), ir.Constant(_F32, 1.0)
    whole = builder.lshr(lanes, _number(4))
    high = cgutils.alloca_once_value(builder, zero)
    length = cgutils.alloca_once_value(builder, zero)

    def difference(index: Any) -> Any:
        place = builder.shl(index, _number(6))
        left = _at(builder, builder.add(query, place), _FLOATS, 4)
        return builder.fsub(left, _at(builder, builder.add(head, place), _FLOATS, 4))

    with cgutils.for_range(builder, whole, intp=_I64) as loop:
        gap = difference(loop.index)
        size = _call(builder, "llvm.fabs.v16f32", _FLOATS, [gap])
        builder.store(_call(builder, "llvm.maxnum.v16f32", _FLOATS, [size, builder.load(high)]), high)
        builder.store(_call(builder, "llvm.fmuladd.v16f32", _FLOATS, [gap, gap, builder.load(length)]), length)
    top = _call(builder, "llvm.vector.reduce.fmax.v16f32", _F32, [builder.load(high)], fastmath=("nnan", "nsz"))
    tiny = ir.Constant(_F32, 2.0**-100)
    top = builder.select(builder.fcmp_ordered(">", top, tiny), top, tiny)
    unit = builder.fmul(top, ir.Constant(_F32, 0.007874015718698502))  # 1 / 127
    inverse = _splat(builder, builder.fdiv(one, unit))
    wide = _splat(builder, unit)
    error = cgutils.alloca_once_value(builder, zero)
    total = cgutils.alloca_once_value(builder, ir.Constant(_INTS, [0] * 16))
    with cgutils.for_range(builder, whole, intp=_I64) as loop:
        gap = difference(loop.index)
        near = _call(builder, "llvm.rint.v16f32", _FLOATS, [builder.fmul(gap, inverse)])
        miss = builder.fsub(gap, builder.fmul(near, wide))
        builder.store(_call(builder, "llvm.fmuladd.v16f32", _FLOATS, [miss, miss, builder.load(error)]), error)
        code = builder.fptosi(near, _INTS)
        builder.store(builder.add(builder.load(total), code), total)
        target = builder.inttoptr(
            builder.add(out, builder.shl(loop.index, _number(4))), ir.VectorType(_I8, 16).as_pointer()
        )
        builder.store(builder.trunc(code, ir.VectorType(_I8, 16)), target, align=1)
    none = ir.Constant(_F32, -0.0)
    values = [
        unit,
        _call(builder, "llvm.vector.reduce.fadd.v16f32", _F32, [none, builder.load(error)], fastmath=_FAST),
        builder.sitofp(_call(builder, "llvm.vector.reduce.add.v16i32", _I32, [builder.load(total)]), _F32),
        _call(builder, "llvm.vector.reduce.fadd.v16f32", _F32, [none, builder.load(length)], fastmath=_FAST),
    ]
    packed: Any = ir.Constant(ir.VectorType(_F32, 4), ir.Undefined)
    for i, value in enumerate(values):
        packed = builder.insert_element(packed, value, ir.Constant(_I32, i))
    return packed


@intrinsic
def centre(typing: Any, query: Any, head: Any, out: Any, lanes: Any) -> Any:
    """Code query - head (``lanes`` float32, a multiple of 16) as signed bytes at ``out``.

    Returns (step, squared error, sum of the codes, squared length of the difference).
    """
    result = types.UniTuple(types.float32, 4)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kind = ir.VectorType(_F32, 4)
        packed = builder.call(_private(builder, "hasten_centre", kind, [_I64] * 4, _centre_body), arguments)
        return cgutils.pack_array(builder, [builder.extract_element(packed, ir.Constant(_I32, i)) for i in range(4)])

    return result(*([types.int64] * 4)), generate
