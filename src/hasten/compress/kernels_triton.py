"""Products of a few rows with codes on a GPU: each byte of the weight is read once, and opened in registers.

Up to some tens of rows ``x Wᵀ`` costs the bytes of W, so the bound is ``bytes of codes / bandwidth`` and what counts is
how many bytes are under way. One row is multiplied and added in float32; more go through the matrix units with the
weight on the left, ``W xᵀ``, where the opened codes stay in registers. The inputs are cut into ``splits`` so that every
multiprocessor has work; the program that ends last adds the parts in their order, so a result does not depend on who
that was. :func:`hasten.compress.device_codes.opened` is the twin of the tests, which run these kernels under Triton's
interpreter.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from hasten.compress.device_codes import Codes, codes_in
from hasten.compress.packed import Packed

try:
    import triton
    import triton.language as tl
except ImportError:  # optional: comes with torch's CUDA builds
    triton = None

__all__ = [
    "Tiling",
    "by_bytes",
    "by_opening",
    "by_row",
    "by_tiles",
    "cut_of_bytes",
    "open_codes",
    "round_rows",
    "tiling",
    "triton",
]

if triton is not None:
    _UNFOLD = tl.constexpr(
        "{ .reg .b32 low, high; and.b32 low, $8, 0x0F0F0F0F; shr.u32 high, $8, 4; and.b32 high, high, 0x0F0F0F0F;"
        + "".join(f" prmt.b32 ${i}, low, 0x4300, 0x5{i}44;" for i in range(4))
        + "".join(f" prmt.b32 ${4 + i}, high, 0x4300, 0x5{i}44;" for i in range(4))
        + " }"
    )
    """four bytes at a time: a half lands behind the bits of 128 with one instruction"""

    @triton.jit  # type: ignore[untyped-decorator]
    def _halves(both, fast: tl.constexpr):  # type: ignore[no-untyped-def]
        """136 + the codes in the low and high halves of bytes, as float32: the bits of 128 with a half behind them."""
        if fast:
            low, high = tl.inline_asm_elementwise(
                _UNFOLD, "=r,=r,=r,=r,=r,=r,=r,=r,r", [both], dtype=(tl.float32, tl.float32), is_pure=True, pack=4
            )
        else:  # the same for the interpreter
            low = ((both.to(tl.int32) & 0x0F) << 16 | 0x43000000).to(tl.float32, bitcast=True)
            high = ((both.to(tl.int32) & 0xF0) << 12 | 0x43000000).to(tl.float32, bitcast=True)
        return low, high

    @triton.jit(do_not_specialize=["groups"])  # type: ignore[untyped-decorator]
    def _row_kernel(  # type: ignore[no-untyped-def]
        x, codes, scales, zeros, bias, out, outs, inner, line, groups, x_stride,
        block: tl.constexpr, width: tl.constexpr, group: tl.constexpr, four: tl.constexpr, affine: tl.constexpr,
        biased: tl.constexpr, even: tl.constexpr, stages: tl.constexpr, fast: tl.constexpr,
    ):  # fmt: skip
        n = tl.program_id(0) * block + tl.arange(0, block)
        row = tl.program_id(1).to(tl.int64)
        own = tl.minimum(n, outs - 1).to(tl.int64)
        parts: tl.constexpr = width // 16
        each: tl.constexpr = 32 if four else 16  # inputs of 16 bytes
        if group:
            acc = tl.zeros([block, parts], tl.float32)
        else:
            acc = tl.zeros([block, width], tl.float32)
            whole = tl.zeros([width], tl.float32)
        for begin in tl.range(0, line, width, num_stages=stages):
            at = begin + tl.arange(0, width)
            where = codes + own[:, None] * line + at[None, :]
            raw = tl.load(where) if even else tl.load(where, mask=(at < line)[None, :], other=0.0)
            if four:
                k = at // 16 * 32 + at % 16
                first = x + row * x_stride + k
                one = (tl.load(first) if even else tl.load(first, mask=k < inner, other=0.0)).to(tl.float32)
                two = (tl.load(first + 16) if even else tl.load(first + 16, mask=k + 16 < inner, other=0.0)).to(
                    tl.float32
                )
                low, high = _halves(raw, fast)
                product = low * one[None, :] + high * two[None, :]
                given = one + two
            else:
                first = x + row * x_stride + at
                given = (tl.load(first) if even else tl.load(first, mask=at < inner, other=0.0)).to(tl.float32)
                product = raw.to(tl.float32) * given[None, :]
            if group:
                part = tl.sum(tl.reshape(product, [block, parts, 16]), 2)
                number = tl.minimum((begin // 16 + tl.arange(0, parts)) * each // group, groups - 1)
                place = own[:, None] * groups + number[None, :]
                if four or affine:
                    sums = tl.sum(tl.reshape(given, [parts, 16]), 1)[None, :]
                    if affine:
                        part -= (tl.load(zeros + place) + (136.0 if four else 0.0)) * sums
                    else:
                        part -= 136.0 * sums
                acc += part * tl.load(scales + place).to(tl.float32)
            else:
                acc += product
                if four:
                    whole += given
        result = tl.sum(acc, 1)
        if group == 0:
            if four:
                result -= 136.0 * tl.sum(whole, 0)
            result *= tl.load(scales + own).to(tl.float32)
        if biased:
            result += tl.load(bias + own).to(tl.float32)
        tl.store(out + row * outs + n, result.to(out.dtype.element_ty), mask=n < outs)

    @triton.jit  # type: ignore[untyped-decorator]
    def _scaled(value, scale, offset, block: tl.constexpr, width: tl.constexpr):  # type: ignore[no-untyped-def]
        """(block, width) float32 times a scale and plus an offset for each 16 of them."""
        apart = tl.reshape(value, [block, width // 16, 16])
        return tl.reshape(apart * scale[:, :, None] + offset[:, :, None], [block, width])

    @triton.jit  # type: ignore[untyped-decorator]
    def _finish(acc, out, bias, m, n, own, rows, outs, biased: tl.constexpr):  # type: ignore[no-untyped-def]
        if biased:
            acc += tl.load(bias + own).to(tl.float32)[:, None]
        inside = (m[None, :] < rows) & (n[:, None] < outs)
        where = out + m[None, :].to(tl.int64) * outs + n[:, None]
        tl.store(where, acc.to(out.dtype.element_ty), mask=inside)

    @triton.jit(do_not_specialize=["rows", "groups", "splits"])  # type: ignore[untyped-decorator]
    def _tile_kernel(  # type: ignore[no-untyped-def]
        x, codes, scales, zeros, bias, out, scratch, counters, rows, outs, inner, line, groups, x_stride, splits,
        block: tl.constexpr, width: tl.constexpr, many: tl.constexpr, shared: tl.constexpr, group: tl.constexpr,
        four: tl.constexpr, affine: tl.constexpr, biased: tl.constexpr, even: tl.constexpr, apart: tl.constexpr,
        kind: tl.constexpr, floats: tl.constexpr, fast: tl.constexpr,
    ):  # fmt: skip
        n = tl.program_id(0) * block + tl.arange(0, block)
        m = tl.program_id(1) * many + tl.arange(0, many)
        split = tl.program_id(2)
        own = tl.minimum(n, outs - 1).to(tl.int64)
        mine = tl.minimum(m, rows - 1).to(tl.int64)
        parts: tl.constexpr = width // 16
        each: tl.constexpr = 32 if four else 16
        acc = tl.zeros([block, many], tl.float32)
        steps = tl.cdiv(line, width)
        share = tl.cdiv(steps, splits)
        for step in range(split * share, tl.minimum(steps, split * share + share)):
            at = step * width + tl.arange(0, width)
            where = codes + own[:, None] * line + at[None, :]
            raw = tl.load(where) if even else tl.load(where, mask=(at < line)[None, :], other=0.0)
            k = at // 16 * 32 + at % 16 if four else at
            first = x + mine[None, :] * x_stride + k[:, None]
            one = tl.load(first) if even else tl.load(first, mask=(k < inner)[:, None], other=0.0)
            one = one.to(kind)
            if four:
                two = tl.load(first + 16) if even else tl.load(first + 16, mask=(k + 16 < inner)[:, None], other=0.0)
                two = two.to(kind)
            if group and apart:  # the step lies in one group: its sum is scaled
                place = own * groups + step * (parts * each) // group
                part = tl.dot(raw.to(kind), one)
                if affine:
                    part -= tl.load(zeros + place)[:, None] * tl.sum(one.to(tl.float32), 0)[None, :]
                acc += part * tl.load(scales + place).to(tl.float32)[:, None]
            elif group:
                number = tl.minimum((step * parts + tl.arange(0, parts)) * each // group, groups - 1)
                place = own[:, None] * groups + number[None, :]
                scale = tl.load(scales + place).to(tl.float32)
                offset = scale * (-136.0 if four else 0.0)
                if affine:
                    offset -= scale * tl.load(zeros + place)
                if four:
                    low, high = _halves(raw, fast)
                    acc = tl.dot(_scaled(low, scale, offset, block, width).to(kind), one, acc)
                    acc = tl.dot(_scaled(high, scale, offset, block, width).to(kind), two, acc)
                else:
                    acc = tl.dot(_scaled(raw.to(tl.float32), scale, offset, block, width).to(kind), one, acc)
            elif four:
                low, high = _halves(raw, fast)
                acc = tl.dot((low - 136.0).to(kind), one, acc)
                acc = tl.dot((high - 136.0).to(kind), two, acc)
            elif floats:  # through float32: to bfloat16 at once is a slow instruction
                acc = tl.dot(raw.to(tl.float32).to(kind), one, acc)
            else:
                acc = tl.dot(raw.to(kind), one, acc)
        if group == 0:
            acc *= tl.load(scales + own).to(tl.float32)[:, None]
        if not shared:
            _finish(acc, out, bias, m, n, own, rows, outs, biased)
        else:
            inside = (m[None, :] < rows) & (n[:, None] < outs)
            slot = m[None, :].to(tl.int64) * outs + n[:, None]
            size = rows.to(tl.int64) * outs
            tl.store(scratch + split * size + slot, acc, mask=inside)
            tl.debug_barrier()  # all threads of the program have written before it reports
            mark = counters + tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
            if tl.atomic_add(mark, 1, sem="acq_rel") == splits - 1:
                tl.store(mark, 0)  # ready for the next launch
                total = tl.zeros([block, many], tl.float32)
                for other in range(splits):
                    total += tl.load(scratch + other * size + slot, mask=inside, other=0.0, cache_modifier=".cg")
                _finish(total, out, bias, m, n, own, rows, outs, biased)

    @triton.jit(do_not_specialize=["rows"])  # type: ignore[untyped-decorator]
    def _byte_kernel(  # type: ignore[no-untyped-def]
        x, steps_of, codes, scales, bias, out, rows, outs, line,
        block: tl.constexpr, width: tl.constexpr, many: tl.constexpr, biased: tl.constexpr, even: tl.constexpr,
        floats: tl.constexpr,
    ):  # fmt: skip
        n = tl.program_id(0) * block + tl.arange(0, block)
        m = tl.program_id(1) * many + tl.arange(0, many)
        own = tl.minimum(n, outs - 1).to(tl.int64)
        mine = tl.minimum(m, rows - 1).to(tl.int64)
        kind: tl.constexpr = tl.float32 if floats else tl.int32
        acc = tl.zeros([block, many], kind)
        for begin in range(0, line, width):
            at = begin + tl.arange(0, width)
            inside = at < line
            where = codes + own[:, None] * line + at[None, :]
            weight = tl.load(where) if even else tl.load(where, mask=inside[None, :], other=0.0)
            where = x + mine[None, :].to(tl.int64) * line + at[:, None]
            given = tl.load(where) if even else tl.load(where, mask=inside[:, None], other=0.0)
            acc = tl.dot(weight, given, acc, out_dtype=kind)
        step = tl.load(steps_of + mine)
        result = acc.to(tl.float32) * tl.load(scales + own).to(tl.float32)[:, None] * step[None, :]
        _finish(result, out, bias, m, n, own, rows, outs, biased)

    @triton.jit(do_not_specialize=["rows"])  # type: ignore[untyped-decorator]
    def _round_kernel(  # type: ignore[no-untyped-def]
        x, out, steps, rows, inner, line, x_stride, width: tl.constexpr, top: tl.constexpr, whole: tl.constexpr,
        once: tl.constexpr,
    ):  # fmt: skip
        row = tl.program_id(0).to(tl.int64)
        at = tl.arange(0, width)
        given = tl.where(row < rows, inner, 0)  # rows that fill up are zeros
        held = tl.load(x + row * x_stride + at, mask=at < given, other=0.0).to(tl.float32)
        best = tl.abs(held)
        if not once:
            for begin in range(width, inner, width):
                place = x + row * x_stride + begin + at
                value = tl.load(place, mask=begin + at < given, other=0.0).to(tl.float32)
                best = tl.maximum(best, tl.abs(value))
        step = tl.maximum(tl.max(best, 0), 1e-12) / top
        tl.store(steps + row, step)
        for begin in range(0, line, width):
            value = held
            if not once:
                place = x + row * x_stride + begin + at
                value = tl.load(place, mask=begin + at < given, other=0.0).to(tl.float32)
            value = tl.minimum(tl.maximum(value / step, -top), top)
            if whole:  # to nearest, halves to even: beyond 2^23 a float32 has no fractions
                code = ((value + 12582912.0) - 12582912.0).to(tl.int8)
            else:
                code = value.to(out.dtype.element_ty, fp_downcast_rounding="rtne")
            tl.store(out + row * line + begin + at, code, mask=begin + at < line)

    @triton.jit(do_not_specialize=["groups"])  # type: ignore[untyped-decorator]
    def _open_kernel(  # type: ignore[no-untyped-def]
        codes, scales, zeros, out, outs, inner, line, groups,
        block: tl.constexpr, width: tl.constexpr, group: tl.constexpr, four: tl.constexpr, affine: tl.constexpr,
        fast: tl.constexpr,
    ):  # fmt: skip
        n = tl.program_id(0) * block + tl.arange(0, block)
        own = tl.minimum(n, outs - 1).to(tl.int64)
        at = tl.program_id(1) * width + tl.arange(0, width)
        parts: tl.constexpr = width // 16
        each: tl.constexpr = 32 if four else 16
        raw = tl.load(codes + own[:, None] * line + at[None, :], mask=(at < line)[None, :], other=0.0)
        number = tl.zeros([parts], tl.int32)
        if group:
            chunk = tl.program_id(1) * parts + tl.arange(0, parts)
            number = tl.minimum(chunk * each // group, groups - 1)
        place = own[:, None] * groups + number[None, :]
        scale = tl.load(scales + place).to(tl.float32)
        offset = scale * (-136.0 if four else 0.0)
        if affine:
            offset -= scale * tl.load(zeros + place)
        here = (n < outs)[:, None]
        target = out + n[:, None].to(tl.int64) * inner
        if four:
            k = at // 16 * 32 + at % 16
            low, high = _halves(raw, fast)
            low = _scaled(low, scale, offset, block, width)
            high = _scaled(high, scale, offset, block, width)
            tl.store(target + k[None, :], low.to(out.dtype.element_ty), mask=here & (k < inner)[None, :])
            tl.store(target + 16 + k[None, :], high.to(out.dtype.element_ty), mask=here & (k + 16 < inner)[None, :])
        else:
            value = _scaled(raw.to(tl.float32), scale, offset, block, width)
            tl.store(target + at[None, :], value.to(out.dtype.element_ty), mask=here & (at < inner)[None, :])


@dataclass(frozen=True)
class Tiling:
    """How a product is cut into programs."""

    block: int
    """outputs of a program"""
    width: int
    """bytes of a line of codes that a program takes at a time; a power of two"""
    many: int = 16
    """rows of a program"""
    splits: int = 1
    """programs that share the inputs of a tile"""
    warps: int = 4
    stages: int = 3
    """loads under way"""
    apart: bool = False
    """bytes and FP8: scale the sums of groups instead of the weights, where a step lies within a group"""


@lru_cache(maxsize=16)
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def tiling(rows: int, packed: Packed) -> Tiling:
    """The cut for ``rows`` rows: a rule that stays within a tenth of the best measured on an H200.

    One row is a matter of loads under way. Bytes go through three stages, 32 bytes a thread; opening halves of bytes is
    arithmetic as well, and 64 bytes a thread at once overlap it better than stages do. For more rows, what counts is
    that some 12 warps work on each multiprocessor, twice as many where few rows leave the opening of halves in front:
    where outputs give fewer tiles, programs share the inputs, as far as the parts that they write and read again
    (8 bytes a row and output) stay below the codes. Halves of bytes for tens of rows are opened 128 outputs at a time
    only where outputs alone give every multiprocessor work.
    """
    held = codes_in(packed)
    outs, line = packed.shape[0], held.codes.shape[1]
    if rows == 1:
        if held.four:
            block = 8 if outs >= 4096 else 4
            return Tiling(block, min(1024, _power(line)), warps=block // 2, stages=1)
        return Tiling(4, min(512, _power(line)), warps=2, stages=3)
    many = max(16, min(128, _power(rows)))
    if many > 64:
        cut = Tiling(128, 32, many, 1, 8, 3) if held.four else Tiling(64, 64, many, 1, 4, 3)
    elif held.four:
        fills = outs > 64 * _processors(held.codes.device)
        some = Tiling(128, 32, many, 1, 4, 4) if fills else Tiling(64, 128, many, 1, 4, 3)
        cut = Tiling(64, 64, many, 1, 4, 3) if many <= 32 else some
    else:
        cut = Tiling(32, 128, many, 1, 4, 4) if many == 16 else Tiling(64, 128, many, 1, 4, 3)
    tiles = -(-outs // cut.block) * -(-rows // many)
    warps = 24 if held.four and many <= 32 else 12
    fill = _processors(held.codes.device) * warps // cut.warps // tiles
    splits = max(1, min(fill, packed.shape[1] // max(256, 8 * many), 8))
    if -(-rows // many) > 16:
        splits = 1
    return replace(cut, splits=1 << (splits.bit_length() - 1))


def _power(size: int) -> int:
    return 1 << (size - 1).bit_length()


def _rows_of(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _group(packed: Packed, held: Codes) -> int:
    """What the kernels take: 0 for a scale of a row and no zero points."""
    return packed.group or (1 << 30 if held.zeros.numel() else 0)


def _even(packed: Packed, held: Codes, width: int) -> bool:
    inner, line = packed.shape[1], held.codes.shape[1]
    return line % width == 0 and inner == line * (2 if held.four else 1)


def by_row(x: Tensor, packed: Packed, bias: Tensor | None = None, cut: Tiling | None = None) -> Tensor:
    """x (rows, in) -> (rows, out) in the type of x, in float32; every row reads the weight anew."""
    held, x = codes_in(packed), _rows_of(x)
    outs, inner = packed.shape
    cut = cut or tiling(1, packed)
    out = torch.empty((x.shape[0], outs), dtype=x.dtype, device=x.device)
    if x.shape[0]:
        _row_kernel[(-(-outs // cut.block), x.shape[0])](
            x, held.codes, held.scales, held.zeros, out if bias is None else bias, out, outs, inner,
            held.codes.shape[1], held.scales.shape[1], x.stride(0), block=cut.block, width=cut.width,
            group=_group(packed, held), four=held.four, affine=bool(held.zeros.numel()), biased=bias is not None,
            even=_even(packed, held, cut.width), stages=cut.stages, fast=x.is_cuda,
            num_warps=cut.warps,
        )  # fmt: skip
    return out


def by_tiles(x: Tensor, packed: Packed, bias: Tensor | None = None, cut: Tiling | None = None) -> Tensor:
    """x (rows, in) -> (rows, out) in the type of x; sums in float32, factors in bfloat16 (float16 where x is)."""
    held, x = codes_in(packed), _rows_of(x)
    outs, inner = packed.shape
    rows = x.shape[0]
    out = torch.empty((rows, outs), dtype=x.dtype, device=x.device)
    if not rows:
        return out
    cut = cut or tiling(rows, packed)
    group = _group(packed, held)
    inputs = cut.width * (2 if held.four else 1)
    scratch = out
    if cut.splits > 1:
        scratch = torch.empty((cut.splits, rows, outs), dtype=torch.float32, device=x.device)
    kind: Any = tl.float16 if x.dtype is torch.float16 else tl.bfloat16
    if not x.is_cuda:  # the interpreter takes bfloat16 for integers
        kind = tl.float32
    apart = cut.apart and not held.four and group > 0 and group % inputs == 0
    _tile_kernel[(-(-outs // cut.block), -(-rows // cut.many), cut.splits)](
        x, held.codes, held.scales, held.zeros, out if bias is None else bias, out, scratch, held.counters, rows, outs,
        inner, held.codes.shape[1], held.scales.shape[1], x.stride(0), cut.splits, block=cut.block, width=cut.width,
        many=cut.many, shared=cut.splits > 1, group=group, four=held.four, affine=bool(held.zeros.numel()),
        biased=bias is not None, even=_even(packed, held, cut.width), apart=apart, kind=kind,
        floats=held.codes.dtype is torch.float8_e4m3fn, fast=x.is_cuda, num_warps=cut.warps, num_stages=cut.stages,
    )  # fmt: skip
    return out


def open_codes(packed: Packed, dtype: torch.dtype) -> Tensor:
    """The weight (out, in) that the codes stand for, in ``dtype``."""
    held = codes_in(packed)
    outs, inner = packed.shape
    line = held.codes.shape[1]
    out = torch.empty((outs, inner), dtype=dtype, device=held.codes.device)
    width = min(512, _power(line))
    _open_kernel[(-(-outs // 8), -(-line // width))](
        held.codes, held.scales, held.zeros, out, outs, inner, line, held.scales.shape[1], block=8, width=width,
        group=packed.group, four=held.four, affine=bool(held.zeros.numel()), fast=held.codes.is_cuda,
    )  # fmt: skip
    return out


def by_opening(x: Tensor, packed: Packed, bias: Tensor | None = None) -> Tensor:
    """x (rows, in) -> (rows, out): the weight is written out in a half format and the library multiplies."""
    kind = torch.float16 if x.dtype is torch.float16 else torch.bfloat16
    weight = open_codes(packed, kind)
    return functional.linear(x.to(kind), weight, None if bias is None else bias.to(kind)).to(x.dtype)


def round_rows(x: Tensor, line: int, dtype: torch.dtype, rows: int | None = None) -> tuple[Tensor, Tensor]:
    """x (rows, in) -> codes (rows, line) int8 or float8_e4m3fn and their steps (rows,) float32; zeros fill up.

    ``rows``: of the result, at least those of x; what is added is 0.
    """
    x = _rows_of(x)
    count, inner = x.shape
    made = count if rows is None else max(rows, count)
    codes = torch.empty((made, line), dtype=dtype, device=x.device)
    steps = torch.empty(made, dtype=torch.float32, device=x.device)
    whole, width = dtype is torch.int8, min(8192, _power(line))
    if made:
        _round_kernel[(made,)](
            x, codes, steps, count, inner, line, x.stride(0), width=width, top=127.0 if whole else 448.0, whole=whole,
            once=line <= width, num_warps=8,
        )  # fmt: skip
    return codes, steps


def by_bytes(x: Tensor, packed: Packed, bias: Tensor | None = None, cut: Tiling | None = None) -> Tensor:
    """x (rows, in) -> (rows, out): rows become bytes with a step each, sums are int32, both scales come last.

    FP8 with FP8 codes, whose sums are float32 as the matrix units make them (with fewer bits on Hopper).
    """
    held = codes_in(packed)
    outs = packed.shape[0]
    line = held.codes.shape[1]
    rows = x.shape[0]
    out = torch.empty((rows, outs), dtype=x.dtype, device=x.device)
    if not rows:
        return out
    codes, steps = round_rows(x, line, held.codes.dtype)
    cut = cut or cut_of_bytes(rows, packed)
    _byte_kernel[(-(-outs // cut.block), -(-rows // cut.many))](
        codes, steps, held.codes, held.scales, out if bias is None else bias, out, rows, outs, line, block=cut.block,
        width=cut.width, many=cut.many, biased=bias is not None, even=line % cut.width == 0,
        floats=held.codes.dtype is torch.float8_e4m3fn, num_warps=cut.warps, num_stages=cut.stages,
    )  # fmt: skip
    return out


def cut_of_bytes(rows: int, packed: Packed) -> Tiling:
    """The cut of :func:`by_bytes`: the best of those measured on an H200 with 16, 64 and 512 rows.

    Up to 64 rows nothing but loads counts, which are 256 bytes of a line. For more, four stages take 96 KiB, so that
    two programs fit on a multiprocessor, and three stages let a third one in, where there are as many programs.
    """
    many = max(16, min(128, _power(rows)))
    if many <= 64:
        return Tiling(64, 256, many, 1, 4, 3)
    programs = -(-packed.shape[0] // 64) * -(-rows // many)
    return Tiling(64, 128, many, 1, 4, 4 if programs <= 2 * _processors(packed.device) else 3)
