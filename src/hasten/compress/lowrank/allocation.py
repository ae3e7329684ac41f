"""How much of each pair of matrices is cut, from what cutting it alone does to the model's predictions.

    minimise Σ_u f_u(φ_u)   subject to   Σ_u n_u φ_u = ratio · Σ_u n_u,   0 ≤ φ_u ≤ most

over every pair u of every block, of n_u parameters; ``f_u(φ) = b φ + c φ²`` is fitted to the divergence of the
predictions (Kullback-Leibler, nats a token) with a few shares of that pair alone cut. No gradient, short forward
passes. The influence of a block, which MoDeGPT uses, says nothing of its attention against its feed-forward.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from hasten.compress.lowrank.blocks import Block
from hasten.compress.quantize.passes import evaluating
from hasten.errors import ConfigurationError
from hasten.measure.counting import call

__all__ = ["PASSES", "fitted", "measured_shares", "spread_cut"]

_SHARES = (0.75, 1.5)
"""of the mean share, at which a pair is measured"""
PASSES = 2.0
"""passes over the whole calibration that all measuring together may cost"""
_LEAST, _MOST = 128, 2048
"""tokens whose predictions are compared; those of a whole calibration would not fit into memory"""

Cut = Callable[[nn.Module, int, Mapping[str, float]], object]
"""``cut(model, block number, kind -> share)`` in place"""


def measured_shares(
    model: nn.Module, blocks: Sequence[Block], kinds: Sequence[str], calibration: Sequence[Any], cut: Cut,
    average: float, most: float, told: Callable[[float], None] = lambda share: None,
) -> list[dict[str, float]]:  # fmt: skip
    """Share of every kind of pair, block by block; ``average`` is that of all their parameters."""
    units = [(i, k) for i, b in enumerate(blocks) for k in kinds if b.weights(model, (k,))]
    tried = sorted({min(s * average, most) for s in _SHARES})
    probe = _few(calibration, len(units) * len(tried))
    with evaluating(model), torch.inference_mode():
        wanted = [torch.log_softmax(_logits(call(model, x)), -1) for x in probe]
    if not all(bool(torch.isfinite(w).all()) for w in wanted):
        raise ConfigurationError("the model's predictions on calibration hold NaN or infinity; repair it or the inputs")
    clone = copy.deepcopy(model).eval()
    curves = []
    for done, (index, kind) in enumerate(units):
        lost = []
        for share in tried:
            with torch.no_grad():
                cut(clone, index, {kind: share})
            with torch.inference_mode():
                lost.append(_divergence(clone, probe, wanted))
            clone.set_submodule(blocks[index].name, copy.deepcopy(model.get_submodule(blocks[index].name)).eval())
        curves.append(fitted(tried, lost))
        told((done + 1) / len(units))
    sizes = torch.tensor([blocks[i].weights(model, (k,)) for i, k in units], dtype=torch.float64)
    found = spread_cut(torch.tensor(curves, dtype=torch.float64), sizes, average, most).tolist()
    shares: list[dict[str, float]] = [{} for _ in blocks]
    for (index, kind), share in zip(units, found, strict=True):
        shares[index][kind] = share
    return shares


def fitted(shares: Sequence[float], lost: Sequence[float]) -> tuple[float, float]:
    """``(b, c)`` of ``b φ + c φ²``, least squares with neither below zero; c is never quite 0, so that shares differ.

    >>> b, c = fitted([0.1, 0.2, 0.3], [0.01, 0.04, 0.09])
    >>> round(b, 6), round(c, 6)
    (0.0, 1.0)
    """
    x = torch.tensor(shares, dtype=torch.float64)
    y = torch.tensor(lost, dtype=torch.float64).clamp(min=0)
    b, c = torch.linalg.lstsq(torch.stack([x, x * x], 1), y[:, None]).solution[:, 0].tolist() if len(x) > 1 else (0, -1)
    if b < 0 or c < 0:  # one of them alone, whichever is nearer
        alone = [(float(x @ y / (x @ x)), 0.0), (0.0, float(x.square() @ y / x.square().square().sum()))]
        b, c = min(alone, key=lambda p: float((p[0] * x + p[1] * x * x - y).square().sum()))
    return float(b), max(float(c), 1e-12)


def spread_cut(curves: Tensor, sizes: Tensor, average: float, most: float) -> Tensor:
    """Shares (units,) of least sum of ``b φ + c φ²`` (curves (units, 2)) that cut ``average`` of all ``sizes``.

    At the optimum every pair that is cut loses as much for its next parameter as any other; found by bisection.

    >>> spread_cut(torch.tensor([[0.0, 1.0], [0.0, 3.0]]), torch.tensor([1.0, 1.0]), 0.3, 0.8).tolist()
    [0.45000001788139343, 0.15000000596046448]
    """
    if not 0 < average <= most:
        raise ConfigurationError(f"a mean cut of {average:.0%} is not above 0 and at most {most:.0%}; lower the ratio")
    slope, bend = curves.unbind(1)

    def at(price: Tensor) -> Tensor:
        return ((price * sizes - slope) / (2 * bend)).clamp(0, most)

    low = torch.zeros((), dtype=curves.dtype)
    high = ((slope + 2 * bend * most) / sizes).max()
    for _ in range(200):
        middle = (low + high) / 2
        short = bool((at(middle) * sizes).sum() < average * sizes.sum())
        low, high = (middle, high) if short else (low, middle)
    return at(high)


def _few(calibration: Sequence[Any], evaluations: int) -> list[Any]:
    """Inputs whose predictions are compared: as many tokens as ``PASSES`` allows, whole inputs where they are no
    token tensors (batch, time)."""
    tensors = [x for x in calibration if isinstance(x, Tensor) and x.dim() == 2 and not x.is_floating_point()]
    if not tensors:
        return list(calibration[:1])
    whole = sum(x.numel() for x in tensors)
    left = round(min(max(PASSES * whole / max(evaluations, 1), _LEAST), _MOST))
    found = []
    for x in tensors:
        rows = min(len(x), -(-left // x.shape[1]))
        found.append(x[:rows, : -(-left // rows)])
        left -= found[-1].numel()
        if left <= 0:
            break
    return found


def _logits(made: Any) -> Tensor:
    for leaf in pytree.tree_leaves(made):
        if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.dim() > 1:
            return leaf.float()
    raise ConfigurationError("the model returns no predictions to compare; use allocation='influence'")


def _divergence(model: nn.Module, probe: Sequence[Any], wanted: Sequence[Tensor]) -> float:
    """Nats a prediction."""
    total = count = 0.0
    for example, base in zip(probe, wanted, strict=True):
        found = torch.log_softmax(_logits(call(model, example)), -1)
        total += float((base.exp() * (base - found)).sum())
        count += base.shape[:-1].numel()
    return total / max(count, 1.0)
