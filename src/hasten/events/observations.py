"""Light curves as they are observed: irregular, noisy, one band at a time, padded to one length.

Times are days (the modified Julian date of astronomy), fluxes nanojansky, wavelengths ångström: the field's own units.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hasten.errors import ConfigurationError

__all__ = ["LSST", "WAVELENGTHS", "ZTF", "Observations", "flux_of"]

Floats = NDArray[np.float64]

WAVELENGTHS = {"u": 3685.0, "g": 4802.0, "r": 6231.0, "i": 7542.0, "z": 8690.0, "y": 9736.0}
"""effective wavelength of each band"""
LSST = ("u", "g", "r", "i", "z", "y")
"""the passbands of the survey that is to come"""
ZTF = ("g", "r")
"""those of the one that runs"""


@dataclass(frozen=True)
class Observations:
    """A batch of light curves; what lies behind a curve's last point is padding.

    >>> o = Observations.of([[(1.0, 0, 5.0, 1.0), (2.0, 1, 6.0, 1.0)], [(1.5, 0, 2.0, 1.0)]], ("g", "r"))
    >>> o.time.shape, o.valid.tolist()
    ((2, 2), [[True, True], [True, False]])
    """

    time: Floats
    """(objects, points) in days"""
    band: NDArray[np.int64]
    """(objects, points): place in ``bands``"""
    flux: Floats
    """(objects, points) in nanojansky, of the difference to the reference image"""
    error: Floats
    """(objects, points): its standard deviation"""
    valid: NDArray[np.bool_]
    """(objects, points): what is not padding"""
    bands: tuple[str, ...]
    """names, such as ``LSST``"""

    @classmethod
    def of(cls, curves: Sequence[Sequence[tuple[float, int, float, float]]], bands: Sequence[str]) -> Observations:
        """From lists of (time, band, flux, error)."""
        longest = max((len(c) for c in curves), default=0)
        shape = (len(curves), max(longest, 1))
        values, valid = np.zeros((4, *shape)), np.zeros(shape, bool)
        values[3] = 1.0
        for index, curve in enumerate(curves):
            if curve:
                values[:, index, : len(curve)] = np.asarray(curve, np.float64).T
                valid[index, : len(curve)] = True
        return cls(values[0], values[1].astype(np.int64), values[2], values[3], valid, tuple(bands))

    def __post_init__(self) -> None:
        unknown = [b for b in self.bands if b not in WAVELENGTHS]
        if unknown or not self.bands:
            raise ConfigurationError(
                f"band {', '.join(unknown)!r} has no wavelength; known are {', '.join(WAVELENGTHS)}"
            )

    def __len__(self) -> int:
        return len(self.time)

    def __getitem__(self, which: slice | NDArray[np.int64] | NDArray[np.bool_]) -> Observations:
        """Some of the objects."""
        return Observations(
            self.time[which], self.band[which], self.flux[which], self.error[which], self.valid[which], self.bands
        )

    @property
    def wavelength(self) -> Floats:
        """(objects, points) in ångström."""
        found: Floats = np.array([WAVELENGTHS[b] for b in self.bands])[self.band]
        return found


def flux_of(magnitude: Floats | float, error: Floats | float) -> tuple[Floats, Floats]:
    """AB magnitude and its error as flux and error in nanojansky.

    >>> flux, error = flux_of(31.4, 0.1)
    >>> round(float(flux), 3), round(float(error), 3)
    (1.0, 0.092)
    """
    flux = 10 ** (-0.4 * (np.asarray(magnitude, np.float64) - 31.4))
    return flux, 0.4 * np.log(10) * flux * np.asarray(error, np.float64)
