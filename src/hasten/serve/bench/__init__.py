"""Measure any OpenAI-compatible server from the outside, or a pipeline from the inside.

The package is callable: ``hasten.serve.bench(target, clients=range(1, 9))`` is
:func:`hasten.serve.bench.sweep.sweep`.
"""

import sys
import types
from typing import Any

from hasten.serve.bench.dataset import Prompt, prompts_of
from hasten.serve.bench.drive import closed_loop, replay, run
from hasten.serve.bench.report import goodput_slo, result_json, table
from hasten.serve.bench.sweep import CurvePoint, Sweep, SweepPoint

__all__ = [
    "CurvePoint",
    "Prompt",
    "Sweep",
    "SweepPoint",
    "closed_loop",
    "goodput_slo",
    "prompts_of",
    "replay",
    "result_json",
    "run",
    "table",
]


class _CallablePackage(types.ModuleType):
    def __call__(self, *arguments: Any, **named: Any) -> Sweep:
        from hasten.serve.bench.sweep import sweep

        return sweep(*arguments, **named)


sys.modules[__name__].__class__ = _CallablePackage
