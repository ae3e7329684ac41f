"""Networks with delays: causality, streams, kinds of delays, training."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hasten.errors import ConfigurationError, ModelLoadError
from hasten.spiking import DelayConfig, DelayNet, DelayStream
from hasten.spiking.delay_net import TapSchedule
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


def test_rounding_costs_nothing_after_training() -> None:
    x, y = spikes(30, 60, 6), torch.arange(60) % 2
    torch.manual_seed(0)
    model = DelayNet(DelayConfig(inputs=6, hidden=(12,), classes=2, max_delay=0.08, dropout=0.0, fan_in=4))
    assert model.parameters_by_kind()["delays"] == 4 * 12 + 12 * 2
    model.fit((x, y), None, 8, batch=20)
    torch.testing.assert_close(model(x), model.discretise()(x), atol=1e-3, rtol=1e-3)
    assert not TapSchedule.whole(5, 8)
    assert all(TapSchedule.whole(epoch, 8) for epoch in (6, 7, 8))


def test_sparse_networks_save_and_load(tmp_path: Path) -> None:
    model = net(fan_in=3)
    model.save_pretrained(tmp_path)
    again = DelayNet.from_pretrained(tmp_path)
    assert torch.equal(again.synapses[0].connected, model.synapses[0].connected)
    torch.testing.assert_close(again(spikes()), model(spikes()))


def test_the_tap_narrows_and_stays() -> None:
    widths = [TapSchedule.sigma(e, 40, 25) for e in range(40)]
    assert widths[0] == 12
    assert widths == sorted(widths, reverse=True)
    assert set(widths[10:]) == {0.5}


def test_bad_inputs_are_refused() -> None:
    with pytest.raises(ValueError, match="shorter than one step"):
        DelayConfig(max_delay=0.005)
    with pytest.raises(ValueError, match="fan_in 0"):
        DelayConfig(fan_in=0)
    with pytest.raises(ValueError, match="0 or 1"):
        net()(0.5 * torch.ones(5, 1, 6))
    with pytest.raises(ConfigurationError, match="6 input lines"):
        net()(torch.zeros(5, 1, 7))
    with pytest.raises(ConfigurationError, match="6 input lines"):
        net().discretise().stream().push(torch.zeros(5, 7))
    with pytest.raises(ConfigurationError, match="discretise"):
        net().stream()
    with pytest.raises(ConfigurationError, match="learned, fixed or none"):
        DelayConfig(delays="some")
