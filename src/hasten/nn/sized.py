"""Attention whose heads are narrower than the model says, each with its own rotary frequencies.

What compression leaves of a grouped-query layer: queries and keys of ``key_width`` numbers, values of ``value_width``,
and for each key head the list of rotary pairs that stayed. The softmax keeps the scale of the original head, for the
kept numbers are those of the original scores. Head layout: kept first halves, kept second halves, what never turned.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hasten.nn.attention import causal_mask, grouped_attention
from hasten.nn.rotary import rotate

__all__ = ["SizedAttention"]


class SizedAttention(nn.Module):
    """Grouped-query attention with widths of its own: (batch, time, hidden) -> the same.

    Same call as the layer that it replaces: ``forward(x, cos, sin)`` with the full rotary tables (time, pairs).

    >>> layer = SizedAttention(hidden=16, heads=4, kv_heads=2, key_width=4, value_width=3, scale=8**-0.5,
    ...                        pairs=torch.tensor([[0, 2], [1, 3]]))
    >>> layer(torch.randn(1, 3, 16), torch.ones(3, 4), torch.zeros(3, 4)).shape, layer.cache_numbers
    (torch.Size([1, 3, 16]), 14)
    """

    pairs: Tensor

    def __init__(
        self,
        *,
        hidden: int,
        heads: int,
        kv_heads: int,
        key_width: int,
        value_width: int,
        scale: float,
        pairs: Tensor | None = None,
        bias: bool = False,
        out_bias: bool = False,
        softcap: float | None = None,
        window: int | None = None,
        q_norm: nn.Module | None = None,
        k_norm: nn.Module | None = None,
    ) -> None:
        """``pairs`` (kv_heads, kept pairs): which frequency of the full tables turns each pair; None turns nothing.

        ``bias``: of queries and keys; the values' bias is part of the output's, since attention weights add up to one.
        ``q_norm`` and ``k_norm`` act on each head before it turns.
        """
        super().__init__()
        self.heads, self.kv_heads, self.scale = heads, kv_heads, scale
        self.key_width, self.value_width = key_width, value_width
        self.softcap, self.window, self.local = softcap, window, False
        self.q_proj = nn.Linear(hidden, heads * key_width, bias=bias)
        self.k_proj = nn.Linear(hidden, kv_heads * key_width, bias=bias)
        self.v_proj = nn.Linear(hidden, kv_heads * value_width, bias=False)
        self.o_proj = nn.Linear(heads * value_width, hidden, bias=out_bias)
        self.q_norm, self.k_norm = q_norm, k_norm
        self.register_buffer("pairs", torch.zeros(kv_heads, 0, dtype=torch.long) if pairs is None else pairs)

    @property
    def cache_numbers(self) -> int:
        """Numbers that one token keeps in the cache of this layer."""
        return self.kv_heads * (self.key_width + self.value_width)

    def project(self, x: Tensor, cos: Tensor | None, sin: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (batch, heads, time, key_width), keys and values (batch, kv_heads, time, …), turned.

        cos, sin (..., time, pairs), with the same leading axes as x or none.
        """
        batch, time, _ = x.shape
        query = self.q_proj(x).view(batch, time, self.heads, self.key_width)
        keys = self.k_proj(x).view(batch, time, self.kv_heads, self.key_width)
        values = self.v_proj(x).view(batch, time, self.kv_heads, self.value_width).transpose(1, 2)
        if self.q_norm is not None and self.k_norm is not None:
            query, keys = self.q_norm(query), self.k_norm(keys)
        query, keys = query.transpose(1, 2), keys.transpose(1, 2)
        if cos is not None and sin is not None and self.pairs.shape[1]:
            # (..., time, pairs) -> (..., kv_heads, time, kept)
            own = [t[..., self.pairs].movedim(-2, -3) for t in (cos, sin)]
            keys = rotate(keys, *own)
            share = self.heads // self.kv_heads
            query = rotate(query, *(t.repeat_interleave(share, -3) for t in own))
        return query, keys, values

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, time, _ = x.shape
        query, keys, values = self.project(x, cos, sin)
        mask = None
        if self.window is not None and self.window < time:
            mask = causal_mask(time, time, self.window).to(x.device)
        out = grouped_attention(query, keys, values, scale=self.scale, mask=mask, softcap=self.softcap)
        attended: Tensor = self.o_proj(out.transpose(1, 2).reshape(batch, time, -1))
        return attended
