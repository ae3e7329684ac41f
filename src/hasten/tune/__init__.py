"""Tuning: the search over recipes and serving knobs under a hard budget.

The package is callable: ``hasten.tune(model, data, budget)`` is :func:`hasten.tune.model.tune`.
"""

import importlib
import sys
import types
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hasten.tune.frontier import Axis, Candidate, Frontier
    from hasten.tune.model import TuneResult, tune
    from hasten.tune.saved import SavedResult, load
    from hasten.tune.search import Outcome, Search
    from hasten.tune.serving import ServingResult, simulated, tune_serving
    from hasten.tune.space import Knob, Space, recipe_space, serving_space
    from hasten.tune.spiking import tune_spiking

__all__ = [
    "Axis",
    "Candidate",
    "Frontier",
    "Knob",
    "Outcome",
    "SavedResult",
    "Search",
    "ServingResult",
    "Space",
    "TuneResult",
    "load",
    "recipe_space",
    "serving_space",
    "simulated",
    "tune",
    "tune_serving",
    "tune_spiking",
]

_HOMES = {
    "Axis": "frontier",
    "Candidate": "frontier",
    "Frontier": "frontier",
    "Knob": "space",
    "Outcome": "search",
    "SavedResult": "saved",
    "Search": "search",
    "ServingResult": "serving",
    "Space": "space",
    "TuneResult": "model",
    "load": "saved",
    "recipe_space": "space",
    "serving_space": "space",
    "simulated": "serving",
    "tune": "model",
    "tune_serving": "serving",
    "tune_spiking": "spiking",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"hasten.tune.{_HOMES[name]}"), name)


class _CallablePackage(types.ModuleType):
    def __call__(self, *arguments: Any, **named: Any) -> "TuneResult":
        from hasten.tune.model import tune

        return tune(*arguments, **named)


sys.modules[__name__].__class__ = _CallablePackage
