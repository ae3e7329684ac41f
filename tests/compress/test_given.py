"""Bad input is named on one line, by every technique alike, and never becomes a model."""

from __future__ import annotations

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
    Quantize,
    TruncatedSvd,
    WeightPrecision,
    given,
    sqnr,
)
from hasten.compress.acm import ACM
from hasten.compress.deep import DeepCompression
from hasten.compress.given import run_example
from hasten.compress.lowrank.svdquant import SvdQuant
from hasten.compress.quantize import Gptq, QuantizeAware
from hasten.errors import ConfigurationError, DataError
from hasten.tune import tune
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
    from hasten.tune import Knob, Space

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
