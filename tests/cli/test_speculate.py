"""``hasten bench speculate`` and ``bench attention``, small."""

import json

import pytest
import torch
from typer.testing import CliRunner

from hasten.cli.main import app
from hasten.errors import ConfigurationError

torch.set_num_threads(1)


def run(*words):
    return CliRunner().invoke(app, ["bench", *words])


def test_speculation_is_measured_against_none():
    words = "--batch 1,2 --prompts 2 --prompt-len 64 --max-tokens 8 --rounds 1 --speculate ngram --deterministic --json"
    result = run("speculate", *words.split())
    assert result.exit_code == 0, result.output
    rows = json.loads(result.output.splitlines()[-1])
    assert [r["batch"] for r in rows] == [1, 2]
    assert all(r["same_tokens"] and r["plain"] > 0 and r["tokens_per_pass"] >= 0.5 for r in rows)


def test_attention_is_timed():
    result = run("attention", "--context", "64,128", "--batch", "1,2", "--rounds", "1", "--json")
    assert result.exit_code == 0, result.output
    rows = json.loads(result.output.splitlines()[-1])
    assert len(rows) == 4
    assert set(rows[0]["seconds"]) == {"lean", "flash-2", "flash-decoding", "sdpa"}


@pytest.mark.parametrize(
    "words",
    [
        ("speculate", "--batch", "x"),
        ("speculate", "--speculate", "off"),
        ("speculate", "--speculate", "magic"),
        ("attention", "--context", "far"),
    ],
)
def test_bad_input_is_one_line(words):
    result = run(*words)
    assert isinstance(result.exception, ConfigurationError)
    assert "\n" not in str(result.exception)
