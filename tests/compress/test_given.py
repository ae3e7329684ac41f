"""Bad input is named on one line, by every technique alike, and never becomes a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from hasten.compress import (
    Clustering,
    FusedNetwork,
    Int8Network,
    MagnitudePruning,
    Plan,
    Quantize,
    Recipe,
    TruncatedSvd,
    WeightPrecision,
    container,
    export_program,
    given,
    sqnr,
)
from hasten.compress.acm import ACM
from hasten.compress.deep import DeepCompression
from hasten.compress.given import run_example
from hasten.compress.lowrank.svdquant import SvdQuant
from hasten.compress.quantize import Gptq, Int, PerChannel, PerTensor, QuantizeAware
from hasten.errors import ConfigurationError, DataError
from hasten.frozen import load
from hasten.nn.product.instructions import has_bytes
from hasten.tune import Knob, Space, tune
from hasten.tune.model import fidelity

TECHNIQUES: dict[str, Any] = {
    "quantize": Quantize.scheme("W4A16", steps=(Gptq(),), real="never"),
    "precision": WeightPrecision("int8"),
    "svd": TruncatedSvd(ratio=0.5),
    "svdquant": SvdQuant(rank=4, group=32, grid=2),
    "acm": ACM(targets=("0>2",), learners=2, epochs=1, gate_epochs=1, tune_epochs=0),
    "deep": DeepCompression(epochs=1),
    "pruning": MagnitudePruning(0.5, epochs=1),
    "clustering": Clustering(4, epochs=1),
}


def _model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64)).eval()


@pytest.fixture(autouse=True)
def known_times(monkeypatch: pytest.MonkeyPatch) -> None:
    from hasten.compress import kernels

    monkeypatch.setattr(kernels, "measure_kernels", lambda shape, tokens, names, **_: dict.fromkeys(names, 1.0))


@pytest.mark.parametrize("name", TECHNIQUES)
def test_examples_that_do_not_fit_or_are_no_numbers(name: str) -> None:
    technique = TECHNIQUES[name]
    with pytest.raises(DataError, match=r"calibration input.*\(64, 63\) does not fit the model \(.*\); give inputs"):
        technique(_model(), [torch.randn(64, 63)])
    with pytest.raises(DataError, match="calibration input.* holds NaN or infinity; remove or repair it"):
        technique(_model(), [torch.full((64, 64), torch.nan)])


@pytest.mark.parametrize("name", TECHNIQUES)
def test_weights_that_are_no_numbers(name: str) -> None:
    model = _model()
    with torch.no_grad():
        model[2].weight[3, 4] = torch.inf
    with pytest.raises(ConfigurationError, match=r"[02].*holds NaN or infinity; repair"):
        TECHNIQUES[name](model, [torch.randn(64, 64)])


ASKED = {**TECHNIQUES, "fused": FusedNetwork(), "bytes": Int8Network(), "trained": QuantizeAware(epochs=1)}


@pytest.mark.parametrize("name", ASKED)
@pytest.mark.parametrize(
    ("model", "calibration", "said"),
    [
        (lambda: None, [torch.zeros(1, 64)], "was given a NoneType as the model; give an nn.Module"),
        (lambda: nn.Sequential(nn.Linear(64, 64, device="meta")), None, "0.weight is on the meta device"),
        (_model, torch.zeros(9, 64), "calibration is a Tensor; give "),
        (_model, np.zeros((9, 64)), "calibration is a ndarray; give "),
        (_model, {"x": torch.zeros(9, 64)}, "calibration is a dict; give "),
        (_model, [torch.zeros(9, 64), torch.zeros(0, 64)], r"calibration input 1 of shape \(0, 64\) holds no sample"),
    ],
)
def test_what_no_technique_takes(name: str, model: Any, calibration: Any, said: str) -> None:
    with pytest.raises((ConfigurationError, DataError), match=said) as caught:
        ASKED[name](model(), calibration)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["fused", "trained", "svdquant", "quantize"])
@pytest.mark.parametrize("example", ["text", None, torch.zeros(2, 64, dtype=torch.long), torch.zeros(2, 63)])
def test_an_example_that_only_the_models_own_code_refuses(name: str, example: Any) -> None:
    """Whatever broke first, what is said is which example does not fit."""
    technique = ASKED[name]
    if name == "fused" and not isinstance(example, torch.Tensor):
        assert not technique(_model(), [example]).report.touched
        return
    with pytest.raises(DataError, match="calibration input 0 .*does not fit the model"):
        technique(_model(), [example])


def test_errors_of_our_own_are_not_dressed_up(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise AttributeError("a mistake in the technique")

    monkeypatch.setattr("hasten.compress.quantize.technique.targets", broken)
    model = _model().train()
    with pytest.raises(AttributeError, match="a mistake in the technique"):
        Quantize.scheme("W4A16")(model, [torch.zeros(2, 64)])
    assert model.training


def test_training_is_in_float32() -> None:
    with pytest.raises(ConfigurationError, match=r"layer '0' is torch.float64, and training is in float32"):
        QuantizeAware(epochs=1)(_model().double(), [torch.zeros(2, 64).double()])


def test_squares_beyond_float32_are_still_a_quality() -> None:
    one, other = torch.full((4,), 1e30), torch.full((4,), 0.9e30)
    assert sqnr(one, other) == pytest.approx(20, abs=0.01)
    assert fidelity(nn.Identity(), nn.Hardtanh(-1, 0.9e30), [one]) == pytest.approx(0.9, abs=1e-3)


def test_the_layer_without_variance_is_named() -> None:
    model = _model()
    with torch.no_grad():
        model[2].weight.fill_(0.25)
    kept = Quantize.scheme("W4A16", real="never")(model).report.skipped
    assert kept == {"2": "all its weights are 0.25: zero variance"}
    told = {r.layer: r.reason for r in MagnitudePruning(0.5)(model).report.layers}
    assert told["2.weight"] == "0% before; all its weights are equal: which are zero is chance"
    assert told["0.weight"] == "0% before"


def test_a_search_refuses_the_model_and_survives_a_recipe() -> None:
    from hasten.compress import Recipe
    from hasten.measure import Protocol

    model, data = _model(), [torch.randn(4, 64)]
    recipe = Recipe((Quantize.scheme("W4A16", steps=(Gptq(),)),))
    result = tune(
        model, data, "quality>1%", recipes=[recipe], calibration=[torch.randn(4, 63)],
        space=Space((Knob("format", ("unchanged",)),)), protocol=Protocol(min_samples=2, min_time=0, warmup_time=0),
    )  # fmt: skip
    refused = next(c for c in result.frontier.candidates if c.name == recipe.label)
    assert "does not fit the model" in refused.violations[0]
    with torch.no_grad():
        model[0].weight[0, 0] = torch.nan
    with pytest.raises(ConfigurationError, match="0.weight holds NaN or infinity; repair the model before it is tuned"):
        tune(model, data, "quality>1%")


def test_an_example_without_a_number() -> None:
    assert run_example(_model(), torch.zeros(2, 64), 3).shape == (2, 64)
    with pytest.raises(DataError, match=r"calibration input 3 \(str\) does not fit the model"):
        run_example(_model(), "text", 3)


def test_what_a_search_is_given_is_looked_at_first() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).eval()
    given.finite_parameters(model, "tuned")
    given.answers(model, torch.zeros(2, 4))
    with pytest.raises(ConfigurationError, match="calibration holds no input; give at least one"):
        given.finite_examples([], "calibration")
    with pytest.raises(DataError, match=r"data\[1\] holds NaN or infinity"):
        given.finite_examples([torch.zeros(2), torch.tensor([torch.nan])], "data")
    with pytest.raises(DataError, match=r"data\[0\] of shape \(2, 3\) does not fit the model"):
        given.answers(model, torch.zeros(2, 3))
    with torch.no_grad():
        model[1].running_var[2] = torch.nan  # type: ignore[index,union-attr]
    with pytest.raises(ConfigurationError, match=r"1\.running_var holds NaN; repair the model before it is tuned"):
        given.finite_parameters(model, "tuned")
    with pytest.raises(ConfigurationError, match=r"answers data\[0\] with NaN"):
        given.answers(model, torch.zeros(2, 4))


@pytest.mark.parametrize(
    ("technique", "plan", "said"),
    [
        (WeightPrecision("int8"), {"9": "int8-weight"}, "names layer '9', and Sequential has none"),
        (WeightPrecision("int8"), {"0": "nokernel"}, "'nokernel' for layer '0' of 128 x 64, where int8 runs on int8-"),
        (WeightPrecision("int8"), {"0": "int4-g32"}, "'int4-g32' for layer '0'"),
        (Quantize.scheme("W8A16"), {"9": "kept"}, "names layer '9', and Sequential has none"),
        (
            Quantize.scheme("W8A16"),
            {"0": "int8 on int4-g32"},
            "'int4-g32' for layer '0' of 128 x 64, which",
        ),
        (FusedNetwork(), {"9": "fp32"}, "names layer '9', and Sequential has none"),
    ],
)
def test_a_plan_of_another_model_or_machine(technique: Any, plan: dict[str, str], said: str) -> None:
    with pytest.raises(ConfigurationError, match=r"apply the recipe without its plan") as caught:
        Recipe((technique,), Plan((plan,))).apply(_model())
    assert said in str(caught.value)


def test_a_kernel_is_never_given_a_shape_that_it_does_not_take() -> None:
    """torch's kernels read whole vectors and do not all check: such a plan would read beyond the weight."""
    with pytest.raises(ConfigurationError, match="'int8-weight' for layer '0' of 5 x 7, where int8 runs on no kernel"):
        Recipe((WeightPrecision("int8"),), Plan(({"0": "int8-weight"},))).apply(nn.Sequential(nn.Linear(7, 5)))


SMALL = {
    "weight": WeightPrecision("int8", only_faster=False),
    "four": WeightPrecision("int4", only_faster=False),
    "bytes": Quantize.scheme("W8A8", real="always"),
    "static": Quantize(Int(8, PerChannel(0)), Int(8, PerTensor(), symmetric=False), real="always"),
    "kernel": Quantize.scheme("W8A16", real="always"),
    "svdquant": SvdQuant(rank=4, group=32, grid=2, iterations=0),
}


@pytest.mark.parametrize("name", SMALL)
def test_what_a_compressed_layer_is_called_with(name: str) -> None:
    """Whole numbers would cut the result to whole numbers, and bytes hold no NaN: both came out as if all were well."""
    torch.manual_seed(0)
    x = torch.randn(30, 64)
    small = SMALL[name](_model(), [x])
    for bad in (x.long(), x[:, :32], torch.tensor(1.0)):
        with pytest.raises(ConfigurationError, match=r"a layer of 64 inputs was given .* give floats \(…, 64\)"):
            small(bad)
    with torch.no_grad():
        expected = small(x)
        assert torch.equal(small(x.T.contiguous().T), expected)  # whatever way the rows lie
        broken = x.clone()
        broken[3, 5] = torch.nan
        found = small(broken)
        assert bool(found[3].isnan().any())
        assert torch.equal(found[:3], expected[:3])
        assert small(x[:0]).shape == (0, 64)
    if name == "svdquant":
        assert small(x.requires_grad_()).sum().requires_grad


@pytest.mark.skipif(not has_bytes(), reason="this processor has no vpdpbusd")
def test_an_image_without_numbers_stays_one() -> None:
    torch.manual_seed(0)
    head = (nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 8))
    x = torch.rand(20, 3, 8, 8)
    small = Int8Network(only_faster=False)(nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), *head).eval(), [x])
    expected = small(x)
    x[4, 1, 2, 3] = torch.nan
    found = small(x)
    assert bool(found[4].isnan().all())
    assert torch.equal(found[:4], expected[:4])
    assert torch.equal(found[5:], expected[5:])


def test_knobs_of_another_kind_in_a_file() -> None:
    knobs = {"truncated-svd": "ratio: many", "weight-precision": "tokens: many", "quantize": "steps: 3"}
    for technique, knob in knobs.items():
        with pytest.raises(ConfigurationError, match=f"{technique} does not take .*; give knobs of their kinds"):
            Recipe.from_yaml(f"version: 1\ntechniques:\n- technique: {technique}\n  {knob}\n")
    with pytest.raises(ConfigurationError, match=r"2\.5 bits is not known"):
        Int(2.5)  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="damp nan"):
        Gptq(damp=float("nan"))


def test_a_frozen_network_says_what_it_does_not_take(tmp_path: Path) -> None:
    container.save(_model(), tmp_path, (torch.zeros(2, 64),))
    frozen = load(tmp_path)
    for bad in (np.zeros((2, 5), np.float32), np.array("x")):
        with pytest.raises(ConfigurationError, match="the model does not take") as caught:
            frozen(bad)
        assert "\n" not in str(caught.value)


def test_overrides_of_no_layer() -> None:
    with pytest.raises(ConfigurationError, match="overrides= names 'nosuch.*', which is no layer"):
        Quantize(Int(8), overrides=(("nosuch.*", Int(4)),), real="never")(_model())


@pytest.mark.parametrize(
    ("named", "said"),
    [
        ({"budget": 5}, "budget is 5; give a text such as"),
        ({"calibration": torch.zeros(4, 64)}, "calibration is a Tensor; give tune a list"),
        ({"tokens": 0}, "tokens is 0"),
        ({"space": Space(())}, "space has no knob 'format'"),
        ({"power": -1.0}, "power is -1.0; give the watts"),
    ],
)
def test_what_a_search_does_not_take(named: Any, said: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        tune(_model(), [torch.zeros(4, 64)], **{"budget": "quality>1%", **named})
    assert said in str(caught.value)


def test_an_example_that_an_export_cannot_run(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"the example of shape \(2, 5\) does not fit the model"):
        export_program(_model(), torch.zeros(2, 5), tmp_path / "a.pt2")
    assert not list(tmp_path.iterdir())
