"""The grid against dense algebra, point by point, and against scikit-learn."""

from __future__ import annotations

import math

import numpy as np
import pytest

from hasten.errors import ConfigurationError
from hasten.events.gaussian_process import (
    Kernel,
    _Slopes,
    fit_kernels,
    grid,
    log_likelihood,
    predict,
    starting_amplitude,
)
from hasten.events.lightcurves import simulate
from hasten.events.observations import WAVELENGTHS, ZTF, Observations, flux_of


def curves(points: int = 30) -> Observations:
    seen, _ = simulate(6, seed=3)
    lists = [
        list(zip(seen.time[k][:n], seen.band[k][:n], seen.flux[k][:n], seen.error[k][:n], strict=True))
        for k, n in enumerate((points, points - 7, 2, 1, points, 5))
    ]
    return Observations.of(lists, seen.bands)


def slow_covariance(t1: list[float], w1: list[float], t2: list[float], w2: list[float], scale: float) -> np.ndarray:
    out = np.zeros((len(t1), len(t2)))
    for i in range(len(t1)):
        for j in range(len(t2)):
            r = math.sqrt(((t1[i] - t2[j]) / scale) ** 2 + ((w1[i] - w2[j]) / 6000) ** 2)
            out[i, j] = (1 + math.sqrt(3) * r) * math.exp(-math.sqrt(3) * r)
    return out


def test_the_grid_is_dense_algebra() -> None:
    o = curves()
    kernel = Kernel(steps=12, points=9)
    found = grid(o, kernel, batch=3)
    for k in range(len(o)):
        v = o.valid[k]
        t, w = o.time[k][v].tolist(), o.wavelength[k][v].tolist()
        amplitude, scale = fit_kernels(o[k : k + 1], kernel)
        power = math.exp(2 * amplitude[0])
        dense = power * slow_covariance(t, w, t, w, math.exp(scale[0]))
        dense += np.diag(o.error[k][v] ** 2 + 1e-10 * power)
        times = np.linspace(min(t), max(t), 9)
        for band, name in enumerate(o.bands):
            cross = power * slow_covariance(times.tolist(), [WAVELENGTHS[name]] * 9, t, w, math.exp(scale[0]))
            wanted = cross @ np.linalg.solve(dense, o.flux[k][v])
            assert np.allclose(found[k, :, band], wanted, rtol=1e-6, atol=1e-6 * np.abs(wanted).max())


def test_slopes_are_those_of_the_likelihood() -> None:
    o = curves()
    amplitude, scale = np.log(starting_amplitude(o)), np.full(len(o), 2.0)
    found = _Slopes(o, 6000.0)(amplitude, scale)
    for column, move in enumerate((np.array([1e-5, 0.0]), np.array([0.0, 1e-5]))):
        high = log_likelihood(o, amplitude + move[0], scale + move[1])
        low = log_likelihood(o, amplitude - move[0], scale - move[1])
        assert np.allclose(found[:, column], (high - low) / 2e-5, rtol=1e-4, atol=1e-4)


def test_padding_and_company_change_nothing() -> None:
    o = curves()
    alone = np.concatenate([grid(o[k : k + 1], Kernel(points=5)) for k in range(len(o))])
    assert np.allclose(grid(o, Kernel(points=5)), alone, rtol=1e-9, atol=1e-7)


def test_scikit_learn_agrees() -> None:
    pytest.importorskip("sklearn")
    from sklearn.gaussian_process import GaussianProcessRegressor
    from sklearn.gaussian_process.kernels import ConstantKernel, Matern

    o = curves()[:2]
    amplitude, scale = fit_kernels(o, Kernel(steps=60))
    times = np.linspace(o.time[:, :20].min(1), o.time[:, :20].max(1), 7).T
    found = predict(o, times, amplitude, scale)
    for k in range(2):
        v = o.valid[k]
        x = np.stack([o.time[k][v], o.wavelength[k][v]], 1)
        fixed = ConstantKernel(math.exp(2 * amplitude[k]), "fixed") * Matern(
            [math.exp(scale[k]), 6000.0], "fixed", nu=1.5
        )
        model = GaussianProcessRegressor(
            fixed, alpha=o.error[k][v] ** 2 + 1e-10 * math.exp(2 * amplitude[k]), optimizer=None
        )
        model.fit(x, o.flux[k][v])
        assert log_likelihood(o[k : k + 1], amplitude[k : k + 1], scale[k : k + 1])[0] == pytest.approx(
            model.log_marginal_likelihood_value_, rel=1e-8
        )
        for band, name in enumerate(o.bands):
            wanted = model.predict(np.stack([times[k], np.full(7, WAVELENGTHS[name])], 1))
            assert np.allclose(found[k, :, band], wanted, rtol=1e-6, atol=1e-6 * np.abs(wanted).max())


def test_what_is_wrong_is_named() -> None:
    with pytest.raises(ConfigurationError, match="time scale"):
        Kernel(time_scale=2000.0)
    with pytest.raises(ConfigurationError, match="points"):
        Kernel(points=1)
    with pytest.raises(ConfigurationError, match="without observations"):
        grid(Observations.of([[]], ZTF))
    with pytest.raises(ConfigurationError, match="wavelength"):
        Observations.of([[]], ("q",))
    assert float(flux_of(31.4 - 2.5, 0.0)[0]) == pytest.approx(10.0)
