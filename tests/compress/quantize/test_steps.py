"""Folding, equalising and smoothing keep the function; rounding steps bring outputs closer; biases are corrected."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import pytest
import torch
from quantize_models import cnn, images, rows, transformer
from torch import nn

from hasten.compress.quantize import (
    BiasCorrection,
    BlockReconstruction,
    Equalise,
    Gptq,
    Int,
    LearnedRounding,
    MiniFloat,
    PerChannel,
    Quantize,
    SmoothQuant,
    fold_batch_norm,
)
from hasten.compress.quantize.graph import pairs
from hasten.compress.quantize.passes import Calibration, patches
from hasten.compress.quantize.steps import Layer, Step, Work
from hasten.errors import ConfigurationError, DataError


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


def work(model: nn.Module, inputs: torch.Tensor) -> Work:
    layers = [n for n, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    return Work(model, layers, Int(4), None, Calibration([inputs]))


@torch.no_grad()
def test_folding_keeps_the_function() -> None:
    model, x = cnn(), images()
    folded = copy.deepcopy(model)
    assert fold_batch_norm(folded) == ["1", "4", "8"]
    assert relative(folded(x), model(x)) < 1e-5
    assert fold_batch_norm(folded) == []


class Branching(nn.Module):
    """A normalisation whose input has a second reader must stay."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv(x)
        result: torch.Tensor = self.norm(y) + y
        return result


def test_a_second_reader_forbids_folding() -> None:
    assert fold_batch_norm(Branching().eval()) == []


@torch.no_grad()
def test_equalising_keeps_the_function_and_evens_the_ranges() -> None:
    model, x = cnn(), images()
    fold_batch_norm(model)
    before, out = copy.deepcopy(model), model(x)
    Equalise().rewrite(work(model, x))
    assert relative(model(x), out) < 1e-5
    assert len(pairs(model, (nn.Conv2d, nn.Linear), (nn.Conv2d, nn.Linear))) == 3

    def spread(m: nn.Sequential) -> float:
        ranges = m[0].weight.flatten(1).abs().amax(1)
        return float(ranges.max() / ranges.min())

    assert spread(model) < 0.5 * spread(before)
    per_tensor = [Quantize(Int(4), None)(m)(x) for m in (before, model)]
    assert relative(per_tensor[1], out) < relative(per_tensor[0], out)


@torch.no_grad()
def test_smoothing_keeps_the_function_and_tames_outliers() -> None:
    model, x = transformer(), rows()
    out, job = model(x), work(model, x)
    SmoothQuant(0.5).rewrite(job)
    assert relative(model(x), out) < 1e-5
    assert job.notes == ["2 normalisations were smoothed (strength 0.5)"]
    plain, smooth = (
        Quantize(Int(8, PerChannel(0)), Int(6), steps)(transformer(), [x])(x) for steps in ((), (SmoothQuant(0.5),))
    )
    assert relative(smooth, out) < 0.8 * relative(plain, out)


class Leaking(nn.Module):
    """The normalised tensor is also the result."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.layer = nn.LayerNorm(8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm(x)
        result: torch.Tensor = h + self.layer(h)
        return result


@torch.no_grad()
def test_a_normalisation_with_further_readers_is_left_and_named() -> None:
    model = Leaking()
    x = torch.randn(4, 8) * torch.tensor([1.0, 30.0] * 4)
    out, job = model(x), work(model, x)
    SmoothQuant(0.5).rewrite(job)
    assert torch.equal(model(x), out)
    assert "norm has further readers" in job.notes[0]


@dataclass(frozen=True)
class Nearest(Step):
    """Rounds to nearest, and has the error measured."""

    def round(self, layer: Layer) -> torch.Tensor | None:
        layer.hessian()
        return None


@pytest.mark.parametrize("fmt", [Int(3, PerChannel(0)), MiniFloat(2, 1).per_channel()], ids=lambda f: f.label)
@pytest.mark.parametrize("step", [Gptq(), LearnedRounding(60)], ids=lambda s: type(s).__name__)
def test_rounding_steps_bring_layers_closer(step: Step, fmt: Int | MiniFloat) -> None:
    for model, x in ((cnn(), images(16)), (transformer(depth=1), rows())):
        errors = [
            {r.layer: r.error for r in Quantize(fmt, None, [s])(model, [x]).report.layers}  # type: ignore[union-attr]
            for s in (Nearest(), step)
        ]
        nearer = [errors[1][name] <= 1.001 * errors[0][name] for name in errors[0]]
        assert sum(nearer) >= 0.9 * len(nearer)
        assert sum(errors[1].values()) < 0.7 * sum(errors[0].values())


def test_blocks_are_reconstructed_together() -> None:
    model, x = nn.Sequential(transformer(depth=1)[0][0]), rows()
    with torch.no_grad():
        model[0].norm.weight.fill_(1)
    plain = Quantize(Int(3, PerChannel(0)), None)(model, [x])
    better = Quantize(Int(3, PerChannel(0)), None, [BlockReconstruction(iterations=250)])(model, [x])
    assert better.report.notes[-1].startswith("1 of 1 blocks")  # type: ignore[union-attr]
    assert better.report.measured["sqnr"] > plain.report.measured["sqnr"] + 0.5  # type: ignore[union-attr,index]
    with pytest.raises(ConfigurationError, match="no block holds two layers"):
        Quantize(Int(3), None, [BlockReconstruction()])(nn.Sequential(nn.Linear(8, 8)), [torch.randn(2, 8)])


@torch.no_grad()
def test_bias_correction_restores_the_mean_output() -> None:
    model, x = cnn(), images()
    plain, better = (Quantize(Int(3), None, steps)(model, [x]) for steps in ((), (BiasCorrection(),)))
    wanted, off, right = (m(x).mean(0) for m in (model, plain, better))
    assert relative(right, wanted) < 1e-4
    assert relative(off, wanted) > 0.1
    assert better[3].bias is not None  # the depthwise layer had none of its own after folding it has


@torch.no_grad()
@pytest.mark.parametrize(
    "layer",
    [
        nn.Linear(6, 5), nn.Conv2d(4, 6, 3, padding=1, stride=2), nn.Conv2d(4, 8, (3, 1), groups=2, dilation=2),
        nn.Conv2d(4, 4, 3, groups=4, padding="same", padding_mode="circular"), nn.Conv1d(4, 6, 3, padding=2, stride=2),
    ],
    ids=str,
)  # fmt: skip
def test_patches_make_a_convolution_a_product(layer: nn.Module) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 6) if isinstance(layer, nn.Linear) else torch.randn(2, 4, 9, 8)[..., :8]
    if isinstance(layer, nn.Conv1d):
        x = x[:, :, 0]
    weight = layer.weight.flatten(1)
    seen = patches(layer, x)
    seen = seen[None] if seen.dim() == 2 else seen
    product = torch.einsum("gri,goi->rgo", seen, weight.reshape(len(seen), -1, weight.shape[1])).flatten(1)
    channel = -1 if isinstance(layer, nn.Linear) else 1
    expected = layer(x).movedim(channel, -1).reshape(-1, weight.shape[0]) - layer.bias
    assert torch.allclose(product, expected, atol=1e-5)


def test_calibration_that_does_not_fit_is_one_line() -> None:
    with pytest.raises(DataError, match=r"calibration input 1 of shape \(2, 3\) does not fit") as caught:
        Quantize(Int(4), None, [Gptq()])(nn.Sequential(nn.Linear(8, 8)), [torch.randn(2, 8), torch.randn(2, 3)])
    assert "\n" not in str(caught.value)
    bad = torch.full((2, 8), float("nan"))
    with pytest.raises(DataError, match="NaN"):
        Quantize(Int(4), Int(8))(nn.Sequential(nn.Linear(8, 8)), [bad])


def test_steps_without_data_say_so() -> None:
    for step in (Gptq(), LearnedRounding(), SmoothQuant(), BiasCorrection()):
        with pytest.raises(ConfigurationError, match="give calibration inputs"):
            Quantize(Int(4), None, [step])(nn.Sequential(nn.Linear(8, 8)))
    Quantize(Int(4), None, [Equalise()])(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)))
