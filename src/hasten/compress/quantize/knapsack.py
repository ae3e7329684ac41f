"""One option per item, least loss within a budget: the multiple-choice knapsack, solved exactly.

    minimise Σ loss[i, x_i]   subject to   Σ cost[i, x_i] ≤ budget

States (cost so far, loss so far) grow item by item; of two states the one that costs and loses more goes, and so does
one whose linear relaxation cannot beat the best whole answer known. The relaxation of the remaining items is a convex
polygon of the remaining budget, so all states are bounded by one interpolation. Costs are bytes or seconds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hasten.errors import ConfigurationError

__all__ = ["allocate", "two_levels"]

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class _Item:
    index: int
    """place in the caller's list"""
    options: NDArray[np.int64]
    """the caller's numbers of the options that no other dominates, by rising cost"""
    cost: Floats
    loss: Floats
    """falling"""
    hull: tuple[int, ...]
    """of the options, those on the lower convex hull"""


def _item(index: int, cost: Floats, loss: Floats) -> _Item:
    order = np.lexsort((loss, cost))
    kept: list[int] = []
    for o in order:
        if not kept or loss[o] < loss[kept[-1]]:
            kept.append(int(o))
    c, v = cost[kept], loss[kept]
    hull: list[int] = []
    for i in range(len(kept)):
        while len(hull) >= 2:
            a, b = hull[-2], hull[-1]
            if (v[b] - v[a]) * (c[i] - c[a]) >= (v[i] - v[a]) * (c[b] - c[a]):
                hull.pop()
            else:
                break
        hull.append(i)
    return _Item(index, np.array(kept), c, v, tuple(hull))


def _steps(items: Sequence[_Item]) -> list[tuple[float, float, int, int]]:
    """(extra cost, loss saved, item, option reached) along all hulls, the best bargains first."""
    found = [
        (item.cost[b] - item.cost[a], item.loss[a] - item.loss[b], place, b)
        for place, item in enumerate(items)
        for a, b in zip(item.hull, item.hull[1:], strict=False)
    ]
    return sorted(found, key=lambda s: -s[1] / s[0])


def _relaxation(items: Sequence[_Item]) -> tuple[Floats, Floats]:
    """Corners of the convex polygon: budget for these items -> least loss if options could be mixed."""
    at, loss = sum(float(i.cost[0]) for i in items), sum(float(i.loss[0]) for i in items)
    corners = [(at, loss)]
    for extra, saved, _, _ in _steps(items):
        at, loss = at + extra, loss - saved
        corners.append((at, loss))
    return np.array([c for c, _ in corners]), np.array([v for _, v in corners])


def _complete(items: Sequence[_Item], budget: float) -> tuple[float, list[int]]:
    """A whole answer for these items: the bargains in turn, as long as they fit."""
    chosen = [0] * len(items)
    left = budget - sum(float(i.cost[0]) for i in items)
    closed = set()
    for extra, _, place, option in _steps(items):
        if place in closed or extra > left:
            closed.add(place)
            continue
        left -= extra
        chosen[place] = option
    return sum(float(i.loss[o]) for i, o in zip(items, chosen, strict=True)), chosen


def allocate(losses: Sequence[Sequence[float]], costs: Sequence[Sequence[float]], budget: float) -> tuple[int, ...]:
    """The option of each item with the least total loss among those whose total cost is within ``budget``.

    Exact, whatever the numbers: losses may be negative, items may have different numbers of options. Raises
    :class:`~hasten.errors.ConfigurationError` with the least reachable cost when the budget is below it.

    >>> allocate([[9.0, 1.0], [5.0, 2.0]], [[1.0, 2.0], [1.0, 2.0]], budget=3.0)
    (1, 0)
    """
    if len(losses) != len(costs) or any(len(a) != len(b) or not len(a) for a, b in zip(losses, costs, strict=True)):
        raise ConfigurationError(f"{len(losses)} rows of losses and {len(costs)} of costs must agree, option by option")
    tables = [(np.asarray(c, np.float64), np.asarray(v, np.float64)) for c, v in zip(costs, losses, strict=True)]
    for index, (c, v) in enumerate(tables):
        if not (np.isfinite(c).all() and np.isfinite(v).all()):
            raise ConfigurationError(f"item {index} has a cost or loss that is not finite: {c.tolist()}, {v.tolist()}")
    items = [_item(i, c, v) for i, (c, v) in enumerate(tables)]
    least = sum(float(i.cost[0]) for i in items)
    slack = 1e-12 * max(abs(budget), abs(least))  # sums in another order differ in their last bits
    if least > budget + slack:
        raise ConfigurationError(f"a budget of {budget:g} is below the least reachable cost {least:g}; raise it")
    items.sort(key=lambda i: float(i.loss[0] - i.loss[-1]), reverse=True)  # what matters most is decided first
    best, completion = _complete(items, budget + slack)
    answer: list[int] = completion
    cost, loss = np.zeros(1), np.zeros(1)
    trail: list[tuple[NDArray[np.int64], NDArray[np.int64]]] = []
    for place, item in enumerate(items):
        rest = items[place + 1 :]
        corners, values = _relaxation(rest)
        count = len(item.options)
        new_cost = (cost[:, None] + item.cost).ravel()
        new_loss = (loss[:, None] + item.loss).ravel()
        parent, option = np.divmod(np.arange(len(new_cost)), count)
        left = budget + slack - new_cost
        bound = new_loss + np.interp(left, corners, values)
        tolerance = 1e-12 * max(abs(best), 1e-300)
        keep = (left >= corners[0] - slack) & (bound < best - tolerance)
        if not keep.any():  # nothing can beat the answer that is known
            return _in_order(items, answer)
        new_cost, new_loss, bound = new_cost[keep], new_loss[keep], bound[keep]
        parent, option = parent[keep], option[keep]
        order = np.lexsort((new_loss, new_cost))
        lowest = np.minimum.accumulate(new_loss[order])
        first = np.ones(len(order), bool)
        first[1:] = lowest[1:] < lowest[:-1]
        order = order[first]
        cost, loss, bound = new_cost[order], new_loss[order], bound[order]
        trail.append((parent[order], option[order]))
        most_promising = int(np.argmin(bound))
        tail_loss, tail = _complete(rest, budget + slack - float(cost[most_promising]))
        if loss[most_promising] + tail_loss < best:
            best = float(loss[most_promising] + tail_loss)
            answer = [*_walk(trail, most_promising), *tail]
    return _in_order(items, answer)


def _walk(trail: Sequence[tuple[NDArray[np.int64], NDArray[np.int64]]], state: int) -> list[int]:
    options: list[int] = []
    for parent, option in reversed(trail):
        options.append(int(option[state]))
        state = int(parent[state])
    return options[::-1]


def _in_order(items: Sequence[_Item], answer: Sequence[int]) -> tuple[int, ...]:
    result = [0] * len(items)
    for item, option in zip(items, answer, strict=True):
        result[item.index] = int(item.options[option])
    return tuple(result)


def two_levels(sensitivity: Sequence[float], costs: Sequence[tuple[float, float]], budget: float) -> tuple[int, ...]:
    """Q-BERT's rule: the most sensitive items get option 1 (more bits) one after the other, until one does not fit.

    ``costs`` are (low, high) for each item. Where all items have the same two costs and the same gain per unit of
    sensitivity, :func:`allocate` gives the same answer.

    >>> two_levels([3.0, 1.0, 2.0], [(1, 2)] * 3, budget=5)
    (1, 0, 1)
    """
    spent = math.fsum(low for low, _ in costs)
    if spent > budget:
        raise ConfigurationError(f"a budget of {budget:g} is below the least reachable cost {spent:g}; raise it")
    chosen = [0] * len(costs)
    for index in sorted(range(len(costs)), key=lambda i: -sensitivity[i]):
        extra = costs[index][1] - costs[index][0]
        if spent + extra > budget:
            break
        spent += extra
        chosen[index] = 1
    return tuple(chosen)
