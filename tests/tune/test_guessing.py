"""Speculation as a knob: measured once, predicted for every load, confirmed on the engine."""

from __future__ import annotations

import pytest

from hasten.budget import SLO
from hasten.errors import ConfigurationError
from hasten.language import load
from hasten.serve import workload
from hasten.serve.cost import IterationCost
from hasten.serve.policy import FixedSpeculation, GoodputSpeculation
from hasten.tune.guessing import Guessing, measure_guessing, policy_of, prompts_for, words_for
from hasten.tune.language import replay_in_engine, tune_server
from hasten.tune.serving import simulated

COST = IterationCost(m0=5e-3, a=2e-3, b=5e-5)
SLO_ = SLO.parse("ttft<5s, tpot<1s")


def test_a_point_says_who_guesses_and_how_far() -> None:
    assert policy_of({"policy": "stall-free"}) is None
    assert policy_of({"speculate": "ngram", "guesses": 3}) == FixedSpeculation(3)
    assert isinstance(policy_of({"speculate": "ngram", "guesses": 0}), GoodputSpeculation)
    model = load("pycode-4m")
    assert words_for(model, ["off", "ngram", "tree:8"]) == ("off", "ngram", "tree:8")
    model.name = "other"
    assert words_for(model, ["off", "draft", "ngram", "tree"]) == ("off", "ngram")
    assert words_for(model, ["draft"], "some-draft") == ("draft",)
    with pytest.raises(ConfigurationError, match="choose one of"):
        words_for(model, ["guess"])


def test_good_guesses_are_predicted_to_help_where_there_is_room_and_only_there() -> None:
    guessing = {("bf16", "ngram"): Guessing(0.9, 1e-5), ("bf16", "draft"): Guessing(0.1, 5e-3)}
    point = {"precision": "bf16", "max_num_seqs": 16, "token_budget": 128}

    def tail(rate: float, **more: object) -> float:
        load = workload.sample("code", rate=rate, requests=40, seed=0).scaled(max_prompt=100, max_output=60)
        return simulated({"bf16": COST}, load, SLO_, blocks=2000, guessing=guessing)({**point, **more})["e2e@p99"]

    assert tail(2.0, speculate="ngram", guesses=4) < 0.6 * tail(2.0)
    assert tail(2.0, speculate="draft", guesses=4) > 1.5 * tail(2.0)
    assert tail(2.0, speculate="draft", guesses=0) < 1.1 * tail(2.0)  # goodput leaves it
    with pytest.raises(ConfigurationError, match="nothing was measured of 'tree'"):
        tail(2.0, speculate="tree")


def test_what_a_proposer_is_worth_is_measured_on_the_model() -> None:
    model = load("pycode-4m")
    prompts = prompts_for(model, [120, 90], seed=0)
    assert [len(p) for p in prompts] == [120, 90]
    text = model.tokenizer.encode("x = 1\ny = 2\n" * 12)
    repeats = measure_guessing(model, "ngram", [text], tokens=24)
    tree = measure_guessing(model, "tree:4", prompts[:1], tokens=16)
    assert repeats.alpha > 0.6
    assert 0 < repeats.seconds < 1e-2
    assert 0 < tree.alpha < 1
    assert tree.seconds > 0
    assert measure_guessing(model, "off", prompts) == Guessing(0.0, 0.0)
    with pytest.raises(ConfigurationError, match="none was given"):
        measure_guessing(model, "ngram", [])


def test_a_search_over_speculation_confirms_on_the_engine() -> None:
    model = load("pycode-4m", dtype="bf16")
    offered = workload.sample("code", rate=100.0, requests=6, seed=0).scaled(max_prompt=60, max_output=12)
    result = tune_server(
        model, SLO_, offered, baseline={"policy": "prefill-first", "precision": "bf16", "max_num_seqs": 8},
        precisions=["bf16"], speculate=("off", "ngram"), guesses=(0, 2), costs={"bf16": COST}, confirm=1,
    )  # fmt: skip
    names = {c.knobs["speculate"] for c in result.predicted}
    assert names == {"off", "ngram"}
    assert any(c.knobs.get("guesses") == 2 for c in result.predicted)
    assert result.confirmed[0].values["attainment"] == 1.0
    point = {"policy": "stall-free", "token_budget": 32, "max_num_seqs": 4, "speculate": "ngram", "guesses": 2}
    assert replay_in_engine(model, point, offered, SLO_, blocks=128)["attainment"] == 1.0
    with pytest.raises(ConfigurationError, match="at least off"):
        tune_server(model, SLO_, offered, baseline={}, precisions=["bf16"], speculate=(), costs={"bf16": COST})
