"""Knobs that are themselves frozen dataclasses, written as plain mappings and read back by name.

``Int(8, PerChannel(0))`` becomes ``{kind: Int, bits: 8, granularity: {kind: PerChannel, axis: 0}}``: the class by its
name in a registry, then every field that differs from its default. Nothing else can be named, so reading a file never
runs code of it.
"""

from __future__ import annotations

from dataclasses import MISSING, Field, fields, is_dataclass
from typing import Any, TypeVar

from hasten.errors import ConfigurationError

__all__ = ["named_value", "read", "write"]

_VALUES: dict[str, type[Any]] = {}
_T = TypeVar("_T", bound=type[Any])
_KEY = "kind"


def named_value(cls: _T) -> _T:
    """Class decorator: a recipe may hold values of this frozen dataclass."""
    known = _VALUES.get(cls.__name__)
    if known is not None and (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
        raise ConfigurationError(f"two kinds of value are called {cls.__name__!r}; rename one")
    _VALUES[cls.__name__] = cls
    return cls


def default_of(knob: Field[Any]) -> Any:
    """The value that a field has when nothing is given, or ``MISSING``."""
    if knob.default is not MISSING:
        return knob.default
    return knob.default_factory() if knob.default_factory is not MISSING else MISSING


def write(value: Any) -> Any:
    """``value`` as what YAML holds: scalars, lists and mappings."""
    if isinstance(value, (tuple, list)):
        return [write(v) for v in value]
    if isinstance(value, dict):
        return {k: write(v) for k, v in value.items()}
    if is_dataclass(value) and not isinstance(value, type):
        name = type(value).__name__
        if _VALUES.get(name) is not type(value):
            raise ConfigurationError(f"a recipe cannot hold a {name}; decorate the class with named_value")
        kept = ((k.name, getattr(value, k.name), default_of(k)) for k in fields(value) if k.init)
        return {_KEY: name, **{key: write(given) for key, given, usual in kept if given != usual}}
    return value


def read(entry: Any) -> Any:
    """The inverse of :func:`write`; lists become tuples. Raises :class:`~hasten.errors.ConfigurationError`.

    >>> from hasten.compress.quantize import Int, PerChannel
    >>> write(Int(4, PerChannel(1)))
    {'kind': 'Int', 'bits': 4, 'granularity': {'kind': 'PerChannel', 'axis': 1}}
    >>> read(write(Int(4, PerChannel(1)))) == Int(4, PerChannel(1))
    True
    """
    if isinstance(entry, (list, tuple)):
        return tuple(read(v) for v in entry)
    if not isinstance(entry, dict) or _KEY not in entry:
        return entry
    name = entry[_KEY]
    if name not in _VALUES:
        raise ConfigurationError(f"there is no {_KEY} {name!r}; known are {', '.join(sorted(_VALUES))}")
    cls = _VALUES[name]
    known = {k.name for k in fields(cls)}
    knobs = {k: read(v) for k, v in entry.items() if k != _KEY}
    unknown = sorted(set(knobs) - known)
    if unknown:
        raise ConfigurationError(f"{name} has no field {', '.join(unknown)}; its fields are {', '.join(sorted(known))}")
    try:
        return cls(**knobs)
    except TypeError as error:
        raise ConfigurationError(f"{name} cannot be made of {knobs}: {error}; give its fields by name") from error
