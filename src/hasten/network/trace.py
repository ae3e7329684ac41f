"""A link whose bandwidth changes: how long a transfer takes that begins at a given time.

Bandwidth is a step function of time, repeated for ever. Invariant: the bytes delivered up to ``finish(start, size)``
are those delivered up to ``start`` plus ``size``. Bytes, seconds, bytes per second.
"""

from __future__ import annotations

import csv
import gzip
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hasten.errors import DataError

__all__ = ["Trace"]


@dataclass(frozen=True)
class Trace:
    """Bandwidth over time.

    >>> link = Trace.of([0.0, 1.0], [100.0, 50.0], period=2.0)
    >>> link.finish(0.5, 75.0), link.finish(0.0, 300.0), link.mean
    (1.5, 4.0, 75.0)
    """

    edges: NDArray[np.float64]
    """(steps + 1,): where each step begins, and the end of the period; the first is 0"""
    rates: NDArray[np.float64]
    """(steps,): bytes per second"""
    total: NDArray[np.float64]
    """(steps + 1,): bytes delivered from 0 to each edge"""
    name: str = ""

    @classmethod
    def of(cls, times: Any, rates: Any, *, period: float | None = None, name: str = "") -> Trace:
        """From the begin of each step and its rate; the last step is as long as the one before unless ``period`` says.

        Raises :class:`~hasten.errors.DataError` where times do not grow or nothing is ever delivered.
        """
        at, rate = np.asarray(times, np.float64), np.asarray(rates, np.float64)
        if at.ndim != 1 or at.shape != rate.shape or len(at) == 0 or (np.diff(at) <= 0).any() or (rate < 0).any():
            raise DataError(f"trace {name!r}: times must grow and rates must not be negative")
        at = at - at[0]
        end = period if period is not None else float(at[-1] + (at[-1] - at[-2] if len(at) > 1 else 1.0))
        edges = np.append(at, end)
        total = np.concatenate(([0.0], np.cumsum(rate * np.diff(edges))))
        if end <= at[-1] or total[-1] <= 0:
            raise DataError(f"trace {name!r} delivers nothing; give rates above 0")
        return cls(edges, rate, total, name)

    @classmethod
    def constant(cls, rate: float) -> Trace:
        """The same bandwidth always."""
        return cls.of([0.0], [rate], period=1.0, name=f"{rate:g} B/s")

    @classmethod
    def load(cls, path: str | Path, name: str, *, step: float = 0.1) -> Trace:
        """A Mahimahi trace out of an ``.npz`` of delivery times in milliseconds (packets of 1,500 bytes), or a series
        out of a Pensieve ``.csv.gz`` (trace, time_s, mbit_per_s). Raises :class:`~hasten.errors.DataError`.
        """
        path = Path(path)
        try:
            if path.suffix == ".npz":
                with np.load(path) as file:
                    times = file[name].astype(np.float64) / 1e3
                counts = np.bincount((times / step).astype(np.int64))
                return cls.of(np.arange(len(counts)) * step, counts * 1500 / step, name=name)
            series = cls.series(path)
            return series[name]
        except KeyError:
            raise DataError(f"{path.name} has no trace {name!r}") from None
        except (OSError, ValueError) as error:
            raise DataError(f"{str(path)!r} cannot be read as a trace ({error})") from None

    @classmethod
    def series(cls, path: str | Path) -> dict[str, Trace]:
        """All traces of a Pensieve file that deliver something."""
        found: dict[str, list[tuple[float, float]]] = {}
        with gzip.open(path, "rt") as file:
            for row in csv.DictReader(file):
                found.setdefault(row["trace"], []).append((float(row["time_s"]), float(row["mbit_per_s"])))
        out = {}
        for name, points in found.items():
            points = sorted(dict(points).items())
            if len(points) > 1 and any(rate > 0 for _, rate in points):
                out[name] = cls.of([t for t, _ in points], [r * 1e6 / 8 for _, r in points], name=name)
        return out

    @property
    def period(self) -> float:
        """Seconds until it repeats."""
        return float(self.edges[-1])

    @property
    def mean(self) -> float:
        """Bytes per second over the period."""
        return float(self.total[-1] / self.edges[-1])

    def scaled(self, factor: float) -> Trace:
        """The same shape with ``factor`` times the bandwidth."""
        return Trace(self.edges, self.rates * factor, self.total * factor, self.name)

    def delivered(self, time: float) -> float:
        """Bytes from 0 to ``time``."""
        whole, part = divmod(time, self.period)
        return float(whole * self.total[-1] + np.interp(part, self.edges, self.total))

    def finish(self, start: float, size: float) -> float:
        """When a transfer of ``size`` bytes that begins at ``start`` ends."""
        if size <= 0:
            return start
        goal = self.delivered(start) + size
        whole = np.ceil(goal / self.total[-1]) - 1
        part = goal - whole * self.total[-1]
        index = int(np.searchsorted(self.total, part, side="left")) - 1
        rest = part - self.total[index]
        return float(whole * self.period + self.edges[index] + rest / self.rates[index])
