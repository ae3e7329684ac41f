"""``hasten kv``: a store is made, looked into, checked, thinned and used."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from hasten.cli import kv
from hasten.errors import ConfigurationError, DataError
from hasten.language import kvfit

app = typer.Typer()
for _name in kv.__all__:
    app.command(_name)(getattr(kv, _name))


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, list(arguments))


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of one context; its codec is fitted to two short texts, not to the library."""
    folder = tmp_path_factory.mktemp("kv")
    text = folder / "point.py"
    text.write_text("class Point:\n    def __init__(self, x, y):\n        self.x = x\n        self.y = y\n" * 6)
    patch = pytest.MonkeyPatch()
    import hasten.serve.kvstore as home

    patch.setattr(home, "sample_contexts", lambda model: [model.tokenizer.encode(text.read_text()[:600])] * 2)
    patch.setattr(kvfit, "fit", lambda model, contexts, fit=kvfit.fit: fit(model, contexts, measure=False))
    done = run("encode", "pycode-4m", str(text), "-o", str(folder / "s"), "--chunk", "64", "--levels", "0,2", "--json")
    patch.undo()
    assert done.exit_code == 0, (done.output, done.exception)
    assert len(json.loads(done.stdout)["chunks"]) > 1
    return folder / "s"


def test_what_is_in_it_is_said(store: Path) -> None:
    found = json.loads(run("inspect", str(store), "--json").stdout)
    assert found["unsound"] == 0
    assert set(found["levels"]) == {"0", "2"}
    assert found["levels"]["2"]["bytes"] < 0.4 * found["levels"]["0"]["bytes"]
    assert "bytes a token" in run("inspect", str(store)).stdout


def test_writing_goes_on_from_it(store: Path) -> None:
    found = run("decode", "pycode-4m", str(store), "point", "--level", "0", "--max-tokens", "6")
    assert found.exit_code == 0
    assert found.stdout.strip()
    from hasten.language import load
    from hasten.language.speculate import generate

    model = load("pycode-4m")
    tokens = json.loads((store / "point" / "index.json").read_text())["text"]
    expected = generate(model, tokens, max_tokens=6).tokens
    assert found.stdout.rstrip("\n") == model.tokenizer.decode(expected).rstrip("\n")
    missing = run("decode", "pycode-4m", str(store), "point", "--level", "3")
    assert isinstance(missing.exception, DataError)
    assert "choose one of 0, 2" in str(missing.exception)


def test_unsound_entries_are_named_and_old_ones_deleted(store: Path) -> None:
    assert "are sound" in run("verify", str(store)).stdout
    bad = sorted(store.rglob("*.2.hkv"))[0]
    whole = bad.read_bytes()
    bad.write_bytes(whole[:-3] + b"xyz")
    found = run("verify", str(store))
    assert found.exit_code == 1
    assert bad.name in found.stdout
    assert "checksum" in found.stdout
    assert json.loads(run("inspect", str(store), "--json").stdout)["unsound"] == 1
    deleted = json.loads(run("verify", str(store), "--delete", "--json").stdout)
    assert deleted["deleted"] == 1
    assert not bad.exists()
    before = json.loads(run("inspect", str(store), "--json").stdout)
    after = json.loads(run("prune", str(store), "--keep", f"{before['bytes'] // 2}B", "--json").stdout)
    assert after["bytes"] <= before["bytes"] // 2
    assert after["deleted"] > 0
    assert run("verify", str(store)).exit_code == 0


def test_bad_input_is_one_line(tmp_path: Path, store: Path) -> None:
    for arguments, match in (
        (("inspect", str(tmp_path)), "no codec.npz"),
        (("prune", str(tmp_path), "--keep", "1MB"), "no codec.npz"),
        (("encode", "pycode-4m", str(tmp_path / "x"), "-o", str(tmp_path)), "is no file"),
        (("decode", "pycode-draft-0.7m", str(store), "point"), "another model"),
    ):
        error = run(*arguments).exception
        assert isinstance(error, ConfigurationError), (arguments, error)
        assert match in str(error)
