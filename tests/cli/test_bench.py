import json
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

sys.path.insert(0, str(Path(__file__).parents[1] / "serve"))

from hasten.cli.bench import _counts, bench_serve
from hasten.errors import ConfigurationError
from hasten.serve.server import start

APP = typer.Typer()
APP.command()(bench_serve)


@pytest.fixture(scope="module")
def url():
    with start("{}", loader="fakes:load", max_num_seqs=8, num_blocks=256, threads=1) as server:
        yield server.url


def bench(*options):
    return CliRunner().invoke(APP, list(options), catch_exceptions=False)


def test_table_and_file(url, tmp_path):
    result = bench(
        *("--base-url", url, "--num-prompts", "10", "--random-input-len", "20", "--random-output-len", "6"),
        *("--request-rate", "200", "--goodput", "ttft:5000 tpot:5000", "--metric-percentiles", "50,99"),
        *(
            "--save-result",
            "--result-dir",
            str(tmp_path),
            "--result-filename",
            "r.json",
            "--save-detailed",
            "--seed",
            "3",
        ),
    )
    assert result.exit_code == 0
    assert "Successful requests:                     10" in result.stdout
    saved = json.loads((tmp_path / "r.json").read_text())
    assert saved["total_input_tokens"] == 200
    assert saved["total_output_tokens"] == 60
    assert saved["slo_attainment"] == 1.0
    assert {"mean_ttft_ms", "p50_tpot_ms", "p99_itl_ms", "request_goodput", "num_prompts", "request_rate"} <= set(saved)
    assert len(saved["ttfts"]) == 10


def test_json_of_a_closed_loop(url):
    result = bench(
        *("--base-url", url, "--num-prompts", "6", "--random-input-len", "9", "--random-output-len", "3"),
        *("--clients", "1..4", "--backend", "openai-chat", "--json"),
    )
    out = json.loads(result.stdout.strip().splitlines()[-1])
    assert [p["clients"] for p in out["points"]] == [1, 2, 4]
    assert all(p["completed"] == 6 for p in out["points"])


def test_a_trace_at_another_speed(url):
    result = bench(
        *("--base-url", url, "--trace", "code", "--num-prompts", "8", "--trace-speed", "100", "--json"),
        *("--trace-max-prompt", "60", "--trace-max-output", "5"),
    )
    out = json.loads(result.stdout.strip().splitlines()[-1])
    assert out["completed"] == 8
    assert out["duration"] < 5


def test_clients_are_read():
    assert _counts(None) == [None]
    assert _counts("1..32") == [1, 2, 4, 8, 16, 32]
    assert _counts("3") == [3]
    assert _counts("1,5") == [1, 5]
    for bad in ("0", "x", "", "1..x"):
        with pytest.raises(ConfigurationError, match="--clients"):
            _counts(bad)


@pytest.mark.parametrize(
    "options",
    [
        ("--backend", "tgi"),
        ("--dataset-name", "sonnet"),
        ("--dataset-name", "custom"),
        ("--metric-percentiles", "x"),
        ("--num-prompts", "-1"),
        ("--random-range-ratio", "1.5"),
        ("--trace", "code", "--trace-speed", "0"),
    ],
)
def test_what_makes_no_sense_is_refused(options):
    with pytest.raises(ConfigurationError):
        bench(*options)
