"""Which elements of a tensor share a scale: all, a channel, a group of neighbours, or a token.

Every choice lays the tensor out as rows (scales, elements) once, so that ranges of all rows are found together; the
scales come back in a compact shape that broadcasts against the tensor, or is spread over it where groups are short.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from hasten.compress.values import named_value
from hasten.errors import ConfigurationError

__all__ = ["Granularity", "PerChannel", "PerGroup", "PerTensor", "PerToken"]

Shape = tuple[int, ...]


class Granularity(ABC):
    """Which elements share a scale."""

    @abstractmethod
    def compact(self, shape: Shape) -> Shape:
        """Shape of the scales of a tensor of ``shape``."""

    @abstractmethod
    def rows(self, x: Tensor, fill: float = 0.0) -> Tensor:
        """``x`` as (scales, elements); a short group is filled up with ``fill``. Rows follow the compact shape."""

    def spread(self, scale: Tensor, shape: Shape) -> Tensor:
        """Compact scales as something that broadcasts against ``shape``; further axes of ``scale`` stay behind it."""
        return scale

    def check(self, shape: Shape) -> None:  # noqa: B027  (most fit every shape)
        """Raises :class:`~hasten.errors.ConfigurationError` where a tensor of ``shape`` has no such axis."""


@named_value
@dataclass(frozen=True)
class PerTensor(Granularity):
    """One scale for everything.

    >>> PerTensor().compact((3, 4))
    (1, 1)
    """

    def compact(self, shape: Shape) -> Shape:
        """One entry, of as many axes as the tensor."""
        return (1,) * len(shape)

    def rows(self, x: Tensor, fill: float = 0.0) -> Tensor:
        """(1, elements)."""
        return x.reshape(1, -1)


@named_value
@dataclass(frozen=True)
class PerChannel(Granularity):
    """One scale for each index along ``axis``.

    >>> PerChannel(0).compact((3, 4))
    (3, 1)
    """

    axis: int = 0
    """0 is the output of a linear or convolution weight"""

    def compact(self, shape: Shape) -> Shape:
        """Ones but for the axis."""
        self.check(shape)
        kept = self.axis % len(shape)
        return tuple(n if i == kept else 1 for i, n in enumerate(shape))

    def rows(self, x: Tensor, fill: float = 0.0) -> Tensor:
        """(channels, elements of a channel)."""
        self.check(tuple(x.shape))
        return x.movedim(self.axis, 0).reshape(x.shape[self.axis], -1)

    def check(self, shape: Shape) -> None:
        """The axis exists."""
        _check_axis(self.axis, shape)


@named_value
@dataclass(frozen=True)
class PerGroup(Granularity):
    """One scale for ``size`` neighbours along ``axis``; the last group may be short.

    >>> PerGroup(1, 32).compact((8, 70))
    (8, 3)
    """

    axis: int = 1
    """1 is the input of a linear weight"""
    size: int = 32
    """elements of a group"""

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ConfigurationError(f"a group of {self.size} elements holds nothing; give 32, 64 or 128")

    def compact(self, shape: Shape) -> Shape:
        """The axis counts groups."""
        self.check(shape)
        kept = self.axis % len(shape)
        return tuple(math.ceil(n / self.size) if i == kept else n for i, n in enumerate(shape))

    def rows(self, x: Tensor, fill: float = 0.0) -> Tensor:
        """(groups, size), the groups in the order of the compact shape."""
        self.check(tuple(x.shape))
        last = x.movedim(self.axis, -1)
        short = -last.shape[-1] % self.size
        if short:
            last = torch.nn.functional.pad(last, (0, short), value=fill)
        grouped = last.unflatten(-1, (-1, self.size))
        return grouped.movedim(-2, self.axis % x.dim()).reshape(-1, self.size)  # type: ignore[no-any-return]

    def spread(self, scale: Tensor, shape: Shape) -> Tensor:
        """Each group's scale at each of its elements."""
        kept = self.axis % len(shape)
        return scale.repeat_interleave(self.size, dim=kept).narrow(kept, 0, shape[kept])

    def check(self, shape: Shape) -> None:
        """The axis exists."""
        _check_axis(self.axis, shape)


@named_value
@dataclass(frozen=True)
class PerToken(Granularity):
    """One scale for each vector along the last axis: the activations of a token.

    >>> PerToken().compact((2, 5, 64))
    (2, 5, 1)
    """

    def compact(self, shape: Shape) -> Shape:
        """The last axis has one entry."""
        return (*shape[:-1], 1)

    def rows(self, x: Tensor, fill: float = 0.0) -> Tensor:
        """(tokens, channels)."""
        return x.reshape(-1, x.shape[-1])


def _check_axis(axis: int, shape: Shape) -> None:
    if not -len(shape) <= axis < len(shape):
        raise ConfigurationError(f"a tensor of shape {shape} has no axis {axis}; give one of 0 … {len(shape) - 1}")
