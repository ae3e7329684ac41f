"""Asymmetric numeral systems in sixteen lanes of AVX-512: the steps of :mod:`rans` for a run of tokens.

A lane is a channel with a state and a table of its own; up to four registers of lanes go together, so that the long
way through two table look-ups is walked for 64 symbols at once. Lanes that have to give up (or take) sixteen bits do so
in their order, packed by the compress and expand instructions. The bytes are those of the plain twin in :mod:`rans`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from hasten.nn.product import instructions as avx
from hasten.nn.product.blocks import LINE

__all__ = ["BITS", "LOW", "REGISTERS", "decode_run", "encode_run", "has_lanes"]

BITS = 12
"""Frequencies of a table add up to ``2**BITS``."""
LOW = 1 << 16
"""States are kept at this or above, and below ``2**32``."""
REGISTERS = 4
"""Registers of lanes that go together."""
_WORD = ir.IntType(64)
_Generate = Callable[[Any, Any, Any, Any], Any]
# Plain functions call these; a type checker knows the intrinsics by their own parameters only.
_intrinsic: Callable[[Callable[..., Any]], Any] = intrinsic
_INT = ir.IntType(32)
_MASK = ir.IntType(16)
_SHORTS = ir.VectorType(ir.IntType(16), avx.LANES)
_BYTES = ir.VectorType(ir.IntType(8), avx.LANES)


@lru_cache(maxsize=1)
def has_lanes() -> bool:
    """Whether this processor has what the steps need."""
    features = dict(llvm.get_host_cpu_features())
    return all(features.get(name, False) for name in ("avx512f", "avx512dq", "avx512bw"))


def _ints(value: int) -> Any:
    return ir.Constant(avx.INTS, [value] * avx.LANES)


def _gather(builder: Any, base: Any, index: Any, scale: int) -> Any:
    """Sixteen words at ``base + scale * index``; the instruction wants a mask, which it uses up."""
    kind = ir.FunctionType(avx.INTS, [_WORD, avx.INTS])
    text = f"kxnorw %k1, %k1, %k1; vpgatherdd ($1,$2,{scale}), $0 {{%k1}}"
    code = ir.InlineAsm(kind, text, "=&v,r,v,~{k1},~{memory}", side_effect=True)
    return builder.call(code, [base, index])


def _packed(builder: Any, name: str, values: Any, mask: Any) -> Any:
    """``vpcompressd``: the lanes of the mask to the front; ``vpexpandd``: from the front to the lanes of the mask."""
    kind = ir.FunctionType(avx.INTS, [avx.INTS, _MASK])
    return builder.call(ir.InlineAsm(kind, f"{name} $1, $0 {{$2}} {{z}}", "=v,v,^Yk"), [values, mask])


def _two_bytes_each(builder: Any, mask: Any) -> Any:
    """Bytes that the lanes of a mask exchange."""
    kind = ir.FunctionType(_MASK, [_MASK])
    code: Any = cgutils.get_or_insert_function(builder.module, kind, "llvm.ctpop.i16")  # type: ignore[no-untyped-call]
    count = builder.call(code, [mask])
    return builder.shl(builder.zext(count, _WORD), ir.Constant(_WORD, 1))


def _places(builder: Any, states: Any, registers: int) -> list[Any]:
    places = []
    for v in range(registers):
        place: Any = cgutils.alloca_once(builder, avx.INTS)  # type: ignore[no-untyped-call]
        builder.store(avx.load(builder, states, v * LINE, avx.INTS), place)
        places.append(place)
    return places


def _encoder(registers: int) -> _Generate:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        count, states, words, tables, offsets, symbols, stride = arguments
        places = _places(builder, states, registers)
        bases = [avx.load(builder, offsets, v * LINE, avx.INTS) for v in range(registers)]
        at: Any = cgutils.alloca_once_value(builder, words)  # type: ignore[no-untyped-call]
        one = ir.Constant(_WORD, 1)
        with cgutils.for_range(builder, count) as loop:
            line = builder.add(symbols, builder.mul(builder.sub(builder.sub(count, one), loop.index), stride))
            for v in reversed(range(registers)):
                codes = builder.zext(avx.load(builder, line, v * avx.LANES, _BYTES, 1), avx.INTS)
                both = _gather(builder, tables, builder.add(bases[v], codes), 4)
                often, start = builder.lshr(both, _ints(16)), builder.and_(both, _ints(0xFFFF))
                state = builder.load(places[v])
                full = builder.icmp_unsigned(">=", builder.lshr(state, _ints(32 - BITS)), often)
                mask = builder.bitcast(full, _MASK)
                low = builder.trunc(_packed(builder, "vpcompressd", state, mask), _SHORTS)
                here = builder.load(at)
                avx.store(builder, low, here, 0, 2)
                builder.store(builder.add(here, _two_bytes_each(builder, mask)), at)
                state = builder.select(full, builder.lshr(state, _ints(16)), state)
                # The quotient is below 2**20, so that of the rounded floats is off by one at most.
                share = builder.fdiv(builder.uitofp(state, avx.FLOATS), builder.uitofp(often, avx.FLOATS))
                quotient = builder.fptosi(share, avx.INTS)
                rest = builder.sub(state, builder.mul(quotient, often))
                under = builder.icmp_signed("<", rest, _ints(0))
                quotient = builder.select(under, builder.sub(quotient, _ints(1)), quotient)
                rest = builder.select(under, builder.add(rest, often), rest)
                over = builder.icmp_signed(">=", rest, often)
                quotient = builder.select(over, builder.add(quotient, _ints(1)), quotient)
                rest = builder.select(over, builder.sub(rest, often), rest)
                builder.store(builder.add(builder.shl(quotient, _ints(BITS)), builder.add(rest, start)), places[v])
        for v in range(registers):
            avx.store(builder, builder.load(places[v]), states, v * LINE)
        return builder.load(at)

    return generate


def _decoder(registers: int) -> _Generate:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        count, states, words, tables, offsets, slots, symbols, stride = arguments
        places = _places(builder, states, registers)
        bases = [avx.load(builder, offsets, v * LINE, avx.INTS) for v in range(registers)]
        at: Any = cgutils.alloca_once_value(builder, words)  # type: ignore[no-untyped-call]
        with cgutils.for_range(builder, count) as loop:
            line = builder.add(symbols, builder.mul(loop.index, stride))
            for v in range(registers):
                state = builder.load(places[v])
                slot = builder.and_(state, _ints((1 << BITS) - 1))
                lanes = ir.Constant(avx.INTS, [(v * avx.LANES + lane) << BITS for lane in range(avx.LANES)])
                codes = builder.and_(_gather(builder, slots, builder.add(slot, lanes), 1), _ints(255))
                avx.store(builder, builder.trunc(codes, _BYTES), line, v * avx.LANES, 1)
                both = _gather(builder, tables, builder.add(bases[v], codes), 4)
                often, start = builder.lshr(both, _ints(16)), builder.and_(both, _ints(0xFFFF))
                state = builder.add(builder.mul(often, builder.lshr(state, _ints(BITS))), builder.sub(slot, start))
                empty = builder.icmp_unsigned("<", state, _ints(LOW))
                mask = builder.bitcast(empty, _MASK)
                here = builder.sub(builder.load(at), _two_bytes_each(builder, mask))
                builder.store(here, at)
                more = builder.zext(avx.load(builder, here, 0, _SHORTS, 2), avx.INTS)
                more = _packed(builder, "vpexpandd", more, mask)
                longer = builder.or_(builder.shl(state, _ints(16)), more)
                builder.store(builder.select(empty, longer, state), places[v])
        for v in range(registers):
            avx.store(builder, builder.load(places[v]), states, v * LINE)
        return builder.load(at)

    return generate


def _chosen(builder: Any, context: Any, signature: Any, arguments: Any, make: Callable[[int], _Generate]) -> Any:
    """The code for as many registers as the first argument says."""
    out: Any = cgutils.alloca_once_value(builder, ir.Constant(_WORD, 0))  # type: ignore[no-untyped-call]
    for registers in range(1, REGISTERS + 1):
        with builder.if_then(builder.icmp_signed("==", arguments[0], ir.Constant(_WORD, registers))):
            builder.store(make(registers)(context, builder, signature, arguments[1:]), out)
    return builder.load(out)


@_intrinsic
def encode_run(
    typing: Any, registers: Any, count: Any, states: Any, words: Any, tables: Any, offsets: Any, symbols: Any,
    stride: Any,
) -> Any:  # fmt: skip
    """Encode ``count`` tokens, the last first, and return where the next words go.

    Addresses: states (64,) uint32, words to write, tables (n, 256) uint32 of frequency and start, offsets (64,) int32
    of each lane's table in words, symbols (count, ``stride``) uint8.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return _chosen(builder, context, signature, arguments, _encoder)

    return types.intp(*[types.intp] * 8), generate


@_intrinsic
def decode_run(
    typing: Any, registers: Any, count: Any, states: Any, words: Any, tables: Any, offsets: Any, slots: Any,
    symbols: Any, stride: Any,
) -> Any:  # fmt: skip
    """The inverse of :func:`encode_run`: reads words from ``words`` downwards and returns where it stopped.

    ``slots`` (64, 4096) uint8: the symbol of each slot, lane by lane, four bytes longer.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return _chosen(builder, context, signature, arguments, _decoder)

    return types.intp(*[types.intp] * 9), generate
