from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

import hasten.tune
from hasten.budget import SLO
from hasten.cli.tune import tune
from hasten.compress import Recipe
from hasten.errors import ConfigurationError, DataError
from hasten.language.config import DecoderConfig
from hasten.language.loading import random_model
from hasten.tune.language import replay_in_engine, search

CONFIG = DecoderConfig(
    vocab_size=64, hidden_size=32, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=16, intermediate_size=32,
    max_position_embeddings=128,
)  # fmt: skip
app = typer.Typer()
app.command()(tune)


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HASTEN_CACHE", str(tmp_path / "cache"))
    (tmp_path / "made_to_be_tuned.py").write_text(
        "import torch\ndef tiny():\n    torch.manual_seed(0)\n    return torch.nn.Linear(64, 64)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))


@pytest.mark.slow
def test_a_module_from_the_command_line(tmp_path: Path) -> None:
    recipe, page, db = tmp_path / "recipe.yaml", tmp_path / "report.html", tmp_path / "study.db"
    arguments = ["made_to_be_tuned:tiny", "--budget", "p99<10s", "--input-shape", "4x64", "--time-limit", "2s"]
    files = ["--recipe", str(recipe), "--report", str(page), "--storage", str(db), "--save", str(tmp_path / "kept")]
    ran = CliRunner().invoke(app, [*arguments, *files, "--json"])
    assert ran.exit_code == 0, ran.output
    document = json.loads(ran.stdout)
    assert document["best"]["feasible"]
    assert Recipe.load(recipe).to_yaml() == document["recipe"]
    assert "<svg" in page.read_text()
    kept = hasten.tune.load(tmp_path / "kept")
    assert kept.verdict == document["verdict"]
    assert kept.recipe.to_yaml() == document["recipe"]
    assert db.exists()
    again = CliRunner().invoke(app, [*arguments, "--storage", str(db)])
    assert again.exit_code == 0, again.output
    assert "inside" in again.stdout


@pytest.mark.slow
def test_quality_is_judged_on_the_users_inputs(tmp_path: Path) -> None:
    arguments = ["made_to_be_tuned:tiny", "--budget", "quality>1%", "--input-shape", "4x64", "--time-limit", "1ms"]
    np.save(tmp_path / "some.npy", np.random.default_rng(0).standard_normal((9, 64), np.float32))
    ran = CliRunner().invoke(app, [*arguments, "--data", str(tmp_path / "some.npy")])
    assert ran.exit_code == 0, ran.output
    np.save(tmp_path / "few.npy", np.zeros((3, 64), np.float32))
    ran = CliRunner().invoke(app, [*arguments, "--data", str(tmp_path / "few.npy")])
    assert isinstance(ran.exception, DataError)
    assert "3 examples, and a call takes 4" in str(ran.exception)
    np.save(tmp_path / "broken.npy", np.full((9, 64), np.nan, np.float32))
    ran = CliRunner().invoke(app, [*arguments, "--data", str(tmp_path / "broken.npy")])
    assert isinstance(ran.exception, DataError)
    assert "data[0] holds NaN" in str(ran.exception)


def test_one_goal_is_named() -> None:
    for arguments in ([], ["--budget", "p99<1s", "--slo", "ttft<1s"]):
        ran = CliRunner().invoke(app, arguments)
        assert isinstance(ran.exception, ConfigurationError)
        assert "--budget for a module, or --slo" in str(ran.exception)


def test_places_are_asked_for_before_the_search(tmp_path: Path) -> None:
    """Minutes of search are not lost to a folder that cannot be written; the model is not even built."""
    (tmp_path / "file").write_text("old")
    for option, place in (("--recipe", tmp_path), ("--report", tmp_path / "file" / "x"), ("--save", tmp_path / "file")):
        ran = CliRunner().invoke(app, ["no_such_module:tiny", "--budget", "p99<1s", option, str(place)])
        assert isinstance(ran.exception, DataError)
        assert "cannot be written" in str(ran.exception)
    assert (tmp_path / "file").read_text() == "old"
    for option in ("--save", "--recipe"):
        ran = CliRunner().invoke(app, ["--slo", "ttft<1s", option, str(tmp_path / "new")])
        assert isinstance(ran.exception, ConfigurationError)
        assert "for --slo give --report or --json" in str(ran.exception)


def test_serving_knobs_on_a_real_engine(tmp_path: Path) -> None:
    stages: list[str] = []
    result = search(
        "random",
        SLO.parse("ttft<10s, tpot<5s"),
        rate=50.0,
        requests=12,
        precisions=["fp32"],
        confirm=1,
        storage=tmp_path / "study.db",
        calibration_time=0.5,
        progress=lambda s, x: stages.append(s),
        model=random_model(CONFIG, dtype="fp32"),
    )
    assert len(result.confirmed) == 2
    assert result.baseline.values["attainment"] == 1.0
    assert all(c.predicted for c in result.predicted)
    assert any(s.startswith("calibrating fp32") for s in stages)
    assert result.verdict()


def test_every_request_is_served_with_its_lengths() -> None:
    from hasten.serve import workload

    load = workload.sample("code", rate=100.0, requests=8, seed=0).scaled(max_prompt=60, max_output=20)
    model = random_model(CONFIG, dtype="fp32")
    point = {"policy": "stall-free", "token_budget": 32, "max_num_seqs": 4}
    values = replay_in_engine(model, point, load, SLO.parse("e2e<60s"), blocks=64)
    assert values["attainment"] == 1.0
    assert values["goodput"] > 0
    with pytest.raises(ConfigurationError, match="no precision"):
        search("x", SLO.parse("ttft<1s"), precisions=[], model=model)


def test_devices_of_the_command_line() -> None:
    ran = CliRunner().invoke(app, ["pycode-4m", "--slo", "ttft<1s", "--device", "cuda"])
    assert isinstance(ran.exception, ConfigurationError)
    assert "--slo tunes serving on the CPU" in str(ran.exception)
    ran = CliRunner().invoke(
        app, ["made_to_be_tuned:tiny", "--budget", "p99<1s", "--input-shape", "4x64", "--device", "cuda:9"]
    )
    assert isinstance(ran.exception, ConfigurationError)
    assert "device 'cuda:9' is not here" in str(ran.exception)
