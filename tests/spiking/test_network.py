"""Networks: all steps at once, step by step, and one step."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hasten.errors import ConfigurationError
from hasten.spiking import IF, LIF, SpikingNetwork

pytestmark = pytest.mark.usefixtures("one_thread")


def net(timesteps: int = 4, direct: bool = True) -> SpikingNetwork:
    torch.manual_seed(0)
    layers = [
        nn.Conv2d(1, 4, 3, bias=False), nn.MaxPool2d(2), LIF(0.9, 0.2), nn.Conv2d(4, 6, 3, bias=False), LIF(0.8, 0.2),
        nn.Flatten(), nn.Linear(54, 3, bias=False),
    ]  # fmt: skip
    return SpikingNetwork(layers, timesteps, direct).eval()


def test_steps_are_the_whole() -> None:
    model, x = net(), torch.rand(5, 1, 12, 12)
    state, total = model.init_state(), torch.zeros(5, 3)
    for _ in range(4):
        out, state = model.step(x, state)
        total += out
    torch.testing.assert_close(model(x), total / 4)
    assert model.outputs(x).abs().sum() > 0


def test_time_first_inputs() -> None:
    model, x = net(3, direct=False), torch.rand(3, 5, 1, 12, 12)
    state, outs = model.init_state(), []
    for now in x:
        out, state = model.step(now, state)
        outs.append(out)
    torch.testing.assert_close(model.outputs(x), torch.stack(outs))
    with pytest.raises(ConfigurationError, match="2 steps"):
        model(x[:2])


def test_pieces_of_the_time_are_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    from hasten.spiking import network

    for direct in (True, False):
        model = net(7, direct)
        x = torch.rand(5, 1, 12, 12) if direct else torch.rand(7, 5, 1, 12, 12)
        whole = model.outputs(x)  # with gradients: all steps of a layer together
        with torch.no_grad():
            monkeypatch.setattr(network, "_HELD", 4 * 2 * x[0].numel())
            torch.testing.assert_close(model.outputs(x), whole)
    parts, state = [], None
    for piece in x.split(3):
        out, state = model.advance(piece, state)
        parts.append(out)
    torch.testing.assert_close(torch.cat(parts), whole)
    with pytest.raises(ConfigurationError, match="direct=False"):
        net(3).advance(x)


def test_one_step_is_a_plain_network_with_binary_activations() -> None:
    model = net(1)
    x = torch.rand(6, 1, 12, 12)
    one = model.one_step()
    y = x
    for layer in model.layers:
        y = (y > layer.threshold).float() if isinstance(layer, LIF) else layer(y)
    with torch.no_grad():
        assert torch.equal(one(x), y)
        torch.testing.assert_close(model(x), y)
    program = torch.export.export(one.eval(), (x,))
    assert torch.equal(program.module()(x), one(x))
    assert one.state_bytes == 0


def test_bad_networks_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="at least one step"):
        net(0)
    with pytest.raises(ConfigurationError, match="neurons"):
        SpikingNetwork([nn.Linear(2, 2)], 3)
    assert SpikingNetwork([IF()], 2).with_timesteps(5).timesteps == 5
