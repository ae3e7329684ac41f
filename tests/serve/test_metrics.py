import json
import math

import pytest

from hasten.budget import SLO
from hasten.serve.metrics import Distribution, EffectiveThroughput, RequestRecord, summarise


def record(**changes):
    base = {
        "id": "a",
        "arrival": 10.0,
        "first_scheduled": 10.5,
        "token_times": [11.0, 11.1, 11.4],
        "prompt_tokens": 7,
        "output_tokens": 3,
        "finish_reason": "stop",
    }
    return RequestRecord(**(base | changes))


def test_latencies_of_one_request():
    r = record()
    assert r.ttft == pytest.approx(1.0)
    assert r.queue == pytest.approx(0.5)
    assert r.tpot == pytest.approx(0.2)
    assert r.itls == pytest.approx([0.1, 0.3])
    assert r.worst_itl == pytest.approx(0.3)
    assert r.e2e == pytest.approx(1.4)


def test_an_answer_of_one_token_has_no_gaps():
    r = record(token_times=[11.0], output_tokens=1)
    assert math.isnan(r.tpot)
    assert r.itls == []
    assert r.meets(SLO(tpot="1ms", itl="1ms", ttft="2s"))


def test_a_request_without_a_token_is_not_ok():
    r = record(token_times=[], output_tokens=0, first_scheduled=None, error="refused", finish_reason="error")
    assert not r.ok
    assert math.isnan(r.ttft)
    assert not r.meets(SLO(ttft="99s"))


@pytest.mark.parametrize(
    ("slo", "good"),
    [
        (SLO(ttft="1.1s"), True),
        (SLO(ttft="0.9s"), False),
        (SLO(itl="250ms"), False),
        (SLO(tpot="250ms"), True),
        (SLO(queue="400ms"), False),
        (SLO(e2e="1.5s", ttft="1.1s"), True),
    ],
)
def test_a_request_is_good_when_every_objective_holds(slo, good):
    assert record().meets(slo) is good


def test_a_run_counts_completed_work_only():
    records = [
        record(id="a"),
        record(id="b", arrival=11.0, first_scheduled=11.0, token_times=[11.2, 11.3], output_tokens=2),
        record(id="c", error="boom", finish_reason="error"),
        record(id="d", finish_reason="abort"),
    ]
    m = summarise(records, SLO(ttft="500ms"), duration=4.0)
    assert (m.completed, m.failed, m.cancelled) == (2, 1, 1)
    assert m.request_throughput == 0.5
    assert m.output_throughput == 5 / 4
    assert m.total_token_throughput == (5 + 14) / 4
    assert m.goodput == 0.25
    assert m.slo_attainment == pytest.approx(1 / 3)  # the failed one counts against it, the cancelled one does not
    assert m.itl.count == 3
    assert m.ttft.p50 == pytest.approx(0.6)


def test_the_default_duration_is_first_arrival_to_last_token():
    assert summarise([record()]).duration == pytest.approx(1.4)
    assert summarise([]).duration == 0.0


def test_a_run_meets_an_slo_at_its_percentiles():
    records = [record(id=str(i), token_times=[10.0 + t, 10.1 + t]) for i, t in enumerate([0.1] * 9 + [5.0])]
    m = summarise(records)
    assert m.meets(SLO(ttft="200ms@p50"))
    assert not m.meets(SLO(ttft="200ms@p99"))
    assert not m.meets(SLO(ttft="4.9s@p99.9"))
    assert m.meets(SLO(ttft="5.1s@p99.9", tbt="110ms"))


def test_nothing_measured_meets_nothing():
    assert not summarise([]).meets(SLO(ttft="1s"))
    assert summarise([record(token_times=[11.0])]).meets(SLO(tpot="1ms"))


def test_the_keys_of_vllm_bench_serve_in_milliseconds():
    out = summarise([record()], SLO(ttft="2s")).to_vllm_json()
    expected = {"request_throughput", "output_throughput", "total_token_throughput", "request_goodput", "duration"}
    expected |= {"completed", "failed", "total_input_tokens", "total_output_tokens"}
    expected |= {f"{s}_{m}_ms" for s in ("mean", "median", "std", "p99") for m in ("ttft", "tpot", "itl", "e2el")}
    assert expected <= set(out)
    assert out["mean_ttft_ms"] == pytest.approx(1000.0)
    assert out["median_tpot_ms"] == pytest.approx(200.0)
    json.dumps(out, allow_nan=False)
    json.dumps(summarise([]).to_dict() | {"duration": 0}, allow_nan=False)


def test_distribution_leaves_out_what_is_not_a_number():
    d = Distribution.of([math.nan, 1.0, 3.0])
    assert (d.count, d.mean, d.max) == (2, 2.0, 3.0)
    assert math.isnan(Distribution.of([]).p99)


def test_effective_throughput_follows_both_limits():
    steady = record(prompt_tokens=512, token_times=[10.9, 11.1, 11.3])
    late = record(prompt_tokens=512, token_times=[11.1, 11.2, 11.3])
    dip = record(prompt_tokens=512, token_times=[10.9, 11.0, 11.1, 12.0])  # average after the dip: 0.8*0.1 + 0.2*0.9
    score = EffectiveThroughput(generation_rate=4)
    assert [score.succeeds(r) for r in (steady, late, dip)] == [True, False, False]
    assert EffectiveThroughput(generation_rate=3.8).succeeds(dip)  # 0.26 s is 3.85 tokens/s
    assert score([steady, late, record(error="x", finish_reason="error")], duration=2.0) == 0.5
    with pytest.raises(ValueError, match="smoothing"):
        EffectiveThroughput(smoothing=0)
