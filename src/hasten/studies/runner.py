"""Runs a study: collects its checks, stamps the machine and the time, keeps what it is told about progress."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from hasten.clock import Clock, MonotonicClock
from hasten.errors import ConfigurationError, DataError
from hasten.studies.study import Check, Result, Scale, Study

__all__ = ["execute", "find_data"]


def execute(
    study: Study,
    scale: Scale,
    *,
    clock: Clock | None = None,
    on_check: Callable[[Check], None] | None = None,
) -> Result:
    """Run ``study`` and judge it.

    ``on_check`` is called with each check as soon as the study yields it. Errors of the study pass through: a study
    that breaks has no verdict. Raises :class:`~hasten.errors.ConfigurationError` if it yields anything but checks,
    or two checks of one name.
    """
    from hasten.measure.machine import Machine

    clock = clock or MonotonicClock()
    machine = Machine.detect().to_json()
    began = clock.now()
    checks: list[Check] = []
    for check in study.run(scale):
        if not isinstance(check, Check):
            raise ConfigurationError(f"study {study.system!r} yielded {check!r}; a study yields Check objects")
        if any(check.name == c.name for c in checks):
            raise ConfigurationError(f"study {study.system!r} has two checks named {check.name!r}; names are unique")
        checks.append(check)
        if on_check is not None:
            on_check(check)
    return Result(study.system, study.claim, study.published, tuple(checks), machine, clock.now() - began)


def find_data(given: Path | None) -> Path | None:
    """The data folder: the one given, else the environment's ``HASTEN_DATA``, else ``../shared/data`` if it is there.

    Raises :class:`~hasten.errors.DataError` when a folder was named and does not exist.
    """
    named = given if given is not None else (Path(os.environ["HASTEN_DATA"]) if os.environ.get("HASTEN_DATA") else None)
    if named is not None:
        if not named.is_dir():
            raise DataError(f"the data folder {str(named)!r} does not exist; give an existing one with --data DIR")
        return named
    beside = Path("../shared/data")
    return beside if beside.is_dir() else None
