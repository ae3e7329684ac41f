"""Numbers into spikes: rate, latency, change, or not at all (direct).

Every encoder is a pure function to time-first tensors (time, …) of 0 and 1; what is random takes a generator. Sound is
in :mod:`hasten.spiking.cochlea`; events of a sensor become frames here.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numba import njit
from torch import Tensor

from hasten.errors import ConfigurationError

__all__ = ["delta", "direct", "event_frames", "latency", "rate"]


def _check(x: Tensor, steps: int) -> None:
    if steps < 1:
        raise ConfigurationError(f"an encoding has at least one step, got {steps}")
    if x.numel() and (float(x.min()) < 0 or float(x.max()) > 1):
        raise ConfigurationError(
            f"values from {float(x.min()):g} to {float(x.max()):g} were given; scale them to 0 … 1"
        )


def direct(x: Tensor, steps: int) -> Tensor:
    """The value itself at every step: (…) -> (steps, …)."""
    if steps < 1:
        raise ConfigurationError(f"an encoding has at least one step, got {steps}")
    return x.expand(steps, *x.shape)


def rate(x: Tensor, steps: int, generator: torch.Generator | None = None) -> Tensor:
    """A spike with probability x at each step; x in [0, 1].

    >>> rate(torch.tensor([0.0, 1.0]), 3).tolist()
    [[0.0, 1.0], [0.0, 1.0], [0.0, 1.0]]
    """
    _check(x, steps)
    return (torch.rand((steps, *x.shape), generator=generator, dtype=x.dtype) < x).to(x.dtype)


def latency(x: Tensor, steps: int) -> Tensor:
    """One spike, the earlier the larger x; zero never spikes.

    The step is ``round((1 - x) (steps - 1))``.

    >>> latency(torch.tensor([1.0, 0.5, 0.0]), 3).argmax(0).tolist()
    [0, 1, 0]
    """
    _check(x, steps)
    when = ((1 - x) * (steps - 1)).round().long()
    spikes = torch.zeros((steps, *x.shape), dtype=x.dtype)
    return spikes.scatter_(0, when.unsqueeze(0), (x > 0).to(x.dtype).unsqueeze(0))


@njit(cache=True)
def _delta(x: Any, level: Any, threshold: Any, up: Any, down: Any) -> None:
    for t in range(x.shape[0]):
        for i in range(x.shape[1]):
            difference = x[t, i] - level[i]
            if difference > threshold:
                up[t, i] = 1
                level[i] += threshold
            elif difference < -threshold:
                down[t, i] = 1
                level[i] -= threshold


def delta(x: Tensor, threshold: float, level: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Changes: x (time, …, lines) -> spikes (time, …, 2 lines) and the level that they have followed to.

    A line remembers a level. Where x is more than ``threshold`` above it, the line's first half spikes and the level
    rises by the threshold; below, the second half spikes and it falls. Pass the level on to continue; None starts at
    ``x[0]``.

    >>> delta(torch.tensor([[0.0], [1.2], [1.2], [0.0]]), 1.0)[0].tolist()
    [[0.0, 0.0], [1.0, 0.0], [0.0, 0.0], [0.0, 0.0]]
    """
    if not threshold > 0:
        raise ConfigurationError(f"a change of {threshold} always spikes; give a positive threshold")
    start = (x[0] if level is None else level).detach().float().contiguous().clone()
    flat = x.detach().float().reshape(len(x), -1).contiguous().numpy()
    up, down = np.zeros(flat.shape, np.float32), np.zeros(flat.shape, np.float32)
    _delta(flat, start.view(-1).numpy(), np.float32(threshold), up, down)
    both = [torch.from_numpy(a).reshape(x.shape) for a in (up, down)]
    return torch.cat(both, -1), start


def event_frames(
    time: Any, x: Any, y: Any, polarity: Any, *, step: float, steps: int, shape: tuple[int, int]
) -> Tensor:
    """Events of a sensor -> (steps, 2, height, width) of 0 and 1: whether a pixel saw a polarity within a step.

    time in seconds from the beginning, polarity 0 or 1 (or ±1); events after the last step are dropped. Raises
    ``ValueError`` for lists of different length and for a pixel outside the sensor.
    """
    lengths = {len(np.asarray(a)) for a in (time, x, y, polarity)}
    if len(lengths) > 1:
        raise ConfigurationError(f"events are as many times as places and polarities; got lists of {sorted(lengths)}")
    for name, at, size in (("x", np.asarray(x), shape[1]), ("y", np.asarray(y), shape[0])):
        if at.size and not (int(at.min()) >= 0 and int(at.max()) < size):
            raise ConfigurationError(
                f"an event at {name} = {int(at.max() if at.max() >= size else at.min())} lies outside a sensor of "
                f"{shape[1]} × {shape[0]} pixels; give its (height, width) as shape"
            )
    frames = np.zeros((steps, 2, *shape), np.float32)
    when = np.floor(np.asarray(time, np.float64) / step).astype(np.int64)
    inside = (when >= 0) & (when < steps)
    frames[
        when[inside], (np.asarray(polarity)[inside] > 0).astype(np.int64), np.asarray(y)[inside], np.asarray(x)[inside]
    ] = 1
    return torch.from_numpy(frames)
