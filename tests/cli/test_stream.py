"""``hasten stream`` on a sound that we make, with a recogniser that learns in seconds."""

from __future__ import annotations

import importlib.util
import json
import wave
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from hasten.cli.main import app
from hasten.errors import ConfigurationError, DataError

pytestmark = pytest.mark.usefixtures("one_thread")


def data(folder: Path) -> Path:
    """Recordings whose digit is their pitch, as the data folder holds them."""
    spec = importlib.util.spec_from_file_location(
        "recordings", Path(__file__).parent.parent / "spiking" / "test_recogniser.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    (folder / "speech").mkdir(parents=True)
    module.recordings(folder / "speech" / "fsdd_8k.npz")
    return folder


def sound(path: Path, rate: int = 16000) -> Path:
    t = np.arange(int(1.2 * rate)) / rate
    x = 0.4 * ((t > 0.2) & (t < 0.5)) * np.sin(2 * np.pi * 500 * t)
    with wave.open(str(path), "wb") as file:
        file.setnchannels(2)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(np.repeat((x * 32767).astype("<i2"), 2).tobytes())
    return path


@pytest.mark.slow
def test_a_word_is_heard_and_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HASTEN_CACHE", str(tmp_path / "cache"))
    place = data(tmp_path / "data")
    arguments = ["stream", str(sound(tmp_path / "a.wav")), "--data", str(place), "--epochs", "1"]
    done = CliRunner().invoke(app, [*arguments, "--json"], catch_exceptions=False)
    assert done.exit_code == 0
    document = json.loads(done.stdout.strip().splitlines()[-1])
    (word,) = document["words"]
    assert 0.15 < word["begin"] < 0.25
    assert word["latency"] == pytest.approx(word["decided"] - word["begin"])
    assert document["chunks"] == 60
    assert document["compute"]["count"] == 60
    shown = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert "decided after" in shown.stdout


def test_what_is_missing_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no\.wav"):
        CliRunner().invoke(app, ["stream", str(tmp_path / "no.wav")], catch_exceptions=False)
    with pytest.raises(DataError, match="fsdd_8k"):
        CliRunner().invoke(
            app, ["stream", str(sound(tmp_path / "a.wav")), "--data", str(tmp_path)], catch_exceptions=False
        )


def test_batches_and_limits_are_counts(tmp_path: Path) -> None:
    for option in (("--batch", "0"), ("--limit", "-1")):
        with pytest.raises(ConfigurationError, match="a batch of 1 or more, and a limit of 0 or more"):
            CliRunner().invoke(app, ["stream", str(tmp_path / "a.csv"), *option], catch_exceptions=False)


def classifier(folder: Path) -> Path:
    """A packed model of two bands that was not trained."""
    import torch

    from hasten.compress.container import save
    from hasten.events.t2 import T2, T2Config

    torch.manual_seed(0)
    extra = {"bands": ["g", "r"], "classes": ["a", "b", "c"], "kernel": {"steps": 3, "points": 20}}
    model = T2(T2Config(bands=2, length=20, classes=3, width=8, heads=2, hidden=8)).eval()
    save(model, folder, torch.randn(2, 20, 2), extra=extra)
    return folder


def test_alerts_are_classified_and_timed(tmp_path: Path) -> None:
    rows = [f"o{k % 2},{60000 + k},{'gr'[k % 3 == 0]},{100 + 9 * k},5" for k in range(12)]
    alerts = tmp_path / "alerts.csv"
    alerts.write_text("object_id,time,band,flux,error\n" + "\n".join(rows) + "\nbad,60001,q,1,1\n")
    model = str(classifier(tmp_path / "model"))
    done = CliRunner().invoke(
        app, ["stream", str(alerts), "--model", model, "--batch", "4", "--json"], catch_exceptions=False
    )
    document = json.loads(done.stdout.strip().splitlines()[-1])
    assert document["alerts"] == 13
    assert document["skipped"] == 1
    assert document["classified"] == 10
    assert set(document["objects"]) == {"o0", "o1"}
    assert document["latency"]["count"] == 10
    shown = CliRunner().invoke(app, ["stream", str(alerts), "--model", model, "--limit", "5"], catch_exceptions=False)
    assert "alerts per" in shown.stdout.replace("\n", " ")
    alerts.write_text("object_id,time,band,flux,error\n")
    with pytest.raises(DataError):
        CliRunner().invoke(app, ["stream", str(alerts), "--model", model], catch_exceptions=False)
