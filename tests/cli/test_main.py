"""The command line: help, version, and one line for every mistake."""

import json
import subprocess
import sys

import pytest

from hasten.cli.main import run

HASTEN = [sys.executable, "-c", "from hasten.cli.main import run; run()"]


def hasten(*arguments):
    return subprocess.run([*HASTEN, *arguments], capture_output=True, text=True, timeout=120)


def test_help_lists_the_verbs():
    out = hasten("--help")
    assert out.returncode == 0
    for verb in ("measure", "tune", "serve", "bench", "study", "demo", "infill", "train-lm"):
        assert verb in out.stdout


def test_version():
    from importlib.metadata import version

    out = hasten("--version")
    assert out.stdout.strip() == version("hasten")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("infill", "nowhere"), "write FILE:LINE"),
        (("infill", "missing.py:3"), "cannot be read"),
        (("infill", f"{__file__}:99999"), "lines; line 99999 was asked for"),
        (("train-lm", "x", "--preset", "gpt-5"), "pycode-4m"),
        (("train-lm", "x", "--preset", "pycode-draft-0.7m"), "--target"),
        (("demo", "--seconds", "0"), "positive time"),
        (("study", "no-such-study"), "there is no study"),
        (("measure", "no-such-model"), "embedded models"),
        (("tune", "pycode-4m"), "--slo"),
        (("tune", "pycode-4m", "--slo", "speed<1"), "not an objective"),
    ],
)
def test_mistakes_get_one_line(arguments, says, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["hasten", *arguments])
    with pytest.raises(SystemExit) as end:
        run()
    err = capsys.readouterr().err
    assert end.value.code == 2
    assert says in err
    assert err.strip().count("\n") == 0
    assert not list(tmp_path.iterdir())


def test_a_mistake_ends_the_process_with_its_line(tmp_path):
    out = subprocess.run([*HASTEN, "infill", "nowhere"], capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert out.returncode == 2
    assert "write FILE:LINE" in out.stderr
    assert out.stderr.strip().count("\n") == 0


@pytest.mark.slow
def test_infill_prints_json(tmp_path):
    file = tmp_path / "mean.py"
    file.write_text("def mean(xs):\n    return \n\nprint(mean([1, 2]))\n")
    out = hasten("infill", f"{file}:2", "--max-tokens", "4", "--json")
    assert set(json.loads(out.stdout)) == {"middle", "tokens", "dropped"}
    assert file.read_text().count("return") == 1
