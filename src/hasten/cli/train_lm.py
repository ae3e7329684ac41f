"""``hasten train-lm``: train an embedded preset on Python code, reproducibly and resumably."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["train_lm"]


def train_lm(
    output: Annotated[Path, typer.Argument(help="Folder of the model; a run that was cut off goes on there.")],
    preset: Annotated[str, typer.Option(help="pycode-4m or pycode-draft-0.7m.")] = "pycode-4m",
    corpus: Annotated[str, typer.Option(help="stdlib, or a folder of Python files.")] = "stdlib",
    hours: Annotated[float | None, typer.Option(help="Time to train for.")] = None,
    tokens: Annotated[int, typer.Option(help="Tokens to train on, where --hours is not given.")] = 20_000_000,
    target: Annotated[Path | None, typer.Option(help="Folder of the trained target that a draft follows.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of data order and initial weights.")] = 0,
    json: Annotated[bool, typer.Option("--json", help="Print the last log line as JSON.")] = False,
) -> None:
    """Train a small language model; the log and the checkpoint stay beside it."""
    from hasten.errors import ConfigurationError
    from hasten.language.loading import EMBEDDED
    from hasten.language.pycode import train_pycode
    from hasten.train import LMTraining

    if preset not in EMBEDDED:
        raise ConfigurationError(f"preset {preset!r} is unknown; choose one of {', '.join(EMBEDDED)}")
    if preset == EMBEDDED[1] and target is None:
        raise ConfigurationError(
            f"{preset} learns from its target; give the folder of a trained {EMBEDDED[0]} as --target"
        )
    training = LMTraining(
        tokens=10**12 if hours is not None else tokens, seconds=None if hours is None else hours * 3600, seed=seed
    )
    last = train_pycode(
        preset,
        output,
        training,
        corpus=None if corpus == "stdlib" else corpus,
        target=target,
        say=(lambda text: None) if json else print,
    )
    if json:
        from json import dumps

        print(dumps(last))
