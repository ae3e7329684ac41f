"""Delayed synapses: gradients, and exact equality of convolution, delay line and a slow twin."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hasten.errors import ConfigurationError
from hasten.spiking import DelayLine, DelayLinear, DiscreteDelayLinear
from hasten.spiking.delay_line import on_grid

pytestmark = pytest.mark.usefixtures("one_thread")


def spikes(steps: int = 40, batch: int = 3, lines: int = 6, rate: float = 0.15, seed: int = 0) -> torch.Tensor:
    return (torch.rand(steps, batch, lines, generator=torch.Generator().manual_seed(seed)) < rate).float()


def slow(x: torch.Tensor, weight: torch.Tensor, delay: torch.Tensor) -> torch.Tensor:
    """A spike at t acts at t + d, one after the other."""
    out = torch.zeros(*x.shape[:2], len(weight), dtype=torch.float64)
    for t, b, j in x.nonzero().tolist():
        for i in range(len(weight)):
            when = t + int(delay[i, j])
            if when < len(x):
                out[when, b, i] += weight[i, j].double()
    return out.float()


@settings(max_examples=25, deadline=None)
@given(
    steps=st.integers(1, 30), batch=st.integers(1, 3), lines=st.integers(1, 9), outputs=st.integers(1, 7),
    longest=st.integers(0, 12), seed=st.integers(0, 999), cut=st.integers(0, 30),
)  # fmt: skip
def test_delay_line_convolution_and_the_slow_twin_are_the_same_bits(
    steps: int, batch: int, lines: int, outputs: int, longest: int, seed: int, cut: int
) -> None:
    g = torch.Generator().manual_seed(seed)
    x = spikes(steps, batch, lines, 0.3, seed)
    weight = on_grid(torch.randn(outputs, lines, generator=g))
    delay = torch.randint(0, longest + 1, (outputs, lines), generator=g, dtype=torch.int32)
    layer = DiscreteDelayLinear(weight, delay, 0.01)
    expected = slow(x, weight, delay)
    assert torch.equal(layer(x), expected)
    assert torch.equal(layer.convolve(x), expected)
    line = DelayLine(weight, delay, batch)
    cut = min(cut, steps)
    parts = [line.push(x[:cut]), line.push(x[cut:])]
    assert torch.equal(torch.cat(parts), expected)


def test_the_grid_is_fine_and_exact() -> None:
    weight = torch.randn(20, 300, generator=torch.Generator().manual_seed(0))
    grid = on_grid(weight)
    assert (grid - weight).abs().max() < 1e-4
    for order in (torch.arange(300), torch.arange(299, -1, -1), torch.randperm(300)):
        total = torch.zeros(20)
        for j in order.tolist():
            total = total + grid[:, j]
        assert torch.equal(total.double(), grid.double().sum(1))
    assert not on_grid(torch.zeros(2, 2)).any()


def test_gradient_of_the_delay_is_that_of_finite_differences() -> None:
    torch.manual_seed(0)
    layer = DelayLinear(4, 3, 0.1, 0.01).double()
    layer.sigma = 1.5
    x = spikes(25, 2, 4).double()
    target = torch.randn(25, 2, 3, dtype=torch.float64)

    def loss() -> torch.Tensor:
        return ((layer(x) - target) ** 2).sum()

    (gradient,) = torch.autograd.grad(loss(), layer.delay)
    with torch.no_grad():
        for place in [(0, 0), (1, 2), (2, 3)]:
            values = []
            for change in (1e-5, -1e-5):
                layer.delay[place] += change
                values.append(loss().item())
                layer.delay[place] -= change
            assert gradient[place].item() == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-3, abs=1e-6)


def test_a_sharp_gaussian_is_the_tap() -> None:
    torch.manual_seed(0)
    layer = DelayLinear(6, 5, 0.1, 0.01)
    with torch.no_grad():
        layer.delay.round_()
    layer.sigma = 0.1
    x = spikes()
    torch.testing.assert_close(layer(x), layer.discretise()(x), atol=1e-5, rtol=1e-4)
    assert torch.equal(layer.kernel().argmax(-1) if (layer.weight > 0).all() else layer.kernel().abs().argmax(-1),
                       layer.slots - 1 - layer.delay.long())  # fmt: skip


def test_whole_taps_are_those_of_inference_and_delays_learn_by_their_gaussian() -> None:
    torch.manual_seed(0)
    layer, x = DelayLinear(6, 5, 0.1, 0.01), spikes()
    up = torch.randn(len(x), 3, 5)
    layer.sigma = 1.5
    (wide,) = torch.autograd.grad((layer(x) * up).sum(), layer.delay)
    layer.whole = True
    out = layer(x)
    torch.testing.assert_close(out, layer.discretise()(x), atol=1e-5, rtol=1e-4)
    (weight, delay) = torch.autograd.grad((out * up).sum(), (layer.weight, layer.delay))
    torch.testing.assert_close(delay, wide)
    tap = layer.discretise()
    for i, j in [(0, 0), (3, 2), (4, 5)]:  # a weight's gradient is what arrives over its one tap
        late = int(tap.delay[i, j])
        arrived = torch.cat([torch.zeros(late, 3), x[: len(x) - late, :, j]])
        assert weight[i, j].item() == pytest.approx(float((arrived * up[..., i]).sum()), abs=1e-4)


def test_delays_that_do_not_learn_are_whole_from_the_start() -> None:
    torch.manual_seed(0)
    layer, x = DelayLinear(6, 5, 0.1, 0.01, learn_delay=False), spikes()
    assert torch.equal(layer.delay, layer.delay.round())
    torch.testing.assert_close(layer(x), layer.discretise()(x), atol=1e-5, rtol=1e-4)


def test_few_synapses_per_neuron() -> None:
    torch.manual_seed(0)
    layer, x = DelayLinear(20, 7, 0.1, 0.01, fan_in=3), spikes(lines=20)
    assert ((layer.weight != 0).sum(1) == 3).all()
    assert layer.synapses == 21
    up = torch.randn(len(x), 3, 7)
    (layer(x) * up).sum().backward()
    assert ((layer.weight.grad != 0) <= (layer.weight != 0)).all()
    assert ((layer.delay.grad != 0) <= (layer.weight != 0)).all()
    assert ((layer.discretise().weight != 0).sum(1) <= 3).all()
    assert DelayLinear(3, 2, 0.1, 0.01, fan_in=8).synapses == 6
    with pytest.raises(ConfigurationError, match="1 to 3"):
        DelayLinear(3, 2, 0.1, 0.01, fan_in=0)


def test_delays_that_are_no_whole_steps_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="whole steps"):
        DelayLine(torch.ones(1, 1), torch.ones(1, 1))
