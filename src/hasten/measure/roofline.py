"""The roof above an operation: it can be no faster than its bytes or its operations allow.

    bound = max(bytes / bandwidth, operations / rate)        attainment = bound / measured time

*Intensity* is operations per byte; left of the ridge (rate / bandwidth) memory bounds, right of it arithmetic does
(Williams, Waterman and Patterson, "Roofline: an insightful visual performance model for multicore architectures",
2009). Differs from the paper in that both roofs are measured on this machine.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hasten.errors import ConfigurationError
from hasten.measure.bandwidth import Ceilings

__all__ = ["Point", "Roofline"]


@dataclass(frozen=True)
class Point:
    """One operation under the roof."""

    name: str
    """what was measured"""
    operations: float
    """arithmetic operations; a multiply-add is two"""
    traffic: float
    """bytes that must move at least"""
    bound: float
    """seconds that the roof allows at best"""
    limit: str
    """``memory`` or ``compute``: which roof binds"""
    time: float | None = None
    """measured seconds, where it was measured"""

    @property
    def intensity(self) -> float:
        """Operations per byte."""
        return self.operations / self.traffic if self.traffic else float("inf")

    @property
    def attainment(self) -> float | None:
        """Share of the roof that was reached, 0 to 1; above 1 means that the bytes came from a cache."""
        return None if self.time is None else self.bound / self.time

    def to_json(self) -> dict[str, Any]:
        """Plain numbers."""
        return {
            "name": self.name,
            "operations": self.operations,
            "bytes": self.traffic,
            "bound": self.bound,
            "limit": self.limit,
            "time": self.time,
            "attainment": self.attainment,
        }


@dataclass(frozen=True)
class Roofline:
    """The two roofs of one device and number format.

    One GiB over 10 GB/s takes 0.107 s, whatever is computed with it:

    >>> roof = Roofline(bandwidth=10e9, rate=100e9, dtype="float32")
    >>> round(roof.point("read", operations=0, traffic=2**30).bound, 3)
    0.107
    >>> roof.ridge
    10.0
    """

    bandwidth: float
    """bytes per second"""
    rate: float
    """operations per second"""
    dtype: str = "float32"
    """number format of the matrix products"""

    def __post_init__(self) -> None:
        if not (self.bandwidth > 0 and self.rate > 0):
            raise ConfigurationError(
                f"a roof of {self.bandwidth} B/s and {self.rate} /s is not positive; measure again"
            )

    @classmethod
    def of(cls, ceilings: Ceilings, dtype: str = "float32") -> Roofline:
        """The roof for ``dtype`` from measured ceilings."""
        return cls(ceilings.read, ceilings.rate(dtype), dtype)

    @property
    def ridge(self) -> float:
        """Operations per byte where the two roofs meet."""
        return self.rate / self.bandwidth

    def point(self, name: str, operations: float, traffic: float, time: float | None = None) -> Point:
        """Where an operation stands; ``time`` in seconds if it was measured."""
        by_memory, by_compute = traffic / self.bandwidth, operations / self.rate
        limit = "memory" if by_memory >= by_compute else "compute"
        return Point(name, operations, traffic, max(by_memory, by_compute), limit, time)

    def attainable(self, intensity: float) -> float:
        """Operations per second that the roof allows at this intensity."""
        return min(self.rate, self.bandwidth * intensity)

    def curve(self, low: float = 2**-4, high: float = 2**12, count: int = 64) -> list[tuple[float, float]]:
        """(intensity, operations per second) along the roof, evenly on a logarithmic axis, the ridge included."""
        step = (high / low) ** (1 / (count - 1))
        grid = sorted({low * step**i for i in range(count)} | {self.ridge})
        return [(x, self.attainable(x)) for x in grid]

    def to_json(self) -> dict[str, Any]:
        """Plain numbers."""
        return {"bandwidth": self.bandwidth, "rate": self.rate, "dtype": self.dtype, "ridge": self.ridge}
