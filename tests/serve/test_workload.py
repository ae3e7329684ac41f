import gzip
import json
import math
import os
from pathlib import Path

import numpy as np
import pytest

from hasten.errors import ConfigurationError, DataError
from hasten.serve import workload
from hasten.serve.workload import Constant, LogNormal, Normal, RequestSpec, Workload, arrivals

AZURE = (
    "TIMESTAMP,ContextTokens,GeneratedTokens\n"
    "2023-11-16 18:17:03.9799600,4808,10\n"
    "2023-11-16 18:17:04.0319600,3180,8\n"
    "2023-11-16 18:18:04.0319600,0,0\n"
)
MOONCAKE = "\n".join(
    json.dumps({"timestamp": t, "input_length": 700, "output_length": 5, "hash_ids": [0, t]}) for t in (1000, 3500)
)
DATA = Path(os.environ.get("HASTEN_DATA", "../shared/data")) / "llm_traces"


def test_azure_rows_in_seconds_from_the_first(tmp_path):
    path = tmp_path / "azure_mini.csv.gz"
    path.write_bytes(gzip.compress(AZURE.encode()))
    trace = workload.load(path)
    assert trace.name == "azure_mini"
    assert [(r.prompt_len, r.output_len) for r in trace] == [(4808, 10), (3180, 8), (1, 1)]
    assert [r.arrival for r in trace] == pytest.approx([0.0, 0.052, 60.052])
    assert workload.load(path, speed=2.0)[2].arrival == pytest.approx(30.026)


def test_mooncake_rows_are_milliseconds_and_keep_their_prefixes(tmp_path):
    path = tmp_path / "mooncake.jsonl"
    path.write_text(MOONCAKE)
    trace = workload.load(path)
    assert [r.arrival for r in trace] == [0.0, 2.5]
    assert trace[1] == RequestSpec(2.5, 700, 5, (0, 3500))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a,b\n1,2\n", "expected a CSV"),
        (b"", "holds no request"),
        (gzip.compress(AZURE.encode(), mtime=0)[:40], "cannot read"),
        (b"\xff\xfe\x00", "cannot read"),
        (b'{"timestamp": 1}\n', "input_length"),
        (b"TIMESTAMP,ContextTokens,GeneratedTokens\nyesterday,1,2\n", "no trace"),
    ],
)
def test_what_is_no_trace_is_refused(tmp_path, content, message):
    path = tmp_path / "bad"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        workload.load(path)


def test_an_absent_file_names_the_samples():
    with pytest.raises(DataError, match="conversation, code"):
        workload.load("absent.csv")


def test_rate_requests_and_seed(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text(AZURE)
    load = workload.load(path, rate=5.0, requests=2000, seed=3)
    assert len(load) == 2000
    assert load.rate == pytest.approx(5.0, rel=0.1)
    assert load == workload.load(path, rate=5.0, requests=2000, seed=3)
    assert load != workload.load(path, rate=5.0, requests=2000, seed=4)
    assert {(r.prompt_len, r.output_len) for r in load} == {(4808, 10), (3180, 8), (1, 1)}  # rows stay whole
    stretched = workload.load(path, rate=2.0, burstiness=None)
    assert stretched.rate == pytest.approx(2.0)
    assert stretched[1].arrival / stretched[2].arrival == pytest.approx(0.052 / 60.052)
    assert len(workload.load(path, requests=2)) == 2


@pytest.mark.parametrize(("burstiness", "cv"), [(1.0, 1.0), (0.25, 2.0), (4.0, 0.5)])
def test_arrivals_have_the_rate_and_the_variation_of_a_gamma_process(burstiness, cv):
    times = arrivals(40_000, 8.0, burstiness=burstiness, rng=np.random.default_rng(0))
    gaps = np.diff(times)
    assert gaps.mean() == pytest.approx(1 / 8, rel=0.05)
    assert gaps.std() / gaps.mean() == pytest.approx(cv, rel=0.05)


def test_the_same_seed_gives_the_same_arrivals_compressed():
    base = Workload.random(requests=50, prompt=Constant(8), output=Constant(2))
    slow, fast = base.at_rate(1.0, seed=9), base.at_rate(4.0, seed=9)
    assert [r.arrival for r in slow] == pytest.approx([4 * r.arrival for r in fast])


def test_infinite_rate_sends_all_at_once_and_bad_rates_are_refused():
    assert set(arrivals(5, math.inf, rng=np.random.default_rng(0))) == {0.0}
    for rate in (0.0, -1.0):
        with pytest.raises(ConfigurationError, match="rate"):
            arrivals(5, rate, rng=np.random.default_rng(0))
    with pytest.raises(ConfigurationError, match="burstiness"):
        arrivals(5, 1.0, burstiness=0.0, rng=np.random.default_rng(0))


def test_length_distributions():
    rng = np.random.default_rng(0)
    normal = Normal(2600, 0.3).draw(20_000, rng)
    assert normal.mean() == pytest.approx(2600, rel=0.02)
    assert normal.std() == pytest.approx(780, rel=0.03)
    assert Normal(1, 5.0).draw(1000, rng).min() == 1
    log = LogNormal(100, 1.0, low=5, high=900).draw(20_000, rng)
    assert np.median(log) == pytest.approx(100, rel=0.05)
    assert log.min() == 5
    assert log.max() == 900
    for bad in (lambda: Normal(0), lambda: LogNormal(-1, 1), lambda: Constant(0), lambda: LogNormal(1, 1, 5, 2)):
        with pytest.raises(ConfigurationError):
            bad()


def test_scaling_keeps_proportions_and_fits_the_limits():
    load = workload.sample("conversation", requests=2000, seed=1)
    small = load.scaled(max_prompt=600, max_output=120)
    before, after = load.prompt_lens, small.prompt_lens
    assert after.max() <= 600
    assert small.output_lens.max() <= 120
    assert np.quantile(after, 0.5) / np.quantile(after, 0.9) == pytest.approx(
        np.quantile(before, 0.5) / np.quantile(before, 0.9), rel=0.02
    )
    assert [r.arrival for r in small] == [r.arrival for r in load]
    tiny = Workload((RequestSpec(0.0, 5, 5),))
    assert tiny.scaled(max_prompt=100, max_output=100).requests == tiny.requests  # never longer


def test_cutting_and_filtering():
    load = Workload((RequestSpec(0.0, 50, 10), RequestSpec(1.0, 5, 5)))
    assert [(r.prompt_len, r.output_len) for r in load.clipped(max_prompt=20, max_output=7)] == [(20, 7), (5, 5)]
    assert len(load.fitting(30)) == 1
    assert load.head(1).requests == load.requests[:1]
    assert Workload(()).describe() == {"name": "workload", "requests": 0}


@pytest.mark.parametrize(("name", "prompt", "output"), [("conversation", 1020, 129), ("code", 1500, 13)])
def test_samples_have_the_published_medians(name, prompt, output):
    load = workload.load(name, rate=2.0, requests=4000)
    assert np.median(load.prompt_lens) == pytest.approx(prompt, rel=0.06)
    assert np.median(load.output_lens) == pytest.approx(output, rel=0.08)
    assert load.rate == pytest.approx(2.0, rel=0.1)
    with pytest.raises(ConfigurationError, match="conversation, code"):
        workload.sample("chat")


@pytest.mark.skipif(not DATA.exists(), reason="the real traces are not here")
@pytest.mark.parametrize(
    ("name", "rows", "prompt", "output"),
    [("azure_conv.csv.gz", 13556, 1016, 114), ("azure_code.csv.gz", 6173, 1463, 13)],
)
def test_real_traces(name, rows, prompt, output):
    trace = workload.load(DATA / name)
    assert len(trace) == rows
    assert np.median(trace.prompt_lens) == prompt
    assert np.median(trace.output_lens) == output
