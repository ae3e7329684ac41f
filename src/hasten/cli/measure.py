"""``hasten measure``: how far a model is from its budget on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

__all__ = ["build", "calibration_inputs", "examples", "measure", "moved", "taken"]


def measure(
    model: Annotated[
        str, typer.Argument(help="Embedded model, folder of a language model, or package.module:factory of any module.")
    ] = "pycode-4m",
    input_shape: Annotated[
        list[str] | None, typer.Option("--input-shape", help="Shape such as 1x3x224x224; repeat for more inputs.")
    ] = None,
    input_dtype: Annotated[str, typer.Option("--input-dtype", help="float32, bfloat16, int64, …")] = "float32",
    budget: Annotated[str | None, typer.Option("--budget", help='Such as "p99<50ms, size<2GiB".')] = None,
    dtype: Annotated[
        str, typer.Option("--dtype", help="Weights of a language model: auto, fp32, bf16, int8, int4; fp8 on a GPU.")
    ] = "auto",
    device: Annotated[str, typer.Option("--device", help="cpu or cuda.")] = "cpu",
    time: Annotated[str, typer.Option("--time", help="About how long to measure, such as 15s.")] = "15s",
    power: Annotated[float | None, typer.Option("--power", help="Watts, for energy where there is no meter.")] = None,
    refresh: Annotated[bool, typer.Option("--refresh", help="Measure the roofs of this machine again.")] = False,
    report: Annotated[Path | None, typer.Option("--report", help="Write one HTML file.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Measure latency, cost, memory, energy and the roofline that bounds them."""
    from rich.console import Console
    from rich.markup import escape

    from hasten.budget import Budget, parse_quantity
    from hasten.cli.progress import stages
    from hasten.measure.bandwidth import measure_ceilings

    console = Console(stderr=json)
    limit = parse_quantity(time, "time")
    allowed = Budget.parse(budget) if budget else None
    with stages(console) as told:
        roofs = measure_ceilings(device, refresh=refresh, progress=told)
        result: Any
        if ":" in model:
            from hasten.measure.latency import Protocol
            from hasten.measure.measurement import measure as measure_module

            module = build(model)
            example = examples(input_shape, input_dtype, device)
            taken(model, moved(module, device), example)
            rules = Protocol(min_samples=50, min_time=limit / 3, max_time=limit)
            result = measure_module(
                module, example, allowed, name=model, protocol=rules, device=device, power=power, ceilings=roofs,
                progress=told,
            )  # fmt: skip
        else:
            from hasten.language import load
            from hasten.serve.measurement import measure_language

            loaded = load(model, device=device, dtype=dtype)
            result = measure_language(loaded, allowed, time_limit=limit, ceilings=roofs, progress=told)
    if report is not None:
        result.report(report)
        console.print(f"report: {report}")
    if json:
        import json as encoder

        print(encoder.dumps(result.to_json(), ensure_ascii=False, default=str))
        return
    _show(console, result)
    console.print(f"[bold]{escape(result.verdict())}[/]")


def build(target: str) -> Any:
    """The module that ``package.module:factory`` makes; raises ConfigurationError on one line."""
    import importlib
    import os
    import sys

    import torch

    from hasten.errors import ConfigurationError

    place, _, name = target.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found = getattr(importlib.import_module(place), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigurationError(f"{target!r} was not found ({error}); write package.module:factory") from error
    try:
        made = found if isinstance(found, torch.nn.Module) else found()
    except Exception as error:
        said = str(error).strip().splitlines() or [""]
        raise ConfigurationError(
            f"{target!r} failed ({type(error).__name__}: {said[0]}); call it by itself to see where"
        ) from error
    if not callable(made):
        raise ConfigurationError(f"{target!r} gave a {type(made).__name__}; the factory returns a module or a callable")
    held = made.named_parameters() if isinstance(made, torch.nn.Module) else ()
    empty = next((n for n, p in held if p.device.type == "meta"), None)
    if empty is not None:
        raise ConfigurationError(f"{target!r} has {empty} on the meta device, without numbers; load its weights")
    return made


def examples(shapes: list[str] | None, dtype: str, device: str) -> Any:
    """Random inputs of these shapes, the same each time; one tensor, or a tuple of several."""
    import torch

    from hasten.errors import ConfigurationError

    if not shapes:
        raise ConfigurationError("a module needs --input-shape, such as 1x3x224x224; repeat it for more inputs")
    kind = getattr(torch, dtype, None)
    if not isinstance(kind, torch.dtype):
        raise ConfigurationError(f"input dtype {dtype!r} is not one of torch's; write float32, bfloat16 or int64")
    generator = torch.Generator().manual_seed(0)
    made = []
    for text in shapes:
        sizes = text.lower().replace(",", "x").split("x")
        if not all(s.strip().isdigit() and int(s) > 0 for s in sizes):
            raise ConfigurationError(f"input shape {text!r} is not positive numbers joined by x, such as 1x3x224x224")
        shape = [int(s) for s in sizes]
        try:
            if kind.is_floating_point:
                made.append(torch.randn(shape, generator=generator).to(kind).to(device))
            else:
                made.append(torch.zeros(shape, dtype=kind, device=device))
        except (RuntimeError, MemoryError, TypeError) as error:  # more than there is memory, or than can be counted
            raise ConfigurationError(
                f"an input of shape {text!r} in {dtype} cannot be made ({str(error).splitlines()[0][:120]}); give a "
                "smaller one"
            ) from error
    return made[0] if len(made) == 1 else tuple(made)


def moved(module: Any, device: str) -> Any:
    """The module on ``device``; another callable as it is. Raises ConfigurationError for a device that is not here."""
    import torch

    from hasten.measure.device import resolve

    return module.to(resolve(device)) if isinstance(module, torch.nn.Module) else module


def taken(target: str, module: Any, example: Any) -> Any:
    """The module in eval mode, if it takes the example; ConfigurationError on one line where its code does not."""
    import torch

    from hasten.errors import ConfigurationError
    from hasten.measure.counting import call

    if isinstance(module, torch.nn.Module):
        module.eval()
    try:
        with torch.inference_mode():
            call(module, example)
    except Exception as error:  # whatever the model's own code raises
        given = example if isinstance(example, tuple) else (example,)
        shapes = ", ".join("x".join(map(str, x.shape)) for x in given)
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConfigurationError(
            f"{target!r} does not take {shapes} ({reason}); correct --input-shape or --input-dtype"
        ) from error
    return module


def calibration_inputs(path: Path, example: Any) -> list[Any]:
    """Rows of an array as inputs of one row each."""
    import numpy as np
    import torch

    from hasten.errors import DataError

    try:
        array = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:  # an empty file ends before it began
        raise DataError(f"{path} is no .npy array ({error}); write it with numpy.save") from error
    if not isinstance(example, torch.Tensor) or array.ndim < 1 or array.shape[1:] != tuple(example.shape[1:]):
        raise DataError(f"{path} holds {array.shape}; give (examples, {', '.join(map(str, example.shape[1:]))})")
    if not len(array):
        raise DataError(f"{path} holds no example; give at least one")
    return [torch.from_numpy(row[None].copy()).to(example) for row in array]


def _show(console: Any, result: Any) -> None:
    """The numbers as tables."""
    from rich.table import Table

    from hasten.budget import format_quantity

    console.print(f"[dim]{result.machine}[/]")
    kinds = {"size": "bytes", "memory": "bytes", "energy": "energy", "throughput": "rate"}
    table = Table("quantity", "value")
    for name, value in result.values().items():
        table.add_row(name, format_quantity(value, kinds.get(name, "time")))
    energy = getattr(result, "energy", None)
    if energy is not None:
        table.add_row("energy from", energy.source)
    console.print(table)
    points = getattr(result, "points", None) or (result.point,)
    roof = Table("step", "measured", "roof", "bound by", "reached")
    for p in points:
        roof.add_row(
            p.name,
            format_quantity(p.time, "time"),
            format_quantity(p.bound, "time"),
            p.limit,
            format_quantity(p.attainment, "ratio"),
        )
    console.print(roof)
