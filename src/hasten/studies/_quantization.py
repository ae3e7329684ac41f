"""What the quantisation studies share: data, trained networks that are made once, distributions and random layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from hasten.spiking.checkpoint import trained
from hasten.studies._vision_models import ResidualNet, VisionTransformer, digits, digits_cnn, digits_mlp, train
from hasten.studies.study import Scale

Images = tuple[Tensor, Tensor, Tensor, Tensor]


def fashion(scale: Scale) -> Images | None:
    """Fashion-MNIST at 14 x 14: training images (n, 1, 14, 14) in 0 … 1, labels, test images, labels."""
    path = scale.find("vision/fashion_mnist.npz")
    if path is None:
        return None
    with np.load(path) as z:
        x, y, xt, yt = (torch.from_numpy(z[k]) for k in ("x_train", "y_train", "x_test", "y_test"))
    small = [functional.avg_pool2d(v[:, None].float() / 255, 2) for v in (x, xt)]
    return small[0], y.long(), small[1], yt.long()


def make(kind: str, size: int, seed: int) -> nn.Module:
    """An untrained network for images of ``size``."""
    torch.manual_seed(seed)
    if kind == "mlp":
        return digits_mlp(seed)
    if kind == "cnn":
        return digits_cnn(seed)
    if kind == "residual":
        return ResidualNet()
    return VisionTransformer(size, 2, 32, 2, 4) if size < 10 else VisionTransformer(size, 2, 48, 3, 4)


def train_network(x: Tensor, y: Tensor, *, kind: str, epochs: int, seed: int, checkpoint: Path) -> dict[str, Tensor]:
    """Weights of a trained network."""
    return train(make(kind, x.shape[-1], seed), x, y, epochs=epochs, rate=4e-3, size=64, seed=seed).state_dict()


def network(kind: str, data: Images, epochs: int, seed: int) -> nn.Module:
    """A trained network, made once and kept in the user's cache."""
    state = trained(
        f"quantization-{kind}",
        train_network,
        {"kind": kind, "epochs": epochs, "seed": seed},
        {"x": data[0], "y": data[1]},
    )
    model = make(kind, data[0].shape[-1], seed)
    model.load_state_dict(state)
    return model.eval()


def batches(data: Images, count: int, size: int = 64) -> list[Tensor]:
    """The first training images, for calibration."""
    return list(data[0][:count].split(size))


def distributions(count: int, seed: int) -> dict[str, Tensor]:
    """One draw each of the four laws of the study."""
    rng = np.random.default_rng(seed)
    drawn = {
        "uniform": rng.uniform(-1, 1, count),
        "Gaussian": rng.normal(size=count),
        "Laplace": rng.laplace(size=count),
        "Student t, 4 degrees": rng.standard_t(4, size=count),
    }
    return {name: torch.tensor(v, dtype=torch.float32) for name, v in drawn.items()}


def random_layer(seed: int) -> tuple[nn.Module, Tensor]:
    """A linear or convolution layer of a random shape, and inputs whose mean is not zero."""
    generator = torch.Generator().manual_seed(seed)

    def pick(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (1,), generator=generator))

    torch.manual_seed(seed)
    if seed % 3 == 0:
        inner = pick(1, 300)
        layer: nn.Module = nn.Linear(inner, pick(1, 200), bias=bool(seed % 2))
        return layer, torch.randn(pick(1, 40), inner, generator=generator) + 0.5
    groups = (1, 1, 2, 4)[pick(0, 3)]
    before, after, kernel = groups * pick(1, 6), groups * pick(1, 6), pick(1, 4)
    knobs: dict[str, Any] = {
        "stride": pick(1, 2), "padding": pick(0, 2), "dilation": pick(1, 2), "groups": groups, "bias": bool(seed % 2),
    }  # fmt: skip
    size = 2 * kernel + pick(2, 8)
    x = torch.randn(pick(1, 3), before, size, size + 1, generator=generator) + 0.5
    if seed % 3 == 1:
        return nn.Conv2d(before, after, kernel, **knobs), x
    return nn.Conv1d(before, after, kernel, **knobs), x[:, :, 0]


def digits_of(scale: Scale) -> Images | None:
    """scikit-learn's digits, split by the study's seed."""
    return digits(scale.seed)


@torch.no_grad()
def relative(a: Tensor, b: Tensor) -> float:
    """Norm of the difference over the norm of ``b``."""
    return float((a - b).norm() / b.norm())


def mean_of(function: Callable[[int], float], count: int) -> float:
    """Mean over seeds."""
    return float(np.mean([function(seed) for seed in range(count)]))


def by_seed(apart: Sequence[float] | NDArray[np.float64]) -> str:
    """Differences of every seed and the standard error of their mean, for a check's note.

    >>> by_seed([0.1, -0.1])
    'by seed +0.1000, -0.1000 (standard error 0.1000)'
    """
    each = ", ".join(f"{v:+.4f}" for v in apart)
    error = f" (standard error {np.std(apart, ddof=1) / len(apart) ** 0.5:.4f})" if len(apart) > 1 else ""
    return f"by seed {each}{error}"
