from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from quantize_models import cnn, images, rows, transformer
from torch import nn

from hasten.compress import Recipe
from hasten.compress.quantize import (
    MXFP4,
    NF4,
    SCHEMES,
    BiasCorrection,
    Equalise,
    Gptq,
    Int,
    KMeans,
    MiniFloat,
    MinMax,
    Mse,
    Percentile,
    PerChannel,
    PerGroup,
    PerToken,
    Quantize,
    SmoothQuant,
)
from hasten.compress.quantize.layers import Simulated
from hasten.errors import ConfigurationError
from hasten.testing import TechniqueKit

pytestmark = pytest.mark.usefixtures("one_thread", "known_times")


class TestBytes(TechniqueKit):
    technique = Quantize(Int(8, PerChannel(0)), Int(8, PerToken(), dynamic=True), real="always")
    keeps = {"sqnr": 35.0}


class TestStatic(TechniqueKit):
    technique = Quantize(
        Int(8, PerChannel(0)), Int(8, symmetric=False, observer=Percentile(100.0)), [SmoothQuant(0.5)], real="never"
    )
    keeps = {"sqnr": 25.0}

    def test_same_input_same_result(self, parts: Any) -> None:
        model, example, new = parts
        again = self.technique(model, [example])  # ranges need the calibration
        with torch.inference_mode():
            assert torch.equal(new(example), again(example))


class TestGroups(TechniqueKit):
    technique = Quantize(Int(4, PerGroup(1, 32), observer=Mse()), real="never", skip=("head",))
    keeps = {"sqnr": 15.0}


class TestFloats(TechniqueKit):
    technique = Quantize(MiniFloat(4, 3).per_channel(), MiniFloat(4, 3, dynamic=True), real="never")
    keeps = {"sqnr": 25.0}


class TestLists(TechniqueKit):
    technique = Quantize(NF4, overrides=(("head", KMeans(3)), ("first", MXFP4)))
    keeps = {"sqnr": 12.0}


@pytest.mark.parametrize("name", SCHEMES)
def test_every_scheme_runs_and_is_as_small_as_its_bits(name: str) -> None:
    for model, x in ((cnn(), images()), (transformer(), rows())):
        technique = Quantize.scheme(name.lower(), real="never")
        small = technique(model, [x])
        report: Any = small.report
        quantised = [m for m in small.modules() if isinstance(m, Simulated)]
        assert len(quantised) == len(report.touched)
        for layer in quantised:
            assert layer.packed_bytes <= layer.format.stored_bits(layer.matrix) / 8 + 8
        assert report.bytes_after < 0.45 * report.bytes_before
        assert Recipe.from_yaml(Recipe((technique,)).to_yaml()).techniques == (technique,)
        assert torch.isfinite(small(x)).all()


def test_no_float_weight_is_kept() -> None:
    small = Quantize(Int(8, PerChannel(0)))(transformer())
    large = [t for t in small.state_dict().values() if t.numel() >= 32 * 32 and t.element_size() > 1]
    assert not large
    assert not [p for m in small.modules() if isinstance(m, Simulated) for p in m.parameters()]


def test_layers_are_chosen_by_name_and_kind_and_all_are_reported() -> None:
    model = nn.Sequential(cnn(), nn.Embedding(4, 4), nn.MultiheadAttention(8, 2), nn.Linear(4, 4))
    with torch.no_grad():
        model[3].weight.fill_(0.5)
    report: Any = Quantize(Int(4), layers=("0.*", "3"), skip=("0.11",), kinds=("Conv2d", "Linear"))(model).report
    assert report.touched == ("0.0", "0.3", "0.7")
    assert report.skipped["1"].startswith("a Embedding is not quantised")
    assert "NonDynamicallyQuantizableLinear" in report.skipped["2.out_proj"]
    assert report.skipped["3"] == "all its weights are 0.5: zero variance"
    assert report.skipped["0.11"].startswith("left out")
    assert any("attention" in note for note in report.notes)


def test_the_same_inputs_share_a_hessian_and_later_layers_see_rounded_ones() -> None:
    model, x = transformer(), rows()
    technique = Quantize(Int(3, PerChannel(0)), Int(8, PerToken(), dynamic=True), [Gptq(), BiasCorrection()])
    first, second = technique(model, [x]), technique(model, [x])
    with torch.inference_mode():
        assert torch.equal(first(x), second(x))
    batches = technique(model, list(x.split(4)))
    with torch.inference_mode():
        assert torch.allclose(batches(x), first(x), atol=0.2)


def test_shared_weights_are_kept() -> None:
    model = nn.Sequential(nn.Embedding(16, 8), nn.Linear(8, 16, bias=False), nn.Linear(16, 8))
    model[1].weight = model[0].weight
    report: Any = Quantize(Int(8))(model).report
    assert report.skipped["1"] == "its weight is shared with another layer"


def test_a_layer_that_the_data_do_not_reach_is_kept_and_named() -> None:
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.idle = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            result: torch.Tensor = self.used(x)
            return result

    report: Any = Quantize(Int(4), Int(8))(Half(), [torch.randn(4, 8)]).report
    assert report.touched == ("used",)
    assert report.skipped["idle"] == "the calibration did not reach it"


def test_a_whole_model_that_is_one_layer() -> None:
    small = Quantize(Int(8, PerChannel(0)), real="never")(nn.Linear(64, 64))
    assert isinstance(small, Simulated)


def test_layers_that_run_twice() -> None:
    shared = nn.Linear(8, 8)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    small = Quantize(Int(4), Int(8), [Gptq()])(model, [torch.randn(32, 8)])
    assert small[0] is small[2]  # type: ignore[index]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Quantize(None, None), "quantise nothing"),
        (lambda: Quantize("int4"), "no number format"),
        (lambda: Quantize(Int(8, PerToken(), dynamic=True)), "does not change between calls"),
        (lambda: Quantize(Int(8), steps=["gptq"]), "no step"),
        (lambda: Quantize(Int(8), kinds=("LSTM",)), "kind LSTM"),
        (lambda: Quantize(Int(8), real="maybe"), "real='maybe'"),
        (lambda: Quantize(Int(8), tokens=0), "at least one row"),
        (lambda: Quantize.scheme("W9A1"), "no scheme 'W9A1'"),
        (lambda: Quantize(Int(8), Int(8))(nn.Linear(4, 4)), "need calibration"),
        (lambda: Quantize(Int(8))(nn.ReLU()), "nothing to quantise"),
        (lambda: Quantize(Int(8), layers=("x*",))(nn.Sequential(nn.Linear(4, 4))), r"no layer is called 'x\*'"),
        (
            lambda: Quantize(Int(4, PerGroup(1, 32)), strict=True)(nn.Sequential(nn.Linear(40, 4))),
            "layer '0': groups of 32",
        ),
        (lambda: Recipe.from_yaml("version: 1\ntechniques: [{technique: quantize, weight: {kind: Int9}}]"), "no kind"),
        (
            lambda: Recipe.from_yaml("version: 1\ntechniques: [{technique: quantize, weight: {kind: Int, b: 1}}]"),
            "field b",
        ),
        (
            lambda: Recipe.from_yaml("version: 1\ntechniques: [{technique: quantize, weight: {kind: MiniFloat}}]"),
            "MiniFloat",
        ),
    ],
)
def test_bad_requests_are_one_line(make: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_nan_weights_are_named() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    with torch.no_grad():
        model[1].weight[0, 0] = float("nan")
    with pytest.raises(ConfigurationError, match="layer '1': its weight holds NaN"):
        Quantize(Int(8))(model)
    Quantize(Int(8), skip=("1",))(model)


def test_recipes_are_plain_mappings() -> None:
    technique = Quantize(
        Int(4, PerGroup(1, 64), observer=Mse(norm=2.4)), None, [Equalise(), Gptq(damp=0.1)], skip=("head",)
    )
    text = Recipe((technique,)).to_yaml()
    assert "kind: Gptq" in text
    assert "python" not in text
    assert Recipe.from_yaml(text).techniques == (technique,)
    assert Recipe((technique,)).label == "int4 g64, Equalise, Gptq"


def test_progress_is_told() -> None:
    told: list[tuple[str, float]] = []
    Quantize(Int(4), None, [Gptq()])(transformer(), [rows()], progress=lambda stage, share: told.append((stage, share)))
    assert told[-1] == ("done", 1.0)
    assert [s for n, s in told if n == "round"] == sorted(s for n, s in told if n == "round")


@pytest.mark.parametrize("name", ["W4A16", "W3A16", "W2A16"])
def test_presets_of_few_bits_search_their_ranges(name: str) -> None:
    """Closer than the extremes, at the same bits; four bits use every code."""
    weight, _ = SCHEMES[name]
    torch.manual_seed(0)
    given = torch.randn(64, 128)
    plain = replace(weight, observer=MinMax(), full_range=False)
    assert (weight.fake(given) - given).norm() < 0.95 * (plain.fake(given) - given).norm()
    assert weight.stored_bits((64, 128)) == plain.stored_bits((64, 128))
    if weight.bits == 4:
        assert weight.quantize(given).codes.min() == -8
