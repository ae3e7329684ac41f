from __future__ import annotations

import pytest
from torch import nn

from hasten.compress import FusedNetwork, TruncatedSvd, WeightPrecision
from hasten.errors import ConfigurationError
from hasten.nn.product.instructions import has_bytes
from hasten.tune import Knob, Space, recipe_space, serving_space
from hasten.tune.space import key_of, recipe_of

MODEL = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.Linear(64, 64))


def test_points_match_the_slow_twin() -> None:
    space = Space((Knob("a", (1, 2)), Knob("b", ("x", "y"), lambda p: p["a"] == 2), Knob("c", (None, True))))
    expected = []
    for a in (1, 2):
        for b in ("x", "y") if a == 2 else (None,):
            for c in (None, True):
                expected.append({"a": a, "b": b, "c": c} if a == 2 else {"a": a, "c": c})
    assert list(space.points()) == expected
    assert space.size() == 6
    assert space.size(most=4) == 4
    for point in expected:  # asking gives the same points
        assert space.build(lambda name, choices, p=point: p[name]) == point
    assert len({key_of(p) for p in expected}) == 6


def test_bad_spaces() -> None:
    with pytest.raises(ConfigurationError, match="distinct"):
        Knob("a", (1, 1))
    with pytest.raises(ConfigurationError, match="distinct"):
        Knob("a", ())
    with pytest.raises(ConfigurationError, match="same name"):
        Space((Knob("a", (1,)), Knob("a", (2,))))


def test_every_recipe_point_is_a_recipe() -> None:
    recipes = [recipe_of(p, MODEL, tokens=4) for p in recipe_space(MODEL).points()]
    assert recipes[0].techniques == ()
    assert len({r.to_yaml() for r in recipes}) == len(recipes)
    kept = recipe_of({"format": "int8", "keep": "first and last"}, MODEL)
    assert isinstance(kept.techniques[0], WeightPrecision)
    assert kept.techniques[0].skip == ("0", "3")


@pytest.mark.skipif(not has_bytes(), reason="needs registers of 512 bits")
def test_a_network_in_one_call_may_follow_low_rank_factors() -> None:
    wide = nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 256))
    found = [p for p in recipe_space(wide).points() if p["format"] == "fused"]
    assert {(p["products"], p["remove"]) for p in found} >= {("fp32", 0.0), ("int8", 0.25), ("int8", 0.5)}
    recipe = recipe_of({"format": "fused", "products": "int8", "remove": 0.5}, wide)
    assert recipe.techniques == (TruncatedSvd(ratio=0.5), FusedNetwork("int8"))


def test_a_model_without_linear_layers_has_one_recipe() -> None:
    assert list(recipe_space(nn.ReLU()).points()) == [{"format": "unchanged"}]


def test_token_budget_is_a_knob_of_budgeted_policies_only() -> None:
    space = serving_space(policies=("prefill-first", "stall-free"), token_budgets=(2, 4, 8), max_num_seqs=(4,))
    # a budget of 2 cannot feed 4 sequences
    assert [p.get("token_budget") for p in space.points() if p["precision"] == "bf16"] == [None, 4, 8]
    usual = serving_space(precisions=("bf16",), max_num_seqs=(64,))
    assert [p["token_budget"] for p in usual.points()] == [64, 128, 256, 512, "slo"]


def test_a_spiking_network_may_run_for_fewer_timesteps():
    from torch import nn

    from hasten.spiking import IF, SpikingNetwork
    from hasten.tune.space import recipe_of, recipe_space

    model = SpikingNetwork([nn.Linear(4, 8, bias=False), IF(), nn.Linear(8, 3, bias=False)], timesteps=4)
    points = [p for p in recipe_space(model).points() if p["format"] == "timesteps"]
    assert [p["timesteps"] for p in points] == [3, 2, 1]
    for point in points:
        new, plan = recipe_of(point, model).apply(model)
        assert new.timesteps == point["timesteps"]
        assert plan.steps
    assert model.timesteps == 4
    assert not [p for p in recipe_space(nn.Sequential(nn.Linear(4, 4))).points() if p["format"] == "timesteps"]


def test_convolutions_may_run_in_bytes_and_wide_layers_in_factors():
    from hasten.nn.product.instructions import has_bytes

    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(288, 512), nn.Linear(512, 10))
    points = list(recipe_space(model).points())
    assert any(p["format"] == "int8-network" for p in points) == has_bytes()
    removed = [p for p in points if p.get("remove")]
    assert removed
    assert all(p.get("keep", "none") == "none" for p in removed)
    recipe = recipe_of(removed[0], model)
    assert [t.name for t in recipe.techniques] == ["truncated-svd", "weight-precision"]
    assert recipe.techniques[0].skip == ("3",)
    assert not [p for p in recipe_space(MODEL).points() if p.get("remove")]
