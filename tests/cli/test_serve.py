"""The command's options reach the server's configuration; nothing is started here."""

import pytest
import typer
from typer.testing import CliRunner

import hasten.serve.server
from hasten.cli.serve import serve
from hasten.errors import BudgetError, ConfigurationError

APP = typer.Typer()
APP.command()(serve)


@pytest.fixture
def configuration(monkeypatch):
    seen = []
    monkeypatch.setattr(hasten.serve.server, "run", seen.append)

    def run(*options, env=None):
        CliRunner().invoke(APP, list(options), catch_exceptions=False, env=env)
        return seen[-1]

    return run


def test_defaults_are_private(configuration):
    config = configuration()
    assert (config.host, config.port, config.api_key) == ("127.0.0.1", 8000, None)
    assert config.worker.model == "pycode-4m"
    assert config.metrics_prefix == "hasten_"


def test_options(configuration):
    config = configuration(
        *("some/folder", "--slo", "ttft<200ms, tpot<50ms, p99", "--policy", "splitfuse", "--token-budget", "256"),
        *("--max-num-seqs", "16", "--kv-cache-memory", "1GiB", "--dtype", "int8", "--port", "0", "--host", "::1"),
        *("--metrics-prefix", "vllm:", "--max-queue", "9", "--drain-timeout", "2min", "--deterministic"),
        env={"HASTEN_API_KEY": "sesame"},
    )
    assert config.api_key == "sesame"
    assert config.drain_timeout == 120.0
    assert config.worker.cache_bytes == 2**30
    assert config.worker.options == {"dtype": "int8", "device": "cpu"}
    assert config.worker.deterministic
    assert (config.worker.policy, config.worker.token_budget, config.worker.max_num_seqs) == ("splitfuse", 256, 16)


def test_slips_are_told_before_anything_starts(configuration):
    with pytest.raises(BudgetError):
        configuration("--slo", "ttft<banana")
    with pytest.raises(BudgetError):
        configuration("--kv-cache-memory", "1")
    with pytest.raises(ConfigurationError, match="no file"):
        configuration("--chat-template", "nowhere.jinja")
