"""Softmax attention of one sample, head by head, over arrays that may lie in any order.

Keys are turned once for each head, so that scores of a query are sums of whole lines; narrow heads turn their values
too. Lines are filled up to sixteen keys, whose shares are nothing.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from hasten.compress.fused.lines import reduce
from hasten.nn.bfloat import FAST, exp

__all__ = ["attend", "room_for"]

_NARROW = 16
"""Heads below this width sum over keys line by line, not over channels."""
_NOTHING = np.float32(-1e30)


def room_for(keys: int, width: int, deep: int) -> int:
    """Numbers that :func:`attend` writes beside its result: turned keys, values, scores.

    >>> room_for(17, 4, 4)
    288
    """
    held = -(-keys // 16) * 16
    return held * (width + deep + 1)


@njit(cache=True, fastmath=FAST, error_model="numpy")
def attend(
    arena: Any, sizes: Any, shared: Any, q: Any, k: Any, v: Any, mask: Any, out: Any, scale: Any, causal: Any,
    room: Any,
) -> None:  # fmt: skip
    """``softmax(scale q k^T + mask) v``, written to ``out`` (heads, queries, deep) in the arena.

    ``sizes``: heads, queries, keys, width, deep; ``shared``: heads that share one of the keys. ``q``, ``k``, ``v`` and
    ``mask``: start, and numbers from one head, one row and one channel to the next; a mask that starts below 0 is none.
    """
    heads, queries, keys, width, deep = sizes[0], sizes[1], sizes[2], sizes[3], sizes[4]
    held = (keys + 15) // 16 * 16
    # arrays of two dimensions, whose indices are known not to be negative: else numbers are gathered one by one
    turned = room[: width * held].reshape(width, held)
    values = room[width * held : (width + deep) * held]
    by_row, by_channel = values.reshape(held, deep), values.reshape(deep, held)
    scores = room[(width + deep) * held : (width + deep + 1) * held]
    result = arena[out : out + heads * queries * deep].reshape(heads, queries, deep)
    for head in range(heads):
        if head % shared == 0:
            at, below = k[0] + head // shared * k[1], v[0] + head // shared * v[1]
            for j in range(keys):
                here = at + j * k[2]
                for d in range(width):
                    turned[d, j] = arena[here + d * k[3]]
            for d in range(width):
                for j in range(keys, held):
                    turned[d, j] = 0
            for j in range(keys):
                here = below + j * v[2]
                if deep < _NARROW:
                    for d in range(deep):
                        by_channel[d, j] = arena[here + d * v[3]]
                elif v[3] == 1:
                    by_row[j, :] = arena[here : here + deep]
                else:
                    for d in range(deep):
                        by_row[j, d] = arena[here + d * v[3]]
            for j in range(keys, held):
                for d in range(deep):
                    if deep < _NARROW:
                        by_channel[d, j] = 0
                    else:
                        by_row[j, d] = 0
        for i in range(queries):
            for j in range(len(scores)):
                scores[j] = 0
            at = q[0] + head * q[1] + i * q[2]
            for four in range(width // 4):  # a line of scores is read and written once for four channels
                d = 4 * four
                f0, f1 = arena[at + d * q[3]] * scale, arena[at + (d + 1) * q[3]] * scale
                f2, f3 = arena[at + (d + 2) * q[3]] * scale, arena[at + (d + 3) * q[3]] * scale
                for j in range(len(scores)):
                    scores[j] += (
                        f0 * turned[d, j] + f1 * turned[d + 1, j] + (f2 * turned[d + 2, j] + f3 * turned[d + 3, j])
                    )
            for d in range(width // 4 * 4, width):
                factor = arena[at + d * q[3]] * scale
                for j in range(len(scores)):
                    scores[j] += factor * turned[d, j]
            if mask[0] >= 0:
                at = mask[0] + head * mask[1] + i * mask[2]
                for j in range(keys):
                    scores[j] += arena[at + j * mask[3]]
            seen = min(keys, i + 1) if causal else keys
            for j in range(seen, held):
                scores[j] = _NOTHING
            top = reduce(1, scores)
            total = np.float32(0)
            for j in range(len(scores)):
                scores[j] = exp(scores[j] - top)
                total += scores[j]
            share = np.float32(1) / total
            if deep < _NARROW:
                for d in range(deep):
                    mixed = np.float32(0)
                    for j in range(len(scores)):
                        mixed += scores[j] * by_channel[d, j]
                    result[head, i, d] = mixed * share
            else:
                for d in range(deep):
                    result[head, i, d] = 0
                for four in range((seen + 3) // 4):  # keys behind the last have no share
                    j = 4 * four
                    f0, f1, f2, f3 = (scores[j] * share, scores[j + 1] * share, scores[j + 2] * share,
                                      scores[j + 3] * share)  # fmt: skip
                    for d in range(deep):
                        result[head, i, d] += (
                            f0 * by_row[j, d] + f1 * by_row[j + 1, d] + (f2 * by_row[j + 2, d] + f3 * by_row[j + 3, d])
                        )
