"""Too little calibration data: what a technique needs, by arithmetic, and one sentence for what is not there.

- A second moment ``Σ x xᵀ`` of n rows has rank n at most. With fewer rows than a layer has inputs it is singular, and
  whatever is solved with it is blind in the other directions.
- The largest of n examples is exceeded by the next one with probability ``1 / (n + 1)`` whatever their distribution,
  and the mean of n has ``1 / n`` of their variance: from 20 on less than 5 %, the least that is taken in silence.
- A quantile that leaves the share t outside needs ``1 / t`` values, a histogram as many values as it has bins.

Where the result is still sound (damped, or exact for what was seen) a call warns once; where it is not, it refuses.
"""

from __future__ import annotations

import math
import os
import sys
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from hasten.errors import ConfigurationError, DataWarning

__all__ = ["FEW", "Scarcity", "count_examples"]

FEW = 20
"""Examples from which a largest value or a mean is taken without a word."""
_NAMED = 3
"""Layers that a sentence names."""
_HOME = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def count_examples(calibration: Sequence[Any]) -> int:
    """Examples of all batches: the length that a batch's tensors share, or 1.

    >>> import torch
    >>> count_examples([torch.zeros(8, 3), (torch.zeros(2, 5), torch.zeros(2))])
    10
    """
    from hasten.compress.quantize.portions import rows_of  # a package that asks this module

    return sum(max(1, rows_of(batch)) for batch in calibration)


class Scarcity:
    """Gathers what is too little in one call of a technique, and says it on one line.

    >>> scarce, notes = Scarcity(), []
    >>> scarce.rows("Gptq", {"0": 5, "2": 70}, {"0": 64, "2": 64})
    >>> with warnings.catch_warnings():
    ...     warnings.simplefilter("ignore")
    ...     scarce.tell(notes)
    >>> notes[0].partition(": ")[2]
    "Gptq meets a singular second moment in 1 of 2 layers, '0' (5 rows of 64); give 13 times as much"
    """

    def __init__(self) -> None:
        self._said: list[str] = []
        self._few: list[str] = []
        self._seen = FEW
        self._factor = 1.0

    def rows(
        self, user: str, seen: Mapping[str, int], needed: Mapping[str, int],
        why: str = "meets a singular second moment", unit: str = "rows",
    ) -> None:  # fmt: skip
        """Layers of ``needed`` that saw fewer rows than that."""
        short = {p: (seen.get(p, 0), n) for p, n in needed.items() if seen.get(p, 0) < n}
        if short:
            self._said.append(f"{user} {why} in {len(short)} of {len(needed)} layers, {_listed(short, unit)}")
            self._grow(short)

    def examples(self, user: str, seen: int) -> None:
        """Largest values or means that ``user`` takes over ``seen`` examples."""
        if seen < FEW:
            self._few.append(user)
            self._seen = min(self._seen, seen)
            self._factor = max(self._factor, FEW / max(seen, 1))

    def refuse(
        self, what: str, seen: Mapping[str, int], needed: Mapping[str, int], way: str, unit: str = "rows"
    ) -> None:
        """Raises :class:`~hasten.errors.ConfigurationError` on one line where a layer saw fewer than ``needed``."""
        short = {p: (seen.get(p, 0), n) for p, n in needed.items() if seen.get(p, 0) < n}
        if short:
            self._grow(short)
            raise ConfigurationError(
                f"too little calibration: {what} in {len(short)} of {len(needed)} layers, {_listed(short, unit)}; give "
                f"{math.ceil(self._factor)} times as much, or {way}"
            )

    def tell(self, notes: list[str]) -> None:
        """Add the sentence to ``notes`` and warn with it, where anything is too little."""
        said = list(self._said)
        if self._few:
            said.append(
                f"{' and '.join(self._few)} over {_count(self._seen, 'examples')} where {FEW} are wanted (the next one "
                f"lies beyond the largest with probability {1 / (self._seen + 1):.0%})"
            )
        if said:
            line = f"too little calibration: {'; '.join(said)}; give {math.ceil(self._factor)} times as much"
            notes.append(line)
            warnings.warn(line, DataWarning, stacklevel=_frames_inside())

    def _grow(self, short: Mapping[str, tuple[int, int]]) -> None:
        self._factor = max(self._factor, *(need / max(seen, 1) for seen, need in short.values()))


def _count(number: int, unit: str) -> str:
    return f"{number} {unit if number != 1 else unit[:-1]}"


def _listed(short: Mapping[str, tuple[int, int]], unit: str) -> str:
    worst = sorted(short, key=lambda p: short[p][0] / short[p][1])[:_NAMED]
    named = [
        f"{p!r} ({_count(short[p][0], unit) if not i else short[p][0]} of {short[p][1]})" for i, p in enumerate(worst)
    ]
    return ", ".join([*named, *(["…"] if len(short) > _NAMED else [])])


def _frames_inside() -> int:
    """Levels of the stack up to the first caller outside of this package, so that a warning points at the user's."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_HOME):
        level, frame = level + 1, frame.f_back
    return level
