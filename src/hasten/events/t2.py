"""t2, a time-series transformer for light curves: one small block over a hundred time points.

``(batch, time, bands)`` -> robust scaling -> 1 × 1 convolution -> + sinusoidal positions -> one post-norm block ->
mean over time -> logits. Optional features (redshift and its error) are appended as further points in time.

"The Tiny Time-series Transformer", Allam, Peloton and McEwen 2023, arXiv:2303.08951, and "Paying Attention to
Astronomical Transients", Allam and McEwen 2021, arXiv:2105.06178. Differs from the papers in that scaling is part of
the model, so that a saved file is whole.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from hasten.errors import ConfigurationError

__all__ = ["T2", "T2Config", "weighted_log_loss"]


@dataclass(frozen=True)
class T2Config:
    """Sizes; the defaults are those of the published result files.

    >>> T2Config(classes=14).width
    32
    """

    bands: int = 6
    """passbands of the grid"""
    length: int = 100
    """time points of the grid"""
    classes: int = 7
    """kinds of objects"""
    width: int = 32
    """channels of the embedding"""
    heads: int = 16
    """attention heads; they divide the width"""
    hidden: int = 128
    """width of the feed-forward part"""
    layers: int = 1
    """blocks"""
    dropout: float = 0.1
    """share of channels that training leaves out"""
    features: int = 0
    """numbers beside the light curve, such as redshift and its error"""

    def __post_init__(self) -> None:
        if min(self.bands, self.length, self.classes, self.width, self.heads, self.hidden, self.layers) < 1:
            raise ConfigurationError(f"every size of a T2 is at least 1, got {self}")
        if self.width % self.heads:
            raise ConfigurationError(f"{self.heads} heads do not divide a width of {self.width}; give another number")
        if not 0 <= self.dropout < 1:
            raise ConfigurationError(f"dropout {self.dropout} is not a share below 1")


class _Block(nn.Module):
    """Post-norm attention and feed-forward."""

    def __init__(self, config: T2Config) -> None:
        super().__init__()
        self.heads = config.heads
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.out = nn.Linear(config.width, config.width)
        self.norm1 = nn.LayerNorm(config.width, eps=1e-6)
        self.up = nn.Linear(config.width, config.hidden)
        self.down = nn.Linear(config.hidden, config.width)
        self.norm2 = nn.LayerNorm(config.width, eps=1e-6)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, time, width) -> the same."""
        batch, time, width = x.shape
        q, k, v = self.qkv(x).view(batch, time, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        mixed = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, time, width)
        x = self.norm1(x + self.dropout(self.out(mixed)))
        result: Tensor = self.norm2(x + self.dropout(self.down(torch.relu(self.up(x)))))
        return result


class T2(nn.Module):
    """See the module.

    >>> T2(T2Config(bands=2, classes=4)).eval()(torch.zeros(3, 100, 2)).shape
    torch.Size([3, 4])
    """

    centre: Tensor
    spread: Tensor

    def __init__(self, config: T2Config | None = None) -> None:
        super().__init__()
        self.config = config = config or T2Config()
        self.embed = nn.Conv1d(config.bands, config.width, 1)
        self.blocks = nn.ModuleList(_Block(config) for _ in range(config.layers))
        self.dropout = nn.Dropout(config.dropout)
        self.head = nn.Linear(config.width, config.classes)
        self.register_buffer("centre", torch.zeros(config.bands))
        self.register_buffer("spread", torch.ones(config.bands))

    def scale_by(self, grid: Tensor) -> None:
        """Take median and interquartile range of every band from training curves (objects, time, bands)."""
        rows = grid.reshape(-1, grid.shape[-1]).sort(0).values
        low, middle, high = (rows[round(q * (len(rows) - 1))] for q in (0.25, 0.5, 0.75))
        self.centre.copy_(middle)
        self.spread.copy_((high - low).clamp(min=1e-6))

    def forward(self, grid: Tensor, features: Tensor | None = None) -> Tensor:
        """Light curves (batch, time, bands) and features (batch, features) -> logits (batch, classes)."""
        x = (grid - self.centre) / self.spread
        if features is not None:
            x = torch.cat([x, features[:, :, None].expand(-1, -1, self.config.bands)], 1)
        x = torch.relu(self.embed(x.transpose(1, 2))).transpose(1, 2)
        x = x + _positions(x.shape[1], self.config.width)
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.dropout(x.mean(1)))
        return logits


def _positions(time: int, width: int) -> Tensor:
    """(time, width): sines in even channels, cosines in odd ones. Computed, so that no file holds them."""
    places = torch.arange(time).float()[:, None]
    rates = torch.exp(torch.arange(width // 2).float() * (-2 * math.log(10000.0) / width))
    angles = places * rates
    pairs = torch.stack([torch.sin(angles), torch.cos(angles)], -1).reshape(time, -1)
    return pairs if width % 2 == 0 else torch.cat([pairs, torch.sin(places / 10000.0)], 1)


def weighted_log_loss(logits: Tensor, labels: Tensor, weights: Tensor | None = None) -> Tensor:
    """``−(1/M) Σ_m w_m (Σ_i y_im ln p_im) / N_m`` over the classes m that occur; p within [1e−15, 1 − 1e−15].

    logits (batch, classes), labels (batch,), weights (classes,) -> a scalar. Weights are normalised to mean 1.

    >>> float(weighted_log_loss(torch.zeros(6, 3), torch.tensor([0, 0, 0, 0, 1, 2]))) - math.log(3) < 1e-6
    True
    """
    classes = logits.shape[1]
    given = torch.ones(classes, dtype=logits.dtype) if weights is None else weights.to(logits.dtype)
    log_p = torch.log_softmax(logits, -1).gather(1, labels[:, None])[:, 0]
    log_p = log_p.clamp(math.log(1e-15), math.log1p(-1e-15))
    counts = torch.zeros(classes, dtype=logits.dtype).index_add_(0, labels, torch.ones_like(log_p))
    sums = torch.zeros(classes, dtype=logits.dtype).index_add_(0, labels, log_p)
    there = counts > 0
    share = given[there] / given[there].sum()
    return -(share * sums[there] / counts[there]).sum()


def class_weights(labels: Tensor, classes: int) -> Tensor:
    """(classes,): 1 / frequency, mean 1 over a sample, for a loss per batch that does not depend on who is in it."""
    counts = torch.bincount(labels, minlength=classes).clamp(min=1).float()
    return len(labels) / (classes * counts)


def balanced_cross_entropy(weights: Tensor) -> Any:
    """``loss(model, (grid, labels))``: cross-entropy with fixed class weights, what training minimises."""

    def loss(model: nn.Module, batch: Any) -> Tensor:
        grid, labels = batch
        return functional.cross_entropy(model(grid), labels, weight=weights)

    return loss
