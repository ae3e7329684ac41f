"""``hasten``: the shell's front door.

Commands live in their own files and import what they need when they run, so that ``hasten --help`` is quick. An error
that hasten raises on purpose becomes one line on standard error and exit code 2.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from typing import Any

import typer

from hasten.errors import DataWarning, HastenError

__all__ = ["app", "run"]

_SHOW = warnings.showwarning

app = typer.Typer(
    name="hasten",
    help="Machine learning on a latency budget: measure, tune, serve.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
_bench = typer.Typer(help="Load a server and say what its users experience.", no_args_is_help=True)

_COMMANDS = (
    ("measure", "measure", "measure"),
    ("tune", "tune", "tune"),
    ("compress", "compress", "compress"),
    ("export", "export", "export"),
    ("serve", "serve", "serve"),
    ("study", "study", "study"),
    ("demo", "demo", "demo"),
    ("infill", "infill", "infill"),
    ("train-lm", "train_lm", "train_lm"),
    ("stream", "stream", "stream"),
)

_index = typer.Typer(help="An index of vectors on disk: build, search, change, tune, serve.", no_args_is_help=True)
_kv = typer.Typer(help="Caches of keys and values on disk.", no_args_is_help=True)
_KV = ("inspect", "verify", "prune", "encode", "decode")
_INDEX = ("build", "search", "add", "delete", "compact", "verify", "snapshot", "bench", "tune", "cost", "serve")


def _build() -> None:
    for name, module, function in _COMMANDS:
        app.command(name)(getattr(importlib.import_module(f"hasten.cli.{module}"), function))
    _bench.command("serve")(importlib.import_module("hasten.cli.bench").bench_serve)
    _bench.command("speculate")(importlib.import_module("hasten.cli.speculate").bench_speculate)
    _bench.command("attention")(importlib.import_module("hasten.cli.speculate").bench_attention)
    _bench.command("load")(importlib.import_module("hasten.cli.load").bench_load)
    app.add_typer(_bench, name="bench")
    for name in _INDEX:
        _index.command(name)(getattr(importlib.import_module("hasten.cli.index"), name))
    app.add_typer(_index, name="index")
    for name in _KV:
        _kv.command(name)(getattr(importlib.import_module("hasten.cli.kv"), name))
    app.add_typer(_kv, name="kv")


@app.callback(invoke_without_command=True)
def version(show: bool = typer.Option(False, "--version", help="Print the version and exit.")) -> None:
    """Machine learning on a latency budget: measure, tune, serve."""
    if show:
        from importlib.metadata import version as installed

        print(installed("hasten"))
        raise typer.Exit


_build()


def run() -> Any:
    """Entry point of the ``hasten`` command."""
    warnings.showwarning = _on_one_line
    try:
        return app()
    except HastenError as error:
        print(f"hasten: {error}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:  # the reader of a pipe went away
        sys.exit(0)


def _on_one_line(message: Warning | str, category: type[Warning], *place: Any, **where: Any) -> None:
    """What a user should know of the data without the place in our code; other warnings as Python shows them."""
    if issubclass(category, DataWarning):
        print(f"hasten: {message}", file=sys.stderr)
    else:
        _SHOW(message, category, *place, **where)
