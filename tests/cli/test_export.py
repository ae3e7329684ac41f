"""``hasten export`` from the command line, with bad input."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from hasten.cli.main import app
from hasten.errors import ConfigurationError, DataError

SHAPE = ("--input-shape", "2x8")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "a_net.py").write_text("from torch import nn\ndef net():\n    return nn.Sequential(nn.Linear(8, 4))\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def run(*arguments: object):
    return CliRunner().invoke(app, ["export", "a_net:net", *map(str, arguments)])


def test_a_program(here: Path) -> None:
    done = run("--out", "net.pt2", *SHAPE, "--scheme", "w8a8", "--json")
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert told["difference"] == 0
    assert told["bytes"] == (here / "net.pt2").stat().st_size


def test_onnx_with_calibration(here: Path) -> None:
    pytest.importorskip("onnxscript")
    np.save(here / "x.npy", np.ones((3, 8), np.float32))
    (here / "r.yaml").write_text("version: 1\ntechniques:\n- technique: weight-precision\n  format: int8\n")
    done = run("--out", "net.onnx", *SHAPE, "--recipe", "r.yaml", "--calibration", "x.npy")
    assert done.exit_code == 0, done.output
    assert "net.onnx" in done.output


def test_bad_input(here: Path) -> None:
    np.save(here / "x.npy", np.ones((3, 9), np.float32))
    (here / "text.npy").write_text("no array")
    (here / "empty.npy").touch()
    np.save(here / "none.npy", np.ones((0, 8), np.float32))
    (here / "file").touch()
    for arguments, error, words in (
        (("--out", "net.txt", *SHAPE), ConfigurationError, "name the file .onnx or .pt2"),
        (("--out", "net.pt2", *SHAPE, "--recipe", "r", "--scheme", "W8A8"), ConfigurationError, "give one"),
        (("--out", "net.pt2", *SHAPE, "--scheme", "W9A9"), ConfigurationError, "no scheme"),
        (("--out", "net.pt2", "--input-shape", "2x7"), ConfigurationError, "does not take 2x7"),
        (("--out", "net.pt2", *SHAPE, "--scheme", "W8A8", "--calibration", "x.npy"), DataError, "(examples, 8)"),
        (("--out", "net.pt2", *SHAPE, "--scheme", "W8A8", "--calibration", "text.npy"), DataError, "numpy.save"),
        (("--out", "net.pt2", *SHAPE, "--scheme", "W8A8", "--calibration", "empty.npy"), DataError, "numpy.save"),
        (("--out", "net.pt2", *SHAPE, "--scheme", "W8A8", "--calibration", "none.npy"), DataError, "no example"),
        (("--out", "net.pt2", "--input-shape", "99999999x99999999"), ConfigurationError, "cannot be made"),
        (("--out", "net.pt2", *SHAPE, "--tolerance", "nan"), ConfigurationError, "at least 0"),
        (("--out", "file/net.pt2", *SHAPE), DataError, "cannot be written"),
    ):
        done = run(*arguments)
        assert isinstance(done.exception, error)
        assert words in str(done.exception)
    assert not (here / "net.pt2").exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("net = lambda: (lambda x: x)", "a file is written of an nn.Module"),
        ("from torch import nn\nnet = lambda: nn.Linear(8, 4, device='meta')", "weight on the meta device"),
        ("from torch import nn\ndef net():\n  m = nn.Linear(8, 4)\n  m.bias.data[0] = float('nan')\n  return m", "NaN"),
    ],
)
def test_models_that_cannot_be_a_file(here: Path, monkeypatch: pytest.MonkeyPatch, content: str, words: str) -> None:
    (here / "a_net.py").write_text(content)
    monkeypatch.delitem(sys.modules, "a_net", raising=False)
    done = run("--out", "net.pt2", *SHAPE)
    assert isinstance(done.exception, ConfigurationError)
    assert words in str(done.exception)
    assert not (here / "net.pt2").exists()
