"""Sound files and sample rates, one chunk after the other.

A resampler evaluates a windowed sinc at the exact time of each output sample, so that any cut into chunks gives the
same samples. WAV files of 8, 16, 24 or 32 bit are read in blocks; channels are averaged.
"""

from __future__ import annotations

import wave
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from hasten.errors import ConfigurationError, DataError

__all__ = ["Resampler", "read_wav"]

_ZEROS = 12  # zero crossings of the sinc on each side


class Resampler:
    """From one sample rate to another. Output sample n is the input's value at ``n / target`` seconds.

    >>> len(Resampler(16000, 8000).push(torch.zeros(16000))) + 0 <= 8000
    True
    """

    def __init__(self, source: int, target: int) -> None:
        if source < 1 or target < 1:
            raise ConfigurationError(f"sample rates {source} and {target} must be positive")
        self.source, self.target = source, target
        self._cut = min(1.0, target / source)
        self._half = int(np.ceil(_ZEROS / self._cut))
        self.reset()

    def reset(self) -> None:
        """Begin a new sound."""
        self._held = np.zeros(self._half, np.float64)  # silence before the sound
        self._first = -self._half  # index of the first sample that is held
        self._next = 0

    def push(self, chunk: Tensor) -> Tensor:
        """Samples (n,) at the source's rate -> the samples at the target's rate that are known now."""
        if self.source == self.target:
            return chunk.float()
        self._held = np.concatenate([self._held, chunk.detach().double().numpy()])
        return self._take(self._first + len(self._held) - self._half)

    def flush(self) -> Tensor:
        """What is left, with silence behind it."""
        if self.source == self.target:
            return torch.zeros(0)
        end = self._first + len(self._held)
        self._held = np.concatenate([self._held, np.zeros(self._half + 1)])
        return self._take(end)

    def _take(self, end: int) -> Tensor:
        """Outputs whose time lies before input sample ``end``."""
        count = max(0, -(-end * self.target // self.source) - self._next)
        n = self._next + np.arange(count, dtype=np.int64)
        whole, part = np.divmod(n * self.source, self.target)
        offsets = np.arange(-self._half + 1, self._half + 1)
        away = offsets - (part / self.target)[:, None]
        weights = self._cut * np.sinc(self._cut * away) * np.cos(np.clip(away / self._half, -1, 1) * np.pi / 2) ** 2
        samples = self._held[(whole - self._first)[:, None] + offsets]
        result = (samples * weights).sum(1)
        self._next += count
        drop = max(0, self._next * self.source // self.target - self._half - self._first)
        self._held, self._first = self._held[drop:], self._first + drop
        return torch.from_numpy(result).float()


def read_wav(path: str | Path, seconds: float = 0.02) -> tuple[int, Iterator[Tensor]]:
    """Sample rate, and chunks (n,) in [-1, 1] of ``seconds`` each. Raises :class:`~hasten.errors.DataError`."""
    if not seconds > 0:
        raise ConfigurationError(f"chunks of {seconds} s hold no sound; give a length such as 20ms")
    try:
        file = wave.open(str(path), "rb")  # noqa: SIM115 - closed by the iterator
    except (OSError, wave.Error, EOFError) as error:
        raise DataError(
            f"{str(path)!r} is no WAV file that can be read ({str(error) or 'it is empty'}); give a PCM WAV file"
        ) from error
    rate, width, channels = file.getframerate(), file.getsampwidth(), file.getnchannels()
    if width not in (1, 2, 3, 4):
        file.close()
        raise DataError(f"{str(path)!r} has samples of {8 * width} bit; give a PCM WAV file of 8 to 32 bit")

    def chunks() -> Iterator[Tensor]:
        with file:
            while data := file.readframes(max(1, round(rate * seconds))):
                yield torch.from_numpy(_samples(data, width).reshape(-1, channels).mean(1))

    return rate, chunks()


def _samples(data: bytes, width: int) -> np.ndarray:
    """Little-endian PCM bytes -> float32 in [-1, 1]."""
    data = data[: len(data) // width * width]
    if width == 1:
        return (np.frombuffer(data, np.uint8).astype(np.float32) - 128) / 128
    raw = np.frombuffer(data, np.uint8).reshape(-1, width)
    wide = np.zeros((len(raw), 4), np.uint8)
    wide[:, 4 - width :] = raw
    return (wide.view("<i4")[:, 0].astype(np.float64) / 2**31).astype(np.float32)
