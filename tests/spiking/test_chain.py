"""Linear chains in one call: the network's own spikes, and the same bits for any cut of time and batch."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from hasten.spiking import IF, LIF, Leak, SpikeLinear, SpikingNetwork
from hasten.spiking import chain as subject
from hasten.spiking.chain import chain_of
from hasten.spiking.pieces import available

pytestmark = pytest.mark.usefixtures("one_thread")


def network(last: bool = True) -> SpikingNetwork:
    torch.manual_seed(0)
    layers = [
        SpikeLinear(45, 70), LIF(0.9, 0.5, "subtract"), nn.Dropout(0.3), nn.Linear(70, 33),
        LIF(torch.linspace(0.5, 0.9, 33), torch.linspace(0.2, 0.4, 33), "zero", start=0.5),
        nn.Linear(33, 20, bias=False), LIF(0.8, 0.3, "late"), nn.Linear(20, 9), IF(0.6),
    ]  # fmt: skip
    return SpikingNetwork([*layers, nn.Linear(9, 5)] if last else layers, 14, direct=False).eval()


def spikes(rate: float, steps: int = 14, batch: int = 7) -> torch.Tensor:
    return (torch.rand(steps, batch, 45, generator=torch.Generator().manual_seed(1)) < rate).float()


@pytest.mark.parametrize("rate", [0.03, 0.4])
@pytest.mark.parametrize("last", [True, False])
def test_same_as_layer_by_layer(rate: float, last: bool) -> None:
    net, x = network(last), spikes(rate)
    with torch.no_grad():
        twin, state = net._through(0, x, net.init_state(), len(x))
        result = chain_of(net.layers, []).run(x)  # type: ignore[union-attr]
    assert result is not None
    torch.testing.assert_close(result[0], twin, atol=1e-4, rtol=1e-4)
    assert twin.abs().sum() > 0
    for ours, theirs in zip(result[1], state, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("rate", [0.03, 0.4])
def test_any_cut_gives_the_same_bits(rate: float, monkeypatch: pytest.MonkeyPatch) -> None:
    net, x = network(), spikes(rate)
    tiled: list[bool] = []
    chain = chain_of(net.layers, tiled)
    assert chain is not None
    whole, last = chain.run(x)  # type: ignore[misc]
    assert tiled[0] == (available() and rate > subject.GATHER_BELOW)
    parts, state = [], None
    for piece in x.split([3, 1, 10]):
        out, state = chain.run(piece, state)  # type: ignore[misc]
        parts.append(out)
    assert torch.equal(torch.cat(parts), whole)
    assert all(torch.equal(a, b) for a, b in zip(state, last, strict=True) if a is not None)  # type: ignore[arg-type]
    assert torch.equal(torch.cat([chain.run(x[:, a:b])[0] for a, b in ((0, 2), (2, 7))], 1), whole)  # type: ignore[index]
    monkeypatch.setattr(subject, "_SPAN_BYTES", 1)
    assert torch.equal(chain.run(x)[0], whole)  # type: ignore[index]


def test_inference_takes_it_and_streams_go_on() -> None:
    net, x = network(), spikes(0.1)
    with torch.no_grad():
        whole = net.outputs(x)
        assert torch.equal(whole, chain_of(net.layers, net._tiled).run(x)[0])  # type: ignore[union-attr, index]
    given = None
    parts, state = [], None
    for piece in x.split(4):
        before: list[torch.Tensor] | None = copy.deepcopy(state)
        out, following = net.advance(piece, state)
        if before is not None:
            assert all(torch.equal(a, b) for a, b in zip(before, state, strict=True) if a is not None)  # type: ignore[arg-type]
        parts.append(out)
        given, state = state, following
    assert torch.equal(torch.cat(parts), whole)
    assert given is not None


def test_training_mode_draws_dropout_for_all_steps() -> None:
    net, x = network().train(), spikes(0.3)
    with torch.no_grad():
        torch.manual_seed(3)
        once = net.outputs(x)
        torch.manual_seed(3)
        assert torch.equal(once, net._through(0, x, net.init_state(), 14)[0])
        assert not torch.equal(once, net.eval().outputs(x))


def test_what_is_no_chain_of_spikes_runs_layer_by_layer() -> None:
    net = network()
    assert chain_of(net.layers, []).run(0.5 * spikes(0.1)) is None  # type: ignore[union-attr]
    analogue = torch.rand(14, 3, 45)
    with torch.no_grad():
        torch.testing.assert_close(net.outputs(analogue), net._through(0, analogue, net.init_state(), 14)[0])
    assert chain_of([nn.Linear(3, 3), Leak(0.5)], []) is None
    assert chain_of([nn.Linear(3, 3), nn.Linear(3, 3), LIF(0.5)], []) is None
    assert chain_of([nn.Linear(3, 3).double(), LIF(0.5)], []) is None
    assert chain_of([LIF(0.5)], []) is None
