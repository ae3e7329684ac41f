"""The documents run: Python blocks of docs/, and the examples in the docstrings of every module."""

from __future__ import annotations

import doctest
import importlib
import re
from pathlib import Path

import click
import pytest
import typer
from documents import ROOT, Block, blocks, execute

import hasten
from hasten.cli.main import app
from hasten.errors import MissingExtraError

pytestmark = pytest.mark.usefixtures("one_thread", "elsewhere")

PAGES = sorted((ROOT / "docs").glob("*.md"))
BLOCKS = [b for page in PAGES for b in blocks(page)]
SOURCE = Path(hasten.__file__).parent
MODULES = sorted(
    "hasten." + ".".join(p.relative_to(SOURCE).with_suffix("").parts)
    for p in SOURCE.rglob("*.py")
    if p.name != "__init__.py" and ">>>" in p.read_text(encoding="utf-8")
) + sorted(
    ".".join(("hasten", *p.parent.relative_to(SOURCE).parts))
    for p in SOURCE.rglob("__init__.py")
    if ">>>" in p.read_text(encoding="utf-8")
)


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.language == "python"], ids=str)
def test_python_blocks_run(block: Block) -> None:
    assert not block.skipped, "Python blocks of the docs all run"
    execute(block)


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples_run(name: str) -> None:
    try:
        module = importlib.import_module(name)
    except (ImportError, MissingExtraError) as error:
        pytest.skip(f"needs a package that is not installed: {error}")
    found = doctest.testmod(module, optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    assert found.failed == 0, f"{found.failed} of {found.attempted} examples of {name} fail; see the output"


def test_the_runner_of_examples_can_fail() -> None:
    bad = Block("nowhere.md", 1, "python", "assert 1 == 2\n", False)
    with pytest.raises(AssertionError):
        execute(bad)


def test_every_page_is_in_the_menu_and_every_room_has_a_page() -> None:
    menu = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    for page in PAGES:
        assert page.name in menu, f"{page.name} is not in the nav of mkdocs.yml"
    for room in ("measure", "train", "compress", "language", "serve", "tune", "studies", "testing"):
        assert (ROOT / "docs" / f"{room}.md").is_file(), f"the room {room} has no page"


def command_of(words: list[str]) -> tuple[click.Command, list[str]]:
    """The command that the words name, and the words that are left for it."""
    command: click.Command = typer.main.get_command(app)
    rest = list(words)
    while hasattr(command, "get_command"):
        found = command.get_command(click.Context(command), rest[0])
        assert found is not None, f"hasten has no command {rest[0]!r}"
        command = found
        rest = rest[1:]
    return command, rest


def test_commands_on_the_pages_exist() -> None:
    seen = 0
    for block in BLOCKS:
        for line in block.text.splitlines():
            if block.language == "python" or not line.startswith("hasten "):
                continue
            command, rest = command_of(line.split("#")[0].split()[1:])
            known = {option for p in command.params for option in p.opts}
            for word in rest:
                assert not word.startswith("--") or word in known, f"{block}: {line} names {word}, which does not exist"
            seen += 1
    assert seen > 10


def test_options_of_the_serve_page_exist() -> None:
    command, _ = command_of(["serve"])
    known = {option for p in command.params for option in p.opts}
    page = (ROOT / "docs" / "serve.md").read_text(encoding="utf-8")
    table = re.findall(r"^\| (`--[^|]*)\|", page, re.MULTILINE)
    assert len(table) > 5
    for cell in table:
        for option in re.findall(r"`(--[a-z-]+)`", cell):
            assert option in known, f"docs/serve.md names {option}, which hasten serve does not have"
