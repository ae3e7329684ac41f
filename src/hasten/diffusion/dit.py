"""A small diffusion transformer: patches, time and label modulate every block.

"Scalable Diffusion Models with Transformers", Peebles and Xie 2022, arXiv:2212.09748 (adaLN-Zero). Differs from the
paper in size, and in predicting the noise only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from hasten.errors import ConfigurationError

__all__ = ["PRESETS", "DiT", "DiTConfig"]


@dataclass(frozen=True)
class DiTConfig:
    """Shape of a diffusion transformer."""

    size: int = 8
    """height and width of an image"""
    channels: int = 1
    patch: int = 2
    """height and width of a patch"""
    width: int = 96
    """of the residual stream"""
    layers: int = 4
    heads: int = 4
    classes: int = 10
    """labels; one more stands for no label"""
    mlp_ratio: int = 4

    def __post_init__(self) -> None:
        if self.size % self.patch:
            raise ConfigurationError(f"patches of {self.patch} do not tile an image of {self.size}; give a divisor")
        if self.width % self.heads or self.width % 4:
            raise ConfigurationError(
                f"a width of {self.width} does not split into {self.heads} heads and two positions' sines; give a "
                "multiple of the heads and of 4"
            )

    @property
    def tokens(self) -> int:
        """Patches of an image."""
        return (self.size // self.patch) ** 2


PRESETS = {
    "dit-digits": DiTConfig(),
    "dit-tiny": DiTConfig(width=32, layers=2, heads=2),
}
"""Shapes by name."""


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, time, width = x.shape
        q, k, v = self.qkv(x).view(batch, time, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        out = functional.scaled_dot_product_attention(q, k, v)
        mixed: Tensor = self.proj(out.transpose(1, 2).reshape(batch, time, width))
        return mixed


class _Mlp(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, inner)
        self.fc2 = nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(functional.gelu(self.fc1(x), approximate="tanh"))
        return out


class _Block(nn.Module):
    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        width = config.width
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.attn = _Attention(width, config.heads)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.mlp = _Mlp(width, config.mlp_ratio * width)
        self.adaLN = nn.Linear(width, 6 * width)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN(functional.silu(condition))[:, None].chunk(6, -1)
        x = x + gate1 * self.attn(self.norm1(x) * (1 + scale1) + shift1)
        x = x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)
        return x


class DiT(nn.Module):
    """Noise of an image: x (batch, channels, size, size), t (batch,) int64, labels (batch,) -> the shape of x.

    >>> model = DiT(PRESETS["dit-tiny"])
    >>> model(torch.zeros(2, 1, 8, 8), torch.tensor([0, 5]), torch.tensor([1, 10])).shape
    torch.Size([2, 1, 8, 8])
    """

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.config = config
        pixels, width = config.channels * config.patch**2, config.width
        self.x_embed = nn.Linear(pixels, width)
        self.position = nn.Parameter(_positions(config.size // config.patch, width), requires_grad=False)
        self.t_embed = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.y_embed = nn.Embedding(config.classes + 1, width)
        self.blocks = nn.ModuleList(_Block(config) for _ in range(config.layers))
        self.final_norm = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.final_adaLN = nn.Linear(width, 2 * width)
        self.final = nn.Linear(width, pixels)
        nn.init.normal_(self.y_embed.weight, std=0.02)
        still: list[Any] = [self.final_adaLN, self.final, *(b.adaLN for b in self.blocks)]
        for layer in still:  # blocks begin as the identity
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    @property
    def null_label(self) -> int:
        """The label that stands for none."""
        return self.config.classes

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        config = self.config
        side, patch = config.size // config.patch, config.patch
        tokens = x.unflatten(2, (side, patch)).unflatten(4, (side, patch)).permute(0, 2, 4, 1, 3, 5).flatten(3)
        h = self.x_embed(tokens.flatten(1, 2)) + self.position
        if labels is None:
            labels = torch.full_like(t, self.null_label)
        condition = self.t_embed(_waves(t, config.width).to(h.dtype)) + self.y_embed(labels)
        for block in self.blocks:
            h = block(h, condition)
        shift, scale = self.final_adaLN(functional.silu(condition))[:, None].chunk(2, -1)
        out = self.final(self.final_norm(h) * (1 + scale) + shift)
        out = out.unflatten(1, (side, side)).unflatten(3, (config.channels, patch, patch))
        image: Tensor = out.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)
        return image


def _waves(t: Tensor, width: int) -> Tensor:
    """Sines and cosines of the time: (batch,) -> (batch, width)."""
    rates = torch.exp(-math.log(10_000) * torch.arange(width // 2, dtype=torch.float32, device=t.device) / (width // 2))
    angle = t.float()[:, None] * rates
    return torch.cat([angle.cos(), angle.sin()], -1)


def _positions(side: int, width: int) -> Tensor:
    """Fixed positions of a square of patches: (side * side, width)."""
    place = torch.arange(side * side)
    return torch.cat([_waves(place // side, width // 2), _waves(place % side, width // 2)], -1)
