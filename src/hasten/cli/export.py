"""``hasten export``: a module, compressed if asked, as ONNX or as a ``torch.export`` program."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

__all__ = ["export"]


def export(
    model: Annotated[str, typer.Argument(help="package.module:factory of any module.")],
    out: Annotated[Path, typer.Option("--out", help="File to write: .onnx or .pt2.")],
    input_shape: Annotated[
        list[str] | None, typer.Option("--input-shape", help="Shape such as 1x3x224x224; repeat for more inputs.")
    ] = None,
    input_dtype: Annotated[str, typer.Option("--input-dtype", help="float32, bfloat16, int64, …")] = "float32",
    recipe: Annotated[
        Path | None, typer.Option("--recipe", help="Compress by this recipe first, such as one that tune wrote.")
    ] = None,
    scheme: Annotated[str | None, typer.Option("--scheme", help="Quantise first: W8A8, W4A16, FP8 …")] = None,
    calibration: Annotated[
        Path | None, typer.Option("--calibration", help="Example inputs as .npy, (examples, *shape without the first).")
    ] = None,
    tolerance: Annotated[
        float | None, typer.Option("--tolerance", help="Relative difference of the outputs that is allowed.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Write the model as a file for other runtimes, run the file, and compare its outputs before it is kept."""
    from rich.console import Console
    from torch.nn import Module

    from hasten.cli.measure import build, calibration_inputs, examples, taken
    from hasten.compress import Recipe
    from hasten.compress.export import export_onnx, export_program
    from hasten.compress.quantize import Quantize
    from hasten.errors import ConfigurationError
    from hasten.files import check_place

    if out.suffix not in (".onnx", ".pt2"):
        raise ConfigurationError(f"{out} says no format; name the file .onnx or .pt2")
    if recipe is not None and scheme is not None:
        raise ConfigurationError("--recipe and --scheme both say how to compress; give one")
    if tolerance is not None and not tolerance >= 0:
        raise ConfigurationError(f"--tolerance is {tolerance}; give a relative difference of at least 0, such as 1e-3")
    check_place(out)
    example = examples(input_shape, input_dtype, "cpu")
    module = taken(model, build(model), example)
    if not isinstance(module, Module):
        raise ConfigurationError(f"{model!r} gave a {type(module).__name__}; a file is written of an nn.Module")
    given = [example] if calibration is None else calibration_inputs(calibration, example)
    if recipe is not None:
        module, _ = Recipe.load(recipe).apply(module, given)
    elif scheme is not None:
        module = Quantize.scheme(scheme, real="never")(module, given)
    extra: Any = {} if tolerance is None else {"tolerance": tolerance}
    write: Any = export_onnx if out.suffix == ".onnx" else export_program
    done = write(module, example, out, **extra)
    if json:
        import json as encoder

        print(encoder.dumps(done.to_json(), ensure_ascii=False))
        return
    console = Console()
    for layer, how in done.layers:
        console.print(f"{layer}: {how}", markup=False)
    for note in done.notes:
        console.print(note, markup=False)
    console.print(
        f"{done.path}: {done.bytes:,} bytes; its outputs differ by {done.difference:.2g} (relative, allowed "
        f"{done.tolerance:g})",
        markup=False,
    )
