"""A published claim, rerun here: what was claimed, what this machine measured, and a plain verdict.

A :class:`Study` names one published system, its claim and its figures, and a function that yields :class:`Check`\\ s.
A check compares one measured value with one threshold. A check that cannot run here (no data, no GPU) says so with
``holds=None`` and does not count; the verdict is over the others:

    all hold -> "holds", some -> "in part", none -> "does not hold", nothing could be judged -> "not run".

A claim that does not hold stays in the library with its figures.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from hasten.errors import ConfigurationError

__all__ = ["Check", "Progress", "Result", "Scale", "Study", "Verdict", "verdict_of"]

_T = TypeVar("_T")

Verdict = Literal["holds", "in part", "does not hold", "not run"]

Progress = Callable[[str, float], None]
"""Told where a study is: ``progress(stage, share)`` with the share of the whole study that is done, 0 to 1."""


def _silent(stage: str, share: float) -> None:
    """Progress that nobody watches."""


@dataclass(frozen=True)
class Scale:
    """How much a study may spend, and where its data are.

    >>> scale = Scale(quick=True)
    >>> scale.choose(quick=100, full=5000)
    100
    >>> scale.find("llm_traces/azure_conv.csv.gz") is None     # no data folder was given
    True
    """

    quick: bool = False
    """True: minutes instead of hours, smaller samples, the same checks"""
    data: Path | None = None
    """folder of public data sets, or None where there is none"""
    seed: int = 0
    """every random draw of the study comes from it"""
    progress: Progress = _silent
    """called with (stage, share done)"""

    def choose(self, quick: _T, full: _T) -> _T:
        """``quick`` in a quick run, ``full`` otherwise."""
        return quick if self.quick else full

    def find(self, relative: str) -> Path | None:
        """The file or folder ``relative`` inside the data folder, or None where it is absent."""
        if self.data is None:
            return None
        path = self.data / relative
        return path if path.exists() else None


@dataclass(frozen=True)
class Check:
    """One measured value against one threshold.

    >>> Check.at_least("goodput ratio", 2.4, 1.8, "×").holds
    True
    >>> Check.at_most("p99 TPOT", float("nan"), 0.05, "s").holds      # not-a-number never holds
    False
    >>> Check.unavailable("real trace", "azure_conv.csv.gz is not here").holds is None
    True
    """

    name: str
    """what was measured, in a few words"""
    value: float | int | str | None
    """the measured value, None where nothing was measured"""
    unit: str = ""
    """SI unit of the value, ``×`` for a ratio, empty for a count or a text"""
    threshold: str = ""
    """the condition as written, such as ``≥ 1.8``"""
    holds: bool | None = None
    """whether the condition is met; None: it could not be judged here and does not count"""
    note: str = ""
    """what a reader should know: the baseline, the data, why it was not judged"""

    def __post_init__(self) -> None:
        if self.holds is not None and not isinstance(self.holds, bool):
            if not hasattr(self.holds, "item"):  # numpy's bool is welcome, anything else is a mistake
                raise ConfigurationError(f"check {self.name!r}: holds is {self.holds!r}; give True, False or None")
            object.__setattr__(self, "holds", bool(self.holds))
        if hasattr(self.value, "item"):
            object.__setattr__(self, "value", self.value.item())  # type: ignore[union-attr]
        if self.holds is None and not self.note:
            raise ConfigurationError(f"check {self.name!r} was not judged and says no reason; give a note")

    @classmethod
    def at_least(cls, name: str, value: float, bound: float, unit: str = "", note: str = "") -> Check:
        """Holds when ``value >= bound``."""
        return cls(name, value, unit, f"≥ {bound:g}", bool(value >= bound), note)

    @classmethod
    def at_most(cls, name: str, value: float, bound: float, unit: str = "", note: str = "") -> Check:
        """Holds when ``value <= bound``."""
        return cls(name, value, unit, f"≤ {bound:g}", bool(value <= bound), note)

    @classmethod
    def within(cls, name: str, value: float, low: float, high: float, unit: str = "", note: str = "") -> Check:
        """Holds when ``low <= value <= high``."""
        return cls(name, value, unit, f"{low:g} … {high:g}", bool(low <= value <= high), note)

    @classmethod
    def equal(
        cls, name: str, value: float | int | str, expected: float | int | str, unit: str = "", note: str = ""
    ) -> Check:
        """Holds when ``value == expected`` exactly."""
        return cls(name, value, unit, f"= {expected}", bool(value == expected), note)

    @classmethod
    def unavailable(cls, name: str, reason: str, unit: str = "", threshold: str = "") -> Check:
        """A check that could not run here, with the reason; it does not count in the verdict."""
        return cls(name, None, unit, threshold, None, reason)

    def to_json(self) -> dict[str, Any]:
        """A JSON object; a value that is not finite becomes its name, since JSON has none."""
        value = self.value
        if isinstance(value, float) and not math.isfinite(value):
            value = repr(value)
        return {
            "name": self.name,
            "value": value,
            "unit": self.unit,
            "threshold": self.threshold,
            "holds": self.holds,
            "note": self.note,
        }


def verdict_of(checks: Iterable[Check]) -> Verdict:
    """The verdict over the checks that were judged."""
    judged = [c.holds for c in checks if c.holds is not None]
    if not judged:
        return "not run"
    if all(judged):
        return "holds"
    return "in part" if any(judged) else "does not hold"


@dataclass(frozen=True)
class Study:
    """One published system, its claim, and how it is rerun here.

    >>> def run(scale):
    ...     yield Check.at_least("pi", 3.14159, 3.0)
    >>> study = Study("circle", claim="pi exceeds three", published="3.14159", run=run)
    >>> verdict_of(study.run(Scale(quick=True)))
    'holds'
    """

    system: str
    """name of the published system, as in the table of systems: ``sarathi-serve``"""
    claim: str
    """what the publication says, in one sentence"""
    published: str | Mapping[str, Any]
    """its figures, with the conditions under which it got them"""
    run: Callable[[Scale], Iterable[Check]]
    """yields the checks; may be a generator, so that what is done shows early"""

    def __post_init__(self) -> None:
        if not self.system or not self.claim:
            raise ConfigurationError(f"a study needs a system and a claim, got {self.system!r} and {self.claim!r}")


@dataclass(frozen=True)
class Result:
    """What came out of one run of a study."""

    system: str
    """the published system"""
    claim: str
    """its claim"""
    published: str | Mapping[str, Any]
    """its figures"""
    checks: tuple[Check, ...]
    """every check, judged or not, in the order of the run"""
    machine: Mapping[str, Any] = field(default_factory=dict)
    """fingerprint of the machine that measured"""
    seconds: float = 0.0
    """how long the run took"""

    @property
    def verdict(self) -> Verdict:
        """Over the checks that were judged; see the module."""
        return verdict_of(self.checks)

    def to_json(self) -> dict[str, Any]:
        """The published layout: system, claim, published, verdict, checks, machine, seconds."""
        published = self.published if isinstance(self.published, str) else dict(self.published)
        return {
            "system": self.system,
            "claim": self.claim,
            "published": published,
            "verdict": self.verdict,
            "checks": [c.to_json() for c in self.checks],
            "machine": dict(self.machine),
            "seconds": self.seconds,
        }
