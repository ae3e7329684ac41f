"""An attention with narrower heads that is called as transformers calls its own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from hasten.nn.attention import causal_mask
from hasten.nn.sized import SizedAttention

__all__ = ["ForeignAttention"]


class ForeignAttention(SizedAttention):
    """:class:`~hasten.nn.sized.SizedAttention` behind the signature of transformers: cache, mask and rotary tables come
    by name, and the result is a pair.

    >>> layer = ForeignAttention(hidden=8, heads=2, kv_heads=1, key_width=2, value_width=3, scale=0.5)
    >>> layer(torch.randn(1, 4, 8))[0].shape
    torch.Size([1, 4, 8])
    """

    layer_idx: int | None = None
    """which layer of the cache is its own"""
    sliding_window: int | None = None

    def forward(self, hidden_states: Tensor, *given: Any, **named: Any) -> tuple[Tensor, None]:  # type: ignore[override]
        """hidden_states (batch, time, hidden) -> the same and None (no attention weights are kept)."""
        from hasten.compress.lowrank.blocks import rotary_of

        batch, time, _ = hidden_states.shape
        turn = rotary_of((hidden_states, *given), named, native=False)
        cos, sin = (None, None) if turn is None else turn
        query, keys, values = self.project(hidden_states, cos, sin)
        # Its name has changed three times: past_key_value, past_key_values, cache.
        cache = next((v for v in (*named.values(), *given) if hasattr(v, "get_seq_length")), None)
        if cache is not None:
            keys, values = cache.update(keys, values, self.layer_idx)
        mask = named.get("attention_mask")
        if mask is None:
            mask = next((g for g in given if isinstance(g, Tensor)), None)
        length = keys.shape[2]
        if mask is None and (time > 1 or self.window is not None):
            mask = causal_mask(time, length, self.window).to(query.device)
        elif mask is not None:
            mask = mask[..., :length]
        share = self.heads // self.kv_heads
        if self.softcap is not None:
            scores = query @ keys.repeat_interleave(share, 1).transpose(-1, -2) * self.scale
            scores = self.softcap * torch.tanh(scores / self.softcap)
            if mask is not None:
                scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
            out = torch.softmax(scores.float(), -1).to(query.dtype) @ values.repeat_interleave(share, 1)
        else:
            out = functional.scaled_dot_product_attention(
                query, keys, values, attn_mask=mask, scale=self.scale, enable_gqa=share > 1
            )
        return self.o_proj(out.transpose(1, 2).reshape(batch, time, -1)), None
