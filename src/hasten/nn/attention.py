"""Grouped-query attention over dense tensors: the plain form that every faster path is tested against."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["causal_mask", "grouped_attention"]


def causal_mask(queries: int, keys: int, window: int | None = None, device: torch.device | None = None) -> Tensor:
    """True where a query may look: (queries, keys); the last query stands at the last key.

    ``window`` keys at most, the query's own included (sliding-window attention); None for all earlier ones.
    """
    position = torch.arange(keys - queries, keys, device=device)[:, None]
    key = torch.arange(keys, device=device)[None, :]
    mask = key <= position
    return mask if window is None else mask & (key > position - window)


def grouped_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    scale: float,
    mask: Tensor | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Softmax attention in which ``heads / kv_heads`` query heads share one key head.

    query (batch, heads, time, width), keys and values (batch, kv_heads, context, width) -> (batch, heads, time, width).
    ``mask`` (time, context) is True where a query may look; None means causal with time = context. ``softcap`` squashes
    scores to ``softcap * tanh(score / softcap)`` (Gemma 2).
    """
    if softcap is None:
        return functional.scaled_dot_product_attention(
            query,
            keys,
            values,
            attn_mask=mask,
            is_causal=mask is None,
            scale=scale,
            enable_gqa=query.shape[1] != keys.shape[1],
        )
    group = query.shape[1] // keys.shape[1]
    keys, values = keys.repeat_interleave(group, 1), values.repeat_interleave(group, 1)
    scores = query @ keys.transpose(-1, -2) * scale
    scores = softcap * torch.tanh(scores / softcap)
    allowed = causal_mask(query.shape[-2], keys.shape[-2]).to(query.device) if mask is None else mask
    scores = scores.float().masked_fill(~allowed, float("-inf"))
    return torch.softmax(scores, -1).to(query.dtype) @ values
