"""``hasten study``: list the published claims that rerun here, or rerun one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["study"]

_MARKS = {True: "[green]holds[/]", False: "[red]does not hold[/]", None: "[yellow]not judged[/]"}


def study(
    name: Annotated[str, typer.Argument(help="A study, or 'list' for all of them.")],
    quick: Annotated[bool, typer.Option("--quick", help="Smaller samples, the same checks.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    data: Annotated[
        Path | None, typer.Option("--data", help="Folder of public data; ../shared/data where it exists.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Seed of every random draw.")] = 0,
    output: Annotated[Path | None, typer.Option("--output", help="Also write the JSON to this file.")] = None,
) -> None:
    """Rerun a published claim on this machine and say plainly whether it holds."""
    if name == "list":
        _list(json)
    else:
        _run(name, quick, json, data, seed, output)


def _list(as_json: bool) -> None:
    import json

    from rich.console import Console
    from rich.table import Table

    from hasten import studies

    found = [studies.load(n) for n in studies.names()]
    if as_json:
        print(json.dumps([{"system": s.system, "claim": s.claim} for s in found], ensure_ascii=False))
        return
    table = Table("study", "claim", title=f"{len(found)} studies", title_justify="left")
    for one in found:
        table.add_row(one.system, one.claim)
    Console().print(table)


def _run(name: str, quick: bool, as_json: bool, data: Path | None, seed: int, output: Path | None) -> None:
    import json

    from rich.console import Console
    from rich.markup import escape
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    from hasten import studies
    from hasten.files import write_text

    study = studies.load(name)
    folder = studies.find_data(data)
    console = Console(stderr=as_json)
    console.print(f"[bold]{study.system}[/]: {escape(study.claim)}")
    console.print(f"published: {escape(_sentence(study.published))}")
    console.print(f"data: {folder if folder else 'none (checks on real data are not judged)'}")
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("starting", total=1.0)

        def told(stage: str, share: float) -> None:
            bar.update(task, description=escape(stage), completed=share)

        def judged(check: studies.Check) -> None:
            bar.console.print(
                f"  {_MARKS[check.holds]}  {escape(check.name)}: {_value(check)} {escape(check.unit)} "
                f"[dim]({escape(check.threshold)}) {escape(check.note)}[/]"
            )

        scale = studies.Scale(quick=quick, data=folder, seed=seed, progress=told)
        result = studies.execute(study, scale, on_check=judged)
    text = json.dumps(result.to_json(), ensure_ascii=False)
    if output is not None:
        write_text(output, text + "\n")
    counted = [c for c in result.checks if c.holds is not None]
    console.print(
        f"verdict: [bold]{result.verdict}[/] ({sum(bool(c.holds) for c in counted)} of {len(counted)} checks, "
        f"{len(result.checks) - len(counted)} not judged here, {result.seconds:.1f} s)"
    )
    if as_json:
        print(text)


def _sentence(published: object) -> str:
    if isinstance(published, str):
        return published
    assert hasattr(published, "items")
    return "; ".join(f"{key}: {value}" for key, value in published.items())


def _value(check: object) -> str:
    value = getattr(check, "value", None)
    return "–" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
