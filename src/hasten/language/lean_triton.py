"""Lean attention on a GPU: one launch, every program an equal share of the line of tiles.

A program walks its tiles, output by output, and writes the state of each piece to scratch; the program that completes
an output's last piece (an atomic counter says which) merges and writes the result, so nobody waits and there is no
second kernel. :func:`hasten.language.lean.attend` is the CPU twin and the truth of the tests, which run this kernel
under Triton's interpreter. Differs from the paper in: the last contributor reduces, not the owner of the first tile.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hasten.errors import ConfigurationError, MissingExtraError
from hasten.language.lean import partition

__all__ = ["decode", "triton"]

try:
    import triton
    import triton.language as tl
except ImportError:  # optional: comes with torch's CUDA builds
    triton = None

if triton is not None:

    @triton.jit  # type: ignore[untyped-decorator]
    def _lean_kernel(  # type: ignore[no-untyped-def]
        query, keys, values, out, logs, tables, lengths, cuts, ends, hosts, pieces, scratch, sums, counters,
        scale, table_stride,
        kv_heads: tl.constexpr, group: tl.constexpr, rows: tl.constexpr, width: tl.constexpr, page: tl.constexpr,
        tile: tl.constexpr, most: tl.constexpr,
    ):  # fmt: skip
        worker = tl.program_id(0)
        at = tl.load(cuts + worker)
        stop = tl.load(cuts + worker + 1)
        output = tl.load(hosts + worker)  # the output of this program's first tile
        row = tl.arange(0, rows)
        col = tl.arange(0, width)
        key = tl.arange(0, tile)
        while at < stop:
            chunk = output // kv_heads
            head = output % kv_heads
            end = tl.load(ends + output)
            first = end - tl.load(pieces + output * 3 + 1)
            last = tl.minimum(stop, end)
            length = tl.load(lengths + chunk)
            q = tl.load(
                query + ((chunk * kv_heads + head) * group + row[:, None]) * width + col[None, :],
                mask=row[:, None] < group, other=0.0,
            )  # fmt: skip
            top = tl.full([rows], -1e30, tl.float32)
            mass = tl.zeros([rows], tl.float32)
            acc = tl.zeros([rows, width], tl.float32)
            index = at
            while index < last:
                position = (index - first) * tile + key
                seen = position < length
                block = tl.load(tables + chunk * table_stride + position // page, mask=seen, other=0)
                where = ((block * kv_heads + head) * page + position % page) * width
                k = tl.load(keys + where[None, :] + col[:, None], mask=seen[None, :], other=0.0)
                scores = tl.dot(q, k).to(tl.float32) * scale
                scores = tl.where(seen[None, :], scores, -1e30)
                best = tl.maximum(top, tl.max(scores, 1))
                weights = tl.where(seen[None, :], tl.exp(scores - best[:, None]), 0.0)
                fade = tl.exp(top - best)
                mass = mass * fade + tl.sum(weights, 1)
                v = tl.load(values + where[:, None] + col[None, :], mask=seen[:, None], other=0.0)
                acc = acc * fade[:, None] + tl.dot(weights.to(v.dtype), v).to(tl.float32)
                top = best
                index += 1
            piece = worker - tl.load(pieces + output * 3 + 2)
            place = output * most + piece
            tl.store(scratch + (place * 2) * rows + row, top)
            tl.store(scratch + (place * 2 + 1) * rows + row, mass)
            tl.store(sums + place * rows * width + row[:, None] * width + col[None, :], acc)
            tl.debug_barrier()  # all threads of the program have written before it reports
            count = tl.load(pieces + output * 3)
            if tl.atomic_add(counters + output, 1, sem="acq_rel") == count - 1:
                best = tl.full([rows], -1e30, tl.float32)
                for p in range(count):
                    best = tl.maximum(best, tl.load(scratch + ((output * most + p) * 2) * rows + row))
                total = tl.zeros([rows], tl.float32)
                result = tl.zeros([rows, width], tl.float32)
                for p in range(count):
                    other = output * most + p
                    fade = tl.exp(tl.load(scratch + (other * 2) * rows + row) - best)
                    total += fade * tl.load(scratch + (other * 2 + 1) * rows + row)
                    part = tl.load(sums + other * rows * width + row[:, None] * width + col[None, :])
                    result += fade[:, None] * part
                result = tl.where(total[:, None] > 0, result / tl.maximum(total, 1e-30)[:, None], 0.0)
                tl.store(
                    out + ((chunk * kv_heads + head) * group + row[:, None]) * width + col[None, :],
                    result.to(out.dtype.element_ty), mask=row[:, None] < group,
                )  # fmt: skip
                lse = tl.where(total > 0, best + tl.log(tl.maximum(total, 1e-30)), float("-inf"))
                tl.store(logs + (chunk * kv_heads + head) * group + row, lse, mask=row < group)
            at = last
            output += 1


def decode(
    query: Tensor, keys: Tensor, values: Tensor, tables: Tensor, lengths: Tensor, *, scale: float | None = None,
    tile: int = 128, grid: int | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """One query per sequence over a paged cache, on the device of the tensors.

    query (sequences, heads, width), keys and values (blocks, kv_heads, block_size, width), tables (sequences, blocks)
    int32, lengths (sequences,) int32 -> (sequences, heads, width) and (sequences, heads) logarithms of sums of
    exponentials. ``width`` and ``tile`` are powers of two of at least 16. ``grid``: programs, by default two per
    multiprocessor. Raises :class:`~hasten.errors.MissingExtraError` without Triton.
    """
    if triton is None:
        raise MissingExtraError("triton", "gpu", "the GPU kernel of lean attention")
    count, heads, width = query.shape
    _, kv_heads, page, _ = keys.shape
    if heads % kv_heads or width & (width - 1) or width < 16 or tile & (tile - 1) or tile < 16:
        raise ConfigurationError(
            f"{heads} heads of {width} over {kv_heads} key heads in tiles of {tile}: heads must be a multiple of key "
            "heads, width and tile powers of two of at least 16"
        )
    group = heads // kv_heads
    if grid is None:
        grid = 2 * torch.cuda.get_device_properties(query.device).multi_processor_count if query.is_cuda else 8
    held = lengths.tolist()
    plan = partition([max(1, n) for n in held], kv_heads, tile, grid)  # an empty context still writes its zero
    device = query.device
    import numpy as np

    ends = np.cumsum(plan.tiles)
    firsts = ends - plan.tiles
    hosts = np.searchsorted(plan.cuts, firsts, side="right") - 1
    lasts = np.searchsorted(plan.cuts, ends - 1, side="right") - 1
    books = np.stack([lasts - hosts + 1, plan.tiles, hosts], 1).astype(np.int32)
    begins = np.minimum(np.searchsorted(ends, plan.cuts[:-1], side="right"), len(ends) - 1)
    most = int(books[:, 0].max())
    rows = max(16, 1 << (group - 1).bit_length())

    def ints(values: Any) -> Tensor:
        return torch.as_tensor(np.ascontiguousarray(values, np.int32), device=device)

    outputs = count * kv_heads
    out = torch.empty_like(query)
    logs = torch.empty(count, heads, dtype=torch.float32, device=device)
    scratch = torch.empty(outputs * most * 2 * rows, dtype=torch.float32, device=device)
    sums = torch.empty(outputs * most * rows * width, dtype=torch.float32, device=device)
    counters = torch.zeros(outputs, dtype=torch.int32, device=device)
    _lean_kernel[(grid,)](
        query.contiguous(), keys, values, out, logs, tables.contiguous(), lengths.to(torch.int32), ints(plan.cuts),
        ints(ends), ints(begins), ints(books.reshape(-1)), scratch, sums, counters,
        width**-0.5 if scale is None else scale, tables.stride(0),
        kv_heads=kv_heads, group=group, rows=rows, width=width, page=page, tile=tile, most=most,
    )  # fmt: skip
    return out, logs
