"""Factors whose components order themselves by importance while they are trained.

A layer is ``U Vᵀ`` (out, r)(r, in). Each step one layer i and a prefix b are drawn from all pairs (i, b), and a pass
uses only the first b components of that layer: early components must do without later ones, so they become the
important ones. A group lasso over tails, ``sum_b |U[:, b:]| + |V[:, b:]|``, presses the last ones to zero, and they
are dropped. "Maestro: Uncovering Low-Rank Structures via Trainable Decomposition", Horváth et al. 2023,
arXiv:2308.14929.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from hasten.compress.lowrank.layers import FactorConv2d, LowRankLinear, truncate
from hasten.errors import ConfigurationError

__all__ = [
    "OrderedConv2d",
    "OrderedLayer",
    "OrderedLinear",
    "RankSampler",
    "group_lasso",
    "ordered_layers",
    "prefixes_of",
]


class OrderedLayer(nn.Module):
    """What ordered layers share: factors, how many components are left, and how many a pass uses."""

    left: nn.Parameter
    """U (out, r)"""
    right: nn.Parameter
    """V (in, r), a convolution's kernel flattened to in * k * k"""
    bias: nn.Parameter | None

    def __init__(self, left: Tensor, right: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        if left.shape[1] != right.shape[1]:
            raise ConfigurationError(f"factors of {left.shape[1]} and {right.shape[1]} components have no product")
        self.left = nn.Parameter(left)
        self.right = nn.Parameter(right)
        self.bias = None if bias is None else nn.Parameter(bias)
        self.rank = left.shape[1]
        self.prefix: int | None = None

    @property
    def used(self) -> int:
        """Components of this pass."""
        return self.rank if self.prefix is None else min(self.prefix, self.rank)

    def factors(self) -> tuple[Tensor, Tensor]:
        """U and V of this pass: (out, used) and (in, used)."""
        count = self.used
        return self.left[:, :count], self.right[:, :count]

    @property
    def macs_of_rank(self) -> int:
        """Weights that one component takes; a layer of rank r costs r times it, or the dense layer's, if that is
        less."""
        return self.left.shape[0] + self.right.shape[0]

    @property
    def dense_size(self) -> int:
        """Weights of the one matrix."""
        return self.left.shape[0] * self.right.shape[0]

    def size(self, rank: int | None = None) -> int:
        """Weights that are read at ``rank``: of factors, or dense where that is no more."""
        count = self.rank if rank is None else rank
        return min(count * self.macs_of_rank, self.dense_size)

    def importance(self) -> Tensor:
        """``|U[:, b:]| |V[:, b:]|`` for every component left, (rank,), falling."""
        with torch.no_grad():
            tails = [_tails(f[:, : self.rank]) for f in (self.left, self.right)]
            return tails[0].sqrt() * tails[1].sqrt()

    def shrink(self, epsilon: float, least: int = 0) -> int:
        """Drop components whose tail is below ``epsilon`` of the whole; returns how many are left, at least
        ``least``."""
        values = self.importance()
        if len(values):
            small = (values < epsilon * values[0].clamp_min(1e-30)).nonzero()
            count = int(small[0]) if len(small) else self.rank
            if float(values[0]) < 1e-12:
                count = 0
            self.rank = max(min(least, self.rank), count)
        return self.rank


def _tails(factor: Tensor) -> Tensor:
    """Squared norms of ``factor[:, b:]`` for every b."""
    return factor.square().sum(0).flip(0).cumsum(0).flip(0)


class OrderedLinear(OrderedLayer):
    """A linear layer as ordered components: (…, in) -> (…, out).

    >>> layer = OrderedLinear.of(nn.Linear(6, 4))
    >>> layer.prefix = 2
    >>> layer(torch.zeros(3, 6)).shape, layer.rank, layer.used
    (torch.Size([3, 4]), 4, 2)
    """

    @classmethod
    def of(cls, layer: nn.Linear) -> OrderedLinear:
        """At full rank, from the singular vectors of the weight."""
        up, down, _ = truncate(layer.weight.detach(), min(layer.weight.shape))
        dtype = layer.weight.dtype
        bias = None if layer.bias is None else layer.bias.detach().clone()
        return cls(up.to(dtype).contiguous(), down.T.to(dtype).contiguous(), bias)

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.factors()
        if self.used * self.macs_of_rank >= self.dense_size:
            return functional.linear(x, left @ right.T, self.bias)
        return functional.linear(x @ right, left, self.bias)

    def deployed(self, rank: int, dense: bool) -> nn.Module:
        """A plain layer of this rank: one matrix or two."""
        left, right = self.left.detach()[:, :rank], self.right.detach()[:, :rank]
        bias = None if self.bias is None else self.bias.detach().clone()
        if not dense and rank:
            return LowRankLinear(right.T.contiguous(), left.contiguous(), bias=bias)
        layer = nn.Linear(self.right.shape[0], self.left.shape[0], bias=bias is not None)
        layer.weight = nn.Parameter((left @ right.T).contiguous())
        if bias is not None:
            layer.bias = nn.Parameter(bias)
        return layer


class OrderedConv2d(OrderedLayer):
    """A convolution as ordered components: one of the kernel's size to r channels, then one of 1 x 1.

    >>> layer = OrderedConv2d.of(nn.Conv2d(3, 8, 3, padding=1))
    >>> layer(torch.zeros(1, 3, 5, 5)).shape, layer.rank
    (torch.Size([1, 8, 5, 5]), 8)
    """

    def __init__(self, left: Tensor, right: Tensor, bias: Tensor | None, like: nn.Conv2d) -> None:
        super().__init__(left, right, bias)
        if like.groups != 1 or isinstance(like.padding, str) or like.padding_mode != "zeros":
            raise ConfigurationError("only convolutions of one group with plain padding have ordered components")
        self.channels, self.kernel = like.in_channels, like.kernel_size
        self.options: dict[str, Any] = {"stride": like.stride, "padding": like.padding, "dilation": like.dilation}

    @classmethod
    def of(cls, layer: nn.Conv2d) -> OrderedConv2d:
        """At full rank, from the singular vectors of the kernel (out, in * k * k)."""
        flat = layer.weight.detach().flatten(1)
        up, down, _ = truncate(flat, min(flat.shape))
        dtype = layer.weight.dtype
        bias = None if layer.bias is None else layer.bias.detach().clone()
        return cls(up.to(dtype).contiguous(), down.T.to(dtype).contiguous(), bias, layer)

    def _kernel(self, flat: Tensor) -> Tensor:
        return flat.reshape(-1, self.channels, *self.kernel)

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.factors()
        if self.used * self.macs_of_rank >= self.dense_size:
            return functional.conv2d(x, self._kernel(left @ right.T), self.bias, **self.options)
        between = functional.conv2d(x, self._kernel(right.T), None, **self.options)
        return functional.conv2d(between, left[:, :, None, None], self.bias)

    def deployed(self, rank: int, dense: bool) -> nn.Module:
        """A plain layer of this rank: one convolution or two."""
        left, right = self.left.detach()[:, :rank], self.right.detach()[:, :rank]
        like = nn.Conv2d(self.channels, self.left.shape[0], self.kernel, bias=self.bias is not None, **self.options)  # type: ignore[arg-type]
        if self.bias is not None:
            like.bias = nn.Parameter(self.bias.detach().clone())
        if not dense and rank:
            return FactorConv2d.from_factors(like, left, right.T)
        like.weight = nn.Parameter(self._kernel(left @ right.T).contiguous())
        return like


def ordered_layers(model: nn.Module) -> dict[str, OrderedLayer]:
    """Ordered layers by name."""
    return {n: m for n, m in model.named_modules() if isinstance(m, OrderedLayer)}


def group_lasso(model: nn.Module) -> Tensor:
    """``sum_i sum_b |U_i[:, b:]| + |V_i[:, b:]|`` over the components that are left."""
    terms = [
        (_tails(factor[:, : layer.rank]) + 1e-12).sqrt().sum()
        for layer in ordered_layers(model).values()
        if layer.rank
        for factor in (layer.left, layer.right)
    ]
    return torch.stack(terms).sum() if terms else torch.zeros(())


def prefixes_of(layers: dict[str, OrderedLayer], uses: dict[str, int], share: float) -> dict[str, int]:
    """Prefixes of all layers that take at most ``share`` of the dense multiply-adds: the components stay that hold most
    of their layer's energy ``|U_b|² |V_b|²`` per multiply-add. One component of each layer always stays.

    >>> one, other = (OrderedLinear.of(nn.Linear(8, 8)) for _ in range(2))
    >>> sorted(prefixes_of({"a": one, "b": other}, {"a": 1, "b": 1}, 0.01).values())
    [1, 1]
    """
    names, prices, worth = list(layers), [], []
    with torch.no_grad():
        for name in names:
            layer = layers[name]
            energy = (layer.left.square().sum(0) * layer.right.square().sum(0))[: layer.rank]
            price = uses[name] * layer.macs_of_rank
            rising = energy.flip(0).cummax(0).values.flip(0)  # of a prefix, whose tail may hold more
            value = rising / energy.sum().clamp_min(1e-30) / price
            value[:1] = torch.inf
            worth.append(value)
            prices.append(torch.full((layer.rank,), price))
    order = torch.cat(worth).argsort(descending=True, stable=True)
    owners = torch.cat([torch.full((len(w),), i) for i, w in enumerate(worth)])[order]
    spent = torch.cat(prices)[order].cumsum(0)
    budget = share * sum(uses[n] * layers[n].dense_size for n in names)
    kept = torch.bincount(owners[: int((spent <= budget).sum())], minlength=len(names)).tolist()
    return {n: max(1, k) for n, k in zip(names, kept, strict=True)}


class RankSampler:
    """Draws one layer and a prefix of it, uniformly over all pairs of what is left; all other layers are whole.

    >>> layer = OrderedLinear.of(nn.Linear(4, 4))
    >>> with RankSampler(0).drawn({"only": layer}):
    ...     used = layer.used
    >>> 1 <= used <= 4, layer.used
    (True, 4)
    """

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    @contextmanager
    def sized(self, layers: dict[str, OrderedLayer], uses: dict[str, int], least: float) -> Iterator[float]:
        """Inside, all layers use prefixes at once, those of a size drawn between ``least`` and what is left of the
        multiply-adds, evenly in its logarithm; yields that share of the dense ones."""
        left = sum(uses[n] * layer.size() for n, layer in layers.items())
        full = sum(uses[n] * layer.dense_size for n, layer in layers.items())
        top = min(1.0, left / full)
        drawn = float(torch.rand((), generator=self._generator))
        share = top * (min(least, top) / top) ** drawn
        for name, prefix in prefixes_of(layers, uses, share).items():
            layers[name].prefix = prefix
        try:
            yield share
        finally:
            for layer in layers.values():
                layer.prefix = None

    @contextmanager
    def drawn(self, layers: dict[str, OrderedLayer]) -> Iterator[tuple[str, int]]:
        """Inside, one layer uses a prefix; yields its name and the prefix."""
        names = [n for n, layer in layers.items() if layer.rank]
        if not names:
            yield "", 0
            return
        counts = torch.tensor([layers[n].rank for n in names])
        ends = counts.cumsum(0)
        at = int(torch.randint(int(ends[-1]), (1,), generator=self._generator))
        index = int((ends <= at).sum())
        prefix = at - int(ends[index] - counts[index]) + 1
        layer = layers[names[index]]
        layer.prefix = prefix
        try:
            yield names[index], prefix
        finally:
            layer.prefix = None
