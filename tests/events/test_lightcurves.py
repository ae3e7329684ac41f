"""The generator: seeded, detected, all kinds, and not separable by brightness."""

from __future__ import annotations

import numpy as np
import pytest

from hasten.errors import ConfigurationError
from hasten.events.lightcurves import CLASSES, Survey, simulate


def test_the_same_seed_gives_the_same_sky() -> None:
    a, ka = simulate(50, seed=4)
    b, kb = simulate(50, seed=4)
    c, _ = simulate(50, seed=5)
    assert np.array_equal(a.flux, b.flux)
    assert np.array_equal(ka, kb)
    assert not np.array_equal(a.flux, c.flux)


def test_what_is_reported_was_detected_and_every_kind_occurs() -> None:
    survey = Survey()
    seen, kinds = simulate(600, survey, seed=0)
    strong = (seen.valid & (np.abs(seen.flux) > 5 * seen.error)).sum(1)
    assert strong.min() >= survey.least_detections
    assert np.bincount(kinds, minlength=len(CLASSES)).min() > 10, "imbalanced, but each is there"
    assert np.isfinite(seen.flux).all()
    assert (seen.error > 0).all()
    inside = seen.time[seen.valid]
    assert inside.min() >= 60000
    assert inside.max() <= 60000 + survey.season
    assert set(np.unique(seen.band)) == set(range(6))
    medians = [np.median(np.abs(seen.flux[kinds == k]).max(1)) for k in range(len(CLASSES))]
    assert max(medians) < 4 * min(medians), "brightness is not the class"


def test_two_bands_and_bad_surveys() -> None:
    seen, _ = simulate(10, Survey(bands=("g", "r"), visits=0.3), seed=0)
    assert seen.band.max() == 1
    with pytest.raises(ConfigurationError, match="wavelength"):
        Survey(bands=("g", "k"))
    with pytest.raises(ConfigurationError, match="positive"):
        Survey(limit=0.0)
