"""Light curves that a survey would see of seven kinds of objects: seeded, six bands, noise of photons and sky.

Explosions are black bodies whose luminosity and temperature change, stretched and reddened by distance; variable stars
and active galaxies vary about their mean. Peak brightness is drawn from one distribution for all kinds, so that
brightness alone tells little. Only for training and tests: shapes and rates are ours, chosen after how these objects
look, not fitted to any catalogue.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hasten.errors import ConfigurationError
from hasten.events.observations import LSST, WAVELENGTHS, Observations

__all__ = ["CLASSES", "Survey", "simulate", "windows"]

Floats = NDArray[np.float64]
CLASSES = ("SN Ia", "SN II", "SN IIn", "TDE", "RR Lyrae", "eclipsing binary", "AGN")
"""what can be seen"""
_SHARES = np.array([0.30, 0.20, 0.08, 0.06, 0.14, 0.12, 0.10])


@dataclass(frozen=True)
class Survey:
    """Who looks, how often and how well.

    >>> Survey(season=100.0).bands
    ('u', 'g', 'r', 'i', 'z', 'y')
    """

    bands: tuple[str, ...] = LSST
    """filters"""
    season: float = 180.0
    """days that a field is observed"""
    visits: float = 0.4
    """per day, all bands together; weather and moon make gaps"""
    limit: float = 250.0
    """noise of the sky in nanojansky"""
    brightness: tuple[float, float] = (1_500.0, 0.7)
    """median peak flux in nanojansky, and the standard deviation of its logarithm"""
    redshift: float = 0.7
    """largest of the explosions; half of them lie below a third of it"""
    least_detections: int = 3
    """points above five sigma that an object needs to be reported"""

    def __post_init__(self) -> None:
        unknown = [b for b in self.bands if b not in WAVELENGTHS]
        if unknown:
            raise ConfigurationError(f"band {', '.join(unknown)} has no wavelength; known are {', '.join(WAVELENGTHS)}")
        if min(self.season, self.visits, self.limit, *self.brightness) <= 0:
            raise ConfigurationError(f"season, visits, limit and brightness must be positive, got {self}")


def _planck(wavelength: Floats, temperature: Floats) -> Floats:
    """Black-body flux per frequency, relative to that at 6,231 Å."""

    def at(w: Floats | float) -> Floats:
        found: Floats = (np.asarray(w) / 6231.0) ** -3 / np.expm1(1.4388e8 / (w * temperature))
        return found

    return at(wavelength) / at(6231.0)


def _shape(kind: int, t: Floats, wavelength: Floats, u: Floats) -> Any:
    """Flux of one kind relative to its peak: t days from peak (objects, points), u (objects, 4 or more) in 0 … 1."""
    a, b, c, d = (u[:, k, None] for k in range(4))
    if kind == 0:  # SN Ia: quick rise, second maximum in the red
        rise, fall = 3.5 + 1.5 * a, 16 + 8 * b
        light = np.exp(-np.clip(t, 0, None) / fall) / (1 + np.exp(-np.clip(t + 6, -200, 200) / rise))
        heat = 5000 + 9000 / (1 + np.exp(np.clip((t - 8) / 9, -50, 50)))
        second = 0.35 * np.exp(-0.5 * ((t - 26 - 4 * c) / 7) ** 2) * (wavelength > 6800)
        metals = 1 / (1 + np.exp(-(wavelength - 3700) / 250))  # iron swallows the ultraviolet
        shape = light * _planck(wavelength, heat) * metals + second
        return shape
    if kind == 1:  # SN II: plateau of some three months
        rise, length = 3 + 2 * a, 75 + 40 * b
        light = 1 / (1 + np.exp(-np.clip(t + 8, -200, 200) / rise)) / (1 + np.exp(np.clip((t - length) / 4, -50, 50)))
        light = light * np.exp(-np.clip(t, 0, None) / (250 + 300 * c)) + 0.08 * (t > length)
        heat = 5500 + 9000 * np.exp(-np.clip(t + 8, 0, None) / 14)
        return light * _planck(wavelength, heat)
    if kind == 2:  # SN IIn: slow and hot
        rise, fall = 9 + 10 * a, 60 + 80 * b
        light = np.exp(-np.clip(t, 0, None) / fall) / (1 + np.exp(-np.clip(t + 15, -300, 300) / rise))
        heat = 8500 + 3500 * np.exp(-np.clip(t, 0, None) / 80)
        return light * _planck(wavelength, heat)
    if kind == 3:  # tidal disruption: a power law at constant, high temperature
        wait = 20 + 25 * a
        rise = 5 + 5 * b
        power = np.clip(1 + np.clip(t, 0, None) / wait, 1, None) ** (-5 / 3)
        return power / (1 + np.exp(-np.clip(t + 12, -200, 200) / rise)) * _planck(wavelength, 20000 + 15000 * c)
    if kind == 4:  # RR Lyrae: a saw tooth twice a day or so, larger in the blue
        phase = (t / (0.42 + 0.4 * a) + b) % 1.0
        tooth = np.where(phase < 0.2, phase / 0.2, 1 - (phase - 0.2) / 0.8) - 0.5
        return 1.6 * tooth * (wavelength / 5000) ** -0.9
    if kind == 5:  # eclipsing binary: two dips, the same in all bands
        phase = (t / (0.6 + 6 * a**2) + b) % 1.0
        width = 0.035 + 0.05 * c
        first = np.exp(-0.5 * (np.minimum(phase, 1 - phase) / width) ** 2)
        other = (0.3 + 0.5 * d) * np.exp(-0.5 * ((phase - 0.5) / width) ** 2)
        return 0.15 - first - other
    raise ConfigurationError(f"kind {kind} is a random walk and has no shape")


def _walk(rng: np.random.Generator, t: Floats, wavelength: Floats) -> Floats:
    """Damped random walk in order of time (objects, points), bluer when brighter."""
    tau = np.exp(rng.uniform(np.log(40), np.log(250), len(t)))[:, None]
    noise = rng.normal(size=t.shape)
    value = np.empty_like(t)
    value[:, 0] = noise[:, 0]
    decay = np.exp(-np.diff(t, axis=1) / tau)
    for k in range(1, t.shape[1]):  # a recursion in time, all objects at once
        value[:, k] = decay[:, k - 1] * value[:, k - 1] + np.sqrt(1 - decay[:, k - 1] ** 2) * noise[:, k]
    return 0.7 * value * (wavelength / 5000) ** -0.7


def simulate(count: int, survey: Survey | None = None, seed: int = 0) -> tuple[Observations, NDArray[np.int64]]:
    """``count`` reported objects and their classes (place in ``CLASSES``), in random order.

    >>> seen, kinds = simulate(20, seed=1)
    >>> len(seen), set(kinds.tolist()) <= set(range(7)), bool((seen.valid.sum(1) >= 10).all())
    (20, True, True)
    """
    survey = survey or Survey()
    rng = np.random.default_rng(seed)
    parts: list[tuple[Observations, NDArray[np.int64]]] = []
    found = 0
    while found < count:
        seen, kinds = _draw(rng, 2 * count, survey)
        strong = (seen.valid & (np.abs(seen.flux) > 5 * seen.error)).sum(1) >= survey.least_detections
        parts.append((seen[strong], kinds[strong]))
        found += int(strong.sum())
    columns = ([getattr(o, name) for o, _ in parts] for name in ("time", "band", "flux", "error", "valid"))
    time, band, flux, error, valid = (np.concatenate(c)[:count] for c in columns)
    seen = Observations(time, band, flux, error, valid, survey.bands)
    return seen, np.concatenate([k for _, k in parts])[:count]


def _draw(rng: np.random.Generator, count: int, survey: Survey) -> tuple[Observations, NDArray[np.int64]]:
    kinds = rng.choice(len(CLASSES), count, p=_SHARES)
    most = int(survey.season * survey.visits * 1.3) + 10
    time = np.sort(rng.uniform(0, survey.season, (count, most)), 1)
    visits = np.clip(rng.poisson(survey.season * survey.visits, count), 10, most)
    weather = rng.permuted(np.tile(np.arange(most), (count, 1)), axis=1) < visits[:, None]
    time = np.take_along_axis(time, np.argsort(~weather, 1, kind="stable"), 1)  # those that were made first
    valid = np.arange(most) < visits[:, None]
    time = np.where(valid, time, survey.season)
    band = rng.integers(0, len(survey.bands), (count, most))
    wavelength = np.array([WAVELENGTHS[b] for b in survey.bands])[band]
    peak_time = rng.uniform(0.15, 0.65, count)[:, None] * survey.season
    flux = np.zeros((count, most))
    for kind in range(len(CLASSES) - 1):
        of = kinds == kind
        u = rng.uniform(size=(int(of.sum()), 5))
        stretch = 1 + (0.02 + survey.redshift * u[:, 4:] ** 1.6 if kind < 4 else 0.0 * u[:, 4:])
        flux[of] = _shape(kind, (time - peak_time)[of] / stretch, wavelength[of] / stretch, u)
    agn = kinds == len(CLASSES) - 1
    if agn.any():
        flux[agn] = _walk(rng, time[agn], wavelength[agn])
    median, spread = survey.brightness
    flux *= np.exp(rng.normal(np.log(median), spread, count))[:, None] / np.maximum(
        np.quantile(np.abs(flux), 0.97, axis=1, keepdims=True), 0.05
    )
    error = np.sqrt(survey.limit**2 * rng.uniform(0.6, 1.6, flux.shape) + 8.0 * np.abs(flux))
    seen = flux + error * rng.normal(size=flux.shape)
    return Observations(
        time + 60000, band, np.where(valid, seen, 0.0), np.where(valid, error, 1.0), valid, survey.bands
    ), kinds


def windows(seen: Observations, seed: int = 0, share: float = 0.5, least: int = 6) -> Observations:
    """A random ``share`` of the objects seen through a shorter window in time, as a stream sees them.

    A window holds at least ``least`` points and the brightest one; the others stay whole. Padding is behind.

    >>> seen, _ = simulate(40, seed=2)
    >>> cut = windows(seen, share=1.0)
    >>> bool((cut.valid.sum(1) < seen.valid.sum(1)).mean() > 0.8), bool((cut.valid.sum(1) >= 6).all())
    (True, True)
    """
    rng = np.random.default_rng(seed)
    count = seen.valid.sum(1)
    peak = np.take_along_axis(seen.time, np.where(seen.valid, np.abs(seen.flux), -1.0).argmax(1)[:, None], 1)
    before = peak - rng.uniform(3, 60, (len(seen), 1))
    after = peak + rng.exponential(35.0, (len(seen), 1))
    inside = seen.valid & (seen.time >= before) & (seen.time <= after)
    taken = (rng.random(len(seen)) < share) & (inside.sum(1) >= np.minimum(least, count))
    valid = np.where(taken[:, None], inside, seen.valid)
    order = np.argsort(~valid, 1, kind="stable")
    time, band, flux, error, kept = (
        np.take_along_axis(a, order, 1) for a in (seen.time, seen.band, seen.flux, seen.error, valid)
    )
    return Observations(time, band, np.where(kept, flux, 0.0), np.where(kept, error, 1.0), kept, seen.bands)
