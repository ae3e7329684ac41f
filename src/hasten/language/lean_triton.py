"""Lean attention on a GPU: one launch, every program an equal share of the line of tiles.

A program walks its tiles, output by output. An output that lies in one share is written at once; of the others each
piece's state goes to scratch, and the program that completes the last piece (an atomic counter says which) merges and
writes the result, so nobody waits and there is no second kernel. Which tiles belong to whom follows from the prefix
sums of the tiles alone, and those are computed on the device: no call waits for the host, and a step can be captured
as a CUDA graph. :func:`hasten.language.lean.attend` is the CPU twin and the truth of the tests, which run this kernel
under Triton's interpreter. Differs from the paper in: the last contributor reduces, not the owner of the first tile.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hasten.errors import ConfigurationError, MissingExtraError

__all__ = ["Shares", "attend", "decode", "triton"]

try:
    import triton
    import triton.language as tl
except ImportError:  # optional: comes with torch's CUDA builds
    triton = None

if triton is not None:

    @triton.jit  # type: ignore[untyped-decorator]
    def _lean_kernel(  # type: ignore[no-untyped-def]
        query, keys, values, out, logs, tables, owners, lengths, ends, states, sums, counters,
        scale, cap, table_stride, count, window,
        kv_heads: tl.constexpr, group: tl.constexpr, rows: tl.constexpr, width: tl.constexpr, wide: tl.constexpr,
        page: tl.constexpr, tile: tl.constexpr, many: tl.constexpr, capped: tl.constexpr, stages: tl.constexpr,
        exact: tl.constexpr, live: tl.constexpr, together: tl.constexpr,
    ):  # fmt: skip
        worker = tl.program_id(0)
        one = tl.arange(0, many)
        ending = tl.load(ends + one, mask=one < count, other=2147483647)
        total = tl.load(ends + count - 1)
        share = tl.cdiv(total, tl.num_programs(0))
        at = worker * share
        begin = at
        stop = tl.minimum(at + share, total)
        row = tl.arange(0, rows)
        col = tl.arange(0, wide)
        mine_cols = col < width
        key = tl.arange(0, tile)
        while at < stop:
            seq = tl.sum((ending <= at).to(tl.int32), 0)
            length = tl.load(lengths + seq)
            low = tl.where(window > 0, tl.maximum(length - window, 0), 0)
            skipped = low // tile
            tiles = tl.maximum(tl.cdiv(length, tile) - skipped, 1)
            line = tl.load(ends + seq) - tiles * kv_heads  # where the sequence's tiles begin
            head = (at - line) // tiles
            first = line + head * tiles
            last = tl.minimum(stop, first + tiles)
            place = seq * kv_heads + head
            mine = tables + tl.load(owners + seq).to(tl.int64) * table_stride
            cells = (row[:, None] < group) & mine_cols[None, :]
            q = tl.load(query + (place * group + row[:, None]) * width + col[None, :], mask=cells, other=0.0)
            top = tl.full([rows], -1e30, tl.float32)
            mass = tl.zeros([rows], tl.float32)
            acc = tl.zeros([rows, wide], tl.float32)
            for index in tl.range(at - first + skipped, last - first + skipped, num_stages=stages):
                position = index * tile + key
                seen = (position < length) & (position >= low)
                block = tl.load(mine + position // page, mask=seen, other=0).to(tl.int64)
                where = ((block * kv_heads + head) * page + position % page) * width
                k = tl.load(keys + where[None, :] + col[:, None], mask=seen[None, :] & mine_cols[:, None], other=0.0)
                scores = tl.dot(q, k, input_precision=exact).to(tl.float32) * scale
                if capped:
                    scores = cap * (2 * tl.sigmoid(2 * scores / cap) - 1)
                scores = tl.where(seen[None, :], scores, -1e30)
                best = tl.maximum(top, tl.max(scores, 1))
                weights = tl.where(seen[None, :], tl.exp(scores - best[:, None]), 0.0)
                fade = tl.exp(top - best)
                mass = mass * fade + tl.sum(weights, 1)
                v = tl.load(values + where[:, None] + col[None, :], mask=seen[:, None] & mine_cols[None, :], other=0.0)
                more = tl.dot(weights.to(v.dtype), v, input_precision=exact)
                acc = acc * fade[:, None] + more.to(tl.float32)
                top = best
            host = first // share
            pieces = (first + tiles - 1) // share - host + 1
            if pieces == 1:
                whole_out = tl.where(mass[:, None] > 0, acc / tl.maximum(mass, 1e-30)[:, None], 0.0)
                tl.store(
                    out + (place * group + row[:, None]) * width + col[None, :],
                    whole_out.to(out.dtype.element_ty), mask=cells,
                )  # fmt: skip
                whole_lse = tl.where(mass > 0, top + tl.log(tl.maximum(mass, 1e-30)), float("-inf"))
                tl.store(logs + place * group + row, whole_lse, mask=row < group)
            else:
                # A piece that opens its program's share lies in slot 0, one that ends it in slot 1.
                slot = worker * 2 + (at > begin).to(tl.int32)
                tl.store(states + slot * 2 * live + row, top, mask=row < live)
                tl.store(states + (slot * 2 + 1) * live + row, mass, mask=row < live)
                tl.store(
                    sums + (slot * live + row[:, None]) * wide + col[None, :], acc,
                    mask=(row[:, None] < live) & (col[None, :] < wide),
                )  # fmt: skip
                tl.debug_barrier()  # all threads of the program have written before it reports
                if tl.atomic_add(counters + place, 1, sem="acq_rel") == pieces - 1:
                    tl.store(counters + place, 0)  # ready for the next launch
                    some = tl.arange(0, together)
                    line_up = tl.arange(0, live)
                    peak = tl.full([live], -1e30, tl.float32)
                    for at_piece in range(0, pieces, together):
                        number = host + at_piece + some
                        other = number * 2 + (number * share < first).to(tl.int32)
                        held = states + other[:, None] * 2 * live + line_up[None, :]
                        there = (at_piece + some < pieces)[:, None]
                        peak = tl.maximum(peak, tl.max(tl.load(held, mask=there, other=-1e30, cache_modifier=".cg"), 0))
                    whole = tl.zeros([live], tl.float32)
                    merged = tl.zeros([live, wide], tl.float32)
                    for at_piece in range(0, pieces, together):
                        number = host + at_piece + some
                        other = number * 2 + (number * share < first).to(tl.int32)
                        held = states + other[:, None] * 2 * live + line_up[None, :]
                        there = (at_piece + some < pieces)[:, None]
                        fade = tl.exp(tl.load(held, mask=there, other=-1e30, cache_modifier=".cg") - peak[None, :])
                        whole += tl.sum(fade * tl.load(held + live, mask=there, other=0.0, cache_modifier=".cg"), 0)
                        part = tl.load(
                            sums + (other[:, None, None] * live + line_up[None, :, None]) * wide + col[None, None, :],
                            mask=there[:, :, None], other=0.0, cache_modifier=".cg",
                        )  # fmt: skip
                        merged += tl.sum(fade[:, :, None] * part, 0)
                    result = tl.where(whole[:, None] > 0, merged / tl.maximum(whole, 1e-30)[:, None], 0.0)
                    tl.store(
                        out + (place * group + line_up[:, None]) * width + col[None, :],
                        result.to(out.dtype.element_ty), mask=(line_up[:, None] < group) & mine_cols[None, :],
                    )  # fmt: skip
                    lse = tl.where(whole > 0, peak + tl.log(tl.maximum(whole, 1e-30)), float("-inf"))
                    tl.store(logs + place * group + line_up, lse, mask=line_up < group)
            at = last


@dataclass(frozen=True)
class Shares:
    """Who computes what in a batch, and the scratch that it takes; made once per step for all layers.

    Contract: one launch at a time uses an object (its counters are zero before and after each).
    """

    lengths: Tensor
    """(queries,) int32: keys that each query sees"""
    ends: Tensor
    """(queries,) int32: prefix sums of tiles over all key heads; an empty context has one"""
    owners: Tensor
    """(queries,) int32: the row of the block tables that each query reads"""
    states: Tensor
    sums: Tensor
    counters: Tensor
    tile: int
    grid: int
    window: int
    """keys that a query sees at most; 0 for all"""

    @classmethod
    def of(
        cls, lengths: Tensor, heads: int, kv_heads: int, width: int, *, owners: Tensor | None = None, tile: int = 64,
        grid: int | None = None, window: int | None = None,
    ) -> Shares:  # fmt: skip
        """``lengths`` (queries,) int32 on the device; nothing here waits for it."""
        device, count = lengths.device, lengths.shape[0]
        if grid is None:
            grid = 2 * torch.cuda.get_device_properties(device).multi_processor_count if lengths.is_cuda else 8
        rows = _live(heads // kv_heads)
        if owners is None:
            owners = torch.arange(count, dtype=torch.int32, device=device)
        return cls(
            lengths,
            _ends(lengths, kv_heads, tile, window or 0),
            owners,
            torch.empty(grid * 4 * rows, dtype=torch.float32, device=device),
            torch.empty(grid * 2 * rows * _power(width), dtype=torch.float32, device=device),
            torch.zeros(count * kv_heads, dtype=torch.int32, device=device),
            tile,
            grid,
            window or 0,
        )


def _power(size: int) -> int:
    """The least power of two that matrix instructions take and that holds ``size``."""
    return max(16, 1 << (size - 1).bit_length())


def _live(group: int) -> int:
    """Rows of a state in scratch: the query heads of a key head, without the padding of matrix instructions."""
    return 1 << (group - 1).bit_length()


def _ends(lengths: Tensor, kv_heads: int, tile: int, window: int) -> Tensor:
    tiles = (lengths + (tile - 1)) // tile
    if window:
        tiles = tiles - (lengths - window).clamp(min=0) // tile
    return (tiles.clamp(min=1) * kv_heads).cumsum(0, dtype=torch.int32)


def attend(
    query: Tensor, keys: Tensor, values: Tensor, tables: Tensor, shares: Shares, *, scale: float,
    softcap: float | None = None, warps: int = 4, stages: int = 3,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """query (queries, heads, width) over pages (blocks, kv_heads, block_size, width) -> the same shape, and (queries,
    heads) logarithms of sums of exponentials. ``tables`` (sequences, blocks) int32."""
    count, heads, width = query.shape
    _, kv_heads, page, _ = keys.shape
    group = heads // kv_heads
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    logs = torch.empty(count, heads, dtype=torch.float32, device=query.device)
    _lean_kernel[(shares.grid,)](
        query.contiguous(), keys, values, out, logs, tables, shares.owners, shares.lengths, shares.ends,
        shares.states, shares.sums, shares.counters, scale, softcap or 1.0, tables.stride(0), count, shares.window,
        kv_heads=kv_heads, group=group, rows=_power(group), width=width, wide=_power(width), page=page,
        tile=shares.tile, many=_power(count), capped=softcap is not None, stages=stages,
        exact="ieee" if query.dtype == torch.float32 else "tf32", live=_live(group),
        together=max(1, 32 // _live(group)), num_warps=warps,
    )  # fmt: skip
    return out, logs


def decode(
    query: Tensor, keys: Tensor, values: Tensor, tables: Tensor, lengths: Tensor, *, scale: float | None = None,
    tile: int = 64, grid: int | None = None, window: int | None = None, softcap: float | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """One query per sequence over a paged cache, on the device of the tensors.

    query (sequences, heads, width), keys and values (blocks, kv_heads, block_size, width), tables (sequences, blocks)
    int32, lengths (sequences,) int32 -> (sequences, heads, width) and (sequences, heads) logarithms of sums of
    exponentials. ``tile`` is a power of two of at least 16. ``grid``: programs, by default two per multiprocessor.
    Raises :class:`~hasten.errors.MissingExtraError` without Triton.
    """
    if triton is None:
        raise MissingExtraError("triton", "gpu", "the GPU kernel of lean attention")
    _, heads, width = query.shape
    _, kv_heads, _, _ = keys.shape
    if heads % kv_heads or tile & (tile - 1) or tile < 16:
        raise ConfigurationError(
            f"{heads} heads over {kv_heads} key heads in tiles of {tile}: heads must be a multiple of key heads, tile "
            "a power of two of at least 16"
        )
    counted: Any = lengths.to(torch.int32)
    shares = Shares.of(counted, heads, kv_heads, width, tile=tile, grid=grid, window=window)
    scale = width**-0.5 if scale is None else scale
    return attend(query, keys, values, tables.contiguous(), shares, scale=scale, softcap=softcap)
