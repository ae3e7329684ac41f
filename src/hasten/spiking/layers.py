"""Neurons as modules: parameters live here, state does not.

``neuron(x)`` runs (time, batch, …) from rest with the fused kernels; ``neuron.scan(x, state)`` goes on from a state and
returns the next one; ``neuron.step(x, state)`` is one step of (batch, …), for streams. Whatever is learnable must stay
inside its bounds: a training loop calls :func:`constrain` after each step of the optimiser.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from hasten.errors import ConfigurationError
from hasten.spiking import neuron as steps
from hasten.spiking.neuron import (
    AdaptiveParameters,
    AdaptiveState,
    AlphaParameters,
    AlphaState,
    LIFParameters,
    Reset,
    SynapticParameters,
    SynapticState,
    decay_of,
)
from hasten.spiking.scan import adaptive_scan, alpha_scan, leak_scan, lif_scan, synaptic_scan
from hasten.spiking.surrogate import Surrogate

__all__ = ["IF", "LIF", "PLIF", "Adaptive", "Alpha", "Leak", "Neuron", "Synaptic", "constrain"]

_LEAST_THRESHOLD = 1e-3


def constrain(model: nn.Module) -> None:
    """Bring decays, thresholds and delays of ``model`` back into their bounds, in place and without a gradient."""
    with torch.no_grad():
        for module in model.modules():
            keep: Any = getattr(module, "constrain", None)
            if keep is not None:
                keep()


class Neuron(nn.Module, ABC):
    """What all neurons share: a threshold, a reset, a surrogate.

    ``threshold`` is a number or a tensor that broadcasts to the neurons; ``learn`` names what is trained; at rest the
    potential is ``start`` times the threshold.
    """

    threshold: Tensor

    def __init__(
        self,
        threshold: float | Tensor = 1.0,
        reset: Reset = "subtract",
        surrogate: Surrogate | str = "arctan",
        detach: bool = True,
        learn: tuple[str, ...] = (),
        start: float = 0.0,
    ) -> None:
        super().__init__()
        self.start = start
        self.reset: Reset = reset
        self.surrogate = Surrogate(surrogate) if isinstance(surrogate, str) else surrogate
        self.detach = detach
        self.learn = learn
        self._place("threshold", threshold)
        LIFParameters(0.5, 1.0, reset)

    def _place(self, name: str, value: float | Tensor) -> None:
        tensor = torch.as_tensor(value, dtype=torch.get_default_dtype()).clone()
        if name in self.learn:
            self.register_parameter(name, nn.Parameter(tensor))
        else:
            self.register_buffer(name, tensor)

    def _parameters_of(self, decay: Tensor | float) -> LIFParameters:
        return LIFParameters(decay, self.threshold, self.reset, self.surrogate, self.detach)

    def _rest(self, x: Tensor) -> Tensor | None:
        """The potential at rest for inputs (time, batch, …)."""
        return (self.start * self.threshold).to(x.dtype).expand(x.shape[1:]) if self.start else None

    @property
    def states(self) -> int:
        """Numbers that one neuron keeps between two steps."""
        return 1

    def constrain(self) -> None:
        """Keep the threshold positive."""
        self.threshold.data.clamp_(min=_LEAST_THRESHOLD)

    @abstractmethod
    def scan(self, x: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        """x (time, batch, …) -> spikes of that shape, and the state after; ``None`` is rest."""

    def step(self, x: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        """x (batch, …) -> spikes, state: one step."""
        spikes, state = self.scan(x.unsqueeze(0), state)
        return spikes[0], state

    def forward(self, x: Tensor) -> Tensor:
        """x (time, batch, …) -> spikes, from rest."""
        return self.scan(x)[0]

    def extra_repr(self) -> str:
        """For ``print(model)``."""
        shown = f"{self.threshold.item():.4g}" if self.threshold.numel() == 1 else tuple(self.threshold.shape)
        return f"threshold={shown}, reset={self.reset}, surrogate={self.surrogate.name}"


class IF(Neuron):
    """Integrate and fire: no leak.

    >>> IF()(torch.full((2, 1), 0.6)).flatten().tolist()
    [0.0, 1.0]
    """

    def scan(self, x: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        """See :meth:`Neuron.scan`."""
        return lif_scan(x, self._rest(x) if state is None else state, self._parameters_of(1.0))


class LIF(Neuron):
    """Leaky integrate and fire; give ``decay`` (or ``beta``, another name of it), or ``tau`` and ``dt`` in seconds.

    >>> LIF(tau=20e-3, dt=1e-3).decay, LIF(beta=0.9).decay
    (tensor(0.9512), tensor(0.9000))
    """

    decay: Tensor

    def __init__(
        self,
        decay: float | Tensor | None = None,
        threshold: float | Tensor = 1.0,
        reset: Reset = "subtract",
        surrogate: Surrogate | str = "arctan",
        detach: bool = True,
        learn: tuple[str, ...] = (),
        *,
        start: float = 0.0,
        tau: float | None = None,
        dt: float | None = None,
        beta: float | Tensor | None = None,
    ) -> None:
        super().__init__(threshold, reset, surrogate, detach, learn, start)
        self._place("decay", _decay(decay, tau, dt, beta))

    def constrain(self) -> None:
        """Keep the decay in [0, 1] and the threshold positive."""
        super().constrain()
        self.decay.data.clamp_(0.0, 1.0)

    def scan(self, x: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        """See :meth:`Neuron.scan`."""
        return lif_scan(x, self._rest(x) if state is None else state, self._parameters_of(self.decay))


def _decay(
    decay: float | Tensor | None, tau: float | None, dt: float | None, beta: float | Tensor | None = None
) -> float | Tensor:
    if decay is not None and beta is not None:
        raise ConfigurationError(f"decay {decay} and beta {beta} are two names of one number; give one of them")
    decay = beta if decay is None else decay
    if (decay is None) == (tau is None) or (tau is None) != (dt is None):
        raise ConfigurationError(
            f"give a decay (beta), or tau and dt in seconds; got decay={decay}, tau={tau}, dt={dt}"
        )
    if decay is None:
        assert tau is not None
        assert dt is not None
        return decay_of(tau, dt)
    if bool((torch.as_tensor(decay) < 0).any() | (torch.as_tensor(decay) > 1).any()):
        raise ConfigurationError(f"a decay of {decay} is not between 0 and 1")
    return decay


class PLIF(Neuron):
    """Parametric leak (Fang et al., ICCV 2021): ``u = v + k (x - v)``, ``k = sigmoid(raw)`` learned, one per layer."""

    raw: Tensor

    def __init__(
        self,
        tau_over_dt: float = 2.0,
        threshold: float | Tensor = 1.0,
        reset: Reset = "zero",
        surrogate: Surrogate | str = "arctan",
        detach: bool = True,
        learn: tuple[str, ...] = ("raw",),
    ) -> None:
        super().__init__(threshold, reset, surrogate, detach, learn)
        if not tau_over_dt > 1:
            raise ConfigurationError(f"a membrane of {tau_over_dt} steps forgets at once; give more than 1")
        self._place("raw", -math.log(tau_over_dt - 1))

    @property
    def gain(self) -> Tensor:
        """``dt / tau``."""
        return torch.sigmoid(self.raw)

    def scan(self, x: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        """See :meth:`Neuron.scan`."""
        return lif_scan(self.gain * x, state, self._parameters_of(1 - self.gain))


class Synaptic(LIF):
    """A synapse that filters the input (``synapse`` is kept per step), then a leaky neuron."""

    synapse: Tensor

    def __init__(self, synapse: float | Tensor = 0.8, decay: float | Tensor | None = None, **others: Any) -> None:
        super().__init__(decay, **others)
        self._place("synapse", synapse)

    @property
    def states(self) -> int:
        """Potential and current."""
        return 2

    def constrain(self) -> None:
        """Keep both decays in [0, 1]."""
        super().constrain()
        self.synapse.data.clamp_(0.0, 1.0)

    def scan(self, x: Tensor, state: SynapticState | None = None) -> tuple[Tensor, Any]:
        """See :meth:`Neuron.scan`."""
        return synaptic_scan(x, state, SynapticParameters(self.synapse, self._parameters_of(self.decay)))


class Alpha(LIF):
    """A synapse that rises and falls, then a leaky neuron."""

    def __init__(self, synapse: float = 0.8, decay: float | Tensor | None = None, **others: Any) -> None:
        super().__init__(decay, **others)
        self.synapse = AlphaParameters(synapse).synapse

    @property
    def states(self) -> int:
        """Potential and two filters."""
        return 3

    def scan(self, x: Tensor, state: AlphaState | None = None) -> tuple[Tensor, Any]:
        """See :meth:`Neuron.scan`."""
        return alpha_scan(x, state, AlphaParameters(self.synapse, self._parameters_of(self.decay)))


class Adaptive(LIF):
    """A leaky neuron whose threshold rises by ``jump`` with each spike and keeps ``recovery`` of the rise per step."""

    recovery: Tensor
    jump: Tensor

    def __init__(
        self,
        recovery: float | Tensor = 0.95,
        jump: float | Tensor = 0.2,
        decay: float | Tensor | None = None,
        **others: Any,
    ) -> None:
        super().__init__(decay, **others)
        AdaptiveParameters(membrane=self._parameters_of(0.5))
        self._place("recovery", recovery)
        self._place("jump", jump)

    @property
    def states(self) -> int:
        """Potential and trace."""
        return 2

    def constrain(self) -> None:
        """Keep decays in [0, 1] and the jump positive."""
        super().constrain()
        self.recovery.data.clamp_(0.0, 1.0)
        self.jump.data.clamp_(min=_LEAST_THRESHOLD)

    def scan(self, x: Tensor, state: AdaptiveState | None = None) -> tuple[Tensor, Any]:
        """See :meth:`Neuron.scan`."""
        return adaptive_scan(x, state, AdaptiveParameters(self.recovery, self.jump, self._parameters_of(self.decay)))


class Leak(nn.Module):
    """A neuron that never fires: its potential is the output. ``decay`` 1 accumulates."""

    def __init__(
        self,
        decay: float | Tensor | None = None,
        *,
        tau: float | None = None,
        dt: float | None = None,
        beta: float | Tensor | None = None,
    ) -> None:
        super().__init__()
        self.decay: Tensor
        kept = _decay(decay, tau, dt, beta)
        self.register_buffer("decay", torch.as_tensor(kept, dtype=torch.get_default_dtype()).clone())

    states = 1

    def scan(self, x: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        """x (time, batch, …) -> potentials, and the last one."""
        return leak_scan(x, state, self.decay)

    def step(self, x: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        """One step."""
        return steps.leak_step(x, state if state is not None else torch.zeros_like(x), self.decay)

    def forward(self, x: Tensor) -> Tensor:
        """From rest."""
        return self.scan(x)[0]
