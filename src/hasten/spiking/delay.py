"""Learned delays: one delay per synapse, trained with its weight.

"Learning Delays in Spiking Neural Networks using Dilated Convolutions with Learnable Spacings", Hammouamri, Khalfaoui-
Hassani, Masquelier, ICLR 2024, arXiv:2306.17670. A layer with delays is a causal convolution over time whose kernel
has one tap per synapse; while it learns, the tap is a Gaussian around the delay that narrows:

    y_i[t] = Σ_j Σ_n k_ij[n] s_j[t - (K-1) + n],   k_ij[n] = w_ij g_ij[n] / (1e-7 + Σ_m g_ij[m]),
    g_ij[n] = exp(-½ ((n - (K - 1 - d_ij)) / σ)²),   so that a spike at t acts at t + d_ij.

Differs from the paper in: a spike needs a potential above the threshold, not at it; weights are rounded to an exact
grid when delays become whole steps; ``whole`` runs the taps of inference while delays learn by their Gaussian.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from hasten.errors import ConfigurationError
from hasten.spiking.delay_line import DelayLine, on_grid

__all__ = ["SHARPEST", "DelayLinear", "DiscreteDelayLinear", "slots_of"]

SHARPEST = 0.5
"""width of the narrowest tap, steps"""


def slots_of(max_delay: float, step: float) -> int:
    """Length K of the kernel, odd, for delays up to ``max_delay`` seconds in steps of ``step`` seconds."""
    if not (step > 0 and max_delay >= step):
        raise ConfigurationError(
            f"a delay range of {max_delay} s is shorter than one step of {step} s; both are in seconds"
        )
    slots = round(max_delay / step) + 1
    return slots + 1 - slots % 2


def _taps(spikes: Tensor, kernel: Tensor) -> Tensor:
    """Causal convolution over time: spikes (time, batch, in), kernel (out, in, K) -> (time, batch, out)."""
    x = functional.pad(spikes.permute(1, 2, 0), (kernel.shape[-1] - 1, 0))
    return functional.conv1d(x, kernel).permute(2, 0, 1)


class DelayLinear(nn.Module):
    """A linear layer with a learnable delay per synapse.

    Parameters: ``weight`` and ``delay`` (out, in), the delay in steps from 0 to K - 1. ``sigma`` is the width of the
    tap in steps; eval mode still uses the Gaussian, :meth:`discretise` gives the layer for inference. With ``whole``
    the layer runs as it will after that, one tap at the nearest step, and only the gradient of the delay is the
    Gaussian's. Delays that are not learned are whole steps from the start. With ``fan_in`` each output hears so many
    inputs, drawn at random; the other weights are zero and stay so.

    >>> layer = DelayLinear(3, 2, max_delay=0.05, step=0.01)
    >>> layer(torch.zeros(20, 4, 3)).shape, layer.slots
    (torch.Size([20, 4, 2]), 7)
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        max_delay: float,
        step: float,
        *,
        learn_delay: bool = True,
        delayed: bool = True,
        fan_in: int | None = None,
    ) -> None:
        super().__init__()
        if fan_in is not None and fan_in < 1:
            raise ConfigurationError(f"{fan_in} synapses per neuron hear nothing; give 1 to {inputs}, or None for all")
        self.slots = slots_of(max_delay, step) if delayed else 1
        self.step_seconds = step
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        nn.init.kaiming_uniform_(self.weight, a=5**0.5)
        delay = torch.rand(outputs, inputs) * (self.slots - 1)
        learned = learn_delay and delayed
        self.delay = nn.Parameter(delay if learned else delay.round(), requires_grad=learned)
        self.sigma = max(SHARPEST, self.slots // 2)
        self.whole = not learned
        self.connected: Tensor | None
        self.register_buffer("connected", None)
        if fan_in is not None and fan_in < inputs:
            chosen = torch.rand(outputs, inputs).argsort(1)[:, :fan_in]
            self.connected = torch.zeros(outputs, inputs).scatter_(1, chosen, 1.0)
            with torch.no_grad():
                self.weight.mul_(self.connected * (inputs / fan_in) ** 0.5)  # as wide a current as from all

    @property
    def synapses(self) -> int:
        """Weights that are not fixed at zero."""
        return self.weight.numel() if self.connected is None else int(self.connected.sum())

    def constrain(self) -> None:
        """Keep delays between 0 and K - 1."""
        self.delay.data.clamp_(0, self.slots - 1)

    def _weights(self) -> Tensor:
        return self.weight if self.connected is None else self.weight * self.connected

    def kernel(self) -> Tensor:
        """(out, in, K): each synapse's Gaussian tap, in the order of the convolution (oldest input first)."""
        weight = self._weights().unsqueeze(-1)
        if self.whole and not self.delay.requires_grad:
            return weight * self._one_tap()
        n = torch.arange(self.slots, dtype=self.weight.dtype, device=self.weight.device)
        g = torch.exp(-0.5 * ((n - (self.slots - 1 - self.delay.unsqueeze(-1))) / self.sigma).square())
        g = g / (1e-7 + g.sum(-1, keepdim=True))
        return weight * (self._one_tap() + (g - g.detach()) if self.whole else g)

    def _one_tap(self) -> Tensor:
        where = self.slots - 1 - self.delay.detach().round().long()
        return functional.one_hot(where, self.slots).to(self.weight.dtype)

    def forward(self, spikes: Tensor) -> Tensor:
        """spikes (time, batch, in) -> current (time, batch, out)."""
        if self.slots == 1:
            return functional.linear(spikes, self._weights())
        return _taps(spikes, self.kernel())

    def discretise(self) -> DiscreteDelayLinear:
        """Whole delays, one tap per synapse, weights on the exact grid."""
        delay = self.delay.detach().round().to(torch.int32)
        return DiscreteDelayLinear(on_grid(self._weights()), delay, self.step_seconds)


class DiscreteDelayLinear(nn.Module):
    """A linear layer with whole delays, for inference: an event-driven delay line, or the same as a convolution.

    >>> layer = DiscreteDelayLinear(torch.ones(1, 1), torch.tensor([[1]], dtype=torch.int32), step=0.01)
    >>> layer(torch.tensor([1.0, 0.0, 0.0]).reshape(3, 1, 1)).flatten().tolist()
    [0.0, 1.0, 0.0]
    """

    def __init__(self, weight: Tensor, delay: Tensor, step: float) -> None:
        super().__init__()
        self.weight: Tensor
        self.delay: Tensor
        self.register_buffer("weight", weight)
        self.register_buffer("delay", delay)
        self.step_seconds = step

    def line(self, batch: int = 1) -> DelayLine:
        """Fresh delay lines for a batch of streams."""
        return DelayLine(self.weight, self.delay, batch)

    def kernel(self) -> Tensor:
        """(out, in, K), one tap per synapse."""
        slots = int(self.delay.max()) + 1
        return self.weight.unsqueeze(-1) * functional.one_hot(slots - 1 - self.delay.long(), slots)

    def convolve(self, spikes: Tensor) -> Tensor:
        """The same result by a convolution, for devices and for tests."""
        return _taps(spikes, self.kernel())

    def forward(self, spikes: Tensor) -> Tensor:
        """spikes (time, batch, in) -> current (time, batch, out)."""
        if spikes.device.type != "cpu" or torch.compiler.is_compiling() or torch.compiler.is_exporting():
            return self.convolve(spikes)
        return self.line(spikes.shape[1]).push(spikes)
