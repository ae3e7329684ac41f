"""Machine learning on a latency budget: measure, tune, serve.

>>> import hasten as hs
>>> hs.Budget.parse("p99<50ms, memory<2GiB").bounds[0].limit
0.05

``hs.measure(model, example)`` says how far a model is from its budget, ``hs.tune(model, data, budget)`` makes it fit,
``hs.serve`` holds the engine and the server, ``hs.language`` the models. Nothing heavy is imported before it is used.
"""

from __future__ import annotations

from pathlib import Path as _Path
from typing import TYPE_CHECKING, Any

from hasten import kernel_cache as _kernel_cache
from hasten.budget import SLO, Budget
from hasten.errors import HastenError

if TYPE_CHECKING:
    from hasten import (
        compress,
        diffusion,
        events,
        frozen,
        language,
        measure,
        nn,
        retrieve,
        serve,
        spiking,
        studies,
        testing,
        train,
        tune,
    )

__all__ = [
    "SLO",
    "Budget",
    "HastenError",
    "compress",
    "diffusion",
    "events",
    "frozen",
    "language",
    "measure",
    "nn",
    "retrieve",
    "serve",
    "spiking",
    "studies",
    "testing",
    "train",
    "tune",
]

__version__ = "0.1.0"

_kernel_cache.install(_Path(__file__).parent)
_ROOMS = frozenset(__all__) - {"SLO", "Budget", "HastenError"}


def __getattr__(name: str) -> Any:
    if name in _ROOMS:  # hasten.measure and hasten.tune are packages that can be called: the verbs
        from importlib import import_module

        return import_module(f"hasten.{name}")
    raise AttributeError(f"module 'hasten' has no attribute {name!r}")
