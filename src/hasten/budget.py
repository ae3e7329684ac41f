"""Budgets and service-level objectives: what a user may spend, in SI units.

Text is parsed here, at the edge, and nowhere else: ``"50ms"`` becomes 0.05 (seconds), ``"2GiB"`` becomes 2147483648
(bytes), ``"3mJ"`` becomes 0.003 (joules). Everything behind this module computes in seconds, bytes, joules and hertz.

A :class:`Budget` bounds what one model may spend (latency at a percentile, memory, energy) or must keep (quality).
An :class:`SLO` bounds what each *request* to a server may wait for (time to first token, time per output token, …).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields

from hasten.errors import BudgetError

__all__ = ["SLO", "Bound", "Budget", "Target", "format_quantity", "parse_quantity"]

_UNITS: dict[str, tuple[str, float]] = {
    # name as written -> (kind, factor to SI)
    "ns": ("time", 1e-9),
    "us": ("time", 1e-6),
    "µs": ("time", 1e-6),
    "ms": ("time", 1e-3),
    "s": ("time", 1.0),
    "min": ("time", 60.0),
    "h": ("time", 3600.0),
    "B": ("bytes", 1.0),
    "kB": ("bytes", 1e3),
    "KB": ("bytes", 1e3),
    "MB": ("bytes", 1e6),
    "GB": ("bytes", 1e9),
    "TB": ("bytes", 1e12),
    "KiB": ("bytes", 2.0**10),
    "MiB": ("bytes", 2.0**20),
    "GiB": ("bytes", 2.0**30),
    "TiB": ("bytes", 2.0**40),
    "uJ": ("energy", 1e-6),
    "µJ": ("energy", 1e-6),
    "mJ": ("energy", 1e-3),
    "J": ("energy", 1.0),
    "kJ": ("energy", 1e3),
    "Hz": ("rate", 1.0),
    "/s": ("rate", 1.0),
    "%": ("ratio", 0.01),
    "": ("number", 1.0),
}
_QUANTITY = re.compile(r"^\s*([0-9]*\.?[0-9]+(?:[eE][-+]?[0-9]+)?)\s*([A-Za-zµ/%]*)\s*$")


def parse_quantity(text: str, kind: str) -> float:
    """Read a number with a unit as SI.

    ``kind`` is one of ``time`` (seconds), ``bytes``, ``energy`` (joules), ``rate`` (hertz), ``ratio`` (0 to 1) or
    ``number``. A ratio may be written ``0.99`` or ``99%``; every other kind but ``number`` needs its unit.

    >>> parse_quantity("50ms", "time"), parse_quantity("2GiB", "bytes")
    (0.05, 2147483648.0)

    Raises :class:`~hasten.errors.BudgetError` with the value received and the units that would do.
    """
    match = _QUANTITY.match(text)
    if not match:
        raise BudgetError(f"{text!r} is not a quantity; write a number and a unit, such as {_example(kind)}")
    number, unit = float(match.group(1)), match.group(2)
    known = _UNITS.get(unit)
    if known is None or (known[0] != kind and not (kind == "ratio" and known[0] == "number")):
        units = ", ".join(sorted((u for u, (k, _) in _UNITS.items() if k == kind and u), key=len))
        raise BudgetError(f"{text!r} has the unit {unit or 'none'!r}; a {kind} is given in {units or 'plain numbers'}")
    return number * known[1]


def format_quantity(value: float, kind: str) -> str:
    """Write an SI value for a person, with three significant digits.

    >>> format_quantity(0.0512, "time"), format_quantity(2**31, "bytes")
    ('51.2 ms', '2 GiB')
    """
    if value != value:
        return "n/a"
    if kind == "time":
        for unit, factor in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
            if abs(value) >= factor:
                return f"{value / factor:.3g} {unit}"
        return f"{value / 1e-9:.3g} ns"
    if kind == "bytes":
        for unit, factor in (("GiB", 2.0**30), ("MiB", 2.0**20), ("KiB", 2.0**10)):
            if abs(value) >= factor:
                return f"{value / factor:.3g} {unit}"
        return f"{value:.0f} B"
    if kind == "energy":
        for unit, factor in (("J", 1.0), ("mJ", 1e-3)):
            if abs(value) >= factor:
                return f"{value / factor:.3g} {unit}"
        return f"{value / 1e-6:.3g} µJ"
    if kind == "ratio":
        return f"{value * 100:.3g} %"
    if kind == "rate":
        return f"{value:.3g} /s"
    return f"{value:.3g}"


def _example(kind: str) -> str:
    return {"time": "50ms", "bytes": "2GiB", "energy": "3mJ", "rate": "30/s", "ratio": "99%"}.get(kind, "3")


_METRICS: dict[str, str] = {
    # what a Budget may bound -> kind of quantity
    "latency": "time",
    "memory": "bytes",
    "size": "bytes",
    "energy": "energy",
    "quality": "ratio",
    "throughput": "rate",
}
_CONDITION = re.compile(r"^\s*([A-Za-z_][A-Za-z0-9_.]*)\s*(<=|>=|<|>|=)\s*(\S.*?)\s*$")
_PERCENTILE = re.compile(r"^p([0-9]{1,2}(?:\.[0-9]+)?)$")


def _percentile(text: str) -> float | None:
    match = _PERCENTILE.match(text.strip())
    return float(match.group(1)) if match else None


@dataclass(frozen=True)
class Bound:
    """One condition of a budget: ``metric`` at ``percentile`` stays below (or above) ``limit``."""

    metric: str
    """latency, memory, size, energy, quality or throughput"""
    limit: float
    """SI units; quality is the share of the unchanged model's quality that must remain"""
    percentile: float | None = None
    """for latency: the percentile that is bounded, 0 to 100"""
    at_least: bool = False
    """True where the value must not fall below the limit"""

    @property
    def key(self) -> str:
        """Name of the value that is bounded: ``latency@p99`` for a latency, else the metric."""
        return f"latency@p{self.percentile:g}" if self.metric == "latency" else self.metric

    def holds(self, value: float) -> bool:
        """Whether ``value`` is inside the bound; not-a-number is not."""
        return value >= self.limit if self.at_least else value <= self.limit

    def __str__(self) -> str:
        name = f"p{self.percentile:g}" if self.percentile is not None else self.metric
        return f"{name} {'≥' if self.at_least else '≤'} {format_quantity(self.limit, _METRICS[self.metric])}"


@dataclass(frozen=True)
class Budget:
    """What a model may spend on one machine, and the quality it must keep.

    >>> budget = Budget.parse("p99<50ms, memory<2GiB")
    >>> [str(b) for b in budget.bounds]
    ['p99 ≤ 50 ms', 'memory ≤ 2 GiB']
    >>> budget.violations({"latency@p99": 0.04, "memory": 2**32})
    ['memory is 4 GiB, the budget allows 2 GiB']
    """

    bounds: tuple[Bound, ...] = ()

    @classmethod
    def parse(cls, text: str) -> Budget:
        """Read ``"p99<50ms, memory<2GiB, quality>99%"``; conditions are separated by commas.

        ``p50``, ``p99.9`` … bound the latency at that percentile; ``latency`` alone means its median. The other names
        are memory, size, energy, quality and throughput. Raises :class:`~hasten.errors.BudgetError`.
        """
        bounds: list[Bound] = []
        for part in (p for p in text.split(",") if p.strip()):
            match = _CONDITION.match(part)
            if not match:
                raise BudgetError(
                    f"{part.strip()!r} is not a condition; write name<value, such as p99<50ms, memory<2GiB "
                    "or quality>99%"
                )
            name, sign, value = match.groups()
            percentile = _percentile(name)
            metric = "latency" if percentile is not None else name
            if metric == "latency" and percentile is None:
                percentile = 50.0
            if metric not in _METRICS:
                raise BudgetError(f"{name!r} cannot be bounded; a budget bounds {', '.join(_METRICS)} or p50 … p99.9")
            at_least = sign.startswith(">")
            if at_least != (metric in ("quality", "throughput")):
                raise BudgetError(
                    f"{part.strip()!r} bounds {metric} from the wrong side; "
                    f"write {name}{'<' if at_least else '>'}{value}"
                )
            bounds.append(Bound(metric, parse_quantity(value, _METRICS[metric]), percentile, at_least))
        if not bounds:
            raise BudgetError(f"{text!r} holds no condition; write for example p99<50ms, memory<2GiB")
        return cls(tuple(bounds))

    def violations(self, values: Mapping[str, float]) -> list[str]:
        """One line for each bound that ``values`` breaks.

        Keys are metric names, latency as ``latency@p99``. A bound whose value is absent is not judged.
        """
        lines = []
        for bound in self._broken(values):
            kind, value = _METRICS[bound.metric], values[bound.key]
            verb = "asks for" if bound.at_least else "allows"
            lines.append(
                f"{bound.key} is {format_quantity(value, kind)}, the budget {verb} {format_quantity(bound.limit, kind)}"
            )
        return lines

    def excess(self, values: Mapping[str, float]) -> float:
        """By what share the worst broken bound is missed; 0 where none is.

        >>> Budget.parse("p99<50ms, quality>80%").excess({"latency@p99": 0.06, "quality": 0.9})
        0.2
        """
        shares = [0.0]
        for bound in self._broken(values):
            given, allowed = (bound.limit, values[bound.key]) if bound.at_least else (values[bound.key], bound.limit)
            shares.append(given / allowed - 1 if allowed > 0 else math.inf)
        return round(max(shares), 12)

    def _broken(self, values: Mapping[str, float]) -> list[Bound]:
        return [b for b in self.bounds if b.key in values and not b.holds(values[b.key])]

    def __str__(self) -> str:
        return ", ".join(str(b) for b in self.bounds)


@dataclass(frozen=True)
class Target:
    """One latency objective: ``limit`` seconds at ``percentile``."""

    limit: float
    """seconds"""
    percentile: float = 99.0
    """0 to 100"""

    def __post_init__(self) -> None:
        if not self.limit > 0:
            raise BudgetError(f"a latency objective of {self.limit} s can never be met; give a positive time")
        if not 0 < self.percentile <= 100:
            raise BudgetError(f"percentile {self.percentile} is not within (0, 100]")

    @classmethod
    def parse(cls, text: str) -> Target:
        """Read ``"100ms@p99"`` or ``"100ms"`` (then at p99)."""
        value, _, at = text.partition("@")
        percentile = 99.0
        if at:
            parsed = _percentile(at)
            if parsed is None:
                raise BudgetError(f"{at!r} is not a percentile; write p50, p99 or p99.9")
            percentile = parsed
        return cls(parse_quantity(value, "time"), percentile)

    def __str__(self) -> str:
        return f"{format_quantity(self.limit, 'time')}@p{self.percentile:g}"


_SLO_NAMES = {"ttft": "ttft", "tpot": "tpot", "itl": "itl", "tbt": "itl", "e2e": "e2e", "e2el": "e2e", "queue": "queue"}


@dataclass(frozen=True, init=False)
class SLO:
    """What a request to a server may wait for.

    >>> SLO.parse("ttft<200ms, tpot<50ms, p99").ttft
    Target(limit=0.2, percentile=99.0)
    >>> SLO(tbt="100ms@p99", queue="2s@p50").queue
    Target(limit=2.0, percentile=50.0)
    """

    ttft: Target | None
    """time to first token: from the arrival of the request to its first token"""
    tpot: Target | None
    """time per output token: (last token - first token) / (tokens - 1), one value per request"""
    itl: Target | None
    """inter-token latency (time between tokens, TBT): every gap of every request"""
    e2e: Target | None
    """end to end: from arrival to the last token"""
    queue: Target | None
    """scheduling delay: from arrival to the first step that computes a token of the request"""

    def __init__(
        self,
        ttft: str | float | Target | None = None,
        tpot: str | float | Target | None = None,
        itl: str | float | Target | None = None,
        e2e: str | float | Target | None = None,
        queue: str | float | Target | None = None,
        *,
        tbt: str | float | Target | None = None,
    ) -> None:
        if tbt is not None and itl is not None:
            raise BudgetError("tbt and itl are two names of one objective; give one of them")
        given = {"ttft": ttft, "tpot": tpot, "itl": itl if tbt is None else tbt, "e2e": e2e, "queue": queue}
        for name, value in given.items():
            if isinstance(value, str):
                value = Target.parse(value)
            elif isinstance(value, (int, float)):
                value = Target(float(value))
            object.__setattr__(self, name, value)

    @classmethod
    def parse(cls, text: str) -> SLO:
        """Read ``"ttft<200ms, tpot<50ms, p99"`` or ``"tbt=100ms@p99"``.

        A bare percentile is that of every objective which does not name its own. Raises
        :class:`~hasten.errors.BudgetError`.
        """
        shared = 99.0
        conditions: dict[str, str] = {}
        for part in (p.strip() for p in text.split(",")):
            if not part:
                continue
            percentile = _percentile(part)
            if percentile is not None:
                shared = percentile
                continue
            match = _CONDITION.match(part)
            if not match or match.group(2).startswith(">"):
                raise BudgetError(f"{part!r} is not an objective; write for example ttft<200ms, tpot<50ms, p99")
            name = _SLO_NAMES.get(match.group(1).lower())
            if name is None:
                raise BudgetError(f"{match.group(1)!r} is not an objective; known are {', '.join(_SLO_NAMES)}")
            conditions[name] = match.group(3)
        if not conditions:
            raise BudgetError(f"{text!r} holds no objective; write for example ttft<200ms, tpot<50ms, p99")
        targets = {n: Target.parse(v if "@" in v else f"{v}@p{shared:g}") for n, v in conditions.items()}
        return cls(**targets)

    def targets(self) -> dict[str, Target]:
        """The objectives that are set, by name."""
        return {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) is not None}

    def met_by(self, latencies: Mapping[str, float]) -> bool:
        """Whether one request with these latencies (seconds, by objective name) is good.

        A request counts as good when every objective that is set and was measured stays within its limit; this is what
        goodput counts, whatever the percentile.
        """
        return all(latencies[n] <= t.limit for n, t in self.targets().items() if latencies.get(n) is not None)

    def __str__(self) -> str:
        return ", ".join(f"{n}<{t}" for n, t in self.targets().items())
