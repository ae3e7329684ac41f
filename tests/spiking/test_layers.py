"""Modules: scan, step and forward agree; parameters stay in their bounds."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hasten.errors import ConfigurationError
from hasten.spiking import IF, LIF, PLIF, Adaptive, Alpha, Leak, Synaptic, constrain

pytestmark = pytest.mark.usefixtures("one_thread")
KINDS = [
    IF(), LIF(0.8), LIF(0.8, start=0.5), LIF(torch.tensor([0.5, 0.6, 0.7, 0.8]), torch.tensor([0.4, 0.5, 0.6, 0.7])),
    PLIF(3.0, threshold=0.4), Synaptic(0.6, 0.8), Alpha(0.6, 0.8), Adaptive(decay=0.8), Leak(0.9),
]  # fmt: skip


@pytest.mark.parametrize("layer", KINDS, ids=lambda m: type(m).__name__)
def test_steps_scan_and_forward_agree(layer: nn.Module) -> None:
    x = torch.rand(9, 3, 4, generator=torch.Generator().manual_seed(0))
    whole, last = layer.scan(x)
    state, parts = None, []
    for now in x:
        out, state = layer.step(now, state)
        parts.append(out)
    torch.testing.assert_close(torch.stack(parts), whole)
    torch.testing.assert_close(state, last)
    assert torch.equal(layer(x), whole)
    assert whole.abs().sum() > 0


def test_what_is_learned_is_a_parameter_and_stays_in_bounds() -> None:
    layer = LIF(0.9, learn=("decay", "threshold"))
    assert {n for n, _ in layer.named_parameters()} == {"decay", "threshold"}
    with torch.no_grad():
        layer.decay.fill_(1.7)
        layer.threshold.fill_(-1.0)
    constrain(nn.Sequential(layer))
    assert layer.decay == 1.0
    assert layer.threshold > 0
    assert not list(LIF(0.9).parameters())


def test_exported_neurons_take_the_plain_steps() -> None:
    layer = LIF(0.8)
    x = torch.rand(5, 2, 3)
    program = torch.export.export(layer, (x,))
    torch.testing.assert_close(program.module()(x), layer(x))


def test_beta_is_another_name_of_the_decay() -> None:
    layers = [LIF(beta=0.75), Synaptic(0.5, beta=0.75), Alpha(0.5, beta=0.75), Adaptive(beta=0.75), Leak(beta=0.75)]
    for layer in layers:
        assert layer.decay.item() == 0.75


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="seconds"):
        LIF()
    with pytest.raises(ConfigurationError, match="seconds"):
        LIF(0.9, tau=0.02, dt=0.001)
    with pytest.raises(ConfigurationError, match="two names of one number"):
        LIF(0.9, beta=0.8)
    with pytest.raises(ConfigurationError, match="between 0 and 1"):
        LIF(1.2)
    with pytest.raises(ConfigurationError, match="more than 1"):
        PLIF(1.0)
