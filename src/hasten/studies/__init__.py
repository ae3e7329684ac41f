"""Published claims that rerun: one module per system, each exposing ``study``.

>>> from hasten import studies
>>> all(isinstance(name, str) for name in studies.names())
True
"""

from hasten.studies.registry import load, names
from hasten.studies.runner import execute, find_data
from hasten.studies.study import Check, Result, Scale, Study, verdict_of

__all__ = ["Check", "Result", "Scale", "Study", "execute", "find_data", "load", "names", "verdict_of"]
