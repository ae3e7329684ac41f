"""A packed model, run without torch: a flat list of operations over numpy arrays, read from one file.

    program = [[operation, arguments, named arguments, slot], …]

An argument is a plain value, ``{"s": slot}`` for an earlier result or ``{"l": [...]}`` for a list that holds some.
Whatever does not depend on the input (positions, say) is computed once when the file is opened. No graph is rebuilt.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hasten.errors import ConfigurationError, ModelLoadError
from hasten.frozen.container import Container
from hasten.frozen.ops import OPERATIONS

__all__ = ["MODEL_FILE", "Frozen", "load"]

MODEL_FILE = "model.hasten"
Array = NDArray[Any]
_Step = tuple[Callable[..., Any], Any, Any, int, tuple[int, ...]]


class Frozen:
    """A model that is called with numpy arrays and returns them.

    Immutable after loading; calls may run at the same time. ``meta`` holds what was saved with the model.
    """

    def __init__(self, program: Sequence[Any], slots: dict[int, Array], inputs: Sequence[int], outputs: Any) -> None:
        self._inputs, self._outputs = list(inputs), outputs
        self.meta: dict[str, Any] = {}
        known = dict(slots)
        steps: list[_Step] = []
        for name, args, named, slot in program:
            if name not in OPERATIONS:
                raise ModelLoadError(f"the program holds an operation {name!r} that this hasten does not know")
            steps.append((OPERATIONS[name], args, named, slot, ()))
        pending: list[_Step] = []
        for function, args, named, slot, _ in steps:
            if all(s in known for s in _reads([args, named])):
                known[slot] = function(*_fill(args, known), **_fill(named, known))
            else:
                pending.append((function, args, named, slot, ()))
        last = {s: k for k, (_, a, n, _, _) in enumerate(pending) for s in _reads([a, n])}
        kept = set(_reads(outputs)) | set(known)
        self._steps = [
            (f, a, n, slot, tuple(s for s in set(_reads([a, n])) if last[s] == k and s not in kept))
            for k, (f, a, n, slot, _) in enumerate(pending)
        ]
        self._known = known

    def __call__(self, *inputs: Any) -> Any:
        """The outputs for these inputs, in the order of the model's arguments."""
        if len(inputs) != len(self._inputs):
            raise ConfigurationError(f"the model takes {len(self._inputs)} inputs, got {len(inputs)}")
        arrays = [_array(x) for x in inputs]
        batch, given = self.meta.get("batch"), next((len(a) for a in arrays if a.ndim), None)
        if batch is not None and given != batch:
            why = self.meta.get("batch_reason") or "the model asks for it as a number"
            raise ConfigurationError(
                f"this file runs batches of {batch}, got {given}; give that many, or save the model again with an "
                f"example of that batch ({why})"
            )
        values = dict(self._known)
        values.update(zip(self._inputs, arrays, strict=True))
        try:
            for function, args, named, slot, done in self._steps:
                values[slot] = (
                    function(*_fill(args, values), **_fill(named, values)) if named else function(*_fill(args, values))
                )
                for old in done:
                    del values[old]
        except (ValueError, TypeError, IndexError) as error:
            shapes = ", ".join(f"{a.shape} {a.dtype}" for a in arrays)
            raise ConfigurationError(
                f"the model does not take {shapes} ({str(error).splitlines()[0]}); give inputs as it was saved with"
            ) from error
        found = _fill(self._outputs, values)
        return found[0] if len(found) == 1 else tuple(found)


def _array(x: Any) -> Array:
    found = np.asarray(x)
    return found.astype(np.float32) if found.dtype == np.float64 else found


def _reads(tree: Any) -> list[int]:
    if isinstance(tree, dict):
        return [tree["s"]] if "s" in tree else [s for v in tree.values() for s in _reads(v)]
    return [s for v in tree for s in _reads(v)] if isinstance(tree, list) else []


def _fill(tree: Any, values: dict[int, Any]) -> Any:
    if isinstance(tree, list):
        return [values[v["s"]] if type(v) is dict and "s" in v else _fill(v, values) for v in tree]
    if isinstance(tree, dict):
        return values[tree["s"]] if "s" in tree else {k: _fill(v, values) for k, v in tree.items()}
    return tree


def load(path: str | os.PathLike[str]) -> Frozen:
    """A model that :func:`hasten.compress.container.save` wrote: its folder or the file itself.

    Raises :class:`~hasten.errors.ModelLoadError` for what is missing or damaged, named.
    """
    place = Path(path)
    container = Container(place / MODEL_FILE if place.is_dir() else place)
    meta = container.meta
    if "program" not in meta:
        raise ModelLoadError(f"{str(container.path)!r} holds tensors but no program; load them with hasten.compress")
    slots = {int(slot): container.tensor(name) for slot, name in meta["slots"]}
    model = Frozen(meta["program"], slots, meta["inputs"], meta["outputs"])
    model.meta = {k: v for k, v in meta.items() if k not in ("program", "slots", "inputs", "outputs")}
    return model
