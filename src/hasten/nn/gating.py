"""The gate of a feed-forward block inside numba kernels: ``act(gate) * up`` with SiLU, or GELU in its tanh form."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from hasten.nn.bfloat import FAST, exp, load, store

__all__ = ["gated"]


@njit(cache=True, fastmath=FAST, error_model="numpy")
def gated(gate: Any, up: Any, gelu: bool, target: Any) -> None:
    """gate, up (n,) -> target (n,); an element's bits do not depend on where in the line it stands."""
    if gelu:  # x / (1 + exp(-2u)) with u = sqrt(2/pi) (x + 0.044715 x^3) is x (1 + tanh u) / 2
        for i in range(len(target)):
            value = load(gate[i])
            u = np.float32(1.5957691216) * (value + np.float32(0.044715) * value * value * value)
            store(target, i, value / (np.float32(1.0) + exp(-u)) * load(up[i]))
    else:
        for i in range(len(target)):
            value = load(gate[i])
            store(target, i, value / (np.float32(1.0) + exp(-value)) * load(up[i]))
