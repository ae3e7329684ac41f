"""What a model costs before its first answer: imports, loading, first call and warm calls, each in a fresh process.

The kinds of files are told apart by their names: a packed model (folder or ``.hasten``), ``.onnx``, ``.pt2``
(``torch.export``) and ``.pt``, a pickled module, which runs the code that it names: measure only files of your own. The
process starts from ``cold_child.py``, which imports nothing before its clock runs.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hasten.errors import ConfigurationError, ModelLoadError

__all__ = ["ColdStart", "cold_starts", "kind_of"]

_CHILD = Path(__file__).with_name("cold_child.py")


@dataclass(frozen=True)
class ColdStart:
    """Seconds, medians over fresh processes."""

    path: str
    """the model"""
    kind: str
    """packed, onnx, export or pickle"""
    bytes: int
    """of the file, or of all files of the folder"""
    imports: float
    """of what this kind needs to be loaded, from an interpreter that runs"""
    load: float
    """from the file to something that can be called"""
    first: float
    """of the first call"""
    warm: float
    """of a later call, median"""
    processes: int = 1
    """that were started"""

    @property
    def ready(self) -> float:
        """Until the first answer: imports, load and first call."""
        return self.imports + self.load + self.first


def kind_of(path: str | os.PathLike[str]) -> str:
    """How a file is loaded; raises :class:`~hasten.errors.ModelLoadError` for one that is not known or not there.

    >>> kind_of("none.onnx")
    Traceback (most recent call last):
    hasten.errors.ModelLoadError: 'none.onnx' is not there; name a model
    """
    place = Path(path)
    if not place.exists():
        raise ModelLoadError(f"{str(place)!r} is not there; name a model")
    if place.is_dir() or place.suffix == ".hasten":
        return "packed"
    found = {".onnx": "onnx", ".pt2": "export", ".pt": "pickle", ".pth": "pickle"}.get(place.suffix)
    if found is None:
        raise ModelLoadError(f"{str(place)!r} is of no known kind; give a packed folder, .onnx, .pt2 or .pt")
    return found


def cold_starts(
    paths: Sequence[str | os.PathLike[str]],
    example: Any,
    *,
    processes: int = 5,
    calls: int = 50,
    threads: int = 1,
    seed: int = 0,
) -> dict[str, ColdStart]:
    """Measure every model in ``processes`` fresh processes each, in an order drawn anew per round.

    ``example`` is an array, or several for as many arguments. Files are in the page cache, as those of a running
    service are.
    """
    if processes < 1 or calls < 1:
        raise ConfigurationError(f"processes ({processes}) and calls ({calls}) must be 1 or more")
    arrays = list(example) if isinstance(example, list | tuple) else [example]
    kinds = {str(p): kind_of(p) for p in paths}
    found: dict[str, list[dict[str, float]]] = {p: [] for p in kinds}
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    environment |= {k: str(threads) for k in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as place:
        inputs = Path(place) / "example.npz"
        np.savez(inputs, *(np.asarray(a) for a in arrays))
        for _ in range(processes):
            order = list(kinds)
            rng.shuffle(order)
            for path in order:
                command = [sys.executable, str(_CHILD), path, kinds[path], str(inputs), str(calls)]
                done = subprocess.run(command, capture_output=True, text=True, env=environment)
                if done.returncode:
                    last = (done.stderr.strip().splitlines() or ["no message"])[-1]
                    raise ModelLoadError(f"{path!r} could not be run: {last[:200]}")
                found[path].append(json.loads(done.stdout.strip().splitlines()[-1]))
    return {
        path: ColdStart(
            path, kinds[path], _bytes(Path(path)),
            **{k: float(np.median([r[k] for r in rows])) for k in ("imports", "load", "first", "warm")},
            processes=len(rows),
        )
        for path, rows in found.items()
    }  # fmt: skip


def _bytes(path: Path) -> int:
    files = (
        [p for p in path.rglob("*") if p.is_file()] if path.is_dir() else [path, *path.parent.glob(path.name + ".data")]
    )
    return sum(p.stat().st_size for p in files)
