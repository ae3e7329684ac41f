"""``hasten compress`` from the command line, with bad input."""

import json
import sysconfig
from pathlib import Path

import pytest
import torch
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


def test_rounding_to_nearest_uses_the_text_too(text, tmp_path):
    kept = {}
    for name, words in {"plain": (), "fitted": ("--data", text, "--sequences", 8)}.items():
        out = tmp_path / name
        done = run("pycode-draft-0.7m", "--scheme", "w3a16", "--round", *words, "--out", out, "--json")
        assert done.exit_code == 0, done.output
        assert ("FitRanges" in (out / "recipe.yaml").read_text()) == (name == "fitted")
        kept[name] = load(out, dtype="auto")
    ids = kept["plain"].tokenizer.encode(text.read_text())[:600]
    rows = torch.tensor(ids).view(3, -1)
    with torch.no_grad():
        exact = load("pycode-draft-0.7m").decoder.float()(rows)
        errors = {n: float((m.decoder.float()(rows) - exact).square().mean()) for n, m in kept.items()}
    assert errors["fitted"] < 0.8 * errors["plain"]


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
        (["--scheme", "W4A16", "--skip", "nosuch*"], "no layer is called 'nosuch*'"),
    ],
)
def test_mistakes_are_one_line(arguments, said, tmp_path):
    done = run("pycode-draft-0.7m", *arguments, "--out", tmp_path / "small")
    assert isinstance(done.exception, (ConfigurationError, DataError))
    assert said in str(done.exception)
    assert "\n" not in str(done.exception)
    assert not (tmp_path / "small").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--scheme", "W4A16", "--length", 1], "nothing to predict or to measure on"),
        (["--scheme", "W4A16", "--sequences", 0], "0 pieces of 256 tokens"),
        (["--keep", 0.9, "--tokens", 0], "a layer sees at least one row"),
        (["--technique", "mla", "--kv-rank", "nan"], "kv_rank is nan"),
        (["--technique", "mla", "--kv-rank", "inf"], "kv_rank is inf"),
    ],
)
def test_counts_that_are_none(text, arguments, said, tmp_path):
    done = run("pycode-draft-0.7m", *arguments, "--data", text, "--out", tmp_path / "small")
    assert isinstance(done.exception, ConfigurationError)
    assert said in str(done.exception)
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


def test_latent_attention(text, tmp_path):
    """The same tokens without a size; half the cache and the cost of it with one; the folder loads."""
    whole, half = tmp_path / "whole", tmp_path / "half"
    done = run("pycode-draft-0.7m", "--technique", "mla", "--out", whole)
    assert done.exit_code == 0, done.output
    assert "the same function" in done.output
    cut = ("--technique", "mla", "--kv-rank", 16, "--rope-dims", 16, "--data", text, "--sequences", 8)
    done = run("pycode-draft-0.7m", *cut, "--length", 128, "--out", half, "--json")
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout[done.stdout.index("{") :])
    layers = load("pycode-draft-0.7m").config.num_layers
    assert told["cache_bytes_per_token_after"] == 2 * layers * 32 < told["cache_bytes_per_token_before"]
    assert told["perplexity_after"] > told["perplexity_before"] > 1
    model, latent = (load(m, dtype="fp32") for m in ("pycode-draft-0.7m", whole))
    assert latent.generate("import os", max_tokens=6).text == model.generate("import os", max_tokens=6).text
    assert load(half).executor.bytes_per_token == told["cache_bytes_per_token_after"]
    for made, said in ((("--technique", "mla"), "attention already"), (("--scheme", "W8A16"), "--dtype int8")):
        done = run(half, *made, "--out", tmp_path / "again")
        assert isinstance(done.exception, ConfigurationError)
        assert said in str(done.exception)


def test_narrower_layers(text, tmp_path):
    """A fifth of the layers' parameters goes, the folder is smaller and answers."""
    out = tmp_path / "narrow"
    cut = ("--technique", "modular", "--ratio", 0.3, "--data", text, "--sequences", 8, "--length", 128)
    done = run("pycode-draft-0.7m", *cut, "--out", out, "--json")
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout[done.stdout.index("{") :])
    assert told["removed_of_layers"] == pytest.approx(0.3, abs=0.03)
    assert 1 < told["perplexity_before"] < told["perplexity_after"]
    before, after = (load(m, dtype="fp32").decoder for m in ("pycode-draft-0.7m", out))
    gone = 1 - sum(p.numel() for p in after.parameters()) / sum(p.numel() for p in before.parameters())
    assert gone == pytest.approx(told["removed_of_model"], abs=0.001)
    assert load(out).generate("import os", max_tokens=4).text
    done = run(out, *cut, "--out", tmp_path / "again")
    assert isinstance(done.exception, ConfigurationError)
    assert "different sizes already" in str(done.exception)
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--technique", "modular"], "give --data FILE"),
        (["--technique", "mla", "--ratio", "0.3"], "modular"),
        (["--technique", "modular", "--ratio", "1.5", "--data", "text.txt"], "ratio is 1.5"),
        (["--technique", "mla", "--kv-rank", "16"], "give --data FILE"),
        (["--technique", "pruning"], "--technique is pruning"),
        (["--scheme", "W4A16", "--rope-dims", "16"], "add it"),
        (["--technique", "mla", "--keep", "0.9"], "one thing"),
    ],
)
def test_bad_input_of_latent_attention(tmp_path, arguments, said):
    done = run("pycode-draft-0.7m", *arguments, "--out", tmp_path / "out")
    assert done.exit_code != 0
    assert isinstance(done.exception, ConfigurationError)
    assert said in str(done.exception)
    assert not (tmp_path / "out").exists()
