"""From noise to an image in few steps, with a model that predicts the noise.

DDIM (Song et al. 2021, arXiv:2010.02502): ``x_s = sqrt(ᾱ_s) x̂_0 + sqrt(1 - ᾱ_s - σ²) ε̂ + σ z``. DPM-Solver++(2M) (Lu et
al. 2022, arXiv:2211.01095): second order in the half log signal-to-noise ratio λ, one model call a step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from hasten.diffusion.schedule import Schedule
from hasten.errors import ConfigurationError

__all__ = ["Sampler", "denoising_loss", "trajectories"]

Model = Callable[..., Tensor]


@dataclass(frozen=True)
class Sampler:
    """A few-step sampler; calling it draws images.

    >>> sampler = Sampler(steps=4)
    >>> sampler(lambda x, t, y: torch.zeros_like(x), (2, 1, 4, 4), seed=0).shape
    torch.Size([2, 1, 4, 4])
    """

    method: Literal["ddim", "dpm"] = "ddim"
    """ddim, or dpm: DPM-Solver++ of second order"""
    steps: int = 20
    """calls of the model"""
    eta: float = 0.0
    """ddim: 0 adds no noise on the way (the image is a function of the first noise), 1 is the original chain"""
    guidance: float = 1.0
    """above 1 pushes away from the unconditional prediction; two calls a step then"""
    schedule: Schedule = Schedule()
    """that of the training"""

    def __post_init__(self) -> None:
        if self.method not in ("ddim", "dpm"):
            raise ConfigurationError(f"sampler {self.method!r} is not known; give ddim or dpm")
        if self.method == "dpm" and self.eta:
            raise ConfigurationError(f"eta is {self.eta}; dpm adds no noise on the way, use ddim")
        if not 0 <= self.eta <= 1:
            raise ConfigurationError(f"eta is {self.eta}; give 0 to 1")
        self.schedule.timesteps(self.steps)

    def __call__(
        self,
        model: Model,
        shape: tuple[int, ...],
        *,
        seed: int,
        labels: Tensor | None = None,
        null_label: int | None = None,
        on_step: Callable[[Tensor, Tensor, Tensor | None], None] | None = None,
    ) -> Tensor:
        """Images of ``shape`` (batch, channels, height, width) from the noise of ``seed``.

        ``model(x, t, labels)`` predicts the noise. ``null_label`` is what stands for no label, for guidance.
        ``on_step(x, t, labels)`` hears every input of the model.
        """
        if self.guidance != 1.0 and null_label is None:
            raise ConfigurationError(f"guidance {self.guidance} compares with no label; give null_label")
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(shape, generator=generator)
        times = self.schedule.timesteps(self.steps)
        signal = self.schedule.signal.double()
        before: Tensor | None = None
        step_before = 0.0
        with torch.no_grad():
            for index, t in enumerate(times):
                now = float(signal[t])
                following = float(signal[times[index + 1]]) if index + 1 < len(times) else 1.0
                noise = self._predict(model, x, t, labels, null_label, on_step)
                clean = ((x - (1 - now) ** 0.5 * noise) / now**0.5).clamp(-1.5, 1.5)
                if self.method == "ddim":
                    noise = (x - now**0.5 * clean) / max(1 - now, 1e-12) ** 0.5
                    spread = self.eta * ((1 - following) / (1 - now) * (1 - now / following)) ** 0.5
                    direct = max(1 - following - spread**2, 0.0) ** 0.5
                    x = following**0.5 * clean + direct * noise
                    if spread:
                        x = x + spread * torch.randn(shape, generator=generator)
                else:
                    x, before, step_before = _dpm(x, clean, before, step_before, now, following)
        return x

    def _predict(
        self, model: Model, x: Tensor, t: int, labels: Tensor | None, null: int | None, on_step: Any
    ) -> Tensor:
        times = torch.full((len(x),), t, dtype=torch.long)
        if on_step is not None:
            on_step(x, times, labels)
        noise = model(x, times, labels)
        if self.guidance == 1.0 or labels is None:
            return noise
        plain = model(x, times, torch.full_like(labels, null or 0))
        guided: Tensor = plain + self.guidance * (noise - plain)
        return guided


def _dpm(
    x: Tensor, clean: Tensor, before: Tensor | None, step_before: float, now: float, following: float
) -> tuple[Tensor, Tensor, float]:
    """One step of DPM-Solver++(2M) between two signal levels."""
    if following >= 1.0:
        return clean, clean, 0.0
    half = [0.5 * torch.log(torch.tensor(a / (1 - a), dtype=torch.float64)) for a in (now, following)]
    step = float(half[1] - half[0])
    estimate = clean
    # Steps even in t are long in λ at both ends; extrapolating over more than twice the last one does harm.
    if before is not None and 0.5 * step < step_before < 2 * step:
        ratio = step_before / step
        estimate = (1 + 0.5 / ratio) * clean - 0.5 / ratio * before
    sigma = ((1 - following) / (1 - now)) ** 0.5
    return sigma * x - following**0.5 * float(torch.expm1(torch.tensor(-step))) * estimate, clean, step


def denoising_loss(
    model: nn.Module, schedule: Schedule, images: Tensor, labels: Tensor | None, generator: torch.Generator,
    *, drop: float = 0.1, null_label: int | None = None,
) -> Tensor:  # fmt: skip
    """Mean squared error of the predicted noise at random times; a share ``drop`` of the labels is hidden."""
    t = torch.randint(0, schedule.steps, (len(images),), generator=generator)
    noise = torch.randn(images.shape, generator=generator)
    if labels is not None and null_label is not None and drop:
        hidden = torch.rand(len(images), generator=generator) < drop
        labels = torch.where(hidden, torch.full_like(labels, null_label), labels)
    predicted = model(schedule.add_noise(images, t, noise), t, labels)
    loss: Tensor = (predicted - noise).square().mean()
    return loss


def trajectories(
    model: Model,
    sampler: Sampler,
    shape: tuple[int, ...],
    *,
    seed: int = 0,
    labels: Tensor | None = None,
    keep: int = 8,
) -> list[tuple[Tensor, Tensor, Tensor | None]]:
    """Inputs of the model along ``keep`` evenly spaced steps of one sampling run: calibration that quantisation
    sees."""
    seen: list[tuple[Tensor, Tensor, Tensor | None]] = []
    sampler(model, shape, seed=seed, labels=labels, on_step=lambda x, t, y: seen.append((x.clone(), t, y)))
    places = sorted({round(i * (len(seen) - 1) / max(keep - 1, 1)) for i in range(keep)})
    return [seen[p] for p in places]
