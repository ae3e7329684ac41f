"""Finds the studies: every module of this package that is not part of the framework is one.

``sarathi_serve.py`` is the study ``sarathi-serve``; it exposes ``study``, a :class:`~hasten.studies.study.Study` of
that name. Modules whose name begins with an underscore are helpers. Names are read from files, so listing imports
nothing.
"""

from __future__ import annotations

import difflib
import importlib
import pkgutil

from hasten.errors import ConfigurationError
from hasten.studies.study import Study

__all__ = ["load", "names"]

_FRAMEWORK = {"catalog", "registry", "runner", "study"}


def names(package: str = "hasten.studies") -> list[str]:
    """Names of the studies that exist, sorted."""
    paths = importlib.import_module(package).__path__
    found = (m.name for m in pkgutil.iter_modules(paths))
    return sorted(n.replace("_", "-") for n in found if n not in _FRAMEWORK and not n.startswith("_"))


def load(name: str, package: str = "hasten.studies") -> Study:
    """The study ``name``.

    Raises :class:`~hasten.errors.ConfigurationError` for an unknown name or a malformed module.
    """
    known = names(package)
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"known are {', '.join(known) or 'none yet'}"
        raise ConfigurationError(f"there is no study {name!r}; {hint}")
    module = importlib.import_module(f"{package}.{name.replace('-', '_')}")
    study = getattr(module, "study", None)
    if not isinstance(study, Study):
        raise ConfigurationError(f"{module.__name__} exposes no 'study'; add study = Study({name!r}, …)")
    if study.system != name:
        raise ConfigurationError(f"{module.__name__} holds the study {study.system!r}; name it {name!r} like its file")
    return study
