"""Latent attention: keys and values of a token as one short vector that all heads read (DeepSeek-V2, Liu et al. 2024).

A token caches ``u`` (rope numbers, rotated) and ``c`` (rank numbers, not rotated). Head i scores
``(B_i q_i turned) . u + (K_i q_i) . c`` and returns ``V_i (sum of a_t c_t)``: queries are absorbed into the latent
side, so nothing is expanded per head. The rotation acts on the latent side, behind ``B_i``, so it stays right when the
factors are trained. ``pairs`` says which rotary frequency turns which pair of ``u``.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hasten.nn.attention import causal_mask
from hasten.nn.rotary import rotate

__all__ = ["LatentAttention"]


class LatentAttention(nn.Module):
    """Attention over a latent cache: (batch, time, hidden) -> the same.

    Same call as grouped-query attention: ``forward(x, cos, sin)`` with the rotary tables (time, pairs) of a head.

    >>> layer = LatentAttention(hidden=16, heads=2, width=8, rope=4, rank=6, pairs=torch.tensor([0, 1]), scale=8**-0.5)
    >>> layer(torch.randn(1, 3, 16), torch.ones(3, 4), torch.zeros(3, 4)).shape, layer.cache_numbers
    (torch.Size([1, 3, 16]), 10)
    """

    pairs: Tensor

    def __init__(
        self,
        *,
        hidden: int,
        heads: int,
        width: int,
        rope: int,
        rank: int,
        pairs: Tensor,
        scale: float,
        plain_keys: bool = True,
        bias: bool = False,
        out_bias: bool = False,
        softcap: float | None = None,
        window: int | None = None,
    ) -> None:
        """``rope`` and ``rank``: numbers of a cached token that are rotated and that are not.

        ``plain_keys`` False: scores come from the rotated part alone and the latent holds values only, as in a
        grouped-query layer written in this form.
        """
        super().__init__()
        self.heads, self.width, self.rope, self.rank, self.scale = heads, width, rope, rank, scale
        self.plain_keys, self.softcap, self.window = plain_keys, softcap, window
        self.local = False
        self.q_proj = nn.Linear(hidden, heads * width, bias=bias)
        self.rope_proj = nn.Linear(hidden, rope, bias=bias)
        self.latent_proj = nn.Linear(hidden, rank, bias=bias)
        self.rope_query = nn.Parameter(torch.randn(heads, rope, width) * width**-0.5)
        if plain_keys:
            self.latent_query = nn.Parameter(torch.randn(heads, rank, width) * width**-0.5)
        self.latent_value = nn.Parameter(torch.randn(heads, width, rank) * rank**-0.5)
        self.o_proj = nn.Linear(heads * width, hidden, bias=out_bias)
        self.register_buffer("pairs", pairs)

    @property
    def cache_numbers(self) -> int:
        """Numbers that one token keeps in the cache of this layer."""
        return self.rope + self.rank

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, time, _ = x.shape
        query = self.q_proj(x).view(batch, time, self.heads, self.width).transpose(1, 2)
        turned_cos, turned_sin = cos[:, self.pairs], sin[:, self.pairs]
        rotated = rotate(query @ self.rope_query.transpose(-1, -2), turned_cos, turned_sin)
        keys = rotate(self.rope_proj(x)[:, None], turned_cos, turned_sin)
        latent = self.latent_proj(x)[:, None]
        scores = rotated @ keys.transpose(-1, -2)
        if self.plain_keys:
            scores = scores + (query @ self.latent_query.transpose(-1, -2)) @ latent.transpose(-1, -2)
        scores = scores * self.scale
        if self.softcap is not None:
            scores = self.softcap * torch.tanh(scores / self.softcap)
        mask = causal_mask(time, time, self.window).to(x.device)
        # Half precision needs the wider type here; wider types stay as they are.
        wide = scores if scores.dtype == torch.float64 else scores.float()
        weights = torch.softmax(wide.masked_fill(~mask, float("-inf")), -1).to(x.dtype)
        out = (weights @ latent) @ self.latent_value.transpose(-1, -2)
        attended: Tensor = self.o_proj(out.transpose(1, 2).reshape(batch, time, -1))
        return attended

    def expanded(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """The same with keys and values of every head written out: the form to check the absorbed one against."""
        batch, time, _ = x.shape
        query = self.q_proj(x).view(batch, time, self.heads, self.width).transpose(1, 2)
        cos, sin = cos[:, self.pairs], sin[:, self.pairs]
        latent = self.latent_proj(x)[:, None]
        keys = rotate(self.rope_proj(x)[:, None], cos, sin).expand(-1, self.heads, -1, -1)
        query_rows = [rotate(query @ self.rope_query.transpose(-1, -2), cos, sin)]
        key_rows = [keys]
        if self.plain_keys:
            query_rows.append(query)
            key_rows.append(latent @ self.latent_query)
        values = latent @ self.latent_value.transpose(-1, -2)
        scores = torch.cat(query_rows, -1) @ torch.cat(key_rows, -1).transpose(-1, -2) * self.scale
        if self.softcap is not None:
            scores = self.softcap * torch.tanh(scores / self.softcap)
        mask = causal_mask(time, time, self.window).to(x.device)
        out = torch.softmax(scores.masked_fill(~mask, float("-inf")), -1) @ values
        attended: Tensor = self.o_proj(out.transpose(1, 2).reshape(batch, time, -1))
        return attended
