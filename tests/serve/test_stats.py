from hypothesis import given
from hypothesis import strategies as st

from hasten.serve.http.metrics import render
from hasten.serve.stats import EngineStats, Histogram


@given(st.lists(st.floats(0, 100, allow_nan=False), max_size=200))
def test_one_by_one_equals_all_at_once(values):
    one, many = Histogram((0.5, 1, 50)), Histogram((0.5, 1, 50))
    for value in values:
        one.add(value)
    many.add_many(values)
    a, b = one.snapshot(), many.snapshot()
    assert (
        a["counts"]
        == b["counts"]
        == [
            sum(v <= 0.5 for v in values),
            sum(0.5 < v <= 1 for v in values),
            sum(1 < v <= 50 for v in values),
            sum(v > 50 for v in values),
        ]
    )
    assert abs(a["sum"] - b["sum"]) < 1e-6


def test_the_text_is_what_prometheus_reads():
    import pytest

    parser = pytest.importorskip("prometheus_client.parser")
    stats = EngineStats()
    stats.ttft.add(0.03)
    stats.finished["stop"] = 2
    snapshot = stats.snapshot() | {"gauges": {"num_requests_running": 3}}
    text = render(snapshot, {"refused": {"overloaded": 1}}, prefix="vllm:", model='a"b\\c')
    families = {f.name: f for f in parser.text_string_to_metric_families(text)}
    assert families["vllm:num_requests_running"].samples[0].value == 3
    assert families["vllm:num_requests_running"].samples[0].labels == {"model_name": 'a"b\\c'}
    assert {s.labels["finished_reason"]: s.value for s in families["vllm:request_success"].samples}["stop"] == 2
    ttft = families["vllm:time_to_first_token_seconds"]
    assert ttft.type == "histogram"
    assert [s.value for s in ttft.samples if s.name.endswith("_count")] == [1]
    assert families["vllm:requests_refused"].samples[0].value == 1
