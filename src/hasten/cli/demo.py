"""``hasten demo``: the main job on a real model, with real output."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["demo"]


def demo(
    model: Annotated[str, typer.Option(help="Folder of a model, or the name of an embedded one.")] = "pycode-4m",
    report: Annotated[Path, typer.Option(help="The HTML page that is written.")] = Path("report.html"),
    seconds: Annotated[float, typer.Option(help="About how long each of the two replays takes.")] = 20.0,
    threads: Annotated[int | None, typer.Option(help="Threads of the model; all cores but one if left out.")] = None,
    data: Annotated[Path | None, typer.Option(help="Folder of public data; ../shared/data where it exists.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of every random draw.")] = 0,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Measure a model, tune its server for an SLO, serve it, and compare with the untuned server."""
    from rich.console import Console

    from hasten.apps.demo import run
    from hasten.cli.progress import stages
    from hasten.errors import ConfigurationError
    from hasten.studies.runner import find_data

    if seconds <= 0:
        raise ConfigurationError(f"--seconds is {seconds}; a replay takes a positive time")
    console = Console(stderr=json)
    result = run(
        console, stages, model=model, report=report, data=find_data(data), seconds=seconds, threads=threads, seed=seed
    )
    if json:
        import json as encoder

        print(encoder.dumps(result.to_json(), ensure_ascii=False, default=str))
