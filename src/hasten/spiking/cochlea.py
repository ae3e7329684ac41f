"""Sound into spikes: a bank of auditory filters, a logarithm, and a spike per change of loudness.

Each channel is the energy of a triangular band on the mel scale within a window of 25 ms, every step. Its level in
decibels is heard relative to a running peak ``p[t] = max(loudest channel, p[t-1] - recovery step)``, so that a quiet
speaker is as loud as any other, and followed by an up and a down line (:func:`hasten.spiking.encode.delta`). With
``background`` a channel is heard only where it exceeds its own running minimum by so much. All of it is causal:
:class:`CochleaStream` gives the same spikes for any cut of the sound.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numba import njit
from torch import Tensor

from hasten.errors import ConfigurationError
from hasten.spiking.encode import delta

__all__ = ["Cochlea", "CochleaStream", "cochleagram"]

_SILENCE = 1e-10  # power of a channel below which there is no background


@dataclass(frozen=True)
class Cochlea:
    """The ear.

    >>> Cochlea().lines, Cochlea().hop
    (80, 80)
    """

    sample_rate: int = 8000
    """samples per second"""
    channels: int = 40
    """bands"""
    step: float = 0.01
    """length of a timestep, seconds"""
    window: float = 0.025
    """length of the analysis window, seconds; it ends with the step"""
    lowest: float = 80.0
    """lower edge of the lowest band, hertz"""
    highest: float = 3800.0
    """upper edge of the highest band, hertz"""
    quietest: float = -45.0
    """level of a channel below which the running peak does not fall, decibels of full scale"""
    span: float = 40.0
    """how far below the running peak a channel is heard, decibels"""
    recovery: float = 20.0
    """how fast the running peak falls, decibels per second"""
    background: float = 0.0
    """how far a channel must rise above its own background to be heard, decibels; 0 hears everything"""
    adaptation: float = 10.0
    """how fast the background, a running minimum, may rise, decibels per second"""
    change: float = 4.0
    """decibels per spike"""

    def __post_init__(self) -> None:
        if not 0 < self.lowest < self.highest <= self.sample_rate / 2:
            raise ConfigurationError(
                f"bands from {self.lowest} to {self.highest} Hz do not fit {self.sample_rate} samples per second"
            )
        for name in ("span", "recovery", "adaptation", "change"):
            if not getattr(self, name) > 0:
                raise ConfigurationError(f"{name} {getattr(self, name)} is not positive; it is in decibels")
        if self.background < 0:
            raise ConfigurationError(f"background {self.background} dB is negative; 0 hears everything")
        if self.hop < 1 or self.window < self.step:
            raise ConfigurationError(f"a window of {self.window} s must hold a step of {self.step} s")

    @property
    def hop(self) -> int:
        """Samples per step."""
        return round(self.sample_rate * self.step)

    @property
    def width(self) -> int:
        """Samples of the window."""
        return round(self.sample_rate * self.window)

    @property
    def lines(self) -> int:
        """Input lines of a network: up and down for each channel."""
        return 2 * self.channels


@lru_cache(maxsize=8)
def _bank(ear: Cochlea) -> tuple[Tensor, Tensor, int]:
    """Window (width,), triangles (frequencies, channels), transform length."""
    size = 1 << (ear.width - 1).bit_length()

    def mel(f: float | np.ndarray) -> np.ndarray:
        return 2595.0 * np.log10(1.0 + np.asarray(f) / 700.0)

    edges = np.linspace(mel(ear.lowest), mel(ear.highest), ear.channels + 2)
    at = mel(np.arange(size // 2 + 1) * ear.sample_rate / size)[:, None]
    rise, fall = (at - edges[:-2]) / (edges[1:-1] - edges[:-2]), (edges[2:] - at) / (edges[2:] - edges[1:-1])
    triangles = np.clip(np.minimum(rise, fall), 0.0, None)
    triangles[at[:, 0].searchsorted(edges[1:-1]).clip(0, size // 2), np.arange(ear.channels)] += 1e-3  # none is empty
    window = np.hanning(ear.width + 2)[1:-1]
    return torch.from_numpy(window), torch.from_numpy(triangles), size


@njit(cache=True)
def _subtract_background(power: Any, before: Any, lowest: float, rise: float, factor: float) -> None:
    """power (steps, channels) less ``factor`` times its running minimum ``before`` (channels,), at least 0, in place.

    The minimum stays above ``lowest`` and grows by the factor ``rise`` per step where nothing is below it.
    """
    for t in range(power.shape[0]):
        for c in range(power.shape[1]):
            before[c] = max(lowest, min(power[t, c], rise * before[c]))
            power[t, c] = max(0.0, power[t, c] - factor * before[c])


@njit(cache=True)
def _running_peak(loudest: Any, before: float, lowest: float, fall: float, peaks: Any) -> float:
    """peaks (steps,): the level of the loudest channel so far, less ``fall`` for each step since; returns the last."""
    for t in range(loudest.shape[0]):
        before = max(loudest[t], before - fall, lowest)
        peaks[t] = before
    return before


def loudness(samples: Tensor, ear: Cochlea) -> Tensor:
    """Frames (steps, width) float64 -> power of each channel (steps, channels), 1 at full scale."""
    window, triangles, size = _bank(ear)
    power = torch.fft.rfft(samples * window, n=size).abs().square() / window.square().sum() / ear.width
    # summed band by band in a fixed order: a product's order may depend on how many steps there are
    return (power.unsqueeze(-1) * triangles).sum(-2)


class CochleaStream:
    """Samples in, spikes out: ``push(samples)`` gives one tensor (lines,) per step that has ended."""

    def __init__(self, ear: Cochlea = Cochlea()) -> None:
        self.ear = ear
        self.reset()

    def reset(self) -> None:
        """Silence, and no sound remembered."""
        self._held = torch.zeros(self.ear.width - self.ear.hop, dtype=torch.float64)  # silence before the sound
        self._background = np.full(self.ear.channels, _SILENCE)
        self.forget()

    def forget(self) -> None:
        """Hear what comes as after a long silence: the running peak and the levels fall to their lowest."""
        self._peak = self.ear.quietest
        self._level = torch.full((self.ear.channels,), -self.ear.span, dtype=torch.float32)

    def steps(self, samples: Tensor) -> Tensor:
        """Spikes (steps, lines) of the steps that end within these samples (n,), float in [-1, 1]."""
        ear = self.ear
        if samples.dim() != 1:
            raise ConfigurationError(f"samples of shape {tuple(samples.shape)} are not one sound; give (n,), mono")
        held = torch.cat([self._held, samples.double()])
        count = (len(held) - (ear.width - ear.hop)) // ear.hop
        if count <= 0:
            self._held = held
            return torch.zeros(0, ear.lines)
        power = loudness(held.unfold(0, ear.width, ear.hop)[:count], ear)
        self._held = held[count * ear.hop :]
        if ear.background:
            rise, factor = 10.0 ** (ear.adaptation * ear.step / 10.0), 10.0 ** (ear.background / 10.0)
            _subtract_background(power.numpy(), self._background, _SILENCE, rise, factor)
        loudest = 10.0 * torch.log10(power.amax(-1).clamp_min(1e-30)).numpy()
        peaks = np.empty_like(loudest)
        self._peak = _running_peak(loudest, self._peak, ear.quietest, ear.recovery * ear.step, peaks)
        share = power * 10.0 ** (-torch.from_numpy(peaks).unsqueeze(-1) / 10.0)
        relative = 10.0 * torch.log10(share + 10.0 ** (-ear.span / 10.0))
        spikes, self._level = delta(relative.float(), ear.change, self._level)
        return spikes

    def push(self, chunk: Tensor) -> list[Tensor]:
        """One tensor (lines,) per step."""
        return list(self.steps(chunk).unbind(0))

    def flush(self) -> list[Tensor]:
        """An unfinished step is dropped."""
        return []


def cochleagram(samples: Tensor, ear: Cochlea = Cochlea()) -> Tensor:
    """A recording (n,) in [-1, 1] at ``ear.sample_rate`` -> spikes (steps, lines) of 0 and 1.

    >>> cochleagram(torch.zeros(8000)).shape
    torch.Size([100, 80])
    """
    return CochleaStream(ear).steps(samples)
