"""What a search may choose: knobs with finite choices, and the conditions under which a knob matters.

A point is a plain dict ``knob -> choice``. Knobs whose condition does not hold are left out of it, so two points are
equal exactly when they would build the same candidate.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from hasten.compress import Recipe, WeightPrecision, available
from hasten.compress.fused import FusedNetwork
from hasten.compress.int8 import Int8Network
from hasten.compress.lowrank.truncated import TruncatedSvd
from hasten.errors import ConfigurationError
from hasten.measure.device import lies_on
from hasten.nn.product.instructions import has_bfloat16, has_bytes

__all__ = ["Knob", "Point", "Space", "key_of", "recipe_of", "recipe_space", "serving_space", "with_choices"]

Point = Mapping[str, Any]


def key_of(point: Point) -> str:
    """A text that is equal for equal points."""
    return json.dumps(dict(point), sort_keys=True)


@dataclass(frozen=True)
class Knob:
    """One choice."""

    name: str
    """unique in its space"""
    choices: tuple[Any, ...]
    """plain values: numbers, texts, booleans or None"""
    when: Callable[[Point], bool] = lambda point: True
    """whether the knob matters, given the knobs before it"""

    def __post_init__(self) -> None:
        if not self.choices or len(set(map(repr, self.choices))) != len(self.choices):
            raise ConfigurationError(f"knob {self.name!r} needs distinct choices, got {self.choices!r}")


@dataclass(frozen=True)
class Space:
    """Knobs in order.

    >>> space = Space((Knob("format", ("bf16", "int4")), Knob("group", (32, 64), lambda p: p["format"] == "int4")))
    >>> list(space.points())
    [{'format': 'bf16'}, {'format': 'int4', 'group': 32}, {'format': 'int4', 'group': 64}]
    """

    knobs: tuple[Knob, ...]
    """a condition may look at earlier knobs only"""
    allowed: Callable[[Point], bool] = lambda point: True
    """which whole points make sense; the others are never visited"""

    def __post_init__(self) -> None:
        if len({k.name for k in self.knobs}) != len(self.knobs):
            raise ConfigurationError("two knobs of one space have the same name; rename one")

    def build(self, choose: Callable[[str, Sequence[Any]], Any]) -> dict[str, Any]:
        """A point, asking ``choose(name, choices)`` for each knob that matters; it may not be an allowed one."""
        point: dict[str, Any] = {}
        for knob in self.knobs:
            if knob.when(point):
                point[knob.name] = choose(knob.name, knob.choices)
        return point

    def points(self) -> Iterator[dict[str, Any]]:
        """Every point once, in order."""
        yield from filter(self.allowed, self._extend({}, 0))

    def _extend(self, point: dict[str, Any], index: int) -> Iterator[dict[str, Any]]:
        if index == len(self.knobs):
            yield dict(point)
            return
        knob = self.knobs[index]
        if not knob.when(point):
            yield from self._extend(point, index + 1)
            return
        for choice in knob.choices:
            yield from self._extend({**point, knob.name: choice}, index + 1)

    def size(self, most: int = 100_000) -> int:
        """Number of points, counted up to ``most``."""
        return sum(1 for _ in itertools.islice(self.points(), most))

    def describe(self) -> dict[str, list[Any]]:
        """Plain values that identify the space in a stored study."""
        return {k.name: list(k.choices) for k in self.knobs}


def with_choices(space: Space, name: str, choices: tuple[Any, ...]) -> Space:
    """The space with further choices of one knob, which must be there and not have them yet."""
    if not choices:
        return space
    if name not in {k.name for k in space.knobs}:
        raise ConfigurationError(f"the space has no knob {name!r} that further recipes could be choices of; add one")
    knobs = tuple(replace(k, choices=(*k.choices, *choices)) if k.name == name else k for k in space.knobs)
    return replace(space, knobs=knobs)


_WIDE = 256
"""Least side of a matrix that low-rank factors are tried for."""
_REMOVED = (0.0, 0.25, 0.5)
"""Shares of such a matrix that factors take away."""
_PRODUCTS = ("fp32", "bf16", "int8")
"""Precisions of the products of a network in one call."""
_KEEP = ("none", "first", "last", "first and last")
_TOLERANCES = (0.0, 0.005, 0.01, 0.02)
"""Shares of right answers that an exit on confidence may lose on the data that sets its threshold."""


def recipe_space(model: nn.Module) -> Space:
    """Weight formats with a kernel on the model's device, group sizes of int4, which end layers keep their precision,
    and how much of the linear layers low-rank factors take away before.

    A model of linear layers may run whole in one call, a convolutional network whole in bytes, a spiking network for
    fewer timesteps, or for as many as each sample needs to be sure.
    """
    linears = [n for n, m in model.named_modules() if type(m) is nn.Linear]
    place = lies_on(model) or torch.device("cpu")
    host = place.type == "cpu"
    present = available(place)
    formats = [f for f in ("bf16", "int8", "int4", "fp8") if any(k.precision == f for k in present)]
    sizes = (k.name.partition("-g")[2].partition("-")[0] for k in present if k.precision == "int4")
    groups = tuple(dict.fromkeys(int(size) for size in sizes if size))
    keep = _KEEP if len(linears) > 2 else _KEEP[:1]
    fewer = _fewer_timesteps(model)
    convolutions = host and has_bytes() and any(isinstance(m, nn.Conv2d) for m in model.modules())
    choices = (
        "unchanged",
        *(("int8-network",) if convolutions else ()),
        *(formats if linears else ()),
        *(("fused",) if linears and host and has_bytes() else ()),
        *(("timesteps", "confidence") if fewer else ()),
    )
    wide = [m for m in model.modules() if type(m) is nn.Linear and min(m.weight.shape) >= _WIDE]
    knobs = [Knob("format", choices)]
    if fewer:
        knobs.append(Knob("timesteps", fewer, lambda p: p["format"] == "timesteps"))
        knobs.append(Knob("tolerance", _TOLERANCES, lambda p: p["format"] == "confidence"))
    if groups:
        knobs.append(Knob("group", groups, lambda p: p["format"] == "int4"))
    if "fused" in choices:
        knobs.append(
            Knob("products", _PRODUCTS if has_bfloat16() else ("fp32", "int8"), lambda p: p["format"] == "fused")
        )
    knobs.append(Knob("keep", keep, lambda p: p["format"] in ("int8", "int4", "fp8")))
    if wide:  # factors of small matrices cost a call more than they save
        knobs.append(
            Knob("remove", _REMOVED, lambda p: p["format"] in (*formats, "fused") and p.get("keep", "none") == "none")
        )
    return Space(tuple(knobs))


def _fewer_timesteps(model: nn.Module) -> tuple[int, ...]:
    """All smaller numbers of timesteps, or about eight of them where there are many; none for other models."""
    steps = getattr(model, "timesteps", None)
    if not isinstance(steps, int) or not hasattr(model, "with_timesteps"):
        return ()
    stride = max(1, steps // 8)
    return tuple(dict.fromkeys([*range(steps - stride, 0, -stride), *((1,) if steps > 1 else ())]))


def recipe_of(point: Point, model: nn.Module, tokens: int = 1) -> Recipe:
    """The recipe that a point of :func:`recipe_space` stands for; ``tokens`` is the rows a layer sees at a time."""
    if point["format"] == "unchanged":
        return Recipe()
    if point["format"] == "timesteps":
        from hasten.spiking.timesteps import Timesteps  # the room is loaded only for its own networks

        return Recipe((Timesteps(point["timesteps"]),))
    if point["format"] == "confidence":
        from hasten.spiking.exits import DynamicConfidence

        return Recipe((DynamicConfidence(tolerance=point["tolerance"]),))
    if point["format"] == "int8-network":
        return Recipe((Int8Network(),))
    if point["format"] == "fused":
        return Recipe((*_narrowed(point, model), FusedNetwork(point.get("products", "fp32"))))
    linears = [n for n, m in model.named_modules() if type(m) is nn.Linear]
    kept = {"none": [], "first": linears[:1], "last": linears[-1:], "first and last": linears[:1] + linears[-1:]}
    skip = tuple(dict.fromkeys(kept[point.get("keep", "none")]))
    technique = WeightPrecision(point["format"], group_size=point.get("group", 32), skip=skip, tokens=tokens)
    return Recipe((*_narrowed(point, model), technique))


def _narrowed(point: Point, model: nn.Module) -> tuple[TruncatedSvd, ...]:
    """The factors that come before the precision, where there are any."""
    if not point.get("remove"):
        return ()
    small = [n for n, m in model.named_modules() if type(m) is nn.Linear and min(m.weight.shape) < _WIDE]
    return (TruncatedSvd(ratio=point["remove"], skip=tuple(small)),)


PER_STEP = "slo"
"""The token budget that follows in each step from the SLO and the batch, as in ``hasten serve --slo``."""


def serving_space(
    *,
    token_budgets: Sequence[int | str] = (32, 64, 128, 256, 512, PER_STEP),
    precisions: Sequence[str] = ("bf16", "int8"),
    max_num_seqs: Sequence[int] = (8, 16, 32, 64),
    policies: Sequence[str] = ("stall-free",),
) -> Space:
    """Knobs of a server: policy, tokens per step, precision of the weights, sequences that run together.

    A token budget is a number or :data:`PER_STEP`. A step that has fewer tokens than there are decoding sequences
    starves some of them; such points are left out.
    """

    def budgeted(point: Point) -> bool:
        return point["policy"] in ("stall-free", "splitfuse", "token-budget")

    return Space(
        (
            Knob("policy", tuple(policies)),
            Knob("precision", tuple(precisions)),
            Knob("max_num_seqs", tuple(max_num_seqs)),
            Knob("token_budget", tuple(token_budgets), budgeted),
        ),
        allowed=lambda point: (
            point.get("token_budget") in (None, PER_STEP) or point["token_budget"] >= point["max_num_seqs"]
        ),
    )
