from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import typer
from torch import nn
from typer.testing import CliRunner

from hasten.cli.measure import build, examples, measure
from hasten.errors import BudgetError, ConfigurationError
from hasten.language.config import DecoderConfig
from hasten.language.loading import random_model
from hasten.measure import Ceilings, bandwidth
from hasten.serve.measurement import measure_language

ROOFS = Ceilings("cpu", 1e10, 1e10, {"float32": 1e11, "bfloat16": 2e11})
CONFIG = DecoderConfig(
    vocab_size=64, hidden_size=32, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=16, intermediate_size=64,
    max_position_embeddings=128,
)  # fmt: skip
app = typer.Typer()
app.command()(measure)


def tiny() -> nn.Module:
    """A factory for the command line."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 16), nn.ReLU())


@pytest.fixture(autouse=True)
def _roofs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HASTEN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(bandwidth, "measure_ceilings", lambda *a, **k: ROOFS)
    (tmp_path / "made_for_the_test.py").write_text(
        "import torch\ndef tiny():\n    return torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.ReLU())\n"
        "def number():\n    return 3\n"
        "def broken():\n    raise RuntimeError('no weights\\nhere')\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))


def test_a_module_from_the_command_line(tmp_path: Path) -> None:
    page = tmp_path / "out" / "report.html"
    command = ["made_for_the_test:tiny", "--input-shape", "4x16", "--budget", "p99<10s", "--time", "200ms"]
    ran = CliRunner().invoke(app, [*command, "--report", str(page), "--json"])
    assert ran.exit_code == 0, ran.output
    document = json.loads(ran.stdout)
    assert document["cost"]["macs"] == 4 * 16 * 16
    assert document["verdict"].startswith("inside the budget")
    assert "<svg" in page.read_text()
    shown = CliRunner().invoke(app, command)
    assert shown.exit_code == 0
    assert "inside the budget" in shown.stdout


def test_a_language_model() -> None:
    stages: list[str] = []
    model = random_model(CONFIG, dtype="fp32")
    result = measure_language(
        model, "p99<10s", time_limit=1.0, max_num_seqs=4, ceilings=ROOFS, progress=lambda s, x: stages.append(s)
    )
    assert result.violations == []
    assert result.precision == "fp32"
    assert {p.name for p in result.points} == {
        "decode, 1 sequence, context 64",
        "decode, 4 sequences",
        "prefill of 128 tokens",
    }
    decode = result.points[0]
    # Multiply-adds of one token: projections, feed-forward and head, then 65 keys and values of context.
    linear = 2 * (32 * (32 + 16 + 16) + 32 * 32 + 3 * 32 * 64) + 32 * 64
    attention = 2 * 2 * 2 * 16 * 65
    assert decode.operations == 2 * (linear + attention)
    assert decode.traffic == result.weight_bytes + 65 * result.bytes_per_token
    assert json.loads(json.dumps(result.to_json(), default=str))["iterations"]
    assert "iterations" in stages


def test_the_report_of_a_language_model(tmp_path: Path) -> None:
    model = random_model(CONFIG, dtype="fp32")
    result = measure_language(model, time_limit=0.5, max_num_seqs=8, ceilings=ROOFS)
    result.report(tmp_path / "r.html")
    page = (tmp_path / "r.html").read_text()
    assert page.count("<svg") == 3
    assert "://" not in page
    assert "a decode step of one sequence takes" in page


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("no.such.module:x", "was not found"),
        ("made_for_the_test:y", "was not found"),
        ("made_for_the_test:number", "int"),
        ("made_for_the_test:broken", "RuntimeError: no weights\\); call it"),
    ],
)
def test_bad_targets(target: str, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        build(target)


def test_inputs() -> None:
    one = examples(["2x3"], "float32", "cpu")
    assert one.shape == (2, 3)
    assert torch.equal(one, examples(["2x3"], "float32", "cpu"))
    pair = examples(["2,3", "4"], "int64", "cpu")
    assert [t.shape for t in pair] == [(2, 3), (4,)]
    for shapes, dtype, message in (
        (None, "float32", "--input-shape"),
        (["2xx3"], "float32", "joined by x"),
        (["0x3"], "float32", "positive"),
        (["2"], "float99", "not one of torch's"),
    ):
        with pytest.raises(ConfigurationError, match=message):
            examples(shapes, dtype, "cpu")


def test_a_bad_budget_comes_before_any_work() -> None:
    ran = CliRunner().invoke(app, ["made_for_the_test:tiny", "--budget", "p99>1s"])
    assert isinstance(ran.exception, BudgetError)
