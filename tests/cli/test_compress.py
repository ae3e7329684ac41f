"""``hasten compress`` from the command line, with bad input."""

import json
import sysconfig
from pathlib import Path

import pytest
from typer.testing import CliRunner

from hasten.cli.main import app
from hasten.errors import ConfigurationError, DataError
from hasten.language import load

LIBRARY = Path(sysconfig.get_paths()["stdlib"])


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    content = (LIBRARY / "heapq.py").read_text(), (LIBRARY / "bisect.py").read_text()
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in content))
    return path


def run(*arguments):
    return CliRunner().invoke(app, ["compress", *map(str, arguments)])


def test_a_scheme(text, tmp_path):
    out = tmp_path / "small"
    done = run("pycode-draft-0.7m", "--scheme", "w4a16", "--data", text, "--sequences", 8, "--out", out, "--json")
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout[done.stdout.index("{") :])
    assert told["bytes_after"] < told["bytes_before"]
    assert 0.8 < told["kept"] < 1.01
    assert set(told["widths"].values()) == {4, 16}
    answer = load(out).generate("import ", max_tokens=3)
    assert answer.completion_tokens == 3 if hasattr(answer, "completion_tokens") else answer.text


def test_keeping_a_quality(text, tmp_path, monkeypatch):
    compressing = "hasten.language.compressing.layer_latency"
    monkeypatch.setattr(compressing, lambda *a, **k: lambda path, bits: 1.0)
    done = run("pycode-draft-0.7m", "--keep", 0.98, "--data", text, "--sequences", 8, "--out", tmp_path / "none")
    assert "faster in fewer bits" in str(done.exception)
    monkeypatch.setattr(compressing, lambda *a, **k: lambda path, bits: bits)
    out = tmp_path / "small"
    done = run("pycode-draft-0.7m", "--keep", 0.98, "--data", text, "--sequences", 8, "--length", 128, "--out", out)
    assert done.exit_code == 0, done.output
    assert "kept)" in done.output
    assert (out / "config.json").is_file()
    assert (out / "tokenizer.json").is_file()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--scheme", "W4A16", "--keep", "0.9"], "--scheme W4A16, or --keep"),
        ([], "--scheme W4A16, or --keep"),
        (["--keep", "0.9"], "--data FILE"),
        (["--scheme", "W5B3"], "no scheme"),
        (["--scheme", "W4A16", "--data", "/nowhere.txt"], "cannot be read"),
    ],
)
def test_mistakes_are_one_line(arguments, said, tmp_path):
    done = run("pycode-draft-0.7m", *arguments, "--out", tmp_path / "small")
    assert isinstance(done.exception, (ConfigurationError, DataError))
    assert said in str(done.exception)
    assert "\n" not in str(done.exception)
    assert not (tmp_path / "small").exists()


def test_text_that_is_none(tmp_path):
    path = tmp_path / "bad.jsonl"
    for content, said in (('{"other": 1}\n', "line 1"), ("no json\n", "line 1"), ('{"text": "x"}\n', "tokens")):
        path.write_text(content)
        done = run("pycode-draft-0.7m", "--scheme", "W4A16", "--data", path, "--out", tmp_path / "small")
        assert isinstance(done.exception, DataError)
        assert said in str(done.exception)
    (tmp_path / "small").mkdir()
    done = run("pycode-draft-0.7m", "--scheme", "W4A16", "--out", tmp_path / "small")
    assert "exists already" in str(done.exception)
