"""What an export came to: the file is read back, run, and compared with the model before it takes its name."""

from __future__ import annotations

import contextlib
import math
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from hasten.compress.given import run_example
from hasten.errors import ConfigurationError, DataError, ModelError

__all__ = ["Exported", "arguments", "compare_outputs", "outputs_of", "placed"]

EXACT = 1e-5
"""Relative difference that another order of additions explains."""
STEP = 2e-2
"""Relative difference allowed where activations are rounded: a value in the middle of two codes may fall to either."""


@dataclass(frozen=True)
class Exported:
    """A file that was checked."""

    path: Path
    """where it lies"""
    bytes: int
    """its size, with the data that lie beside it"""
    difference: float
    """``‖y - y₀‖ / ‖y₀‖`` over all outputs of the example"""
    tolerance: float
    """what was allowed"""
    layers: tuple[tuple[str, str], ...] = ()
    """(path of a weight, how the file holds it)"""
    notes: tuple[str, ...] = ()
    """plain sentences"""

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "path": str(self.path),
            "bytes": self.bytes,
            "difference": self.difference,
            "tolerance": self.tolerance,
            "layers": dict(self.layers),
            "notes": list(self.notes),
        }


def arguments(example: Any) -> tuple[Any, ...]:
    """An example (a tensor, or a tuple of arguments) as positional arguments."""
    if isinstance(example, Tensor):
        return (example,)
    if isinstance(example, (tuple, list)) and all(isinstance(x, Tensor) for x in example):
        return tuple(example)
    raise ConfigurationError(f"an export takes a tensor or a tuple of tensors as example, got {type(example).__name__}")


def outputs_of(model: nn.Module, example: Any) -> list[Tensor]:
    """The floating-point outputs of a call."""
    with torch.inference_mode():
        return _floats(run_example(model, example, which="the example"))


def _floats(tree: Any) -> list[Tensor]:
    return [x.float() for x in pytree.tree_leaves(tree) if isinstance(x, Tensor) and x.is_floating_point()]


def compare_outputs(reference: Sequence[Tensor], other: Sequence[Tensor], tolerance: float, what: str) -> float:
    """The relative difference; raises :class:`~hasten.errors.ModelError` where it is beyond ``tolerance``."""
    if [tuple(a.shape) for a in reference] != [tuple(b.shape) for b in other]:
        raise ModelError(
            f"{what} gives outputs of shapes {[tuple(b.shape) for b in other]}, the model "
            f"{[tuple(a.shape) for a in reference]}; nothing was written"
        )
    error = sum(float((a - b).square().sum()) for a, b in zip(reference, other, strict=True))
    norm = sum(float(a.square().sum()) for a in reference)
    difference = math.sqrt(error / norm) if norm else math.sqrt(error)
    if not difference <= tolerance:  # NaN too
        raise ModelError(
            f"{what} differs from the model by {difference:.2g} (relative), allowed is {tolerance:g}; nothing was "
            "written: raise tolerance= if that is good enough, or leave the layers out that cannot be lowered"
        )
    return difference


@contextlib.contextmanager
def placed(path: str | os.PathLike[str], check: Callable[[Path], float]) -> Iterator[tuple[Path, list[float]]]:
    """A place beside ``path`` to write to; ``check`` reads it, and only then it takes its name.

    Gives the place and a list that holds the checked difference afterwards.
    """
    target = Path(path)
    found: list[float] = []
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as folder:
            place = Path(folder) / target.name
            yield place, found
            found.append(check(place))
            for written in sorted(Path(folder).iterdir(), key=lambda p: p.name == target.name):  # the file itself last
                os.replace(written, target.parent / written.name)
    except OSError as error:
        raise DataError(
            f"{str(target)!r} was not written ({error.strerror or error}); free some space or name another place"
        ) from error
