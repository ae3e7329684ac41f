"""Integer layers against the float arithmetic that they stand for, over random shapes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from hasten.compress.quantize import Int, PerChannel, PerToken
from hasten.compress.quantize.arithmetic import IntegerLayer, accumulate, dyadic, requantize
from hasten.compress.quantize.layers import ActivationQuantizer, IntegerLinear, Simulated, convolve, describe
from hasten.errors import ConfigurationError


def random_layer(seed: int) -> tuple[nn.Module, torch.Tensor]:
    """A linear or convolution layer of a random shape, and inputs."""
    g = torch.Generator().manual_seed(seed)

    def pick(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (1,), generator=g))

    torch.manual_seed(seed)
    kind = seed % 3
    if kind == 0:
        inner = pick(1, 300)
        return nn.Linear(inner, pick(1, 200), bias=bool(seed % 2)), torch.randn(pick(1, 40), inner, generator=g) + 0.5
    groups = (1, 1, 2, 4)[pick(0, 3)]
    before, after, kernel = groups * pick(1, 6), groups * pick(1, 6), pick(1, 4)
    settings: dict[str, Any] = {
        "stride": pick(1, 2), "padding": pick(0, 2), "dilation": pick(1, 2), "groups": groups, "bias": bool(seed % 2),
    }  # fmt: skip
    size = 2 * kernel + pick(2, 8)
    x = torch.randn(pick(1, 3), before, size, size + 1, generator=g) + 0.5
    if kind == 1:
        return nn.Conv2d(before, after, kernel, **settings), x
    return nn.Conv1d(before, after, kernel, **settings), x[:, :, 0]


@pytest.mark.parametrize("symmetric", [True, False])
def test_200_random_shapes_agree_with_the_simulation(symmetric: bool) -> None:
    worst = 0.0
    for seed in range(200):
        layer, x = random_layer(seed)
        told = describe(layer)
        weight = Int(8, PerChannel(0)).quantize(layer.weight.detach().flatten(1))
        fmt = Int(8, symmetric=symmetric)
        scale, zero = fmt.find(x)
        code = 0 if zero is None else int(zero)
        total = accumulate(fmt.quantize(x, scale, zero).codes, weight.codes, told, code)
        channel = -1 if told["kind"] == "Linear" else 1
        own = total.movedim(channel, -1).double() - code * weight.codes.sum(1).double()
        real = (own * weight.scales.double().reshape(-1) * float(scale)).movedim(-1, channel)
        shape = [1] * real.dim()
        shape[channel] = -1
        if layer.bias is not None:
            real = real + layer.bias.detach().double().view(shape)
        bias = None if layer.bias is None else layer.bias.detach()
        simulated = convolve(fmt.fake(x, scale, zero), weight.dequantize().view(told["shape"]), bias, told)
        assert simulated.shape == real.shape
        worst = max(worst, float((real - simulated).abs().max() / simulated.abs().max()))
    assert worst <= 1e-5


@pytest.mark.parametrize("symmetric", [True, False])
def test_codes_to_codes_without_a_float(symmetric: bool) -> None:
    differing, count = 0, 0
    for seed in range(60):
        layer, x = random_layer(seed)
        told = describe(layer)
        weight = Int(8, PerChannel(0)).quantize(layer.weight.detach().flatten(1))
        fmt, out = Int(8, symmetric=symmetric), Int(8, symmetric=False)
        scale, zero = fmt.find(x)
        bias = None if layer.bias is None else layer.bias.detach()
        goal = convolve(fmt.fake(x, scale, zero), weight.dequantize().view(told["shape"]), bias, told)
        out_scale, out_zero = out.find(goal)
        assert out_zero is not None
        inputs = (float(scale), 0 if zero is None else int(zero))
        integer = IntegerLayer.of(told, weight, bias, inputs, (float(out_scale), int(out_zero)))
        assert integer.bias.dtype is torch.int32
        got = integer.run(fmt.quantize(x, scale, zero).codes)
        expected = out.quantize(goal, out_scale, out_zero).codes
        assert int((got.int() - expected.int()).abs().max()) <= 1
        differing += int((got != expected).sum())
        count += got.numel()
    assert differing / count < 0.01  # ties, and the rounding of the bias


@settings(max_examples=100, deadline=None)
@given(value=st.floats(1e-9, 1e3), total=st.integers(-(2**24), 2**24))
def test_dyadic_multipliers(value: float, total: int) -> None:
    mantissa, shift = dyadic(torch.tensor([value]))
    assert 2**30 <= int(mantissa) < 2**31
    exact = float(torch.tensor([value]))
    assert int(mantissa) * 2.0 ** -int(shift) == pytest.approx(exact, rel=2**-30)
    got = int(requantize(torch.tensor([total], dtype=torch.int32), mantissa, shift, 0, Int(8)))
    product = total * exact
    if abs(product) < 126:
        assert abs(got - product) <= 0.5 + 1e-4
    with pytest.raises(ConfigurationError):
        dyadic(torch.tensor([0.0]))


@pytest.mark.parametrize(
    "fmt", [Int(8, PerToken(), dynamic=True), Int(8), Int(8, symmetric=False), Int(8, symmetric=False, dynamic=True)],
    ids=lambda f: f.label,
)  # fmt: skip
def test_the_integer_linear_layer_is_the_simulated_one(fmt: Int) -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(96, 40), torch.randn(2, 7, 96) + 0.3
    weight = Int(8, PerChannel(0)).quantize(layer.weight)
    limits = (None, None) if fmt.dynamic else fmt.find(x)
    activation = ActivationQuantizer(fmt, *limits)
    simulated = Simulated.of(layer, weight, activation)
    real = IntegerLinear(weight, layer.bias.detach(), activation)
    with torch.no_grad():
        got, expected = real(x), simulated(x)
    assert float((got - expected).abs().max()) <= 1e-5 * float(expected.abs().max())
    assert torch.allclose(real.plain()(x), expected, atol=1e-4)
    assert torch.equal(real.quantized().codes, simulated.quantized().codes)
