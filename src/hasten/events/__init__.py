"""Things that happen and are told one by one: astronomical alerts, their light curves, and who classifies them.

>>> from hasten.events import Alert
>>> Alert("ZTF21abc", 59000.5, "g", 120.0, 4.0).band
'g'
"""

import importlib
from typing import TYPE_CHECKING, Any

from hasten.events.alerts import Alert, AlertClassifier, Classification
from hasten.events.gaussian_process import Kernel, grid
from hasten.events.observations import Observations

if TYPE_CHECKING:
    from hasten.events.lightcurves import CLASSES, simulate
    from hasten.events.t2 import T2, T2Config, weighted_log_loss

__all__ = [
    "CLASSES",
    "T2",
    "Alert",
    "AlertClassifier",
    "Classification",
    "Kernel",
    "Observations",
    "T2Config",
    "grid",
    "simulate",
    "weighted_log_loss",
]

# These need torch, or are needed by nobody who only classifies.
_LATER = {
    "CLASSES": "hasten.events.lightcurves",
    "simulate": "hasten.events.lightcurves",
    "T2": "hasten.events.t2",
    "T2Config": "hasten.events.t2",
    "weighted_log_loss": "hasten.events.t2",
}


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_LATER[name]), name)
