"""``hasten bench load``."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from torch import nn
from typer.testing import CliRunner

from hasten.cli.load import bench_load
from hasten.compress.container import save
from hasten.errors import ConfigurationError, DataError

app = typer.Typer()
app.command()(bench_load)


def test_times_of_a_packed_model(tmp_path: Path) -> None:
    place = str(tmp_path / "m")
    save(nn.Linear(3, 4), place, torch.ones(1, 3))
    done = CliRunner().invoke(app, [place, "--shape", "2,3", "--processes", "1", "--json"], catch_exceptions=False)
    row = json.loads(done.stdout.strip().splitlines()[-1])[place]
    assert row["kind"] == "packed"
    assert row["ready"] > 0
    np.save(tmp_path / "x.npy", np.ones((1, 3), np.float32))
    shown = CliRunner().invoke(
        app, [place, "--example", str(tmp_path / "x.npy"), "--processes", "1"], catch_exceptions=False
    )
    assert "warm call" in shown.stdout


def test_what_is_wrong_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="shape"):
        CliRunner().invoke(app, ["m"], catch_exceptions=False)
    with pytest.raises(DataError, match="cannot be read"):
        CliRunner().invoke(app, ["m", "--example", str(tmp_path / "x.npy")], catch_exceptions=False)
