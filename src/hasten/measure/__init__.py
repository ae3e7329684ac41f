"""Measuring: latency, cost, memory, energy, the roofline, and the report that shows them.

The package is callable: ``hasten.measure(model, example)`` is :func:`hasten.measure.measurement.measure`.

>>> from hasten.measure import Protocol, latency, percentile
>>> percentile([1.0, 2.0, 3.0], 50).value
2.0
"""

import sys
import types
from typing import TYPE_CHECKING, Any

from hasten.measure.bandwidth import Ceilings, measure_ceilings
from hasten.measure.energy import Energy
from hasten.measure.latency import Comparison, LatencySample, Protocol, compare, latency
from hasten.measure.machine import Machine
from hasten.measure.roofline import Point, Roofline
from hasten.measure.stats import Estimate, Summary, bootstrap, paired_ratio, percentile, summarise

if TYPE_CHECKING:
    from hasten.measure.counting import Cost, cost
    from hasten.measure.measurement import Measurement, measure
    from hasten.measure.report import Report

__all__ = [
    "Ceilings",
    "Comparison",
    "Cost",
    "Energy",
    "Estimate",
    "LatencySample",
    "Machine",
    "Measurement",
    "Point",
    "Protocol",
    "Report",
    "Roofline",
    "Summary",
    "bootstrap",
    "compare",
    "cost",
    "latency",
    "measure",
    "measure_ceilings",
    "paired_ratio",
    "percentile",
    "summarise",
]

# These need torch or matplotlib; they are fetched when first asked for.
_LATER = {
    "Cost": "hasten.measure.counting",
    "cost": "hasten.measure.counting",
    "Measurement": "hasten.measure.measurement",
    "measure": "hasten.measure.measurement",
    "Report": "hasten.measure.report",
}


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_LATER[name]), name)


class _CallablePackage(types.ModuleType):
    def __call__(self, *arguments: Any, **named: Any) -> "Measurement":
        from hasten.measure.measurement import measure

        return measure(*arguments, **named)


sys.modules[__name__].__class__ = _CallablePackage
