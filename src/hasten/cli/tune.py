"""``hasten tune``: make a model meet its budget, or a server its SLO."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

__all__ = ["tune"]


def tune(
    model: Annotated[
        str,
        typer.Argument(
            help="Embedded model or folder of a language model (with --slo), or module:factory (with --budget)."
        ),
    ] = "pycode-4m",
    budget: Annotated[str | None, typer.Option("--budget", help='For a module: "p99<5ms, quality>99%".')] = None,
    slo: Annotated[str | None, typer.Option("--slo", help='For a server: "ttft<200ms, tpot<50ms, p99".')] = None,
    rate: Annotated[float, typer.Option("--rate", help="Requests per second that are offered.")] = 2.0,
    requests: Annotated[int, typer.Option("--requests", help="Requests of the replayed workload.")] = 60,
    workload: Annotated[
        str, typer.Option("--workload", help="conversation, code, or the file of a trace.")
    ] = "conversation",
    precisions: Annotated[str, typer.Option("--precisions", help="Weight formats to try, by commas.")] = "bf16,int8",
    speculate: Annotated[
        str,
        typer.Option("--speculate", help="Who may guess tokens: off, ngram, auto, draft, tree, triforce, by commas."),
    ] = "off,ngram,auto",
    draft: Annotated[str | None, typer.Option("--draft", help="Small model that guesses.")] = None,
    kv_precisions: Annotated[
        str, typer.Option("--kv-precisions", help="Precisions of the KV cache to try, by commas: auto, int8.")
    ] = "auto,int8",
    kv_quality: Annotated[
        str, typer.Option("--kv-quality", help="How much a precision of the KV cache may raise the perplexity.")
    ] = "1%",
    confirm: Annotated[int, typer.Option("--confirm", help="Predicted settings that are run for real.")] = 3,
    input_shape: Annotated[
        list[str] | None, typer.Option("--input-shape", help="For a module: shape such as 1x3x224x224.")
    ] = None,
    input_dtype: Annotated[str, typer.Option("--input-dtype", help="float32, bfloat16, int64, …")] = "float32",
    device: Annotated[str, typer.Option("--device", help="For a module: cpu or cuda.")] = "cpu",
    storage: Annotated[
        Path | None, typer.Option("--storage", help="SQLite file; a killed search goes on from it.")
    ] = None,
    time_limit: Annotated[str, typer.Option("--time-limit", help="How long to search, such as 2min.")] = "2min",
    seed: Annotated[int, typer.Option("--seed", help="Seed of the workload.")] = 0,
    power: Annotated[
        float | None, typer.Option("--power", help="Watts under load, for an energy bound where there is no meter.")
    ] = None,
    recipe: Annotated[
        Path | None, typer.Option("--recipe", help="For a module: write the best recipe as YAML.")
    ] = None,
    also: Annotated[
        list[Path] | None,
        typer.Option("--also", help="For a module: a recipe (YAML) to try too; repeat for more."),
    ] = None,
    calibration: Annotated[
        Path | None, typer.Option("--calibration", help="For a module: example inputs (.npy) to learn from.")
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option("--data", help="For a module: example inputs (.npy) that judge the quality; random ones without."),
    ] = None,
    report: Annotated[Path | None, typer.Option("--report", help="Write one HTML file.")] = None,
    save: Annotated[
        Path | None,
        typer.Option("--save", help="For a module: folder for recipe, figures and page; hasten.tune.load reads it."),
    ] = None,
    formats: Annotated[
        str | None,
        typer.Option("--formats", help="For a module: number formats of these widths (3..8), for an FPGA's LUTs."),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Search over recipes (--budget) or serving knobs (--slo); every number that counts is measured."""
    from rich.console import Console
    from rich.markup import escape

    from hasten.budget import SLO, parse_quantity
    from hasten.cli.progress import stages
    from hasten.errors import ConfigurationError
    from hasten.files import check_place

    console = Console(stderr=json)
    limit = parse_quantity(time_limit, "time")
    if formats is not None:
        from hasten.cli.formats import compare_formats

        if budget is not None or slo is not None or device not in ("cpu", "fpga"):
            raise ConfigurationError("--formats compares number formats for an FPGA; leave out --budget, --slo, a GPU")
        compare_formats(
            console, model, formats, input_shape, input_dtype, calibration=calibration, data=data, report=report,
            json=json,
        )  # fmt: skip
        return
    if (budget is None) == (slo is None):
        raise ConfigurationError("say what to meet: --budget for a module, or --slo for a served language model")
    if slo is not None and device != "cpu":
        raise ConfigurationError("--slo tunes serving on the CPU; leave --device out")
    if slo is not None and (save is not None or recipe is not None):
        raise ConfigurationError("--save and --recipe keep what --budget finds; for --slo give --report or --json")
    for path, folder in ((recipe, False), (report, False), (save, True)):
        if path is not None:
            check_place(path, folder=folder)  # not after minutes of search
    result: Any
    with stages(console) as told:
        if budget is not None:
            result = _of_module(
                model, input_shape, input_dtype, device, data, calibration, also or [],
                budget=budget, storage=storage, time_limit=limit, power=power, progress=told,
            )  # fmt: skip
            page = None
        else:
            from hasten.tune.language import search

            result = search(
                model,
                SLO.parse(slo or ""),
                workload=workload,
                rate=rate,
                requests=requests,
                precisions=[p.strip() for p in precisions.split(",") if p.strip()],
                speculate=[w.strip() for w in speculate.split(",") if w.strip()],
                draft=draft,
                kv_precisions=[p.strip() for p in kv_precisions.split(",") if p.strip()],
                kv_quality=_share(kv_quality),
                confirm=confirm,
                storage=storage,
                time_limit=limit,
                seed=seed,
                progress=told,
            )
            from hasten.tune.report import of_serving

            page = of_serving(result)
    if recipe is not None:
        result.recipe.save(recipe)
        console.print(f"recipe: {recipe}")
    if save is not None:
        result.save(save)
        console.print(f"saved: {save}")
    if report is not None:
        page.write(report) if page is not None else result.report(report)
        console.print(f"report: {report}")
    if json:
        import json as encoder

        print(encoder.dumps(result.to_json(), ensure_ascii=False, default=str))
        return
    _show(console, result)
    console.print(f"[bold]{escape(result.verdict())}[/]")


def _of_module(
    target: str, shapes: list[str] | None, dtype: str, device: str, data: Path | None, calibration: Path | None,
    also: list[Path], **search: Any,
) -> Any:  # fmt: skip
    """The search for a module, whose inputs and recipes are read from files."""
    from hasten.cli.measure import build, calibration_inputs, examples, moved, taken
    from hasten.compress import Recipe
    from hasten.tune.model import tune as tune_module

    module, example = moved(build(target), device), examples(shapes, dtype, device)
    module = taken(target, module, example)
    judged = [example] if data is None else _judged(data, calibration_inputs(data, example), example)
    learned = None if calibration is None else calibration_inputs(calibration, example)
    return tune_module(module, judged, recipes=[Recipe.load(path) for path in also], calibration=learned, **search)


def _show(console: Any, result: Any) -> None:
    from rich.table import Table

    from hasten.budget import format_quantity

    kinds = {"size": "bytes", "quality": "ratio", "attainment": "ratio"}
    candidates = result.frontier.candidates
    keys = list(dict.fromkeys(k for c in candidates for k in c.values))
    table = Table("candidate", *keys, "budget")
    for c in candidates:
        cells = [
            format_quantity(c.values[k], "time" if "@p" in k else kinds.get(k, "rate")) if k in c.values else "–"
            for k in keys
        ]
        state = "inside" if c.feasible else "; ".join(c.violations)
        table.add_row(c.name, *cells, state if c.measured else f"not measured: {state}")
    console.print(table)


def _judged(path: Path, rows: list[Any], example: Any) -> list[Any]:
    """The rows of a file as inputs, the first as large as the example, for that one is timed."""
    import torch

    from hasten.errors import DataError

    batch = len(example)
    if len(rows) < batch:
        raise DataError(f"{path} holds {len(rows)} examples, and a call takes {batch}; give at least as many")
    return [torch.cat(rows[:batch]), *rows[batch:]]


def _share(text: str) -> float:
    """``1%`` as 0.01."""
    from hasten.errors import ConfigurationError

    try:
        value = float(text.rstrip("%")) / 100
    except ValueError:
        value = -1.0
    if not 0 <= value < 1 or not text.endswith("%"):
        raise ConfigurationError(f"--kv-quality is {text!r}; give a percentage such as 1%")
    return value
