"""Sweeps over closed-loop clients: in process they are exact, over a socket they keep the same promises."""

import json

import pytest
from fakes import FakeExecutor

import hasten.serve
from hasten.clock import ManualClock
from hasten.errors import ConfigurationError, EngineDeadError
from hasten.serve.bench.sweep import in_process
from hasten.serve.engine import Engine
from hasten.serve.local import Pipeline
from hasten.serve.metrics import EffectiveThroughput
from hasten.serve.workload import Constant, Normal


def fake_pipe(cost=0.1, **options):
    clock = ManualClock()
    return Pipeline(Engine(FakeExecutor(clock=clock, cost=cost), num_blocks=256, clock=clock, seed=0, **options))


def test_a_step_of_fixed_time_gives_the_curve_by_hand():
    score = EffectiveThroughput(prompt_rate=50, generation_rate=4)
    result = hasten.serve.bench(
        fake_pipe(), clients=(1, 2, 4), requests=8, prompt=Constant(20), output=Constant(5), score=score
    )
    # A request takes 5 steps of 0.1 s, however many share the step.
    for point in result.curve():
        assert point.throughput == pytest.approx(point.clients / 0.5)
        assert point.latency == pytest.approx(0.5)
        assert point.ttft == pytest.approx(0.1)
        assert point.itl_p95 == pytest.approx(0.1)
        assert point.score == pytest.approx(point.throughput)
    assert [p.clients for p in result.curve()] == [1, 2, 4]
    assert result.best.clients == 4
    assert len(str(result).splitlines()) == 4
    assert json.loads(json.dumps(result.to_dict()))["points"][2]["metrics"]["completed"] == 8


def test_a_score_that_nobody_meets_is_nil():
    score = EffectiveThroughput(generation_rate=20)  # a token in 0.05 s; a step takes twice that
    result = hasten.serve.bench(fake_pipe(), [1], 4, Constant(20), Constant(5), score)
    assert result.points[0].score == 0.0
    assert result.points[0].metrics.completed == 4


def test_lengths_are_drawn_and_points_share_them_but_no_prompt():
    pipe = fake_pipe()
    result = hasten.serve.bench(pipe, clients=[1, 3], requests=20, prompt=Normal(60, 0.3), output=Normal(6, 0.3))
    one, three = ([(r.prompt_tokens, r.output_tokens) for r in p.records] for p in result.points)
    assert one == three
    assert len(set(one)) > 5
    assert pipe.engine.pool.hits == 0  # nothing was in the cache already
    assert max(sum(lengths) for lengths in one) <= 256


def test_few_records_are_kept_by_the_engine():
    result = hasten.serve.bench(
        fake_pipe(max_records=4), clients=[3], requests=12, prompt=Constant(9), output=Constant(3)
    )
    assert len(result.points[0].records) == 12


def test_over_a_socket(server):
    result = hasten.serve.bench(server.url, clients=range(1, 3), requests=6, prompt=Constant(12), output=Constant(5))
    assert [p.metrics.completed for p in result.points] == [6, 6]
    assert all(point.throughput > 0 and point.ttft > 0 for point in result.curve())
    assert all(record.e2e >= record.ttft > 0 for point in result.points for record in point.records)
    handle = hasten.serve.bench(server, clients=[2], requests=2, prompt=Constant(12), output=Constant(5))
    assert handle.points[0].metrics.output_tokens == 10


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"clients": []}, "clients is"),
        ({"clients": [0, 1]}, "clients is"),
        ({"requests": 0}, "requests is 0"),
        ({"prompt": Normal(2600, 0.3)}, "do not fit a context of 256"),
    ],
)
def test_bad_knobs(knobs, message):
    with pytest.raises(ConfigurationError, match=message):
        hasten.serve.bench(fake_pipe(), **knobs)


def test_an_engine_at_work_is_not_measured():
    pipe = fake_pipe()
    pipe.engine.add([1, 2, 3])
    with pytest.raises(ConfigurationError, match="idle"):
        in_process(pipe.engine, [], 1)
    with pytest.raises(EngineDeadError):
        hasten.serve.bench("http://127.0.0.1:9", clients=[1], requests=1)
