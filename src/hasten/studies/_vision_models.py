"""Small networks for images that the compression studies share, and their training.

Images are (batch, channels, height, width). Each network is made for one size and holds what makes compression hard:
an MLP, a residual network with depthwise blocks (few weights in each channel), and a vision transformer (outliers).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["ResidualNet", "VisionTransformer", "accuracy", "classify", "digits", "digits_cnn", "digits_mlp", "train"]

Images = tuple[Tensor, Tensor, Tensor, Tensor]


def digits(seed: int = 0) -> Images | None:
    """scikit-learn's 8 x 8 digits in 0 … 1, (n, 1, 8, 8), a fifth held out; None where the package is absent."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        return None
    data = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(seed))
    x = torch.from_numpy(data.images).float()[order, None] / 16
    y = torch.from_numpy(data.target).long()[order]
    held = len(y) // 5
    return x[held:], y[held:], x[:held], y[:held]


def digits_mlp(seed: int = 0) -> nn.Sequential:
    """64-128-128-10 with ReLU, over (n, 1, 8, 8)."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10)
    )


def digits_cnn(seed: int = 0, size: int = 8) -> nn.Sequential:
    """Three convolutions with batch normalisation, then one linear layer."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Conv2d(32, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(128, 10),
    )  # fmt: skip


class _Depthwise(nn.Module):
    """Expand, filter each channel, project; a shortcut where the shape stays."""

    def __init__(self, before: int, after: int, stride: int, expand: int = 3) -> None:
        super().__init__()
        wide = before * expand
        self.expand = nn.Conv2d(before, wide, 1, bias=False)
        self.expand_norm = nn.BatchNorm2d(wide)
        self.filter = nn.Conv2d(wide, wide, 3, stride=stride, padding=1, groups=wide, bias=False)
        self.filter_norm = nn.BatchNorm2d(wide)
        self.project = nn.Conv2d(wide, after, 1, bias=False)
        self.project_norm = nn.BatchNorm2d(after)
        self.first, self.second = nn.ReLU(), nn.ReLU()
        self.shortcut = stride == 1 and before == after

    def forward(self, x: Tensor) -> Tensor:
        """(batch, before, h, w) -> (batch, after, h / stride, w / stride)."""
        inside = self.first(self.expand_norm(self.expand(x)))
        inside = self.second(self.filter_norm(self.filter(inside)))
        result: Tensor = self.project_norm(self.project(inside))
        return x + result if self.shortcut else result


class _Plain(nn.Module):
    """Two convolutions and a shortcut."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU()
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, width, h, w) -> the same."""
        result: Tensor = torch.relu(x + self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x))))))
        return result


class ResidualNet(nn.Module):
    """A residual network with plain and depthwise blocks for images of one or three channels."""

    def __init__(self, channels: int = 1, width: int = 16, classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Conv2d(channels, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.act = nn.ReLU()
        self.blocks = nn.Sequential(
            _Plain(width),
            _Depthwise(width, 2 * width, 2),
            _Depthwise(2 * width, 2 * width, 1),
            _Plain(2 * width),
            _Depthwise(2 * width, 3 * width, 2),
            _Depthwise(3 * width, 3 * width, 1),
        )
        self.head = nn.Linear(3 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, channels, h, w) -> (batch, classes)."""
        logits: Tensor = self.head(self.blocks(self.act(self.norm(self.stem(x)))).mean((2, 3)))
        return logits


class _Attention(nn.Module):
    """Self-attention over patches, its products written out as linear layers."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, time, width) -> the same."""
        batch, time, width = x.shape
        qkv = self.qkv(x).view(batch, time, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(qkv[0], qkv[1], qkv[2])
        result: Tensor = self.out(mixed.transpose(1, 2).reshape(batch, time, width))
        return result


class _Layer(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = _Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.act = nn.GELU()
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, time, width) -> the same."""
        x = x + self.attention(self.norm1(x))
        result: Tensor = x + self.down(self.act(self.up(self.norm2(x))))
        return result


class VisionTransformer(nn.Module):
    """A pre-norm vision transformer with a class token."""

    def __init__(
        self, size: int = 28, patch: int = 4, width: int = 64, depth: int = 4, heads: int = 4, channels: int = 1,
        classes: int = 10,
    ) -> None:  # fmt: skip
        super().__init__()
        self.patches = nn.Conv2d(channels, width, patch, stride=patch)
        count = (size // patch) ** 2
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.position = nn.Parameter(torch.randn(1, count + 1, width) * 0.02)
        self.layers = nn.Sequential(*(_Layer(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, channels, size, size) -> (batch, classes)."""
        rows = self.patches(x).flatten(2).transpose(1, 2)
        rows = torch.cat([self.token.expand(len(rows), -1, -1), rows], 1) + self.position
        logits: Tensor = self.head(self.norm(self.layers(rows))[:, 0])
        return logits


def classify(model: nn.Module, batch: Any) -> Tensor:
    """Cross-entropy of ``batch`` = (images, labels)."""
    x, y = batch
    return functional.cross_entropy(model(x), y)


def train(
    model: nn.Module, x: Tensor, y: Tensor, *, epochs: int, rate: float = 2e-3, size: int = 128, seed: int = 0
) -> nn.Module:
    """Fit ``model`` in place by AdamW with a cosine rate; returned in eval mode."""
    from hasten.train.fit import fit

    def batches(epoch: int) -> Any:
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed * 1009 + epoch))
        return ((x[i], y[i]) for i in order.split(size))

    fit(model, batches, classify, epochs=epochs, rate=rate, seed=seed)
    return model.eval()


def accuracy(model: nn.Module, x: Tensor, y: Tensor, size: int = 500) -> float:
    """Share of right answers."""
    model.eval()
    with torch.inference_mode():
        right = sum(int((model(a).argmax(1) == b).sum()) for a, b in zip(x.split(size), y.split(size), strict=True))
    return right / len(y)
