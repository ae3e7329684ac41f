"""What a search found, as a folder: the recipe, every candidate's figures, the page, and where they were measured.

``recipe.yaml`` is what :class:`~hasten.compress.Recipe` reads, ``report.html`` is for people, ``result.json`` holds the
figures, the machine, the versions and a digest of the model's weights. ``result.json`` is written last and names the
recipe beside it, so a folder whose writing was cut off is known by that. Loaded again on another machine, another
version or another model, the result says so before it is used.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from hasten.budget import Bound, Budget
from hasten.compress import Recipe
from hasten.errors import ConfigurationError, DataError, DataWarning
from hasten.files import write_text
from hasten.measure.machine import Machine
from hasten.tune.frontier import Axis, Candidate, Frontier

if TYPE_CHECKING:
    from hasten.tune.model import TuneResult

__all__ = ["SavedResult", "describe", "identity", "load", "save"]

_VERSION = 1
_RESULT, _RECIPE, _PAGE = "result.json", "recipe.yaml", "report.html"
_FACTS = {"cpu": "processor", "cores": "cores", "isa": "instruction sets", "memory": "bytes of memory",
          "blas": "linear algebra", "threads": "threads", "accelerators": "accelerators", "torch": "torch"}  # fmt: skip


@dataclass(frozen=True)
class SavedResult:
    """A result that was stored; figures are those of the machine that measured."""

    verdict: str
    """one sentence"""
    budget: Budget
    """what was asked"""
    best: Candidate | None
    """the best confirmed candidate inside the budget"""
    baseline: Candidate
    """the unchanged model's own numbers"""
    frontier: Frontier
    """everything that was considered"""
    recipe: Recipe
    """how to make the best model, with its plan"""
    sensitivity: Mapping[str, float]
    """quality lost by each layer alone"""
    machine: Mapping[str, Any]
    """what :meth:`~hasten.measure.Machine.to_json` said where it was measured"""
    versions: Mapping[str, str]
    """of hasten and torch"""
    model: Mapping[str, Any]
    """class, parameters and digest of the unchanged model's weights"""

    def differences(self, model: nn.Module | None = None) -> list[str]:
        """What is otherwise here than where it was measured, a sentence each; of the model too where it is given."""
        here, found = Machine.detect().to_json(), []
        changed = [k for k in _FACTS if here.get(k) != self.machine.get(k)]
        if changed:
            told = ", ".join(f"{_FACTS[k]} {_short(self.machine.get(k))} became {_short(here.get(k))}" for k in changed)
            found.append(f"it was measured on another machine ({told})")
        own = _versions()
        if own["hasten"] != self.versions.get("hasten"):
            found.append(f"it was measured by hasten {self.versions.get('hasten')}, and this is {own['hasten']}")
        if model is not None:
            found += self._of_model(model)
        return found

    def _of_model(self, model: nn.Module) -> list[str]:
        told = describe(model)
        if told["class"] != self.model["class"] or told["parameters"] != self.model["parameters"]:
            return [
                f"it was tuned for {self.model['class']} of {self.model['parameters']:,} parameters, and this is "
                f"{told['class']} of {told['parameters']:,}"
            ]
        return [] if told["digest"] == self.model["digest"] else ["it was tuned for other weights than the model's"]

    def apply(self, model: nn.Module, calibration: Sequence[Any] | None = None) -> nn.Module:
        """The best model, made of ``model``, which is not changed; the unchanged one where nothing met the budget.

        On the machine that measured, the plan is followed; on another one layers are measured again, and one warning
        says what is different. Raises :class:`~hasten.errors.ConfigurationError` for another model.
        """
        wrong = self._of_model(model)
        if wrong:
            raise ConfigurationError(
                f"{wrong[0]}; tune again, or take the recipe without the figures: saved.recipe.apply(model)"
            )
        recipe, other = self.recipe, self.differences()
        if other:
            recipe = Recipe(recipe.techniques)
            warnings.warn(f"{'; '.join(other)}: layers are measured again", DataWarning, stacklevel=2)
        made, _ = recipe.apply(model, calibration)
        return made


def describe(model: nn.Module) -> dict[str, Any]:
    """Class, parameters and a digest of the weights."""
    count = sum(p.numel() for p in model.parameters())
    return {"class": type(model).__name__, "parameters": count, "digest": identity(model)}


def identity(model: nn.Module) -> str:
    """Digest of the weights, so that a study is never resumed, and a result never used, for another model."""
    digest = hashlib.blake2b(digest_size=8)
    try:
        state = model.state_dict()
    except ConfigurationError:  # a network in bytes has none
        state = {}
        digest.update(pickle.dumps(model))
    for name, tensor in sorted(state.items()):
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def save(result: TuneResult, folder: str | os.PathLike[str]) -> Path:
    """Write ``result`` to ``folder``, which is made; each file whole or not at all. Returns the folder.

    Raises :class:`~hasten.errors.DataError` on one line where the folder cannot be written.
    """
    place = Path(folder)
    result.recipe.save(place / _RECIPE)
    result.report(place / _PAGE)
    axes = [{"key": a.key, "maximise": a.maximise, "kind": a.kind} for a in result.frontier.axes]
    content = {
        "version": _VERSION, **result.to_json(), "axes": axes, "tie": result.frontier.tie,
        "candidates": [c.to_json() for c in result.frontier.candidates], "points": result.points,
        "versions": _versions(), "model": dict(result.tuned), "bounds": [asdict(b) for b in result.budget.bounds],
    }  # fmt: skip
    write_text(place / _RESULT, json.dumps(content, indent=1, ensure_ascii=False, default=str) + "\n")
    return place


def load(folder: str | os.PathLike[str]) -> SavedResult:
    """Read what :func:`save` wrote. Raises :class:`~hasten.errors.DataError` on one line."""
    place = Path(folder)
    try:
        content = json.loads((place / _RESULT).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{str(place / _RESULT)!r} cannot be read ({error}); name a folder that save() wrote") from None
    try:
        if content["version"] != _VERSION:
            raise DataError(f"{str(place)!r} has version {content['version']!r}; this hasten reads {_VERSION}")
        recipe = Recipe.load(place / _RECIPE)
        if recipe.to_yaml() != Recipe.from_yaml(content["recipe"]).to_yaml():
            raise DataError(
                f"{str(place)!r} holds the recipe of one result and the figures of another: its writing was cut off, "
                "or the recipe was edited; save the result again, or use Recipe.load alone"
            )
        best = content["best"]
        axes = tuple(Axis(str(a["key"]), bool(a["maximise"]), str(a["kind"])) for a in content["axes"])
        return SavedResult(
            content["verdict"], Budget(tuple(Bound(**b) for b in content["bounds"])),
            None if best is None else Candidate.from_json(best), Candidate.from_json(content["baseline"]),
            Frontier(tuple(Candidate.from_json(c) for c in content["candidates"]), axes, float(content["tie"])), recipe,
            content["sensitivity"], content["machine"], content["versions"], content["model"],
        )  # fmt: skip
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{str(place / _RESULT)!r} is no stored result ({error!r} is missing or wrong)") from error


def _versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    try:
        own = version("hasten")
    except PackageNotFoundError:  # run from a checkout
        own = "unknown"
    return {"hasten": own, "torch": str(torch.__version__)}


def _short(fact: Any) -> str:
    return " ".join(map(str, fact)) if isinstance(fact, (list, tuple)) else str(fact)
