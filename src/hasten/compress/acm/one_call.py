"""A gated layer in one call, for calls of few tokens: packed once, then no Python and no torch between its products.

In torch a gated call of 50 tokens is a dozen calls, each of which takes longer than what it computes; then skipping
learners saves nothing. Here gate, sorting and learners are one compiled call (:mod:`hasten.compress.fused.adaptive`)
by the calling thread. Weights are packed when they are first met, and again when one of them has changed.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from hasten.compress.acm.module import AdaptiveComputation

__all__ = ["OneCall", "one_call", "takes"]

_SHARED = 512
"""Tokens for each thread from which a call is shared out."""


@lru_cache(maxsize=1)
def _can() -> bool:
    """Whether this processor has registers of 512 bits, and numba is there."""
    from hasten.nn.product.instructions import has_bytes

    return has_bytes()


def takes(z: Tensor) -> bool:
    """Whether tokens such as these may go through the one call: float32 on the CPU, no gradients, and nobody listens to
    torch's operations, for instance to count them."""
    return (
        z.dtype is torch.float32
        and z.device.type == "cpu"
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and not torch._C._len_torch_dispatch_stack()
        and _can()
    )


def one_call(layer: AdaptiveComputation) -> OneCall:
    """The layer's call, packed when it is first met and when its weights have changed."""
    own: Any = layer._parameters
    gate: Any = layer._modules["gate"]._modules  # type: ignore[union-attr]  # a module's attributes take longer than this
    first, second, third = gate["0"]._parameters, gate["2"]._parameters, gate["4"]._parameters
    weights = (
        own["into"], own["bias"], own["out"], first["weight"], first["bias"], second["weight"], second["bias"],
        third["weight"], third["bias"],
    )  # fmt: skip
    try:
        stamp = [(p.data_ptr(), p._version) for p in weights]
    except RuntimeError:  # made in inference mode: nothing tells whether such tensors have changed
        return OneCall(layer)
    held = layer.packed
    if held is None or held[0] != stamp:
        held = layer.packed = (stamp, OneCall(layer))
    return held[1]


class OneCall:
    """The packed matrices of one layer, and the call."""

    def __init__(self, layer: AdaptiveComputation) -> None:
        import numpy as np

        from hasten.compress.fused.adaptive import adapt_rows
        from hasten.compress.fused.lines import UNARY
        from hasten.compress.fused.products import describe_float32
        from hasten.nn.product import float32

        self._least, self._activation = layer.least, UNARY.index(_UNARY.get(layer.activation, layer.activation))
        self._keep: list[Any] = []
        rows = []
        for weight, bias in _matrices(layer):
            plain = np.ascontiguousarray(weight.numpy())
            held = None if bias is None else np.array(bias.numpy(), np.float32)
            packed = float32.pack(plain)
            self._keep += [packed, held]
            rows.append(describe_float32(packed, held, *plain.shape))
        self._table = np.stack(rows)
        self._run: Any = adapt_rows
        self._new: Any = np.empty

    def __call__(self, z: Tensor, counts: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """z (…, width) -> the same, and learners of each token (…,) int64.

        ``counts`` (…,): taken in place of what the gate says, though it is asked too; for measuring.
        """
        given = (z.detach() if z.requires_grad else z).contiguous().numpy()
        made = self._new(given.shape, given.dtype)
        rows, out = given.reshape(-1, given.shape[-1]), made.reshape(-1, given.shape[-1])
        told = counts is not None
        chosen = self._new(len(rows), "int64") if counts is None else counts.flatten().numpy()
        threads = min(torch.get_num_threads(), len(rows) // _SHARED)
        if threads < 2:
            self._run(rows, self._table, self._least, self._activation, told, chosen, out)
        else:
            cuts = [len(rows) * part // threads for part in range(threads + 1)]
            parts = [slice(a, b) for a, b in zip(cuts, cuts[1:], strict=False)]
            jobs = [
                _pool().submit(
                    self._run, rows[p], self._table, self._least, self._activation, told, chosen[p], out[p]
                )
                for p in parts[1:]
            ]  # fmt: skip
            p = parts[0]
            self._run(rows[p], self._table, self._least, self._activation, told, chosen[p], out[p])
            for job in jobs:
                job.result()
        return torch.from_numpy(made), torch.from_numpy(chosen.reshape(given.shape[:-1]))


@lru_cache(maxsize=1)
def _pool() -> ThreadPoolExecutor:
    """Threads beside the callers'."""
    return ThreadPoolExecutor(max(1, torch.get_num_threads() - 1), "hasten-acm")


_UNARY = {"identity": "copy"}


def _matrices(layer: AdaptiveComputation) -> Sequence[tuple[Tensor, Tensor | None]]:
    """Weight (out, in) and bias of the gate's layers, then of every learner's two."""
    found: list[tuple[Tensor, Tensor | None]] = [
        (m.weight.detach(), m.bias.detach()) for m in layer.gate if isinstance(m, nn.Linear)
    ]
    for n in range(layer.learners):
        mine = slice(n * layer.size, (n + 1) * layer.size)
        found += [(layer.into.detach()[mine], layer.bias.detach()[mine]), (layer.out.detach()[mine].T, None)]
    return found
