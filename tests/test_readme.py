"""The README tells the truth: its Python blocks run, its commands run, its table is the generated one."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
import typer
from documents import ROOT, Block, blocks, execute
from typer.testing import CliRunner

from hasten import serve
from hasten.cli.main import app
from hasten.studies import catalog

pytestmark = pytest.mark.usefixtures("one_thread", "elsewhere")

README = ROOT / "README.md"
BLOCKS = blocks(README)
PYTHON = [b for b in BLOCKS if b.language == "python"]
SHELL = [b for b in BLOCKS if b.language in ("sh", "console")]
ADDRESS = "http://127.0.0.1:8000"


def commands(block: Block) -> list[str]:
    """Lines of a shell block, the prompt of a console block taken off."""
    return [line.removeprefix("$ ") for line in block.text.splitlines() if line.strip()]


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """A server that stands for the one on port 8000."""
    with serve.start("pycode-4m", num_blocks=256, threads=1) as server:
        yield server.url


@pytest.mark.parametrize("block", PYTHON, ids=str)
def test_python_blocks_run(block: Block, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]) -> None:
    replace = {}
    if ADDRESS in block.text:
        replace[ADDRESS] = request.getfixturevalue("address")
    execute(block, replace)
    assert capsys.readouterr().out.strip(), "an example shows something"


@pytest.mark.parametrize("block", [b for b in SHELL if not b.skipped], ids=str)
def test_commands_run(block: Block, request: pytest.FixtureRequest) -> None:
    for line in commands(block):
        words = shlex.split(line)
        if words[0] == "hasten":
            ran = CliRunner().invoke(app, words[1:])
            assert ran.exit_code == 0, f"{line}\n{ran.output}\n{ran.exception!r}"
            assert ran.output.strip(), f"{line} prints nothing"
            for page in (words[i + 1] for i, w in enumerate(words) if w == "--report"):
                assert Path(page).read_text(encoding="utf-8").startswith("<!doctype html>")
        elif words[0] == "curl" and shutil.which("curl") is None:
            pytest.skip("curl is not installed")
        else:
            assert words[0] in ("curl", "printf"), f"{line}: the README runs hasten, curl and printf only"
            if ADDRESS in line:
                line = line.replace(ADDRESS, request.getfixturevalue("address"))
            done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=60)
            assert done.returncode == 0, done.stderr
            if words[0] == "curl":
                assert '"choices"' in done.stdout, done.stdout


@pytest.mark.parametrize("block", [b for b in SHELL if b.skipped], ids=str)
def test_commands_that_are_not_run_name_real_options(block: Block) -> None:
    for line in commands(block):
        assert line.startswith("hasten "), f"{line}: only commands of hasten may be left out"
        check_options(shlex.split(line)[1:])


def check_options(words: list[str]) -> None:
    """The command parses with these words, and its ``--help`` names every option."""
    command: click.Command = typer.main.get_command(app)
    context = click.Context(command, info_name="hasten")
    path: list[str] = []
    while hasattr(command, "get_command"):
        found = command.get_command(context, words[len(path)])
        assert found is not None, f"hasten has no command {words[len(path)]!r}"
        path.append(words[len(path)])
        command = found
    shown = CliRunner().invoke(app, [*path, "--help"], env={"COLUMNS": "300", "NO_COLOR": "1", "TERM": "dumb"})
    assert shown.exit_code == 0
    for word in words[len(path) :]:
        if word.startswith("--"):
            assert re.search(rf"(?<![\w-]){re.escape(word)}(?![\w-])", shown.output), f"{path} has no option {word}"
    command.make_context("hasten", list(words[len(path) :]), resilient_parsing=False)


def test_the_check_of_options_can_fail() -> None:
    with pytest.raises(AssertionError, match="no option --sllo"):
        check_options(["serve", "pycode-4m", "--sllo", "p99"])
    with pytest.raises(AssertionError, match="no command"):
        check_options(["swerve"])


def test_every_verb_has_an_example() -> None:
    lines = [line for b in SHELL for line in commands(b)]
    for verb in ("measure", "tune", "serve", "infill", "study", "bench serve"):
        assert any(line.startswith(f"hasten {verb}") for line in lines), f"no example of hasten {verb}"
    texts = [b.text for b in PYTHON]
    for call in ("hs.measure(", "hs.tune(", "hs.serve.start(", ".infill(", "studies.load("):
        assert any(call in text for text in texts), f"no example of {call}"


def test_the_table_of_systems_is_the_generated_one() -> None:
    between = re.search(r"<!-- systems: begin -->\n(.*?)\n<!-- systems: end -->", README.read_text(), re.DOTALL)
    assert between is not None
    assert between[1] == catalog.table(), "write what `python -m hasten.studies.catalog` prints into the README"


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for word in re.findall(r"\bmake ([a-z]+)\b(?=\s+#|`)", README.read_text()):
        assert re.search(rf"^{word}:", makefile, re.MULTILINE), f"the Makefile has no {word}"


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md"])
def test_links_lead_somewhere(name: str) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", (ROOT / name).read_text()):
        assert (ROOT / target).exists(), f"{name} links to {target}, which is not there"
