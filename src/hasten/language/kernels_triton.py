"""The operations of a step on a GPU: one launch each, nothing that waits for the host.

Norm, rotation with the cache write, and gating are fused Triton kernels; decode rows and short chunks attend through
lean shares (:mod:`lean_triton`), long chunks through torch's flash kernel on their gathered pages. All numbers that
describe a batch go to the device in one copy (:class:`Step`). :mod:`kernels_torch` is the truth of the tests, which
run these kernels under Triton's interpreter.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from hasten.language.lean_triton import Shares, triton
from hasten.language.lean_triton import attend as lean
from hasten.language.ragged import RaggedBatch
from hasten.nn import causal_mask

if triton is not None:
    import triton.language as tl

__all__ = [
    "LONG",
    "LongChunk",
    "Step",
    "add_norm",
    "attend",
    "available",
    "constant",
    "gate",
    "norm",
    "place",
    "prepare",
]

LONG = 16
"""Rows of a chunk from which the flash kernel takes it."""


def available() -> bool:
    """Whether Triton is installed."""
    return triton is not None


@dataclass(frozen=True)
class LongChunk:
    """A chunk that goes through the flash kernel."""

    rows: slice
    owner: int
    """its row of the block tables"""
    context: int
    length: int


@dataclass
class Step:
    """A batch on the device. Rows are tokens."""

    tokens: Tensor
    """(rows,) int32"""
    positions: Tensor
    """(rows,) int32"""
    owners: Tensor
    """(rows,) int32: the chunk of each row"""
    tables: Tensor
    """(chunks, blocks) int32"""
    wanted: Tensor
    """(n,) int32: rows whose logits are asked for"""
    few: Tensor | None
    """(m,) int32: rows that attend one by one; None where all do"""
    long: tuple[LongChunk, ...] = ()
    shares: dict[Any, Shares] = field(default_factory=dict, repr=False)
    """by window; made once per step for all layers"""


def prepare(batch: RaggedBatch, device: torch.device) -> Step:
    """Pack what describes ``batch`` (on the CPU) into one buffer and copy it."""
    starts, chunks = batch.starts.numpy(), batch.num_chunks
    sizes = np.diff(starts)
    owners = np.repeat(np.arange(chunks, dtype=np.int32), sizes)
    long = tuple(
        LongChunk(slice(int(starts[c]), int(starts[c + 1])), int(c), int(batch.contexts[c]), int(sizes[c]))
        for c in np.flatnonzero(sizes >= LONG)
    )
    few = np.flatnonzero(sizes[owners] < LONG).astype(np.int32) if long else None
    parts = [batch.tokens.numpy(), batch.positions.numpy(), owners, batch.logit_rows.numpy()]
    parts += [few if few is not None else owners[:0], batch.block_tables.numpy().reshape(-1)]
    packed = torch.empty(sum(p.size for p in parts), dtype=torch.int32, pin_memory=device.type == "cuda")
    np.concatenate(parts, out=packed.numpy(), casting="unsafe")
    tokens, positions, owner, wanted, some, tables = packed.to(device, non_blocking=True).split([p.size for p in parts])
    return Step(tokens, positions, owner, tables.view(chunks, -1), wanted, some if few is not None else None, long)


def constant(x: Tensor) -> Tensor:
    """The form of a weight or table that these operations take: the tensor itself."""
    return x


if triton is not None:

    @triton.jit  # type: ignore[untyped-decorator]
    def _norm_kernel(x, residual, weight, out, eps, width, block: tl.constexpr, adds: tl.constexpr):  # type: ignore[no-untyped-def]
        row = tl.program_id(0).to(tl.int64)
        col = tl.arange(0, block)
        inside = col < width
        value = tl.load(x + row * width + col, mask=inside, other=0.0).to(tl.float32)
        if adds:
            value += tl.load(residual + row * width + col, mask=inside, other=0.0)
            tl.store(residual + row * width + col, value, mask=inside)
        scale = tl.rsqrt(tl.sum(value * value, 0) / width + eps)
        result = value * scale * tl.load(weight + col, mask=inside, other=0.0)
        tl.store(out + row * width + col, result.to(out.dtype.element_ty), mask=inside)

    @triton.jit  # type: ignore[untyped-decorator]
    def _gate_kernel(x, out, inner, block: tl.constexpr, gelu: tl.constexpr):  # type: ignore[no-untyped-def]
        row = tl.program_id(0).to(tl.int64)
        col = tl.program_id(1) * block + tl.arange(0, block)
        inside = col < inner
        left = tl.load(x + row * 2 * inner + col, mask=inside, other=0.0).to(tl.float32)
        right = tl.load(x + (row * 2 + 1) * inner + col, mask=inside, other=0.0).to(tl.float32)
        if gelu:  # tanh(z) = 2 sigmoid(2 z) - 1
            z = 0.7978845608028654 * (left + 0.044715 * left * left * left)
            act = left * tl.sigmoid(2 * z)
        else:
            act = left * tl.sigmoid(left)
        act = act.to(out.dtype.element_ty).to(tl.float32)
        tl.store(out + row * inner + col, (act * right).to(out.dtype.element_ty), mask=inside)

    @triton.jit  # type: ignore[untyped-decorator]
    def _place_kernel(  # type: ignore[no-untyped-def]
        qkv, positions, owners, tables, cos, sin, q_weight, k_weight, query, keys, values, eps, table_stride,
        heads: tl.constexpr, kv_heads: tl.constexpr, width: tl.constexpr, wide: tl.constexpr, pairs: tl.constexpr,
        page: tl.constexpr, normed: tl.constexpr,
    ):  # fmt: skip
        token = tl.program_id(0).to(tl.int64)
        part = tl.program_id(1)
        col = tl.arange(0, wide)
        inside = col < width
        source = qkv + (token * (heads + 2 * kv_heads) + part) * width
        value = tl.load(source + col, mask=inside, other=0.0).to(tl.float32)
        position = tl.load(positions + token)
        block = tl.load(tables + tl.load(owners + token).to(tl.int64) * table_stride + position // page).to(tl.int64)
        if part < heads + kv_heads:
            turned = col < 2 * pairs
            partner = tl.where(col < pairs, col + pairs, col - pairs)
            other = tl.load(source + partner, mask=turned, other=0.0).to(tl.float32)
            if normed:
                scale = tl.rsqrt(tl.sum(value * value, 0) / width + eps)
                weight = q_weight
                if part >= heads:
                    weight = k_weight
                value = value * scale * tl.load(weight + col, mask=inside, other=0.0)
                other = other * scale * tl.load(weight + partner, mask=turned, other=0.0)
            angle = position * pairs + tl.where(col < pairs, col, col - pairs)
            c = tl.load(cos + angle, mask=turned, other=1.0)
            s = tl.load(sin + angle, mask=turned, other=0.0)
            value = value * c + tl.where(col < pairs, -1.0, 1.0) * other * s
        if part < heads:
            tl.store(query + (token * heads + part) * width + col, value.to(query.dtype.element_ty), mask=inside)
        elif part < heads + kv_heads:
            slot = ((block * kv_heads + part - heads) * page + position % page) * width
            tl.store(keys + slot + col, value.to(keys.dtype.element_ty), mask=inside)
        else:
            slot = ((block * kv_heads + part - heads - kv_heads) * page + position % page) * width
            tl.store(values + slot + col, value.to(values.dtype.element_ty), mask=inside)


def _block(width: int) -> int:
    return max(16, 1 << (width - 1).bit_length())


def _warps(width: int) -> int:
    return 4 if width <= 2048 else 8


def norm(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """Root-mean-square norm: x (rows, width), weight (width,) float32 -> (rows, width) in ``dtype``."""
    rows, width = x.shape
    out = torch.empty((rows, width), dtype=dtype, device=x.device)
    _norm_kernel[(rows,)](
        x.contiguous(), x, weight, out, eps, width, block=_block(width), adds=False, num_warps=_warps(width)
    )
    return out


def add_norm(residual: Tensor, x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """``residual += x`` in place (float32), then its norm in ``dtype``."""
    rows, width = residual.shape
    out = torch.empty((rows, width), dtype=dtype, device=x.device)
    _norm_kernel[(rows,)](
        x.contiguous(), residual, weight, out, eps, width, block=_block(width), adds=True, num_warps=_warps(width)
    )
    return out


def gate(x: Tensor, gelu: bool) -> Tensor:
    """x (rows, 2 * inner) holding gate and up side by side -> act(gate) * up (rows, inner)."""
    rows, inner = x.shape[0], x.shape[1] // 2
    out = torch.empty((rows, inner), dtype=x.dtype, device=x.device)
    block = min(1024, _block(inner))
    _gate_kernel[(rows, -(-inner // block))](x.contiguous(), out, inner, block=block, gelu=gelu)
    return out


def place(
    qkv: Tensor, step: Step, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, heads: int,
    q_norm: Tensor | None, k_norm: Tensor | None, eps: float,
) -> Tensor:  # fmt: skip
    """Norm and rotate queries and keys, write keys and values into the cache; returns the queries.

    Shapes as in :func:`hasten.language.kernels_torch.place`.
    """
    _, kv_heads, size, width = keys.shape
    rows = qkv.shape[0]
    query = torch.empty((rows, heads, width), dtype=qkv.dtype, device=qkv.device)
    normed = q_norm is not None and k_norm is not None
    _place_kernel[(rows, heads + 2 * kv_heads)](
        qkv.contiguous(), step.positions, step.owners, step.tables, cos, sin, q_norm if normed else cos,
        k_norm if normed else cos, query, keys, values, eps, step.tables.stride(0), heads=heads, kv_heads=kv_heads,
        width=width, wide=_block(width), pairs=cos.shape[-1], page=size, normed=normed, num_warps=1,
    )  # fmt: skip
    return query


def attend(
    query: Tensor, step: Step, keys: Tensor, values: Tensor, scale: float, window: int | None, softcap: float | None
) -> Tensor:
    """Each row attends to its sequence in the cache, itself included: (rows, heads, width) -> (rows, heads * width)."""
    rows, heads, width = query.shape
    if step.few is None:
        out, _ = lean(
            query, keys, values, step.tables, _shares(step, heads, keys, window), scale=scale, softcap=softcap
        )
        return out.view(rows, heads * width)
    out = torch.empty((rows, heads * width), dtype=query.dtype, device=query.device)
    if step.few.numel():
        shares = _shares(step, heads, keys, window)
        some, _ = lean(query[step.few], keys, values, step.tables, shares, scale=scale, softcap=softcap)
        out[step.few] = some.view(-1, heads * width)
    for chunk in step.long:
        table = step.tables[chunk.owner]
        out[chunk.rows] = _flash(query[chunk.rows], chunk, table, keys, values, scale, window, softcap)
    return out


def _shares(step: Step, heads: int, keys: Tensor, window: int | None) -> Shares:
    if window not in step.shares:
        some = slice(None) if step.few is None else step.few
        step.shares[window] = Shares.of(
            step.positions[some] + 1, heads, keys.shape[1], keys.shape[3], owners=step.owners[some], window=window
        )
    return step.shares[window]


def _flash(
    query: Tensor, chunk: LongChunk, table: Tensor, keys: Tensor, values: Tensor, scale: float, window: int | None,
    softcap: float | None,
) -> Tensor:  # fmt: skip
    """query (length, heads, width) -> (length, heads * width), on gathered pages."""
    from torch.nn.attention.bias import causal_lower_right

    _, kv_heads, size, width = keys.shape
    length, heads, _ = query.shape
    total = chunk.context + length
    used = table[: -(-total // size)].long()

    def gathered(cache: Tensor) -> Tensor:
        return cache[used].transpose(0, 1).reshape(1, kv_heads, -1, width)[:, :, :total]

    q, k, v = query.transpose(0, 1)[None], gathered(keys), gathered(values)
    if softcap is not None:  # no fused kernel takes it
        wide = k.repeat_interleave(heads // kv_heads, 1)
        scores = softcap * torch.tanh(q.float() @ wide.float().transpose(-1, -2) * scale / softcap)
        mask = causal_mask(length, total, window, device=query.device)
        weights = torch.softmax(scores.masked_fill(~mask, -torch.inf), -1)
        out = (weights @ v.repeat_interleave(heads // kv_heads, 1).float()).to(query.dtype)
    elif window is None or window >= total:
        bias: Any = causal_lower_right(length, total)
        out = functional.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale, enable_gqa=True)
    else:
        mask = causal_mask(length, total, window, device=query.device)
        out = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=True)
    return out[0].transpose(0, 1).reshape(length, heads * width)
