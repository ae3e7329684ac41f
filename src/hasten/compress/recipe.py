"""A recipe is what was asked (techniques and their knobs), a plan is what came out (layer by layer); both are YAML.

They lie next to ``model.safetensors``. A recipe applied again on another machine measures again; with its plan it
repeats the same choice without measuring.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped,unused-ignore]
from torch import nn

from hasten.compress.technique import Technique, TechniqueReport, from_dict, to_dict
from hasten.errors import ConfigurationError
from hasten.files import write_text

__all__ = ["Plan", "Recipe"]

_VERSION = 1


@dataclass(frozen=True)
class Plan:
    """Layer -> what was done, for each technique of a recipe in order.

    >>> Plan(({"0": "int8-dynamic"},)).to_dict()
    {'steps': [{'0': 'int8-dynamic'}]}
    """

    steps: tuple[Mapping[str, str], ...] = ()
    """one mapping per technique: layer path -> action, ``kept`` included"""

    @classmethod
    def of(cls, reports: Sequence[TechniqueReport]) -> Plan:
        """The plan that these reports describe."""
        return cls(tuple({x.layer: x.action for x in r.layers} for r in reports))

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {"steps": [dict(s) for s in self.steps]}


@dataclass(frozen=True)
class Recipe:
    """Techniques in the order in which they are applied.

    >>> from hasten.compress import WeightPrecision
    >>> recipe = Recipe((WeightPrecision("int4", group_size=64),))
    >>> Recipe.from_yaml(recipe.to_yaml()) == recipe
    True
    """

    techniques: tuple[Technique, ...] = ()
    """may be empty: the unchanged model"""
    plan: Plan | None = field(default=None, compare=False)
    """what came out when it was applied, where it was"""

    @property
    def label(self) -> str:
        """A short name for tables: ``int4 g64``, or ``unchanged``."""
        return " + ".join(_label(t) for t in self.techniques) or "unchanged"

    def apply(self, model: nn.Module, calibration: Sequence[Any] | None = None) -> tuple[nn.Module, Plan]:
        """The new module and the plan; ``model`` is not changed. A plan that the recipe carries is followed."""
        reports: list[TechniqueReport] = []
        for index, technique in enumerate(self.techniques):
            step = self.plan.steps[index] if self.plan is not None and index < len(self.plan.steps) else {}
            follow = getattr(technique, "apply", None)
            model = follow(model, step, calibration) if step and follow else technique(model, calibration)
            report = getattr(model, "report", None)
            if not isinstance(report, TechniqueReport):
                raise ConfigurationError(
                    f"technique {technique.name} left no report; set model.report before returning"
                )
            reports.append(report)
        return model, Plan.of(reports)

    def to_yaml(self) -> str:
        """Text of ``recipe.yaml``."""
        document: dict[str, Any] = {"version": _VERSION, "techniques": [to_dict(t) for t in self.techniques]}
        if self.plan is not None:
            document["plan"] = self.plan.to_dict()
        text: str = yaml.safe_dump(document, sort_keys=False, allow_unicode=True)
        return text

    @classmethod
    def from_yaml(cls, text: str) -> Recipe:
        """The inverse of :meth:`to_yaml`; raises :class:`~hasten.errors.ConfigurationError` on one line."""
        try:
            document = yaml.safe_load(text)
        except yaml.YAMLError as error:
            place = getattr(error, "problem_mark", None)
            where = f" (line {place.line + 1})" if place is not None else ""
            raise ConfigurationError(
                f"the recipe is not YAML{where}; write version: 1 and a list techniques:"
            ) from error
        if not isinstance(document, dict) or not isinstance(document.get("techniques"), list):
            raise ConfigurationError("the recipe holds no list 'techniques'; write version: 1 and a list techniques:")
        if document.get("version") != _VERSION:
            raise ConfigurationError(
                f"recipe version {document.get('version')!r} is not known; this hasten reads {_VERSION}"
            )
        plan = document.get("plan")
        steps: Plan | None = None
        if plan is not None:
            listed = plan.get("steps") if isinstance(plan, dict) else None
            if not isinstance(listed, list) or not all(isinstance(s, dict) for s in listed):
                raise ConfigurationError("the plan holds no list 'steps' of mappings; remove it to measure again")
            steps = Plan(tuple({str(k): str(v) for k, v in s.items()} for s in listed))
        return cls(tuple(from_dict(t) for t in document["techniques"]), steps)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write ``recipe.yaml``, whole or not at all."""
        write_text(path, self.to_yaml())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Recipe:
        """Read it; raises :class:`~hasten.errors.ConfigurationError` when it is not there or malformed."""
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigurationError(f"recipe {str(path)!r} cannot be read ({error}); name an existing file") from error
        return cls.from_yaml(text)


def _label(technique: Technique) -> str:
    own = getattr(technique, "label", None)
    if isinstance(own, str):
        return own
    knobs = {k: v for k, v in to_dict(technique).items() if k != "technique"}
    if technique.name == "weight-precision":
        shown = str(getattr(technique, "format", ""))
        group = knobs.get("group_size")
        rest = {k: v for k, v in knobs.items() if k not in ("format", "group_size", "tokens")}
        extra = "".join(f" {k}={v}" for k, v in rest.items())
        return f"{shown}{f' g{group}' if group else ''}{extra}"
    return technique.name + "".join(f" {k}={v}" for k, v in knobs.items())
