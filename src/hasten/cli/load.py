"""``hasten bench load``: what models cost before their first answer, each in fresh processes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["bench_load"]


def bench_load(
    models: Annotated[
        list[str], typer.Argument(help="Packed folders, .onnx, .pt2 or .pt files; a .pt runs the code that it names.")
    ],
    shape: Annotated[str, typer.Option("--shape", help="Shape of the input, such as 1,100,6.")] = "",
    example: Annotated[Path | None, typer.Option("--example", help="Input as .npy, or .npz for several.")] = None,
    processes: Annotated[int, typer.Option("--processes", help="Fresh processes for each model.")] = 5,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Time imports, loading, the first call and warm calls of each model, in fresh processes."""
    import dataclasses
    from json import dumps

    import numpy as np
    from rich.console import Console
    from rich.table import Table

    from hasten.budget import format_quantity
    from hasten.errors import ConfigurationError, DataError
    from hasten.frozen.cold import cold_starts

    if example is not None:
        try:
            held = np.load(example)
        except (OSError, ValueError) as error:
            raise DataError(f"{str(example)!r} cannot be read ({error}); give a .npy or .npz file") from error
        arrays = [held[k] for k in held.files] if hasattr(held, "files") else [held]
    else:
        try:
            sizes = [int(s) for s in shape.split(",")]
        except ValueError:
            raise ConfigurationError(
                f"shape {shape!r} is not a list of numbers; give --shape 1,100,6 or --example x.npy"
            ) from None
        arrays = [np.random.default_rng(0).normal(size=sizes).astype(np.float32)]
    found = cold_starts(models, arrays, processes=processes)
    if json:
        print(dumps({p: {**dataclasses.asdict(c), "ready": c.ready} for p, c in found.items()}))
        return
    table = Table(title=f"seconds until an answer, medians of {processes} processes")
    for head in ("model", "size", "imports", "load", "first call", "warm call", "ready"):
        table.add_column(head, justify="left" if head == "model" else "right")
    for path, cold in found.items():
        times = (cold.imports, cold.load, cold.first, cold.warm, cold.ready)
        table.add_row(path, format_quantity(cold.bytes, "bytes"), *(format_quantity(t, "time") for t in times))
    Console().print(table)
