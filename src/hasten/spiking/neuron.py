"""Spiking neurons as pure steps: ``step(x, state, parameters) -> (spikes, state)``.

The state is a value that is given and returned. With a the decay and V the threshold, a step of the leaky neuron is

    u = a v + x,   s = 1 if u > V else 0,   and the reset  v = u (1 - s)  "zero",  u - V s  "subtract",
    or  u = a v + x - V s_before,  v = u  "late": the threshold is taken off one step later and does not leak before.

A spike needs ``u > V`` strictly, as in NIR and snnTorch. Time constants are seconds: ``a = exp(-dt / tau)``. These
steps work on any device and are what the fused kernels of :mod:`hasten.spiking.scan` are tested against.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from hasten.errors import ConfigurationError
from hasten.spiking.surrogate import Surrogate, spike

__all__ = [
    "AdaptiveParameters", "AdaptiveState", "AlphaParameters", "AlphaState", "LIFParameters", "Reset",
    "SynapticParameters", "SynapticState", "adaptive_step", "alpha_step", "decay_of", "if_step", "leak_step",
    "lif_step", "plif_step", "synaptic_step",
]  # fmt: skip

Reset = Literal["zero", "subtract", "late"]


def decay_of(tau: float, dt: float, rule: Literal["exact", "euler"] = "exact") -> float:
    """Share of the potential that is left after ``dt`` seconds: ``exp(-dt/tau)``, or ``1 - dt/tau`` by Euler's rule.

    >>> round(decay_of(tau=10e-3, dt=1e-3), 4), decay_of(10e-3, 1e-3, "euler")
    (0.9048, 0.9)
    """
    if not (tau > 0 and dt > 0 and math.isfinite(dt)):
        raise ConfigurationError(f"tau {tau} s and dt {dt} s must be positive; both are in seconds")
    if rule == "euler":
        if dt > tau:
            raise ConfigurationError(
                f"a step of {dt} s is longer than tau {tau} s; take a shorter step or rule='exact'"
            )
        return 1.0 - dt / tau
    return math.exp(-dt / tau)


@dataclass(frozen=True)
class LIFParameters:
    """What a leaky integrate-and-fire neuron is.

    >>> LIFParameters.of_tau(tau=20e-3, dt=1e-3).decay == decay_of(20e-3, 1e-3)
    True
    """

    decay: Tensor | float = 0.9
    """share of the potential that is left after one step, 0 to 1; other libraries call it beta. A number, or a tensor
    that broadcasts to the neurons"""
    threshold: Tensor | float = 1.0
    """the potential above which it fires"""
    reset: Reset = "subtract"
    """zero, subtract (soft reset, then the leak) or late (soft reset one step later, after the leak)"""
    surrogate: Surrogate = Surrogate()
    """gradient of the spike"""
    detach: bool = True
    """no gradient through the spike of the reset"""

    def __post_init__(self) -> None:
        if self.reset not in ("zero", "subtract", "late"):
            raise ConfigurationError(f"reset {self.reset!r} is not known; give zero, subtract or late")
        if isinstance(self.decay, (int, float)) and not 0 <= self.decay <= 1:
            raise ConfigurationError(f"a decay of {self.decay} is not between 0 and 1")
        if isinstance(self.threshold, (int, float)) and not self.threshold > 0:
            raise ConfigurationError(f"a threshold of {self.threshold} fires without input; give a positive one")

    @classmethod
    def of_tau(cls, tau: float, dt: float, **others: object) -> LIFParameters:
        """Parameters of a membrane of time constant ``tau`` (seconds) in steps of ``dt`` (seconds)."""
        return cls(decay=decay_of(tau, dt), **others)  # type: ignore[arg-type]


def _reset(u: Tensor, s: Tensor, threshold: Tensor | float, reset: Reset) -> Tensor:
    if reset == "zero":
        return u * (1 - s)
    return u - threshold * s


def lif_step(x: Tensor, state: Tensor, parameters: LIFParameters) -> tuple[Tensor, Tensor]:
    """One step; x and state (batch, …neurons) -> spikes of that shape and the next state.

    >>> lif_step(torch.tensor([1.5]), torch.zeros(1), LIFParameters(decay=0.5))
    (tensor([1.]), tensor([0.5000]))
    """
    p = parameters
    u = p.decay * state + x
    if p.reset == "late":
        before = spike(state, p.threshold, p.surrogate)
        u = u - p.threshold * (before.detach() if p.detach else before)
        return spike(u, p.threshold, p.surrogate), u
    s = spike(u, p.threshold, p.surrogate)
    return s, _reset(u, s.detach() if p.detach else s, p.threshold, p.reset)


def if_step(x: Tensor, state: Tensor, parameters: LIFParameters) -> tuple[Tensor, Tensor]:
    """:func:`lif_step` without a leak, whatever the decay says."""
    return lif_step(x, state, replace(parameters, decay=1.0))


def plif_step(x: Tensor, state: Tensor, raw: Tensor, parameters: LIFParameters) -> tuple[Tensor, Tensor]:
    """Learned leak (Fang et al., ICCV 2021): ``u = v + k (x - v)`` with ``k = sigmoid(raw)`` = dt / tau."""
    gain = torch.sigmoid(raw)
    return lif_step(gain * x, state, replace(parameters, decay=1 - gain))


def leak_step(x: Tensor, state: Tensor, decay: Tensor | float) -> tuple[Tensor, Tensor]:
    """A neuron that never fires (or a synapse): the next potential, as result and as state."""
    u = decay * state + x
    return u, u


@dataclass(frozen=True)
class SynapticParameters:
    """A synapse that filters its input, then a leaky neuron."""

    synapse: Tensor | float = 0.8
    """share of the current that is left after one step"""
    membrane: LIFParameters = LIFParameters()
    """the neuron behind it"""


class SynapticState(NamedTuple):
    """State of a current-based neuron."""

    potential: Tensor
    current: Tensor


def synaptic_step(x: Tensor, state: SynapticState, parameters: SynapticParameters) -> tuple[Tensor, SynapticState]:
    """Current ``i = alpha i + x`` drives the leaky neuron in the same step."""
    current, _ = leak_step(x, state.current, parameters.synapse)
    s, potential = lif_step(current, state.potential, parameters.membrane)
    return s, SynapticState(potential, current)


@dataclass(frozen=True)
class AlphaParameters:
    """A synapse whose response rises and falls, ``t exp(-t / tau)``: the same filter twice, its peak near one."""

    synapse: float = 0.8
    """share left of either filter after one step, below 1"""
    membrane: LIFParameters = LIFParameters()
    """the neuron behind it"""

    def __post_init__(self) -> None:
        if not 0 < self.synapse < 1:
            raise ConfigurationError(f"a synapse that keeps {self.synapse} of its current per step is not in (0, 1)")

    @property
    def gain(self) -> float:
        """``e (1 - alpha)``: brings the peak of the response to about one."""
        return math.e * (1.0 - self.synapse)


class AlphaState(NamedTuple):
    """State of a neuron with an alpha synapse."""

    potential: Tensor
    rise: Tensor
    current: Tensor


def alpha_step(x: Tensor, state: AlphaState, parameters: AlphaParameters) -> tuple[Tensor, AlphaState]:
    """Two equal filters in a row, then the leaky neuron."""
    rise, _ = leak_step(parameters.gain * x, state.rise, parameters.synapse)
    current, _ = leak_step(rise, state.current, parameters.synapse)
    s, potential = lif_step(current, state.potential, parameters.membrane)
    return s, AlphaState(potential, rise, current)


@dataclass(frozen=True)
class AdaptiveParameters:
    """A threshold that rises with each spike and recovers (Bellec et al., NeurIPS 2018)."""

    recovery: Tensor | float = 0.95
    """share of the rise that is left after one step"""
    jump: Tensor | float = 0.2
    """rise of the threshold per spike; not zero"""
    membrane: LIFParameters = LIFParameters()
    """the neuron; its threshold is the resting one, its reset zero or subtract"""

    def __post_init__(self) -> None:
        if isinstance(self.jump, (int, float)) and not self.jump:
            raise ConfigurationError("a threshold that jumps by 0 does not adapt; use the leaky neuron")
        if self.membrane.reset == "late":
            raise ConfigurationError("an adaptive neuron resets at once; give reset zero or subtract, not late")


class AdaptiveState(NamedTuple):
    """State of an adaptive neuron; ``trace`` is how far spikes have raised the threshold for the next step, over the
    jump."""

    potential: Tensor
    trace: Tensor


def adaptive_step(x: Tensor, state: AdaptiveState, parameters: AdaptiveParameters) -> tuple[Tensor, AdaptiveState]:
    """Fires above ``threshold + jump b``; then ``b = recovery b + s``. The gradient through b is kept."""
    p = parameters.membrane
    bound = p.threshold + parameters.jump * state.trace
    u = p.decay * state.potential + x
    s = spike(u, bound, p.surrogate)
    potential = _reset(u, s.detach() if p.detach else s, bound, p.reset)
    return s, AdaptiveState(potential, parameters.recovery * state.trace + s)
