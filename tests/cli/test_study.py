from __future__ import annotations

import json
import sys
import types
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from hasten.cli.study import study
from hasten.studies import Check, Scale, Study, registry

app = typer.Typer()
app.command()(study)


@pytest.fixture
def one_study(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(scale: Scale) -> list[Check]:
        scale.progress("measuring [x]", 0.5)
        return [Check.at_least("ratio", 2.0, 1.5, "×"), Check.unavailable("trace", "no data [here]")]

    module = types.ModuleType("hasten.studies.fake_system")
    module.study = Study("fake-system", "it is faster", {"speedup": "2×"}, run)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(registry, "names", lambda package="": ["fake-system"])
    import hasten.studies

    monkeypatch.setattr(hasten.studies, "names", lambda: ["fake-system"])


@pytest.mark.usefixtures("one_study")
def test_list_and_run(tmp_path: Path) -> None:
    runner = CliRunner()
    listed = runner.invoke(app, ["list", "--json"])
    assert json.loads(listed.stdout) == [{"system": "fake-system", "claim": "it is faster"}]
    assert "fake-system" in runner.invoke(app, ["list"]).stdout
    out = tmp_path / "deep" / "result.json"
    ran = runner.invoke(app, ["fake-system", "--quick", "--json", "--data", str(tmp_path), "--output", str(out)])
    assert ran.exit_code == 0, ran.output
    document = json.loads(ran.stdout)
    assert document["verdict"] == "holds"
    assert json.loads(out.read_text()) == document
    people = runner.invoke(app, ["fake-system"])
    assert "verdict: holds (1 of 1 checks, 1 not judged here" in people.stdout
