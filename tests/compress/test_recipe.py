from __future__ import annotations

from pathlib import Path

import pytest
from torch import nn

from hasten.compress import PackedLinear, Plan, Recipe, WeightPrecision
from hasten.errors import ConfigurationError


def test_file_round_trip(tmp_path: Path) -> None:
    recipe = Recipe(
        (WeightPrecision("int4", group_size=128, skip=("head",)), WeightPrecision("bf16")), Plan(({"a": "kept"},))
    )
    recipe.save(tmp_path / "recipe.yaml")
    again = Recipe.load(tmp_path / "recipe.yaml")
    assert again == recipe
    assert again.plan == recipe.plan
    assert again.label == "int4 g128 skip=['head'] + bf16"
    assert Recipe().label == "unchanged"


def test_a_plan_is_followed_without_measuring(monkeypatch: pytest.MonkeyPatch) -> None:
    from hasten.compress import kernels

    monkeypatch.setattr(kernels, "measure_kernels", None)  # calling it would fail
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    recipe = Recipe((WeightPrecision("int8"),), Plan(({"0": "int8-dynamic", "1": "kept"},)))
    new, plan = recipe.apply(model)
    assert isinstance(new[0], PackedLinear)  # type: ignore[index]
    assert type(new[1]) is nn.Linear  # type: ignore[index]
    assert plan == recipe.plan


def test_an_empty_recipe_is_the_model_itself() -> None:
    model = nn.Linear(2, 2)
    new, plan = Recipe().apply(model)
    assert new is model
    assert plan.steps == ()


def test_a_plan_for_another_machine_names_the_kernel() -> None:
    recipe = Recipe((WeightPrecision("int8"),), Plan(({"0": "int8-from-elsewhere"},)))
    with pytest.raises(ConfigurationError, match="the plan has 'int8-from-elsewhere' for layer '0'"):
        recipe.apply(nn.Sequential(nn.Linear(64, 64)))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not YAML"),
        ("[]", "no list 'techniques'"),
        ("version: 9\ntechniques: []", "version 9"),
        ("version: 1\ntechniques: [x]", "names no technique"),
        ("version: 1\ntechniques: [{technique: magic}]", "no technique 'magic'"),
        ("version: 1\ntechniques: [{technique: weight-precision, bits: 3}]", "no knob bits"),
        ("version: 1\ntechniques: [{technique: weight-precision, format: int3}]", "format 'int3'"),
        ("version: 1\ntechniques: []\nplan: 3", "no list 'steps'"),
        ("!!python/object/apply:os.system [ls]", "not YAML"),
    ],
)
def test_bad_recipes_are_one_line(text: str, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message) as caught:
        Recipe.from_yaml(text)
    assert "\n" not in str(caught.value)


def test_missing_file() -> None:
    with pytest.raises(ConfigurationError, match="cannot be read"):
        Recipe.load("no/such/recipe.yaml")


def test_a_technique_without_a_report_is_named() -> None:
    class Silent:
        name = "silent"

        def __call__(self, model: nn.Module, calibration: object = None) -> nn.Module:
            return nn.Identity()

    with pytest.raises(ConfigurationError, match="silent left no report"):
        Recipe((Silent(),)).apply(nn.Identity())  # type: ignore[arg-type]
