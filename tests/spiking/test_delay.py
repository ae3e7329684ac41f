"""Learned delays: gradients, exact equality of three forms, streams, training."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hasten.errors import ConfigurationError, ModelLoadError
from hasten.spiking import DelayConfig, DelayLine, DelayLinear, DelayNet, DiscreteDelayLinear
from hasten.spiking.delay import DelayStream, TapSchedule
from hasten.spiking.delay_line import on_grid
from hasten.testing import ModelKit, StreamKit

pytestmark = pytest.mark.usefixtures("one_thread")
CONFIG = DelayConfig(inputs=6, hidden=(12, 10), classes=4, max_delay=0.08, step=0.01, threshold=0.3, tau=0.03)


def spikes(steps: int = 40, batch: int = 3, lines: int = 6, rate: float = 0.15, seed: int = 0) -> torch.Tensor:
    return (torch.rand(steps, batch, lines, generator=torch.Generator().manual_seed(seed)) < rate).float()


def net(**changes: object) -> DelayNet:
    torch.manual_seed(0)
    made = DelayNet(DelayConfig(**{**vars(CONFIG), **changes}))
    for norm in made.norms:
        norm.running_mean.uniform_(-0.1, 0.1)
        norm.running_var.uniform_(0.02, 0.1)
    return made.eval()


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


def test_nothing_looks_ahead() -> None:
    model, x = net().discretise(), spikes()
    changed = x.clone()
    changed[25:] = 1 - changed[25:]
    assert torch.equal(model.potentials(x)[:25], model.potentials(changed)[:25])
    wide = net()
    torch.testing.assert_close(wide.potentials(x)[:25], wide.potentials(changed)[:25])


class TestStream(StreamKit):
    def stream(self) -> DelayStream:
        return net().discretise().stream()

    def input(self) -> torch.Tensor:
        return spikes()[:, 0]

    def same(self, a: list, b: list) -> bool:  # type: ignore[type-arg]
        return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_the_stream_is_the_network() -> None:
    model, x = net().discretise(), spikes()
    for sample in range(3):
        stream = model.stream()
        scores = stream.push(x[:, sample])
        torch.testing.assert_close(scores[-1], model(x)[sample])
        assert stream.spikes > 0
        size = stream.state_bytes
        stream.push(x[:, sample])
        assert stream.state_bytes == size


class TestModel(ModelKit):
    def model(self) -> DelayNet:
        return net().discretise()

    def example(self) -> torch.Tensor:
        return spikes()


def test_a_network_in_training_saves_too(tmp_path: Path) -> None:
    model = net()
    model.save_pretrained(tmp_path)
    again = DelayNet.from_pretrained(tmp_path)
    assert not again.discrete
    (tmp_path / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(ModelLoadError, match="save_pretrained"):
        DelayNet.from_pretrained(tmp_path)


def test_kinds_of_delays() -> None:
    learned, fixed, none = (net(delays=d) for d in ("learned", "fixed", "none"))
    assert learned.parameters_by_kind()["delays"] == 6 * 12 + 12 * 10 + 10 * 4
    assert fixed.parameters_by_kind() == none.parameters_by_kind()
    assert fixed.parameters_by_kind()["weights"] == learned.parameters_by_kind()["weights"]
    assert len(learned.groups(1e-3)) == 2
    assert len(fixed.groups(1e-3)) == 1
    assert learned.groups(1e-3)[1]["lr"] == pytest.approx(0.1)
    assert max(d.max() for d in learned.delays) <= 0.08 + 1e-6  # seconds
    assert net(delays="none").discretise()(spikes()).shape == (3, 4)


def test_training_learns_and_keeps_delays_inside() -> None:
    x, y = spikes(30, 60, 6), torch.arange(60) % 2
    x[:, y == 1] = x[:, y == 1].roll(5, 2)
    torch.manual_seed(0)
    model = DelayNet(DelayConfig(inputs=6, hidden=(12,), classes=2, max_delay=0.08, dropout=0.0))
    before = model.synapses[0].delay.detach().clone()
    result = model.fit((x, y), (x, y), 6, batch=20)
    assert result["losses"][-1] < result["losses"][0]
    assert not torch.equal(before, model.synapses[0].delay)
    assert 0 <= model.synapses[0].delay.min() <= model.synapses[0].delay.max() <= 8
    assert model.synapses[0].sigma == 0.5
    assert 0 <= result["accuracy"] <= 1


def test_the_tap_narrows_and_stays() -> None:
    widths = [TapSchedule.sigma(e, 40, 25) for e in range(40)]
    assert widths[0] == 12
    assert widths == sorted(widths, reverse=True)
    assert set(widths[10:]) == {0.5}


def test_bad_inputs_are_refused() -> None:
    with pytest.raises(ValueError, match="shorter than one step"):
        DelayConfig(max_delay=0.005)
    with pytest.raises(ValueError, match="0 or 1"):
        net()(0.5 * torch.ones(5, 1, 6))
    with pytest.raises(ConfigurationError, match="discretise"):
        net().stream()
    with pytest.raises(ConfigurationError, match="learned, fixed or none"):
        DelayConfig(delays="some")
    with pytest.raises(ConfigurationError, match="whole steps"):
        DelayLine(torch.ones(1, 1), torch.ones(1, 1))
