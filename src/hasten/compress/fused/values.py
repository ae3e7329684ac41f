"""What a lowered network computes with: arrays as views of buffers, and operations in order.

A buffer is a run of float32; a value says where in it an array begins and how far its neighbours lie apart. Turning,
cutting and repeating an array therefore costs nothing: only its numbers change.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from torch import Tensor

__all__ = ["Buffer", "Operation", "Unsupported", "Value", "contiguous", "merged", "viewed"]


class Unsupported(Exception):
    """An operator that has no operation here; the text names it and says why."""


@dataclass(eq=False)
class Buffer:
    """``size`` float32."""

    size: int
    content: Tensor | None = None
    """what it always holds, flat; None for what is computed"""


@dataclass(frozen=True, eq=False)
class Value:
    """An array in a buffer; ``strides`` and ``start`` count numbers."""

    buffer: Buffer
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    start: int = 0

    @property
    def size(self) -> int:
        """Numbers of the array."""
        return math.prod(self.shape)

    @property
    def in_order(self) -> bool:
        """Whether its numbers lie one behind the other."""
        return viewed(self, (self.size,)) is not None


@dataclass(frozen=True)
class Operation:
    """One row of the program's table."""

    kind: int
    """a constant of :mod:`run`"""
    result: Value
    sources: tuple[Value, ...]
    sizes: tuple[int, ...]
    """up to five dimensions that the loop runs over"""
    strides: tuple[tuple[int, ...], ...] = ()
    """for the result and then each source, in the order of ``sizes``"""
    code: int = 0
    number: float = 0.0
    flag: int = 0
    matrix: str = ""
    """name of the weight of a product or a look-up"""
    bias: Value | None = None
    extra: tuple[Value, ...] = field(default=())
    """values that are read beside the sources"""
    matrices: tuple[tuple[str, Value | None, bool], ...] = ()
    """where an operation has several: their names, biases, and whether they stay in float32"""


def contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides of an array whose numbers lie in order.

    >>> contiguous((2, 3, 4))
    (12, 4, 1)
    """
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= size
    return tuple(reversed(strides))


def viewed(value: Value, shape: tuple[int, ...]) -> Value | None:
    """The same numbers as an array of ``shape``, or None where they would have to move."""
    old = [(n, s) for n, s in zip(value.shape, value.strides, strict=True) if n != 1]
    strides, at = [], 0
    groups: list[tuple[int, int]] = []  # runs of old dimensions that lie evenly, as (numbers, step)
    for n, s in old:
        if groups and groups[-1][1] == n * s:
            groups[-1] = (groups[-1][0] * n, s)
        else:
            groups.append((n, s))
    held, step = groups[0] if groups else (1, 1)
    done = 1  # of the group, by the new dimensions so far
    for n in shape:
        if n == 1:
            strides.append(0)
            continue
        while done == held:
            at += 1
            if at >= len(groups):
                return None
            (held, step), done = groups[at], 1
        done *= n
        if held % done:
            return None
        strides.append(step * (held // done))
    return Value(value.buffer, shape, tuple(strides), value.start)


def merged(sizes: tuple[int, ...], strides: list[tuple[int, ...]]) -> tuple[tuple[int, ...], list[tuple[int, ...]]]:
    """The same loop over fewer dimensions: neighbours that lie evenly in every array become one.

    >>> merged((2, 3, 1, 4), [(12, 4, 4, 1), (0, 4, 4, 1)])
    ((2, 12), [(12, 1), (0, 1)])
    """
    kept: list[int] = []
    columns: list[list[int]] = []
    for axis, n in enumerate(sizes):
        if n == 1:
            continue
        mine = [s[axis] for s in strides]
        if kept and all(before == n * here for before, here in zip(columns[-1], mine, strict=True)):
            kept[-1] *= n
            columns[-1] = mine
        else:
            kept.append(n)
            columns.append(mine)
    if not kept:
        kept, columns = [1], [[0] * len(strides)]
    return tuple(kept), [tuple(c[i] for c in columns) for i in range(len(strides))]
