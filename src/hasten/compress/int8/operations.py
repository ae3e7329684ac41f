"""What a byte network is made of: operations over unsigned bytes that stand for ``scale * (byte - zero)``.

A convolution takes in what follows it: an addition, and a clamp. Only what is written to memory has a scale; sums stay
int32 and are scaled once, in float32. A linear layer over a feature map is a convolution as large as the map.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

__all__ = ["Convolution", "Joined", "Mean", "Operation", "Pool", "Shortcut", "Value"]


@dataclass
class Value:
    """A tensor (height, width, channels) of bytes."""

    name: str
    """of the node that makes it"""
    channels: int
    height: int
    width: int
    scale: float = 1.0
    zero: int = 0
    border: int = 0
    """rows and columns of ``zero`` around it, as its readers need them"""


@dataclass
class Shortcut:
    """A value that is added: every ``stride``-th place of it, its channels from ``offset`` on; the rest is 0."""

    value: Value
    stride: int = 1
    offset: int = 0


@dataclass
class Operation:
    """One operation."""

    name: str
    """node, for reports"""
    source: Value
    result: Value | None
    """None: its numbers leave the network as float32"""
    shape: tuple[int, int, int]
    """(height, width, channels) of the result"""


@dataclass
class Convolution(Operation):
    """Weights (out, in, rows, columns) int8 with a scale for each output; or (out, 1, rows, columns), depthwise."""

    weight: Any = None
    weight_scale: Any = None
    """(out,) float64"""
    bias: Any = None
    """(out,) float64, in real units"""
    stride: int = 1
    padding: int = 0
    depthwise: bool = False
    shortcut: Shortcut | None = None
    low: float = -np.inf
    """least real value, 0 behind a ReLU"""
    high: float = np.inf


@dataclass
class Pool(Operation):
    """Largest of a window."""

    window: int = 2
    stride: int = 2
    padding: int = 0


@dataclass
class Mean(Operation):
    """Average over all places."""


@dataclass
class Joined(Operation):
    """Sum of two values, then a clamp."""

    shortcut: Shortcut = field(default_factory=lambda: Shortcut(Value("", 0, 0, 0)))
    low: float = -np.inf
    high: float = np.inf
