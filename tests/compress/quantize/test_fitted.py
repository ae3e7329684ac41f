"""Fitted ranges lower the error of a layer's output and never raise it; rounding stays to nearest."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from quantize_models import cnn, images, rows, transformer

from hasten.compress.quantize import (
    MXFP4,
    NF4,
    NVFP4,
    FitRanges,
    Format,
    Gptq,
    Int,
    KMeans,
    MiniFloat,
    Mse,
    PerChannel,
    PerGroup,
    PerTensor,
    Quantize,
    hessian_of,
)
from hasten.compress.quantize.fitted import fit_ranges
from hasten.compress.recipe import Recipe
from hasten.errors import ConfigurationError

FORMATS = [
    Int(4, PerGroup(1, 16), symmetric=False, observer=Mse()),
    Int(4, PerGroup(1, 16), full_range=True, observer=Mse()),
    Int(3, PerGroup(-1, 20)),
    Int(4, PerChannel(0), symmetric=False),
    MiniFloat(2, 1).per_group(16),
    NF4,
    MXFP4,
]


def correlated(rows: int, inner: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(rows, 8, generator=generator) @ torch.randn(8, inner, generator=generator)
    return mixed + 0.3 * torch.randn(rows, inner, generator=generator)


def lost(weight: torch.Tensor, values: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Squared change of each output, from the inputs themselves."""
    return (x.double() @ (values - weight).double().t()).square().sum(0)


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda f: f.label)
@given(seed=st.integers(0, 10_000), inner=st.integers(5, 70), count=st.integers(1, 90))
@settings(max_examples=8, deadline=None)
def test_no_output_is_further_off_than_with_the_ranges_of_the_weights(
    fmt: Format, seed: int, inner: int, count: int
) -> None:
    x = correlated(count, inner, seed)
    weight = torch.randn(6, inner, generator=torch.Generator().manual_seed(seed))
    scale, zero = fit_ranges(weight, hessian_of(x), fmt)
    plain = fmt.find(weight)
    assert scale.shape == plain[0].shape
    assert (zero is None) == (plain[1] is None)
    before, after = lost(weight, fmt.fake(weight, *plain), x), lost(weight, fmt.fake(weight, scale, zero), x)
    assert bool((after <= before * (1 + 1e-4) + 1e-6 * (x.double() @ weight.double().t()).square().sum(0)).all())


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda f: f.label)
def test_inputs_that_vary_together_gain_and_values_stay_the_nearest(fmt: Format) -> None:
    x = correlated(512, 64, 0)
    weight = torch.randn(32, 64, generator=torch.Generator().manual_seed(1))
    scale, zero = fit_ranges(weight, hessian_of(x), fmt)
    values = fmt.fake(weight, scale, zero)
    assert torch.equal(fmt.quantize(weight, scale, zero).dequantize(), values)
    # A scale for a row, or powers of two alone, leave less to fit.
    share = 0.95 if isinstance(fmt.granularity, PerChannel) or fmt == MXFP4 else 0.6
    assert float(lost(weight, values, x).sum()) < share * float(lost(weight, fmt.fake(weight), x).sum())


def brute(weight: torch.Tensor, x: torch.Tensor, fmt: Int) -> float:
    """Least error of one output over a fine grid of scales of both groups."""
    tops = [w.abs().max() for w in weight.split(4, 1)]
    best = torch.inf
    for first in torch.linspace(0.5, 1.3, 81):
        for second in torch.linspace(0.5, 1.3, 81):
            high = torch.stack([tops[0] * first, tops[1] * second])[None]
            values = fmt.fake(weight, *fmt.parameters(-high, high))
            best = min(best, float(lost(weight, values, x)))
    return best


def test_two_groups_come_near_the_best_of_all_pairs_of_scales() -> None:
    fmt, ratios = Int(3, PerGroup(1, 4), full_range=True), []
    for seed in range(12):
        x = correlated(64, 8, seed)
        weight = torch.randn(1, 8, generator=torch.Generator().manual_seed(seed))
        values = fmt.fake(weight, *fit_ranges(weight, hessian_of(x), fmt, sweeps=4))
        start, best = float(lost(weight, fmt.fake(weight), x)), brute(weight, x, fmt)
        ratios.append((start - float(lost(weight, values, x))) / (start - best))
    assert sum(ratios) / len(ratios) > 0.75  # share of what there is to gain; one group at a time may stop before


def test_groups_of_a_convolution_are_fitted_apart() -> None:
    x = [correlated(200, 18, k) for k in range(2)]
    weight, fmt = torch.randn(6, 18), Int(4, PerGroup(1, 8), symmetric=False)
    both = fit_ranges(weight, torch.stack([hessian_of(v) for v in x]), fmt)
    alone = [fit_ranges(w, hessian_of(v), fmt) for w, v in zip(weight.split(3), x, strict=True)]
    for index in range(2):
        assert torch.allclose(both[index], torch.cat([a[index] for a in alone]))  # type: ignore[arg-type]


@pytest.mark.parametrize(("model", "x"), [(transformer(), rows()), (cnn(), images())], ids=["transformer", "cnn"])
def test_as_a_step_it_brings_the_model_closer(model: torch.nn.Module, x: torch.Tensor) -> None:
    fmt = Int(4, PerGroup(1, 8), symmetric=False, observer=Mse(20))
    plain, fitted = (Quantize(fmt, None, steps, real="never")(model, [x]) for steps in ((), [FitRanges()]))
    assert fitted.report.measured["sqnr"] > plain.report.measured["sqnr"] + 1  # type: ignore[union-attr,index]
    assert all(r.error is not None for r in fitted.report.layers if r.touched)  # type: ignore[union-attr]
    recipe: Recipe = fitted.recipe  # type: ignore[assignment]
    assert Recipe.from_yaml(recipe.to_yaml()).techniques[0].steps == (FitRanges(),)  # type: ignore[attr-defined]


def test_formats_without_a_range_of_their_own_are_left() -> None:
    torch.manual_seed(0)
    model, x = torch.nn.Sequential(torch.nn.Linear(32, 16)), correlated(64, 32, 0)
    for fmt in (NVFP4, KMeans(3), Int(8, PerTensor())):
        plain, fitted = (Quantize(fmt, None, steps, real="never")(model, [x]) for steps in ((), [FitRanges()]))
        assert torch.equal(plain[0].weight, fitted[0].weight)


def test_bad_knobs_and_shapes_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="0 sweeps fit nothing"):
        FitRanges(0)
    with pytest.raises(ConfigurationError, match="does not belong"):
        fit_ranges(torch.randn(4, 8), torch.eye(7), Int(4, PerGroup(1, 4)))
    with pytest.raises(ConfigurationError, match="give calibration inputs"):
        Quantize(Int(4), None, [FitRanges()])(torch.nn.Sequential(torch.nn.Linear(8, 8)))


def test_it_may_go_before_gptq() -> None:
    model, x = torch.nn.Sequential(torch.nn.Linear(64, 32)), correlated(256, 64, 0)
    fmt = Int(4, PerGroup(1, 16), symmetric=False)
    fitted, both = (Quantize(fmt, None, s, real="never")(model, [x]) for s in ([FitRanges()], [FitRanges(), Gptq()]))
    assert both.report.layers[0].error < fitted.report.layers[0].error  # type: ignore[union-attr]
