"""The fresh process of :mod:`hasten.frozen.cold`: loads one model and prints its times as JSON.

Started by its path and not as a part of the package, so that nothing heavy is imported before the clock runs.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hasten.clock import Clock

__all__: list[str] = []


def _importer(kind: str) -> Callable[[], Callable[[str], Callable[..., Any]]]:
    """A function that imports what the kind needs and gives the function that loads."""

    def packed() -> Any:
        from hasten.frozen.runner import load

        return load

    def onnx() -> Any:
        import onnxruntime  # type: ignore[import-untyped,unused-ignore]

        def load(path: str) -> Any:
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = 1
            session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
            names = [i.name for i in session.get_inputs()]
            return lambda *xs: session.run(None, dict(zip(names, xs, strict=True)))

        return load

    def pickled() -> Any:
        import torch

        def load(path: str) -> Any:
            return _quiet(torch.load(path, weights_only=False).eval(), torch)

        return load

    def exported() -> Any:
        import torch

        def load(path: str) -> Any:
            return _quiet(torch.export.load(path).module(), torch)

        return load

    return {"packed": packed, "onnx": onnx, "pickle": pickled, "export": exported}[kind]


def _quiet(module: Any, torch: Any) -> Callable[..., Any]:
    def run(*xs: Any) -> Any:
        with torch.inference_mode():
            return module(*(torch.from_numpy(x) for x in xs))

    return run


def _measure(path: str, kind: str, inputs: str, calls: int, clock: Clock) -> dict[str, float]:
    """In the fresh process."""
    began = clock.now()
    import numpy as np

    load = _importer(kind)()
    imported = clock.now()
    with np.load(inputs) as held:
        arrays = [held[k] for k in held.files]
    began_load = clock.now()
    run = load(path)
    loaded = clock.now()
    run(*arrays)
    first = clock.now()
    times = []
    for _ in range(calls):
        at = clock.now()
        run(*arrays)
        times.append(clock.now() - at)
    return {
        "imports": imported - began, "load": loaded - began_load, "first": first - loaded,
        "warm": sorted(times)[len(times) // 2],
    }  # fmt: skip


if __name__ == "__main__":
    sys.path.pop(0)  # the folder of this file, whose names belong to a package
    from hasten.clock import MonotonicClock

    print(json.dumps(_measure(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]), MonotonicClock())))
