"""A layer as a sequence of small learners, and a gate that says for each token how many of them run.

``h(z, k) = sum_{n ≤ k} W2_n σ(W1_n z + b_n)``. Learners lie behind one another in one pair of matrices, so the first
k are a contiguous slice: a plain layer of width k m. Tokens are sorted by k once, and each run of equal k is one pair
of products; what a token does not need is not computed. "Adaptive Computation Modules: Granular Conditional
Computation For Efficient Inference", Wójcik et al. 2023, arXiv:2312.10193. Differs from the paper in: runs of equal k
in place of one pass per learner; on a CPU gate and learners are one compiled call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from hasten.compress.acm.one_call import OneCall, one_call, takes
from hasten.errors import ConfigurationError

__all__ = ["AdaptiveComputation"]

_GATE = 16
"""Width of the gate's hidden layers."""


def _identity(x: Tensor) -> Tensor:
    return x


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "relu": functional.relu,
    "silu": functional.silu,
    "identity": _identity,
}


class AdaptiveComputation(nn.Module):
    """Learners and their gate: (…, width) -> (…, width).

    >>> layer = AdaptiveComputation(width=8, learners=4, size=6)
    >>> layer.fixed = 2
    >>> layer(torch.zeros(3, 5, 8)).shape, layer.cost_of(2) < layer.cost_of(4)
    (torch.Size([3, 5, 8]), True)
    """

    def __init__(self, *, width: int, learners: int, size: int, activation: str = "gelu", least: int = 0) -> None:
        """``size``: hidden width of a learner. ``least``: learners that always run (1 where there is no residual)."""
        super().__init__()
        if learners < 1 or size < 1 or not 0 <= least <= learners:
            raise ConfigurationError(
                f"{learners} learners of {size} hidden units, at least {least}, is no layer; give at least one of each"
            )
        if activation not in ACTIVATIONS:
            raise ConfigurationError(f"activation {activation!r} is not known; give one of {', '.join(ACTIVATIONS)}")
        self.width, self.learners, self.size, self.least, self.activation = width, learners, size, least, activation
        self.into = nn.Parameter(torch.empty(learners * size, width))
        self.bias = nn.Parameter(torch.zeros(learners * size))
        self.out = nn.Parameter(torch.empty(learners * size, width))
        nn.init.normal_(self.into, std=width**-0.5)
        nn.init.normal_(self.out, std=0.1 * (learners * size) ** -0.5)  # near nothing, so that no learner does harm
        self.gate = nn.Sequential(
            nn.Linear(width, _GATE), nn.ReLU(), nn.Linear(_GATE, _GATE), nn.ReLU(),
            nn.Linear(_GATE, learners + 1 - least),
        )  # fmt: skip
        self.fixed: int | None = learners
        """this many learners for every token; None asks the gate"""
        self.min_tokens = 0
        """below so many tokens, ``typical`` learners run for all of them: sorting would cost more than it saves"""
        self.typical = learners
        self.temperature = 0.8
        """of the Gumbel noise in training"""
        self.asked = True
        """whether the last call asked the gate; False where there were fewer than ``min_tokens``"""
        self.last: Tensor | None = None
        """learners of each token in the last gated call, (…,) int64"""
        self.choice: Tensor | None = None
        """in training: one-hot choices (…, learners + 1 - least) of the last call, with gradients"""
        self.packed: tuple[Any, OneCall] | None = None
        """of which weights, and the call of :mod:`one_call` with them"""

    def cost_of(self, count: float) -> float:
        """Multiply-adds of a token with ``count`` learners, its gate included."""
        return self.gate_cost + count * 2 * self.width * self.size

    @property
    def gate_cost(self) -> int:
        """Multiply-adds of the gate for one token."""
        return sum(m.weight.numel() for m in self.gate if isinstance(m, nn.Linear))

    @property
    def gate_bias(self) -> Tensor:
        """Of the gate's logits."""
        bias: Tensor = self.gate[-1].bias  # type: ignore[assignment]
        return bias

    def _act(self, x: Tensor) -> Tensor:
        return ACTIVATIONS[self.activation](x)

    def prefix(self, z: Tensor, count: int) -> Tensor:
        """``h(z, count)`` for every token: the first learners as one layer."""
        if count == 0:
            return torch.zeros_like(z)
        end = count * self.size
        return self._act(functional.linear(z, self.into[:end], self.bias[:end])) @ self.out[:end]

    def prefixes(self, z: Tensor) -> Tensor:
        """``h(z, k)`` for all k: (…, width) -> (learners + 1, …, width)."""
        hidden = self._act(functional.linear(z, self.into, self.bias)).unflatten(-1, (self.learners, self.size))
        parts = torch.einsum("...nm,nmd->n...d", hidden, self.out.view(self.learners, self.size, self.width))
        return torch.cat([torch.zeros_like(parts[:1]), parts.cumsum(0)])

    def scores(self, z: Tensor) -> Tensor:
        """The gate's logits: (…, learners + 1 - least)."""
        logits: Tensor = self.gate(z)
        return logits

    def masked(self, z: Tensor, choice: Tensor) -> Tensor:
        """All learners, those beyond each token's choice multiplied by zero: choice (…, learners + 1 - least) one-hot.

        Differentiable in the choice; what training uses, and the slow twin of :meth:`sparse`.
        """
        tail = choice.flip(-1).cumsum(-1).flip(-1)  # entry k - least: the choice is k or more, so learner k runs
        at_least = tail if self.least else tail[..., 1:]
        if self.least > 1:
            ones = torch.ones(*at_least.shape[:-1], self.least - 1, dtype=at_least.dtype, device=at_least.device)
            at_least = torch.cat([ones, at_least], -1)
        hidden = self._act(functional.linear(z, self.into, self.bias)).unflatten(-1, (self.learners, self.size))
        made: Tensor = (hidden * at_least[..., None]).flatten(-2) @ self.out
        return made

    def sparse(self, z: Tensor, counts: Tensor) -> Tensor:
        """Only what is asked for: z (tokens, width), counts (tokens,) int64 -> (tokens, width)."""
        order = torch.argsort(counts)
        lengths = torch.bincount(counts, minlength=self.learners + 1).tolist()
        filled = [k for k, n in enumerate(lengths) if n]
        if len(filled) == 1:
            return self.prefix(z, filled[0])
        rows = z.index_select(0, order)
        back = torch.empty_like(order).index_copy_(0, order, torch.arange(len(order), device=order.device))
        runs = rows.split([lengths[k] for k in filled])
        if torch.is_grad_enabled():
            return torch.cat([self.prefix(run, k) for run, k in zip(runs, filled, strict=True)]).index_select(0, back)
        made = torch.empty_like(rows)
        for run, k, place in zip(runs, filled, made.split([len(run) for run in runs]), strict=True):
            self._write(run, k, place)
        return made.index_select(0, back)

    def _write(self, z: Tensor, count: int, place: Tensor) -> None:
        """:meth:`prefix` into ``place``, without a copy in between; no gradients."""
        if count == 0:
            place.zero_()
            return
        end = count * self.size
        hidden = self._act(functional.linear(z, self.into[:end], self.bias[:end]))
        torch.mm(hidden, self.out[:end], out=place)

    def forward(self, z: Tensor) -> Tensor:
        if self.fixed is not None:
            return self.prefix(z, self.fixed)
        if self.training:
            logits = self.scores(z)
            self.choice = functional.gumbel_softmax(logits, tau=self.temperature, hard=True)
            self.last = self.choice.detach().argmax(-1) + self.least
            return self.masked(z, self.choice)
        asked = z.numel() >= self.min_tokens * self.width
        self.__dict__["asked"] = asked  # not by a module's own way, which takes longer than the gate
        if not asked:
            self.last = torch.full(z.shape[:-1], self.typical, dtype=torch.long, device=z.device)
            return self.prefix(z, self.typical)
        made, self.__dict__["last"] = self.gated(z)
        return made

    def gated(self, z: Tensor, counts: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """What the gate asks for: z (…, width) -> the same, and learners of each token (…,) int64.

        In one call where that can be. ``counts``: taken in place of what the gate says, though it is asked too.
        """
        if takes(z):
            return one_call(self)(z, counts)
        rows = z.reshape(-1, self.width)
        asked = self.scores(rows).argmax(-1) + self.least
        chosen = asked if counts is None else counts.flatten()
        return self.sparse(rows, chosen).view(z.shape), chosen.view(z.shape[:-1])

    def plain(self) -> nn.Module:
        """All learners with masks: the same numbers in a form that ``torch.export`` takes."""
        return _Masked(self)

    def in_one_call(self) -> nn.Module:
        """The layer as an operator that a network in one call knows; see :mod:`hasten.compress.fused`."""
        return self.plain() if self.fixed is not None else _Chosen(self)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "last": None, "choice": None, "packed": None}

    def extra_repr(self) -> str:
        """For ``print(model)``."""
        return f"width={self.width}, learners={self.learners}, size={self.size}, fixed={self.fixed}"


class _Masked(nn.Module):
    def __init__(self, layer: AdaptiveComputation) -> None:
        super().__init__()
        self.layer = layer
        self.options = layer.learners + 1 - layer.least

    def forward(self, z: Tensor) -> Tensor:
        layer = self.layer
        if layer.fixed is not None:
            return layer.prefix(z, layer.fixed)
        choice = functional.one_hot(layer.scores(z).argmax(-1), self.options).to(z.dtype)
        return layer.masked(z, choice)


class _Chosen(nn.Module):
    """One operator with the learners and the gate as its arguments; what it computes is :meth:`masked`'s."""

    def __init__(self, layer: AdaptiveComputation) -> None:
        super().__init__()
        self.into, self.bias, self.out, self.gate = layer.into, layer.bias, layer.out, layer.gate  # by their names
        self.knobs = layer.learners, layer.least, layer.activation

    def forward(self, z: Tensor) -> Tensor:
        gate: list[Any] = [m for m in self.gate if isinstance(m, nn.Linear)]
        weights = [t for m in gate for t in (m.weight, m.bias)]
        made: Tensor = torch.ops.hasten.adaptive(z, self.into, self.bias, self.out, *weights, *self.knobs)
        return made


@torch.library.custom_op("hasten::adaptive", mutates_args=())
def _adaptive(
    z: Tensor, into: Tensor, bias: Tensor, out: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor,
    weight3: Tensor, bias3: Tensor, learners: int, least: int, activation: str,
) -> Tensor:  # fmt: skip
    hidden = functional.relu(functional.linear(functional.relu(functional.linear(z, weight1, bias1)), weight2, bias2))
    count = functional.linear(hidden, weight3, bias3).argmax(-1) + least
    units = ACTIVATIONS[activation](functional.linear(z, into, bias)).unflatten(-1, (learners, -1))
    runs = torch.arange(learners, device=z.device) < count[..., None]
    made: Tensor = (units * runs[..., None]).flatten(-2) @ out
    return made


@_adaptive.register_fake
def _like(z: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(z)
