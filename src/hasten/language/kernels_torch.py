"""The operations of a step on any device, in plain torch: the truth that the fast CPU kernels are tested against.

Every function takes the whole ragged batch; sequences of different length are padded to the longest and masked.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hasten.language.ragged import RaggedBatch

__all__ = ["add_norm", "attend", "constant", "gate", "norm", "place", "prepare"]


def prepare(batch: RaggedBatch) -> RaggedBatch:
    """The form of a batch that these operations take: the batch itself."""
    return batch


def constant(x: Tensor) -> Tensor:
    """The form of a weight or table that these operations take: the tensor itself."""
    return x


def norm(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """Root-mean-square norm: x (rows, width) in any type, weight (width,) float32 -> (rows, width) in ``dtype``."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight).to(dtype)


def add_norm(residual: Tensor, x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """``residual += x`` in place (float32), then its norm in ``dtype``."""
    residual += x
    return norm(residual, weight, eps, dtype)


def gate(x: Tensor, gelu: bool) -> Tensor:
    """x (rows, 2 * inner) holding gate and up side by side -> act(gate) * up (rows, inner)."""
    left, right = x.chunk(2, -1)
    act = torch.nn.functional.gelu(left, approximate="tanh") if gelu else torch.nn.functional.silu(left)
    return act * right


def place(
    qkv: Tensor,
    batch: RaggedBatch,
    cos: Tensor,
    sin: Tensor,
    keys: Tensor,
    values: Tensor,
    heads: int,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
) -> Tensor:
    """Norm and rotate queries and keys, write keys and values into the cache; returns the queries.

    qkv (tokens, (heads + 2 kv_heads) * width); cos, sin (context, pairs); keys and values of one layer
    (blocks, kv_heads, block_size, width) -> (tokens, heads, width).
    """
    _, kv_heads, size, width = keys.shape
    tokens = qkv.shape[0]
    parts = qkv.view(tokens, heads + 2 * kv_heads, width).float()
    query, key, value = parts.split((heads, kv_heads, kv_heads), 1)
    if q_norm is not None and k_norm is not None:
        query = norm(query, q_norm, eps, torch.float32)
        key = norm(key, k_norm, eps, torch.float32)
    positions = batch.positions.long()
    turn_cos, turn_sin = cos[positions][:, None], sin[positions][:, None]
    query, key = _rotate(query, turn_cos, turn_sin), _rotate(key, turn_cos, turn_sin)
    lengths = (batch.starts[1:] - batch.starts[:-1]).long()
    chunk = torch.repeat_interleave(torch.arange(batch.num_chunks, device=qkv.device), lengths)
    block = batch.block_tables.long()[chunk, positions // size]
    keys[block, :, positions % size] = key.to(keys.dtype)
    values[block, :, positions % size] = value.to(values.dtype)
    return query.to(qkv.dtype)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    pairs = cos.shape[-1]
    first, second, rest = x[..., :pairs], x[..., pairs : 2 * pairs], x[..., 2 * pairs :]
    return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), -1)


def attend(
    query: Tensor,
    batch: RaggedBatch,
    keys: Tensor,
    values: Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """Each token attends to its sequence in the cache, itself included.

    query (tokens, heads, width); keys and values (blocks, kv_heads, block_size, width) -> (tokens, heads * width).
    """
    tokens, heads, width = query.shape
    _, kv_heads, size, _ = keys.shape
    lengths = (batch.starts[1:] - batch.starts[:-1]).long()
    chunk = torch.repeat_interleave(torch.arange(batch.num_chunks, device=query.device), lengths)
    row = torch.arange(tokens, device=query.device) - batch.starts.long()[chunk]
    longest, context = int(lengths.max()), batch.block_tables.shape[1] * size
    padded = query.new_zeros(batch.num_chunks, longest, heads, width)
    padded[chunk, row] = query
    tables = batch.block_tables.long()
    group = heads // kv_heads

    def gathered(cache: Tensor) -> Tensor:
        pages = cache[tables].permute(0, 2, 1, 3, 4).reshape(batch.num_chunks, kv_heads, context, width)
        return pages.repeat_interleave(group, 1).float()

    scores = padded.permute(0, 2, 1, 3).float() @ gathered(keys).transpose(-1, -2) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    position = batch.contexts.long()[:, None] + torch.arange(longest, device=query.device)[None, :]
    key = torch.arange(context, device=query.device)
    allowed = key[None, None, :] <= position[..., None]
    if window is not None:
        allowed &= key[None, None, :] > position[..., None] - window
    scores = scores.masked_fill(~allowed[:, None], float("-inf"))
    out = torch.softmax(scores, -1) @ torch.nan_to_num(gathered(values))
    return out.permute(0, 2, 1, 3)[chunk, row].reshape(tokens, heads * width).to(query.dtype)
