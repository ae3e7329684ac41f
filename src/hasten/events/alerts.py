"""A classifier that is told of one observation at a time and answers after each.

The history of every object is kept; after an alert the whole history becomes a grid (Gaussian process) and then
probabilities. The answer does not depend on how alerts were cut into chunks or batches, and the last one of an object
is that of its whole light curve. No torch: the model is any callable over numpy arrays, such as a packed one.
"""

from __future__ import annotations

import csv
import gzip
import math
from bisect import insort
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from hasten.clock import Clock, MonotonicClock
from hasten.errors import ConfigurationError, DataError
from hasten.events.gaussian_process import Kernel, grid
from hasten.events.observations import LSST, Observations, flux_of

__all__ = ["Alert", "AlertClassifier", "Classification", "read_alerts"]


@dataclass(frozen=True)
class Alert:
    """One observation of one object.

    >>> Alert("a", 60000.0, "r", 50.0, 2.0).check(("g", "r"))
    """

    object_id: str
    """whose light curve it belongs to"""
    time: float
    """days (modified Julian date)"""
    band: str
    """passband"""
    flux: float
    """nanojansky, of the difference to the reference image; may be negative"""
    error: float
    """its standard deviation"""

    def check(self, bands: Sequence[str]) -> None:
        """Raises :class:`~hasten.errors.DataError` that names what is wrong with it."""
        if self.band not in bands:
            raise DataError(f"alert of {self.object_id}: band {self.band!r} is not among {', '.join(bands)}")
        for name, value in (("time", self.time), ("flux", self.flux), ("error", self.error)):
            if not math.isfinite(value):
                raise DataError(f"alert of {self.object_id}: {name} is {value}; leave out what was not measured")
        if self.error <= 0:
            raise DataError(f"alert of {self.object_id}: an error of {self.error} is not a standard deviation")


@dataclass(frozen=True)
class Classification:
    """What an object is taken for after one of its alerts."""

    object_id: str
    """the object"""
    time: float
    """of the alert, days"""
    probabilities: tuple[float, ...]
    """per class"""
    points: int
    """observations that it rests on"""
    classes: tuple[str, ...] = ()
    """their names, where known"""

    @property
    def label(self) -> str:
        """Name (or number) of the likeliest class."""
        best = max(range(len(self.probabilities)), key=self.probabilities.__getitem__)
        return self.classes[best] if self.classes else str(best)


Model = Callable[[NDArray[np.float32]], Any]
"""(batch, time, bands) -> logits (batch, classes)"""


class AlertClassifier:
    """See the module. Not shared between threads.

    >>> stream = AlertClassifier(lambda x: np.zeros((len(x), 3)), bands=("g", "r"))
    >>> found = stream.push([Alert("a", t, "g", 10.0 + t, 1.0) for t in (1.0, 2.0, 5.0)])
    >>> [(c.points, round(c.probabilities[0], 3)) for c in found + stream.flush()]
    [(2, 0.333), (3, 0.333)]
    """

    def __init__(
        self,
        model: Model,
        *,
        bands: Sequence[str] = LSST,
        classes: Sequence[str] = (),
        min_points: int = 2,
        batch: int = 64,
        latency: float = 0.0,
        max_points: int = 256,
        forget_after: float = math.inf,
        kernel: Kernel | None = None,
        on_error: Literal["raise", "skip"] = "raise",
        clock: Clock | None = None,
    ) -> None:
        """``latency`` is how many seconds an alert may wait for others to share its batch; 0: answered at once.

        ``max_points`` latest observations of an object count; an object is forgotten ``forget_after`` days after its
        last one. ``on_error='skip'`` counts malformed alerts in ``skipped`` and goes on.
        """
        if min_points < 1 or batch < 1 or max_points < min_points or latency < 0:
            raise ConfigurationError(
                f"min_points ({min_points}) and batch ({batch}) must be 1 or more, max_points ({max_points}) no fewer "
                f"than min_points, latency ({latency}) not negative"
            )
        if on_error not in ("raise", "skip"):
            raise ConfigurationError(f"on_error {on_error!r} is not known; give raise or skip")
        self.model, self.bands, self.classes = model, tuple(bands), tuple(classes)
        self.min_points, self.batch, self.latency = min_points, batch, latency
        self.max_points, self.forget_after = max_points, forget_after
        self.kernel, self.on_error, self.clock = kernel or Kernel(), on_error, clock or MonotonicClock()
        self.reset()

    def reset(self) -> None:
        """Forget every object and what is pending."""
        self._history: dict[str, list[tuple[float, int, float, float]]] = {}
        self._pending: list[tuple[str, float, list[tuple[float, int, float, float]], float]] = []
        self._latest = -math.inf
        self.skipped = 0
        """malformed alerts so far"""
        self.seen = 0
        """alerts so far, the malformed ones not counted"""
        self.answered = 0
        """classifications so far"""
        self.delays: deque[float] = deque(maxlen=100_000)
        """seconds between the arrival of an alert and its answer, of the latest classifications"""

    @property
    def objects(self) -> int:
        """Objects whose history is kept."""
        return len(self._history)

    def push(self, chunk: Iterable[Alert]) -> list[Classification]:
        """Take alerts; give the answers that are due, in the order of the alerts."""
        out: list[Classification] = []
        for alert in chunk:
            try:
                alert.check(self.bands)
            except DataError:
                if self.on_error == "raise":
                    raise
                self.skipped += 1
                continue
            self._take(alert)
            if len(self._pending) >= self.batch:
                out += self._classify()
        if self._pending and self.clock.now() - self._pending[0][3] >= self.latency:
            out += self._classify()
        return out

    def flush(self) -> list[Classification]:
        """Answer what is pending."""
        return self._classify() if self._pending else []

    def _take(self, alert: Alert) -> None:
        self.seen += 1
        history = self._history.setdefault(alert.object_id, [])
        insort(history, (alert.time, self.bands.index(alert.band), alert.flux, alert.error))
        del history[: -self.max_points]
        if len(history) >= self.min_points:
            self._pending.append((alert.object_id, alert.time, list(history), self.clock.now()))
        if alert.time > self._latest + 1 and math.isfinite(self.forget_after):  # look once a day
            self._latest = alert.time
            old = [k for k, h in self._history.items() if h[-1][0] < alert.time - self.forget_after]
            for key in old:
                del self._history[key]

    def _classify(self) -> list[Classification]:
        pending, self._pending = self._pending, []
        found = self.probabilities(Observations.of([p[2] for p in pending], self.bands))
        now = self.clock.now()
        self.delays.extend(now - p[3] for p in pending)
        self.answered += len(pending)
        return [
            Classification(name, time, tuple(row.tolist()), len(history), self.classes)
            for (name, time, history, _), row in zip(pending, found, strict=True)
        ]

    def probabilities(self, curves: Observations) -> NDArray[np.float64]:
        """Of whole light curves: (objects, classes). What the stream does, offline."""
        grids = grid(curves, self.kernel).astype(np.float32)
        parts = [softmax(self.model(grids[k : k + 8])) for k in range(0, len(grids), 8)]  # what a cache holds
        return np.concatenate(parts)


def softmax(logits: Any) -> NDArray[np.float64]:
    """Probabilities (batch, classes) in double precision; takes arrays and tensors."""
    wide = np.asarray(logits.detach() if hasattr(logits, "detach") else logits, np.float64)
    shifted = np.exp(wide - wide.max(-1, keepdims=True))
    result: NDArray[np.float64] = shifted / shifted.sum(-1, keepdims=True)
    return result


_ZTF_BANDS = {"1": "g", "2": "r", "3": "i"}


def read_alerts(path: str | Path) -> Iterator[Alert]:
    """Alerts of a CSV file (``.gz`` or not) in order of time, of any of three layouts:

    ``object_id,time,band,flux,error``; ZTF's ``object_id,jd,fid,magpsf,sigmapsf,isdiffpos`` (upper limits are left out,
    repeated rows of overlapping histories count once); ELAsTiCC's ``object_id,mjd,band,flux_nJy,flux_err_nJy``. Raises
    :class:`~hasten.errors.DataError` for another header or a number that cannot be read.
    """
    place = Path(path)
    try:
        with gzip.open(place, "rt") if place.suffix == ".gz" else place.open() as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{str(place)!r} cannot be read ({error}); give a CSV file of alerts") from error
    head = set(rows[0]) if rows else set()
    found: set[tuple[float, str, str, float, float]] = set()
    for number, row in enumerate(rows, 2):
        try:
            if {"object_id", "time", "band", "flux", "error"} <= head:
                entry = (float(row["time"]), row["band"], float(row["flux"]), float(row["error"]))
            elif {"object_id", "jd", "fid", "magpsf", "sigmapsf"} <= head:
                if not row["magpsf"]:
                    continue
                bright, deviation = flux_of(float(row["magpsf"]), float(row["sigmapsf"]))
                sign = 1.0 if row.get("isdiffpos", "t") in ("t", "1", "") else -1.0
                band = _ZTF_BANDS.get(row["fid"], row["fid"])
                entry = (float(row["jd"]) - 2400000.5, band, sign * float(bright), float(deviation))
            elif {"object_id", "mjd", "band", "flux_nJy", "flux_err_nJy"} <= head:
                entry = (float(row["mjd"]), row["band"].lower(), float(row["flux_nJy"]), float(row["flux_err_nJy"]))
            else:
                raise DataError(
                    f"{str(place)!r} has columns {', '.join(sorted(head)) or 'none'}; give object_id, time, band, flux "
                    "and error"
                )
        except DataError:
            raise
        except (TypeError, ValueError) as wrong:
            raise DataError(f"{str(place)!r} line {number}: {wrong}; numbers are expected there") from wrong
        found.add((entry[0], row["object_id"], entry[1], entry[2], entry[3]))
    for time, name, band, flux, spread in sorted(found):
        yield Alert(name, time, band, flux, spread)
