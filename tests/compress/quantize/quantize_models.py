"""Small trained-looking models for the tests of this room."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def cnn(seed: int = 0) -> nn.Sequential:
    """Convolutions with batch normalisation, one depthwise, and a linear layer; statistics as after training."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Flatten(), nn.Linear(64, 10),
    )  # fmt: skip
    for module in model:
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.3)  # type: ignore[arg-type]
            nn.init.uniform_(module.running_var, 0.3, 3.0)  # type: ignore[arg-type]
            nn.init.uniform_(module.weight, 0.3, 3.0)
            nn.init.normal_(module.bias)
    return model.eval()


class Attention(nn.Module):
    """A pre-norm block that reads one normalisation in three layers, with outliers in two channels."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))
        self.out = nn.Linear(width, width)
        with torch.no_grad():
            self.norm.weight[3], self.norm.weight[7] = 20.0, 30.0

    def forward(self, x: Tensor) -> Tensor:
        """(batch, time, width) -> the same."""
        h = self.norm(x)
        mixed = nn.functional.scaled_dot_product_attention(self.q(h), self.k(h), self.v(h))
        result: Tensor = x + self.out(mixed)
        return result


def transformer(seed: int = 0, depth: int = 2) -> nn.Sequential:
    """Blocks of :class:`Attention`, then a head."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Sequential(*(Attention() for _ in range(depth))), nn.Linear(32, 10)).eval()


def images(count: int = 64, seed: int = 1) -> Tensor:
    """(count, 1, 8, 8)."""
    return torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(seed))


def rows(count: int = 16, seed: int = 1) -> Tensor:
    """Correlated rows (count, 6, 32)."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(8, 32, generator=torch.Generator().manual_seed(7))
    return torch.randn(count, 6, 8, generator=generator) @ mix + 0.1 * torch.randn(count, 6, 32, generator=generator)
