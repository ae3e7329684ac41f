"""A matrix as a product of two thin ones, alone or as a branch beside another layer.

``y = base(x) + up(down(x))`` with ``down`` (rank, in) and ``up`` (out, rank). Without a base it is a factored layer;
with one it is an adapter, or the part of a weight that few bits cannot carry. Widening it adds an adapter exactly:
``[up, B] [down; A] = up down + B A``.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from hasten.errors import ConfigurationError

__all__ = ["FactorConv2d", "LowRankLinear", "truncate"]


def truncate(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Best approximation of rank ``rank``: matrix (out, in) -> up (out, rank), down (rank, in), all singular values.

    The values' square roots lie on both sides, so that neither factor is larger than the other. In float64.

    >>> up, down, values = truncate(torch.diag(torch.tensor([3.0, 2.0, 1.0])), 2)
    >>> [round(v, 6) for v in (up @ down).diagonal().tolist()], [round(v, 6) for v in values.tolist()]
    ([3.0, 2.0, 0.0], [3.0, 2.0, 1.0])
    """
    left, values, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    root = values[:rank].sqrt()
    return left[:, :rank] * root, root[:, None] * right[:rank], values


class LowRankLinear(nn.Module):
    """``base(x) + x downᵀ upᵀ + bias``: (..., in) -> (..., out).

    >>> layer = LowRankLinear(torch.ones(1, 4), torch.ones(3, 1))
    >>> layer(torch.ones(2, 4)).tolist()[0], layer.rank, layer.parameters_of_branch
    ([4.0, 4.0, 4.0], 1, 7)
    """

    def __init__(self, down: Tensor, up: Tensor, *, base: nn.Module | None = None, bias: Tensor | None = None) -> None:
        super().__init__()
        if down.shape[0] != up.shape[1]:
            raise ConfigurationError(
                f"down is {tuple(down.shape)} and up {tuple(up.shape)}; the first must have as many rows as the second "
                "has columns"
            )
        self.down = nn.Parameter(down)
        self.up = nn.Parameter(up)
        self.base = base
        self.bias = None if bias is None else nn.Parameter(bias)

    @classmethod
    def of(cls, layer: nn.Linear, rank: int) -> LowRankLinear:
        """The best factors of a layer's weight; its bias stays."""
        up, down, _ = truncate(layer.weight.detach(), rank)
        dtype = layer.weight.dtype
        bias = None if layer.bias is None else layer.bias.detach().clone()
        return cls(down.to(dtype).contiguous(), up.to(dtype).contiguous(), bias=bias)

    @property
    def in_features(self) -> int:
        """Width of the input."""
        return self.down.shape[1]

    @property
    def out_features(self) -> int:
        """Width of the output."""
        return self.up.shape[0]

    @property
    def rank(self) -> int:
        """Width between the two factors."""
        return self.down.shape[0]

    @property
    def parameters_of_branch(self) -> int:
        """Numbers of both factors."""
        return self.down.numel() + self.up.numel()

    def forward(self, x: Tensor) -> Tensor:
        between = functional.linear(x, self.down)
        if self.base is None:
            return functional.linear(between, self.up, self.bias)
        # The up-projection adds to what the base made, so that the result is written once more and not twice.
        made: Tensor = self.base(x)
        flat = torch.addmm(
            made.reshape(-1, made.shape[-1]), between.reshape(-1, self.rank).to(made.dtype), self.up.T.to(made.dtype)
        )
        made = flat.view(made.shape)
        return made if self.bias is None else made + self.bias

    def widened(self, down: Tensor, up: Tensor) -> LowRankLinear:
        """A layer with another product added: down (more, in), up (out, more). Exact, whatever the base is."""
        if down.shape[1] != self.in_features or up.shape[0] != self.out_features or down.shape[0] != up.shape[1]:
            raise ConfigurationError(
                f"an adapter of {tuple(up.shape)} x {tuple(down.shape)} does not fit a layer of {self.out_features} x "
                f"{self.in_features}; give up (out, r) and down (r, in)"
            )
        dtype = self.down.dtype
        return LowRankLinear(
            torch.cat([self.down.detach(), down.to(dtype)]),
            torch.cat([self.up.detach(), up.to(dtype)], 1),
            base=self.base,
            bias=None if self.bias is None else self.bias.detach(),
        )

    def dense(self) -> nn.Linear:
        """One matrix that does the same; only where the base is an ``nn.Linear`` or absent."""
        weight = self.up.detach().double() @ self.down.detach().double()
        bias = None if self.bias is None else self.bias.detach()
        if self.base is not None:
            if not isinstance(self.base, nn.Linear):
                raise ConfigurationError(f"a branch beside {type(self.base).__name__} cannot be merged into one matrix")
            weight = weight + self.base.weight.detach().double()
            if self.base.bias is not None:
                bias = self.base.bias.detach() if bias is None else bias + self.base.bias.detach()
        layer = nn.Linear(self.in_features, self.out_features, bias=bias is not None)
        layer.weight = nn.Parameter(weight.to(self.up.dtype))
        if bias is not None:
            layer.bias = nn.Parameter(bias.clone())
        return layer

    def extra_repr(self) -> str:
        """For ``print(model)``."""
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}"


class FactorConv2d(nn.Module):
    """A convolution as one with ``rank`` outputs and a 1 x 1 one behind it: (batch, in, height, width).

    >>> layer = FactorConv2d.of(nn.Conv2d(4, 6, 3, padding=1), 6)
    >>> layer(torch.zeros(1, 4, 5, 5)).shape
    torch.Size([1, 6, 5, 5])
    """

    def __init__(self, spatial: nn.Conv2d, mix: nn.Conv2d) -> None:
        super().__init__()
        self.spatial, self.mix = spatial, mix

    @property
    def rank(self) -> int:
        """Channels between the two."""
        return self.mix.in_channels

    @classmethod
    def of(cls, layer: nn.Conv2d, rank: int) -> FactorConv2d:
        """The best factors of the kernel (out, in * k * k). Raises for a grouped convolution."""
        if layer.groups != 1:
            raise ConfigurationError(f"a convolution in {layer.groups} groups has no common factors; leave it as it is")
        up, down, _ = truncate(layer.weight.detach().flatten(1), rank)
        return cls.from_factors(layer, up, down)

    @classmethod
    def from_factors(cls, layer: nn.Conv2d, up: Tensor, down: Tensor) -> FactorConv2d:
        """``up`` (out, rank) and ``down`` (rank, in * k * k) in the place of a kernel, with the layer's strides."""
        rank, dtype = down.shape[0], layer.weight.dtype
        spatial = nn.Conv2d(
            layer.in_channels, rank, layer.kernel_size, layer.stride, layer.padding, layer.dilation, bias=False,  # type: ignore[arg-type]
            padding_mode=layer.padding_mode,
        )  # fmt: skip
        mix = nn.Conv2d(rank, layer.out_channels, 1, bias=layer.bias is not None)
        spatial.weight = nn.Parameter(down.to(dtype).reshape(rank, layer.in_channels, *layer.kernel_size).contiguous())
        mix.weight = nn.Parameter(up.to(dtype)[:, :, None, None].contiguous())
        if layer.bias is not None:
            mix.bias = nn.Parameter(layer.bias.detach().clone())
        return cls(spatial, mix)

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.mix(self.spatial(x))
        return made
