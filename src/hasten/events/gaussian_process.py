"""From irregular points to a regular grid: a Gaussian process over time and wavelength for each light curve.

    k = a² (1 + √3 r) exp(−√3 r),  r² = (Δt / ℓ_t)² + (Δλ / ℓ_λ)²,   y ~ N(0, k + diag σ²)

Amplitude and time scale are those of largest likelihood, found for all curves at once by sign-based steps within
bounds; the wavelength scale stays. One batch of Cholesky factorisations per step, padding costs nothing but time.
As in "Avocado", Boone 2019, arXiv:1907.04690. Differs from it in the optimiser (there L-BFGS-B, curve by curve).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hasten.errors import ConfigurationError
from hasten.events.observations import WAVELENGTHS, Observations

__all__ = ["Kernel", "fit_kernels", "grid", "log_likelihood", "predict"]

Floats = NDArray[np.float64]
_ROOT3 = 3**0.5


@dataclass(frozen=True)
class Kernel:
    """Where the fit begins and what bounds it.

    >>> Kernel(time_scale=10.0).wavelength_scale
    6000.0
    """

    time_scale: float = 20.0
    """days, to start with"""
    longest: float = 1000.0
    """days, at most"""
    shortest: float = 0.5
    """days, at least"""
    wavelength_scale: float = 6000.0
    """ångström; not fitted"""
    steps: int = 30
    """of the fit; 0: the start is used as it is"""
    points: int = 100
    """times of the grid"""

    def __post_init__(self) -> None:
        if not 0 < self.shortest <= self.time_scale <= self.longest or self.wavelength_scale <= 0:
            raise ConfigurationError(
                f"time scale {self.time_scale} must lie within {self.shortest} … {self.longest} days, and wavelength "
                f"scale {self.wavelength_scale} above 0"
            )
        if self.steps < 0 or self.points < 2:
            raise ConfigurationError(f"steps ({self.steps}) must be 0 or more and points ({self.points}) 2 or more")


def _distance(t1: Floats, t2: Floats, w1: Floats, w2: Floats, scale: Floats, across: float) -> tuple[Floats, Floats]:
    """(r, time part of r²), both (objects, n1, n2); ``scale`` (objects,)."""
    part = ((t1[:, :, None] - t2[:, None, :]) / scale[:, None, None]) ** 2
    r = np.sqrt(part + ((w1[:, :, None] - w2[:, None, :]) / across) ** 2)
    return r, part


def _matern(r: Floats) -> Floats:
    found: Floats = (1 + _ROOT3 * r) * np.exp(-_ROOT3 * r)
    return found


def _factor(o: Observations, log_amplitude: Floats, log_scale: Floats, across: float) -> tuple[Floats, ...]:
    """(inverse covariance, α = K⁻¹ y, log-determinant, kernel without noise, r, time part)."""
    both = o.valid[:, :, None] & o.valid[:, None, :]
    r, part = _distance(o.time, o.time, o.wavelength, o.wavelength, np.exp(log_scale), across)
    kernel = np.where(both, np.exp(2 * log_amplitude)[:, None, None] * _matern(r), 0.0)
    noise = np.where(o.valid, o.error**2 + 1e-10 * np.exp(2 * log_amplitude)[:, None], 1.0)
    covariance = kernel + noise[:, :, None] * np.eye(o.time.shape[1])
    lower = np.linalg.cholesky(covariance)
    half = np.linalg.inv(lower)
    inverse = np.matmul(half.transpose(0, 2, 1), half)
    y = np.where(o.valid, o.flux, 0.0)
    alpha = np.matmul(inverse, y[..., None])[..., 0]
    determinant = 2 * np.log(np.einsum("bii->bi", lower)).sum(1)
    return inverse, alpha, determinant, kernel, r, part


def log_likelihood(o: Observations, log_amplitude: Floats, log_scale: Floats, across: float = 6000.0) -> Floats:
    """log p(y) of each curve, (objects,)."""
    _, alpha, determinant, *_ = _factor(o, log_amplitude, log_scale, across)
    y = np.where(o.valid, o.flux, 0.0)
    found: Floats = -0.5 * (y * alpha).sum(1) - 0.5 * determinant - 0.5 * o.valid.sum(1) * np.log(2 * np.pi)
    return found


class _Slopes:
    """Derivatives of the log-likelihood in (log amplitude, log time scale); what does not change is kept."""

    def __init__(self, o: Observations, across: float) -> None:
        self.valid = o.valid
        self.apart = (o.time[:, :, None] - o.time[:, None, :]) ** 2
        self.across = ((o.wavelength[:, :, None] - o.wavelength[:, None, :]) / across) ** 2
        outside = ~(o.valid[:, :, None] & o.valid[:, None, :])
        self.across[outside] = 1e6  # so far that the kernel is zero
        self.noise = np.where(o.valid, o.error**2, 1.0)
        self.y = np.where(o.valid, o.flux, 0.0)

    def __call__(self, log_amplitude: Floats, log_scale: Floats) -> Floats:
        """(objects, 2)."""
        power = np.exp(2 * log_amplitude)
        part = self.apart * np.exp(-2 * log_scale)[:, None, None]
        r = _ROOT3 * np.sqrt(part + self.across)
        decay = np.exp(-r) * power[:, None, None]
        kernel = (1 + r) * decay
        covariance = kernel.copy()
        places = np.arange(len(self.y[0]))
        covariance[:, places, places] += np.where(self.valid, self.noise + 1e-10 * power[:, None], 1.0)
        inverse = np.linalg.inv(covariance)
        alpha = np.matmul(inverse, self.y[..., None])
        decay *= part  # d k / d log scale is three times this
        by_amplitude = _form(alpha, kernel) - np.einsum("bij,bij->b", inverse, kernel)  # ½ tr(… · 2 k)
        by_scale = 1.5 * (_form(alpha, decay) - np.einsum("bij,bij->b", inverse, decay))
        return np.stack([by_amplitude, by_scale], 1)


def _form(alpha: Floats, matrix: Floats) -> Floats:
    found: Floats = np.matmul(alpha.transpose(0, 2, 1), np.matmul(matrix, alpha))[:, 0, 0]
    return found


def starting_amplitude(o: Observations) -> Floats:
    """Half the flux of the point with the best signal-to-noise ratio, (objects,)."""
    ratio = np.where(o.valid, np.abs(o.flux) / o.error, -1.0)
    best = np.take_along_axis(np.abs(o.flux), ratio.argmax(1)[:, None], 1)[:, 0]
    spread = np.where(o.valid, o.error, np.inf).min(1)
    found: Floats = np.maximum(0.5 * best, np.where(np.isfinite(spread), 0.01 * spread, 1.0))
    return found


def fit_kernels(o: Observations, kernel: Kernel | None = None) -> tuple[Floats, Floats]:
    """(log amplitude, log time scale) of every curve, each (objects,); curves do not influence each other."""
    kernel = kernel or Kernel()
    start = np.stack([np.log(starting_amplitude(o)), np.full(len(o), np.log(kernel.time_scale))], 1)
    low = np.stack([start[:, 0] - 4, np.full(len(o), np.log(kernel.shortest))], 1)
    high = np.stack([start[:, 0] + 4, np.full(len(o), np.log(kernel.longest))], 1)
    place, step = start.copy(), np.full_like(start, 0.2)
    before = np.zeros_like(start)
    slopes = _Slopes(o, kernel.wavelength_scale)
    for _ in range(kernel.steps):
        slope = slopes(place[:, 0], place[:, 1])
        turned = np.sign(slope) * np.sign(before)
        step = np.clip(np.where(turned > 0, 1.2 * step, np.where(turned < 0, 0.5 * step, step)), 1e-6, 0.7)
        before = np.where(turned < 0, 0.0, slope)
        place = np.clip(place + np.sign(before) * step, low, high)
    return place[:, 0], place[:, 1]


def predict(o: Observations, times: Floats, log_amplitude: Floats, log_scale: Floats, across: float = 6000.0) -> Floats:
    """Mean of the process at ``times`` (objects, n) in every band: (objects, n, bands)."""
    _, alpha, *_ = _factor(o, log_amplitude, log_scale, across)
    alpha = np.where(o.valid, alpha, 0.0) * np.exp(2 * log_amplitude)[:, None]
    scale = np.exp(log_scale)
    columns = []
    for band in o.bands:  # a handful
        there = np.full_like(times, WAVELENGTHS[band])
        r, _ = _distance(times, o.time, there, o.wavelength, scale, across)
        columns.append(np.matmul(_matern(r), alpha[..., None])[..., 0])
    return np.stack(columns, -1)


def grid(o: Observations, kernel: Kernel | None = None, batch: int = 8) -> Floats:
    """The process on ``kernel.points`` times from the first to the last observation: (objects, points, bands).

    Curves of like length are computed together, so that padding is small.
    """
    kernel = kernel or Kernel()
    counts = o.valid.sum(1)
    if len(o) and counts.min() < 1:
        raise ConfigurationError("a light curve without observations has no grid; give each at least one point")
    result = np.zeros((len(o), kernel.points, len(o.bands)))
    order = np.argsort(counts, kind="stable")
    share = np.linspace(0, 1, kernel.points)
    for chunk in np.split(order, range(batch, len(order), batch)) if len(order) else []:
        width = int(counts[chunk].max())
        part = o[chunk]
        part = Observations(
            part.time[:, :width], part.band[:, :width], part.flux[:, :width], part.error[:, :width],
            part.valid[:, :width], o.bands,
        )  # fmt: skip
        first = np.where(part.valid, part.time, np.inf).min(1)
        last = np.where(part.valid, part.time, -np.inf).max(1)
        times = first[:, None] + share * (last - first)[:, None]
        amplitude, scale = fit_kernels(part, kernel)
        result[chunk] = predict(part, times, amplitude, scale, kernel.wavelength_scale)
    return result
