"""The contract of everything that makes a model smaller or faster.

A technique is a frozen dataclass whose fields are its knobs; calling it gives a *new* module and never touches the
one it was given. The new module carries a report: layer by layer what was done, what was skipped and why, bytes
before and after. Techniques are named in a registry, so a recipe can be read back from YAML.
"""

from __future__ import annotations

import copy
import functools
import importlib
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import MISSING, asdict, dataclass, field, fields
from typing import Any, ClassVar, Protocol, TypeVar, runtime_checkable

import torch
from torch import nn

from hasten.compress.given import fitting, unfit
from hasten.compress.values import default_of, read, write
from hasten.errors import ConfigurationError, HastenError

__all__ = ["LayerReport", "Technique", "TechniqueReport", "exportable", "from_dict", "register", "to_dict"]


@dataclass(frozen=True)
class LayerReport:
    """What became of one layer."""

    layer: str
    """path in the model"""
    action: str
    """what was done, such as ``int8-dynamic``; ``kept`` where nothing was"""
    reason: str = ""
    """why it was kept, or why this choice"""
    bytes_before: int = 0
    """bytes of the layer's weights in the model given"""
    bytes_after: int = 0
    """bytes of its weights in the new model"""
    speedup: float | None = None
    """measured time before over after for this layer, where it was measured"""
    error: float | None = None
    """relative error of the layer's result, where it was measured"""

    @property
    def touched(self) -> bool:
        """Whether the layer is another one now."""
        return self.action != "kept"


@dataclass(frozen=True)
class TechniqueReport:
    """What a technique did to a model."""

    technique: str
    """its registered name"""
    layers: tuple[LayerReport, ...] = ()
    """every layer that was considered"""
    notes: tuple[str, ...] = ()
    """plain sentences that a user should read"""
    measured: dict[str, float] = field(default_factory=dict)
    """qualities of the whole model, where calibration allowed it: ``sqnr`` in dB"""

    @property
    def touched(self) -> tuple[str, ...]:
        """Names of the layers that changed."""
        return tuple(x.layer for x in self.layers if x.touched)

    @property
    def skipped(self) -> dict[str, str]:
        """Layers that were kept, with the reason."""
        return {x.layer: x.reason for x in self.layers if not x.touched}

    @property
    def bytes_before(self) -> int:
        """Bytes of the considered layers in the model given."""
        return sum(x.bytes_before for x in self.layers)

    @property
    def bytes_after(self) -> int:
        """Bytes of the considered layers now."""
        return sum(x.bytes_after for x in self.layers)

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "technique": self.technique,
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
            "layers": [asdict(x) for x in self.layers],
            "notes": list(self.notes),
            "measured": dict(self.measured),
        }


@runtime_checkable
class Technique(Protocol):
    """Model in, smaller model out.

    ``__call__(model, calibration)`` returns a new module with an attribute ``report`` (:class:`TechniqueReport`);
    ``calibration`` is example inputs, or None where the technique needs none. The input is never changed. The result
    exports after :func:`exportable`.
    """

    name: ClassVar[str]
    """what a recipe calls it"""

    def __call__(self, model: nn.Module, calibration: Sequence[Any] | None = None) -> nn.Module:
        """The new module, with its report."""
        ...


_TECHNIQUES: dict[str, type[Any]] = {}
_MODULES = {
    "acm": "hasten.compress.acm",
    "clustering": "hasten.compress.cluster",
    "deep-compression": "hasten.compress.deep",
    "dynamic-confidence": "hasten.spiking.exits",
    "fused-network": "hasten.compress.fused",
    "int8-network": "hasten.compress.int8",
    "maestro": "hasten.compress.lowrank.maestro",
    "magnitude-pruning": "hasten.compress.prune",
    "mixed-precision": "hasten.compress.quantize.mixed",
    "modular": "hasten.compress.lowrank.modular",
    "quantize": "hasten.compress.quantize",
    "quantize-aware": "hasten.compress.quantize",
    "svdquant": "hasten.compress.lowrank.svdquant",
    "timestep-reduction": "hasten.spiking.timesteps",
    "timesteps": "hasten.spiking.timesteps",
    "truncated-svd": "hasten.compress.lowrank.truncated",
}
"""Where a technique is defined, in this room or in one above; a recipe that names it imports it."""
_LOOKED: ContextVar[bool] = ContextVar("looked", default=False)
"""whether a technique is at work, whose arguments were looked at"""
_T = TypeVar("_T", bound=type[Any])


def register(cls: _T) -> _T:
    """Class decorator: a recipe may name this technique, and what it is given is looked at first (:mod:`given`)."""
    if cls.name in _TECHNIQUES and _TECHNIQUES[cls.name] is not cls:
        raise ConfigurationError(f"two techniques are called {cls.name!r}; rename one")
    _TECHNIQUES[cls.name] = cls
    for name, place in (("__call__", 0), ("apply", 1)):
        if name in cls.__dict__:
            setattr(cls, name, _guarded(cls.__dict__[name], place))
    return cls


def _guarded(method: Callable[..., nn.Module], place: int) -> Callable[..., nn.Module]:
    """The method behind the checks of :mod:`given`; ``place`` of the calibration among the arguments after the model.

    Where it fails otherwise than on purpose, and the model does not take an example, that is what is said. The
    outermost call looks; what it calls in turn is given what was looked at.
    """

    @functools.wraps(method)
    def run(self: Any, model: nn.Module, *arguments: Any, **named: Any) -> nn.Module:
        if _LOOKED.get():
            return method(self, model, *arguments, **named)
        calibration = named.get("calibration", arguments[place] if len(arguments) > place else None)
        fitting(self.name, model, calibration)
        before = _LOOKED.set(True)
        try:
            return method(self, model, *arguments, **named)
        except HastenError:
            raise
        except (RuntimeError, TypeError, ValueError, IndexError, AttributeError) as error:
            unfit(model, calibration, error)
            raise
        finally:
            _LOOKED.reset(before)

    return run


def to_dict(technique: Technique) -> dict[str, Any]:
    """The technique and its knobs as plain values (see :mod:`hasten.compress.values`); defaults are left out."""
    knobs: dict[str, Any] = {}
    for knob in fields(technique):  # type: ignore[arg-type]
        value = getattr(technique, knob.name)
        if value != default_of(knob):
            knobs[knob.name] = write(value)
    return {"technique": technique.name, **knobs}


def from_dict(entry: dict[str, Any]) -> Technique:
    """The inverse of :func:`to_dict`; raises :class:`~hasten.errors.ConfigurationError` for unknown names."""
    if not isinstance(entry, dict) or "technique" not in entry:
        raise ConfigurationError(f"{entry!r} names no technique; write technique: weight-precision and its knobs")
    name = entry["technique"]
    if name not in _TECHNIQUES and name in _MODULES:
        importlib.import_module(_MODULES[name])  # registers itself
    if name not in _TECHNIQUES:
        known = ", ".join(sorted({*_TECHNIQUES, *_MODULES}))
        raise ConfigurationError(f"there is no technique {name!r}; known are {known}")
    cls = _TECHNIQUES[name]
    names = {f.name for f in fields(cls)}
    knobs = {k: read(v) for k, v in entry.items() if k != "technique"}
    unknown = sorted(set(knobs) - names)
    if unknown:
        raise ConfigurationError(f"{name} has no knob {', '.join(unknown)}; its knobs are {', '.join(sorted(names))}")
    missing = sorted(f.name for f in fields(cls) if f.name not in knobs and default_of(f) is MISSING)
    if missing:
        raise ConfigurationError(f"{name} needs {', '.join(missing)}; add the knob to the recipe")
    try:
        technique: Technique = cls(**knobs)
    except (TypeError, AttributeError) as error:
        told = ", ".join(f"{k}: {v!r}" for k, v in entry.items() if k != "technique")
        raise ConfigurationError(f"{name} does not take {told} ({error}); give knobs of their kinds") from error
    return technique


def exportable(model: nn.Module, first: str = "plain") -> nn.Module:
    """A copy in which every layer that runs a packed kernel is a plain one with the same weights, for ``torch.export``.

    Layers say how through a method ``plain() -> nn.Module``, or one called ``first`` where they have it. The result
    agrees with ``model`` up to the rounding of the kernel's activations.
    """

    def substitute(module: nn.Module) -> nn.Module | None:
        made = (getattr(module, name, None) for name in (first, "plain"))
        way = next((m for m in made if callable(m)), None)
        return None if way is None else way()

    return _replace(copy.deepcopy(model), substitute)


def _replace(model: nn.Module, substitute: Callable[[Any], nn.Module | None]) -> nn.Module:
    new = substitute(model)
    if new is not None:
        return new
    for name, child in model.named_children():
        setattr(model, name, _replace(child, substitute))
    return model


def sqnr(reference: torch.Tensor, other: torch.Tensor) -> float:
    """Signal to quantisation noise in decibels, over all elements; infinite where both are equal.

    >>> round(sqnr(torch.ones(10), torch.full((10,), 0.9)), 3)
    20.0
    """
    signal, noise = reference.double(), reference.double() - other.double()  # squares of 1e20 leave float32
    lost = noise.square_().sum()
    return float("inf") if lost == 0 else float(10 * torch.log10(signal.square().sum() / lost))
