"""The named generator of test vectors: clusters that overlap, on a spectrum that falls, as embeddings have.

``clustered(n, d, seed)``: ``n // 100`` centres are drawn from a Gaussian whose standard deviation along dimension
``i`` is ``(1 + i)**-0.5``, turned by a random rotation; a row is the centre of a random cluster (sizes follow a
Dirichlet draw) plus ``spread`` times a vector of the same Gaussian. Queries come from the same distribution and are
never base rows. Float32.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["clustered"]


def clustered(
    n: int,
    d: int,
    num_queries: int = 0,
    *,
    seed: int = 7,
    spread: float = 0.7,
    decay: float = 0.5,
    dtype: Any = np.float32,
) -> tuple[NDArray[Any], NDArray[Any]]:
    """Base rows (n, d) and queries (num_queries, d).

    ``dtype`` uint8 or int8 scales the values so that four standard deviations fill the range.

    >>> base, queries = clustered(1000, 16, 10)
    >>> base.shape, queries.shape, str(base.dtype)
    ((1000, 16), (10, 16), 'float32')
    """
    rng = np.random.default_rng(seed)
    count = max(4, n // 100)
    scale = (1.0 + np.arange(d)) ** -decay
    rotation = np.linalg.qr(rng.normal(size=(d, d)))[0].astype(np.float32)
    centres = (rng.normal(size=(count, d)) * scale).astype(np.float32)
    weights = rng.dirichlet(np.full(count, 2.0))
    kind = np.dtype(dtype)
    largest = 4.0 * float(np.sqrt((scale**2).mean() * (1 + spread**2)))

    def draw(rows: int) -> NDArray[Any]:
        out = np.empty((rows, d), kind)
        for begin in range(0, rows, 1 << 16):
            size = min(1 << 16, rows - begin)
            label = rng.choice(count, size, p=weights)
            noise = rng.standard_normal((size, d), dtype=np.float32) * (spread * scale).astype(np.float32)
            part = (centres[label] + noise) @ rotation
            if kind.kind == "u":
                part = np.clip(np.round(part / largest * 127.5 + 127.5), 0, 255)
            elif kind.kind == "i":
                part = np.clip(np.round(part / largest * 127), -128, 127)
            out[begin : begin + size] = part
        return out

    return draw(n), draw(num_queries)
