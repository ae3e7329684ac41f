"""A linear layer that looks for spikes: where few inputs are 1, it adds rows of its weight instead of multiplying.

``y[n] = Σ_j x[n, j] W[:, j]``. For inputs of 0 and 1 with a share r of ones the sum needs ``r × MACs`` additions; the
weight's gradient is the same sum turned round. Whether that pays is decided per call from the measured share of ones:
above it, and for inputs that are not 0 and 1, the dense product runs. Both give the same numbers up to the order of
the sum.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import torch
from numba import njit, prange
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["SpikeLinear", "spike_linear", "watched"]

SPARSE_BELOW = 0.16
"""share of ones below which adding rows is the faster form, forward and backward together (measured with AVX-512)"""

_LEAST_WORK = 1 << 20  # multiply-adds below which the dense product costs less than looking


@njit(cache=True, parallel=True)
def _find(x: Any, limit: int, counts: Any, index: Any) -> None:
    """Positions of the ones of each row; counts[n] is -1 where a value is neither 0 nor 1 or the row is too full."""
    rows, inputs = x.shape
    for n in prange(rows):
        found, odd = 0, False
        for j in range(inputs):
            value = x[n, j]
            if value != 0:
                odd = odd or value != 1
                if found < limit:
                    index[n, found] = j
                found += 1
        counts[n] = -1 if odd or found > limit else found


@njit(cache=True, parallel=True)
def _gather(counts: Any, index: Any, weight: Any, out: Any) -> None:
    """out[n] = sum of the rows of ``weight`` (in, out) at the spikes of n, four at a time."""
    rows, width = out.shape
    for n in prange(rows):
        line = out[n]
        line[:] = 0.0
        count, k = counts[n], 0
        while k + 4 <= count:
            a, b = weight[index[n, k]], weight[index[n, k + 1]]
            c, d = weight[index[n, k + 2]], weight[index[n, k + 3]]
            for i in range(width):
                line[i] += (a[i] + b[i]) + (c[i] + d[i])
            k += 4
        while k < count:
            a = weight[index[n, k]]
            for i in range(width):
                line[i] += a[i]
            k += 1


@njit(cache=True, parallel=True)
def _scatter(counts: Any, index: Any, gradient: Any, parts: int, out: Any) -> None:
    """out[part, j] (in, out) += gradient[n] for the spikes j of the rows n of a part."""
    rows, width = gradient.shape
    size = (rows + parts - 1) // parts
    for part in prange(parts):
        mine = out[part]
        for n in range(part * size, min(rows, (part + 1) * size)):
            g = gradient[n]
            for k in range(counts[n]):
                line = mine[index[n, k]]
                for i in range(width):
                    line[i] += g[i]


def _threads() -> int:
    count = min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS)  # type: ignore[attr-defined]
    numba.set_num_threads(count)
    return int(count)


def spikes_of(x: Tensor) -> tuple[Any, Any] | None:
    """(counts, positions) of the ones of x (rows, inputs), or None where the dense product is the better form."""
    rows, inputs = x.shape
    sample = x[:: max(1, rows // 64)]
    if float(sample.count_nonzero()) > SPARSE_BELOW * sample.numel():
        return None
    limit = min(inputs, max(8, int(2 * SPARSE_BELOW * inputs)))
    counts, index = np.empty(rows, np.int32), np.empty((rows, limit), np.int16)
    _threads()
    _find(x.numpy(), limit, counts, index)
    if counts.min() < 0 or counts.sum() > SPARSE_BELOW * x.numel():
        return None
    return counts, index


class _Rows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, found: Any) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.found, ctx.inputs = found, x.shape[1]
        out = torch.empty(len(x), len(weight))
        _threads()
        _gather(*found, weight.detach().t().contiguous().numpy(), out.numpy())
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (weight,) = ctx.saved_tensors
        g = gradients[0].contiguous()
        gx = g @ weight if ctx.needs_input_grad[0] else None
        gw = None
        if ctx.needs_input_grad[1]:
            parts = _threads()
            sums = torch.zeros(parts, ctx.inputs, g.shape[1])
            _scatter(*ctx.found, g.numpy(), parts, sums.numpy())
            gw = (sums.sum(0) if parts > 1 else sums[0]).t()
        return gx, gw, None


def watched(model: nn.Module) -> bool:
    """Whether somebody looks into ``model``: then every layer runs by itself over all steps, as they expect."""
    return _counting() or any("scan" in m.__dict__ or m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def _counting() -> bool:
    """Whether somebody watches every operation (cost, export): then the dense form runs, which they know."""
    mode = torch.utils._python_dispatch._get_current_dispatch_mode()  # type: ignore[attr-defined]
    return mode is not None or torch.compiler.is_compiling() or torch.compiler.is_exporting()


def spike_linear(x: Tensor, weight: Tensor) -> Tensor:
    """x (…, in), weight (out, in) -> (…, out), by rows where x is 0 and 1 with few ones, else by the dense product."""
    dense = x.device.type != "cpu" or x.dtype != torch.float32 or weight.dtype != torch.float32
    if dense or x.numel() * len(weight) < _LEAST_WORK or x.shape[-1] >= 1 << 15 or _counting():
        return functional.linear(x, weight)
    if torch.is_autocast_enabled("cpu"):
        return functional.linear(x, weight)
    rows = x.reshape(-1, x.shape[-1])
    rows = rows if rows.is_contiguous() else rows.contiguous()
    found = spikes_of(rows.detach())
    if found is None:
        return functional.linear(x, weight)
    out: Tensor = _Rows.apply(rows, weight, found)  # type: ignore[no-untyped-call]
    return out.reshape(*x.shape[:-1], len(weight))


class SpikeLinear(nn.Linear):
    """``nn.Linear`` without bias for inputs that are mostly spikes; the same parameters, the same result.

    The weight (out, in) lies in memory input by input, as its rows are added; a strided tensor as any other.

    >>> layer = SpikeLinear(4, 2)
    >>> layer(torch.tensor([[0.0, 1.0, 0.0, 0.0]])).shape
    torch.Size([1, 2])
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)
        self.weight = nn.Parameter(self.weight.detach().t().contiguous().t())

    def forward(self, x: Tensor) -> Tensor:
        """(…, in) -> (…, out)."""
        return spike_linear(x, self.weight)
