"""A result as a folder: what comes back, what another machine or model is told, and what a cut writing leaves."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import hasten.tune
from hasten.compress import PackedLinear, Recipe, kernels
from hasten.errors import ConfigurationError, DataError, DataWarning
from hasten.measure import Protocol
from hasten.tune import Knob, SavedResult, Space, TuneResult, saved
from hasten.tune.saved import identity

DATA = [torch.randn(4, 64, generator=torch.Generator().manual_seed(0))]


def network(seed: int = 0, width: int = 64) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 64)).eval()


@pytest.fixture(scope="module")
def result() -> TuneResult:
    """Bytes are called the fastest, so that there is a plan."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "measure_kernels", lambda shape, tokens, names, **_: {n: _seconds(n) for n in names})
        space = Space((Knob("format", ("unchanged", "int8")), Knob("keep", ("none",), lambda p: p["format"] == "int8")))
        quick = Protocol(warmup=1, warmup_time=0, min_samples=5, min_time=0)
        # The whole of the two candidates' sizes lies between: only bytes fit.
        return hasten.tune(network(), DATA, "size<20KiB, quality>50%", space=space, protocol=quick, time_limit=None)


def _seconds(name: str) -> float:
    return 1e-3 if name == "int8-dynamic" else 2e-3


@pytest.fixture
def folder(result: TuneResult, tmp_path: Path) -> Path:
    return result.save(tmp_path / "new" / "result")


def test_what_was_found_comes_back(result: TuneResult, folder: Path) -> None:
    assert sorted(p.name for p in folder.iterdir()) == ["recipe.yaml", "report.html", "result.json"]
    found = hasten.tune.load(folder)
    assert isinstance(found, SavedResult)
    assert found.best is not None
    assert found.best.name == result.best.name == "int8"  # type: ignore[union-attr]
    assert found.best.values == result.best.values  # type: ignore[union-attr]
    assert found.verdict == result.verdict()
    assert found.budget == result.budget
    assert [c.name for c in found.frontier.front] == [c.name for c in result.frontier.front]
    assert [c.to_json() for c in found.frontier.candidates] == [c.to_json() for c in result.frontier.candidates]
    assert found.recipe.to_yaml() == result.recipe.to_yaml()
    assert found.versions["torch"] == torch.__version__
    assert found.differences(network()) == []
    assert "int8" in (folder / "report.html").read_text()


def test_the_best_model_again_by_its_plan(
    result: TuneResult, folder: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    monkeypatch.setattr(kernels, "measure_kernels", lambda *_, **__: pytest.fail("the plan says which kernels"))
    made: Any = hasten.tune.load(folder).apply(network())
    assert isinstance(made[0], PackedLinear)
    with torch.inference_mode():
        assert torch.equal(made(DATA[0]), result.model(DATA[0]))
    assert not [w for w in recwarn if issubclass(w.category, DataWarning)]


def test_another_machine_is_named_and_measures_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = folder / "result.json"
    content = json.loads(path.read_text())
    content["machine"] |= {"cpu": "Abacus", "threads": 99}
    content["versions"]["hasten"] = "0.0.1"
    path.write_text(json.dumps(content))
    found = hasten.tune.load(folder)
    first, second = found.differences()
    assert "processor Abacus became" in first
    assert "threads 99 became" in first
    assert "by hasten 0.0.1, and this is" in second
    asked: list[Any] = []

    def slower(shape: Any, tokens: int, names: list[str], **_: Any) -> dict[str, float]:
        asked.append(shape)
        return {n: 1.0 if n == "fp32" else 2.0 for n in names}

    monkeypatch.setattr(kernels, "measure_kernels", slower)
    with pytest.warns(DataWarning, match="processor Abacus became .* layers are measured again"):
        made: Any = found.apply(network())
    assert len(asked) == 2
    assert type(made[0]) is nn.Linear  # here bytes are slower, so the layer is kept


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (lambda: network(seed=1), "tuned for other weights than the model's"),
        (lambda: network(width=32), "Sequential of 8,320 parameters, and this is Sequential of 4,192"),
        (lambda: nn.Linear(64, 64), "and this is Linear of 4,160"),
    ],
)
def test_another_model_is_refused(folder: Path, other: Any, said: str) -> None:
    found, model = hasten.tune.load(folder), other()
    assert said in found.differences(model)[0]
    with pytest.raises(ConfigurationError, match=r"tune again, or take the recipe") as caught:
        found.apply(model)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_folder_that_is_none_or_half(folder: Path, tmp_path: Path) -> None:
    for broken, said in (
        (lambda p: p.unlink(), "cannot be read"),
        (lambda p: p.write_text("{"), "cannot be read"),
        (lambda p: p.write_text("[1]"), "is no stored result"),
        (lambda p: p.write_text('{"version": 7}'), "has version 7; this hasten reads 1"),
        (lambda p: p.write_text('{"version": 1, "recipe": "version: 1\\ntechniques: []"}'), "writing was cut off"),
    ):
        broken(folder / "result.json")
        with pytest.raises((DataError, ConfigurationError)) as caught:
            hasten.tune.load(folder)
        assert said in str(caught.value)
        assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match="name a folder that save"):
        hasten.tune.load(tmp_path / "nowhere")


def test_a_writing_that_is_cut_off_is_known(result: TuneResult, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The figures are written last: a new recipe beside old figures is not taken for a result."""
    other = TuneResult(**{**vars(result), "recipe": Recipe()})

    def full(*_: Any) -> None:
        raise DataError("no space left")

    monkeypatch.setattr(saved, "write_text", full)
    with pytest.raises(DataError, match="no space left"):
        other.save(folder)
    monkeypatch.undo()
    with pytest.raises(DataError, match="writing was cut off"):
        hasten.tune.load(folder)
    other.save(folder)
    assert hasten.tune.load(folder).recipe == Recipe()
    assert not list(folder.glob(".*"))


def test_weights_are_told_apart_whatever_they_are_in() -> None:
    packed = [PackedLinear.of(nn.Linear(64, 64), "int8-weight") for _ in range(2)]
    assert identity(packed[0]) != identity(packed[1])
    assert identity(network()) == identity(network())
