"""``hasten infill``: complete a file at a line, from what stands before and after it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["infill"]


def infill(
    place: Annotated[str, typer.Argument(help="FILE:LINE, or FILE:LINE:COLUMN; both count from 1.")],
    model: Annotated[str, typer.Option(help="Folder of a model, or the name of an embedded one.")] = "pycode-4m",
    max_tokens: Annotated[int, typer.Option(help="Tokens of the answer at most.")] = 32,
    temperature: Annotated[float, typer.Option(help="0 takes the most probable token.")] = 0.0,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Fill in the middle of a file and print what the model would write there."""
    from hasten.errors import DataError
    from hasten.language import load

    name, _, rest = place.partition(":")
    try:
        numbers = [int(n) for n in rest.split(":")] if rest else []
    except ValueError:
        numbers = []
    if not 1 <= len(numbers) <= 2 or min(numbers) < 1:
        raise DataError(f"{place!r} is not a place in a file; write FILE:LINE or FILE:LINE:COLUMN, counted from 1")
    path = Path(name)
    try:
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as UTF-8 text ({error})") from None
    if numbers[0] > len(lines):
        raise DataError(f"{path} has {len(lines)} lines; line {numbers[0]} was asked for")
    line = lines[numbers[0] - 1]
    column = numbers[1] - 1 if len(numbers) == 2 else len(line.rstrip("\r\n"))
    if column > len(line):
        raise DataError(f"line {numbers[0]} of {path} has {len(line)} characters; column {column + 1} was asked for")
    prefix = "".join(lines[: numbers[0] - 1]) + line[:column]
    suffix = line[column:] + "".join(lines[numbers[0] :])
    answer = load(model).infill(prefix, suffix, max_tokens=max_tokens, temperature=temperature)
    if json:
        from json import dumps

        print(dumps({"middle": answer.text, "tokens": len(answer.tokens), "dropped": answer.dropped}))
    else:
        print(answer.text)
        if answer.dropped:
            print(f"({answer.dropped} tokens at the far ends of the file did not fit the context)")
