# mypy: disable-error-code="call-arg, var-annotated"
"""A gate, and as many learners of a layer as it says for each token, in one call.

Tokens are sorted by their number of learners, those with most first: learner n then works on the first rows, as many as
ask for it, and nothing else is computed. A few hundred tokens are taken at a time, so that all they pass through stays
in the cache.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from hasten.compress.fused.lines import UNARY, unary
from hasten.compress.fused.products import product
from hasten.nn.bfloat import FAST
from hasten.nn.product.blocks import PANEL
from hasten.nn.product.denormals import flush_small, keep_small
from hasten.nn.product.dispatch import forms_for

__all__ = ["GATES", "TOKENS", "adapt", "adapt_rows", "room_for_rows"]

TOKENS = 256
"""Rows that are sorted and computed at a time."""
GATES = 3
"""Matrices of a gate, before those of the learners."""
_RELU = UNARY.index("relu")


@njit(cache=True)
def room_for_rows(rows: Any, width: Any, size: Any, gate: Any, options: Any) -> Any:
    """Float32 that :func:`adapt` needs beside its rows."""
    return min(rows, TOKENS) * (PANEL + 2 * width + 2 * max(size, gate) + max(width, options))


@njit(cache=True, fastmath=FAST, error_model="numpy")
def _act(code: Any, x: Any, out: Any) -> None:
    unary(code, x, out)


@njit(cache=True, error_model="numpy")
def _sorted(counts: Any, learners: Any, order: Any) -> Any:
    """Rows by falling count into ``order``; how many of them ask for more than n learners, for each n."""
    more = np.zeros(learners + 2, np.int64)
    for row in range(len(counts)):
        more[counts[row]] += 1
    for n in range(learners - 1, -1, -1):
        more[n] += more[n + 1]  # so many ask for n or more
    place = more[1:].copy()
    for row in range(len(counts)):
        order[place[counts[row]]] = row
        place[counts[row]] += 1
    return more[1:]


@njit(cache=True, nogil=True, error_model="numpy")
def adapt(
    x: Any, start: Any, step: Any, matrices: Any, least: Any, activation: Any, words: Any, forms: Any, room: Any,
    told: Any, counts: Any, out: Any,
) -> None:  # fmt: skip
    """out (rows, width) float32 = the first ``counts[row]`` learners of each row, as the gate says.

    x flat float32, whose rows begin at ``start`` and lie ``step`` apart; matrices (3 + 2 learners, fields): three of
    the gate, then of each learner the one into its units and the one out of them; ``activation``: a place in
    :data:`lines.UNARY`; ``room``: of :func:`room_for_rows`; counts (rows,) int64 is written, or with
    ``told`` read: the gate is asked then too, and not heard, which is for measuring.
    """
    width, gate, options = matrices[0, 2], matrices[0, 1], matrices[2, 1]
    size, learners = matrices[GATES, 1], (len(matrices) - GATES) // 2
    block = min(len(out), TOKENS)
    inner = max(size, gate)
    sums, rest = room[: block * PANEL], room[block * PANEL :]
    gathered, rest = rest[: block * width], rest[block * width :]
    total, rest = rest[: block * width], rest[block * width :]
    hidden, rest = rest[: block * inner], rest[block * inner :]
    active, part = rest[: block * inner], rest[block * inner :]
    order = np.empty(block, np.int64)
    for first in range(0, len(out), TOKENS):
        rows = min(TOKENS, len(out) - first)
        here = counts[first : first + rows]
        product(
            matrices[0], x, start + first * step, step, rows, words, forms, sums,
            hidden[: rows * gate].reshape(rows, gate),
        )  # fmt: skip
        _act(_RELU, hidden[: rows * gate], active[: rows * gate])
        product(matrices[1], active, 0, gate, rows, words, forms, sums, hidden[: rows * gate].reshape(rows, gate))
        _act(_RELU, hidden[: rows * gate], active[: rows * gate])
        scores = part[: rows * options].reshape(rows, options)
        product(matrices[2], active, 0, gate, rows, words, forms, sums, scores)
        for row in range(0 if told else rows):
            best = 0
            for k in range(1, options):
                if scores[row, k] > scores[row, best]:
                    best = k
            here[row] = best + least
        more = _sorted(here, learners, order)
        for place in range(more[0]):
            begin = start + (first + order[place]) * step
            gathered[place * width : place * width + width] = x[begin : begin + width]
        for n in range(learners):
            asked = more[n]
            if asked == 0:
                break
            product(
                matrices[GATES + 2 * n], gathered, 0, width, asked, words, forms, sums,
                hidden[: asked * size].reshape(asked, size),
            )  # fmt: skip
            _act(activation, hidden[: asked * size], active[: asked * size])
            made = total if n == 0 else part
            product(
                matrices[GATES + 2 * n + 1], active, 0, size, asked, words, forms, sums,
                made[: asked * width].reshape(asked, width),
            )  # fmt: skip
            if n > 0:
                for i in range(asked * width):
                    total[i] += part[i]
        for place in range(rows):
            target = out[first + order[place]]
            if place < more[0]:
                target[:] = total[place * width : place * width + width]
            else:
                target[:] = 0


@njit(cache=True, nogil=True, error_model="numpy")
def adapt_rows(x: Any, matrices: Any, least: Any, activation: Any, told: Any, counts: Any, out: Any) -> None:
    """:func:`adapt` for x (rows, width) and matrices in float32 alone, by the calling thread."""
    before = flush_small()
    width, gate, options, size = matrices[0, 2], matrices[0, 1], matrices[2, 1], matrices[GATES, 1]
    room = np.empty(room_for_rows(len(x), width, size, gate, options), np.float32)
    words, forms = np.empty(0, np.uint16), forms_for(1, 1)  # of other precisions
    adapt(x.reshape(-1), 0, width, matrices, least, activation, words, forms, room, told, counts, out)
    keep_small(before)
