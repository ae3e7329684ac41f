"""Number formats from the command line."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from hasten.cli.tune import tune
from hasten.errors import ConfigurationError

app = typer.Typer()
app.command()(tune)
MODEL = ["made_for_formats:tiny", "--input-shape", "4x16"]


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "made_for_formats.py").write_text(
        "import torch\ndef tiny():\n    torch.manual_seed(0)\n    return torch.nn.Linear(16, 8)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))


def test_every_format_of_the_widths_with_its_luts(tmp_path: Path) -> None:
    rows = np.random.default_rng(0).standard_normal((32, 16), np.float32)
    np.save(tmp_path / "rows.npy", rows)
    files = ["--calibration", str(tmp_path / "rows.npy"), "--data", str(tmp_path / "rows.npy")]
    ran = CliRunner().invoke(app, [*MODEL, "--formats", "3..4", "--device", "fpga", *files, "--json"])
    assert ran.exit_code == 0, ran.output
    document = json.loads(ran.stdout.splitlines()[-1])
    found = {row["formats"].split()[0]: row for row in document["candidates"]}
    assert list(found) == ["int3", "e2m0", "int4", "e2m1", "e3m0"]
    assert found["int4"]["score"] > found["int3"]["score"] > 0.3
    assert found["e2m1"]["luts"] > found["int4"]["luts"]
    assert any(row["front"] for row in found.values())
    shown = CliRunner().invoke(app, [*MODEL, "--formats", "4"])
    assert shown.exit_code == 0, shown.output
    assert "e2m1 channel x e2m1" in shown.stdout
    assert "inputs are random" in shown.stdout
    assert "of the front (*)" in shown.stdout


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--formats", "3..9"], "widths between 2 and 8"),
        (["--formats", "few"], "widths between 2 and 8"),
        (["--formats", "4", "--budget", "p99<1s"], "leave out --budget"),
        (["--formats", "4", "--device", "cuda"], "leave out --budget, --slo, a GPU"),
    ],
)
def test_what_does_not_fit_is_named(more: list[str], words: str) -> None:
    ran = CliRunner().invoke(app, [*MODEL, *more])
    assert isinstance(ran.exception, ConfigurationError)
    assert words in str(ran.exception)
