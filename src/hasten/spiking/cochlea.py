"""Sound into spikes: a bank of auditory filters, a logarithm, and a spike per change of loudness.

Each channel is the energy of a triangular band on the mel scale within a window of 25 ms, every step; its level in
decibels is followed by an up and a down line (:func:`hasten.spiking.encode.delta`). Gain moves only the floor, so no
normalisation is needed and the whole is causal: :class:`CochleaStream` gives the same spikes for any cut of the sound.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from hasten.errors import ConfigurationError
from hasten.spiking.encode import delta

__all__ = ["Cochlea", "CochleaStream", "cochleagram"]


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
    floor: float = -55.0
    """quietest level, decibels of full scale"""
    change: float = 4.0
    """decibels per spike"""

    def __post_init__(self) -> None:
        if not 0 < self.lowest < self.highest <= self.sample_rate / 2:
            raise ConfigurationError(
                f"bands from {self.lowest} to {self.highest} Hz do not fit {self.sample_rate} samples per second"
            )
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


def loudness(samples: Tensor, ear: Cochlea) -> Tensor:
    """Frames (steps, width) float64 -> level of each channel in decibels of full scale, at least the floor."""
    window, triangles, size = _bank(ear)
    power = torch.fft.rfft(samples * window, n=size).abs().square() / window.square().sum() / ear.width
    # summed band by band in a fixed order: a product's order may depend on how many steps there are
    energy = (power.unsqueeze(-1) * triangles).sum(-2)
    return 10.0 * torch.log10(energy + 10.0 ** (ear.floor / 10.0))


class CochleaStream:
    """Samples in, spikes out: ``push(samples)`` gives one tensor (lines,) per step that has ended."""

    def __init__(self, ear: Cochlea = Cochlea()) -> None:
        self.ear = ear
        self.reset()

    def reset(self) -> None:
        """Silence."""
        self._held = torch.zeros(self.ear.width - self.ear.hop, dtype=torch.float64)  # silence before the sound
        self._level = torch.full((self.ear.channels,), self.ear.floor, dtype=torch.float32)

    def steps(self, samples: Tensor) -> Tensor:
        """Spikes (steps, lines) of the steps that end within these samples (n,), float in [-1, 1]."""
        ear = self.ear
        held = torch.cat([self._held, samples.double()])
        count = (len(held) - (ear.width - ear.hop)) // ear.hop
        if count <= 0:
            self._held = held
            return torch.zeros(0, ear.lines)
        frames = held.unfold(0, ear.width, ear.hop)[:count]
        self._held = held[count * ear.hop :]
        spikes, self._level = delta(loudness(frames, ear).float(), ear.change, self._level)
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
