"""Delay lines driven by events: a spike of input j adds ``w_ij`` to the slot of output i that is ``d_ij`` steps away.

Memory is one ring of K slots per output neuron; work is spikes × fan-out, whatever the length of the delays. The
weights lie on a grid of powers of two that is coarse enough for every sum to be exact in float32, so the order of the
spikes does not matter: delay line, convolution and stream give the same bits.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numba import njit, prange
from torch import Tensor

from hasten.errors import ConfigurationError

__all__ = ["DelayLine", "on_grid"]


def on_grid(weight: Tensor) -> Tensor:
    """``weight`` (out, in) rounded to the finest power-of-two grid on which every sum of a row is exact in float32.

    A sum is at most ``S = max_i Σ_j |w_ij|``; multiples of ``2^(ceil(log2 S) - 23)`` up to S have 24 bits.
    """
    largest = float(weight.detach().abs().sum(1).max())
    if not largest > 0:
        return weight.detach().clone()
    grain = 2.0 ** (math.ceil(math.log2(largest)) - 22)  # one bit to spare: rounding may lift the sum
    return (weight.detach().double() / grain).round().mul(grain).float()


@njit(cache=True, parallel=True)
def _run(spikes: Any, weight: Any, delay: Any, ring: Any, cursor: int, out: Any) -> None:
    """spikes (time, batch, in) of bool; weight, delay (in, out); ring (batch, slots, out); out (time, batch, out)."""
    steps, batch, inputs = spikes.shape
    slots, outputs = ring.shape[1], ring.shape[2]
    for b in prange(batch):
        lines = ring[b]
        for t in range(steps):
            now = (cursor + t) % slots
            for j in range(inputs):
                if spikes[t, b, j]:
                    w, d = weight[j], delay[j]
                    for i in range(outputs):
                        slot = now + d[i]
                        slot = slot - slots if slot >= slots else slot
                        lines[slot, i] += w[i]
            for i in range(outputs):
                out[t, b, i] = lines[now, i]
                lines[now, i] = 0.0


class DelayLine:
    """The lines of one layer for a batch of streams. Mutable, not thread-safe; ``push`` moves its time on.

    >>> line = DelayLine(torch.ones(1, 1), torch.tensor([[2]]), batch=1)
    >>> line.push(torch.tensor([1.0, 0.0, 0.0, 0.0]).reshape(4, 1, 1)).flatten().tolist()
    [0.0, 0.0, 1.0, 0.0]
    """

    def __init__(self, weight: Tensor, delay: Tensor, batch: int = 1) -> None:
        if delay.dtype.is_floating_point or int(delay.min()) < 0 or weight.shape != delay.shape:
            raise ConfigurationError(
                f"delays are whole steps, one per weight; got {delay.dtype} of {tuple(delay.shape)} from "
                f"{delay.min()} for "
                f"weights of {tuple(weight.shape)}"
            )
        self._weight = np.ascontiguousarray(weight.detach().float().t().numpy())
        self._delay = np.ascontiguousarray(delay.t().numpy().astype(np.int32))
        self._ring = np.zeros((batch, int(delay.max()) + 1, weight.shape[0]), np.float32)
        self._now = 0

    @property
    def state_bytes(self) -> int:
        """Bytes of the rings."""
        return int(self._ring.nbytes)

    def push(self, spikes: Tensor) -> Tensor:
        """spikes (time, batch, in), 0 or 1 -> current (time, batch, out) that arrives in the same steps."""
        out = np.empty((*spikes.shape[:2], self._ring.shape[2]), np.float32)
        events = np.ascontiguousarray(spikes.detach().numpy() != 0)
        _run(events, self._weight, self._delay, self._ring, self._now, out)
        self._now = (self._now + len(out)) % self._ring.shape[1]
        return torch.from_numpy(out)

    def reset(self) -> None:
        """Forget every spike that is on its way."""
        self._ring[:] = 0.0
        self._now = 0
