"""The linear layer that looks for spikes, against the dense product."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hasten.measure.counting import cost
from hasten.spiking import events as subject
from hasten.spiking.events import SpikeLinear, spike_linear

pytestmark = pytest.mark.usefixtures("one_thread")


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 90), st.integers(1, 70), st.integers(1, 40), st.floats(0, 0.2), st.integers(0, 99))
def test_same_as_the_dense_product(rows: int, inputs: int, outputs: int, rate: float, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    x = (torch.rand(rows, inputs, generator=g) < rate).float().requires_grad_()
    weight = torch.randn(outputs, inputs, generator=g, requires_grad=True)
    before, subject._LEAST_WORK = subject._LEAST_WORK, 0
    try:
        ours = spike_linear(x, weight)
        twin = torch.nn.functional.linear(x, weight)
        up = torch.randn(ours.shape, generator=g)
        mine, theirs = (torch.autograd.grad(y, (x, weight), up) for y in (ours, twin))
    finally:
        subject._LEAST_WORK = before
    torch.testing.assert_close(ours, twin, atol=1e-4, rtol=1e-4)
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_the_form_follows_the_data() -> None:
    g = torch.Generator().manual_seed(0)
    few = (torch.rand(256, 100, generator=g) < 0.03).float()
    assert subject.spikes_of(few) is not None
    assert subject.spikes_of((torch.rand(256, 100, generator=g) < 0.5).float()) is None
    assert subject.spikes_of(few * 0.5) is None
    counts, index = subject.spikes_of(few)
    assert counts.sum() == few.sum()
    row = 7
    assert sorted(index[row, : counts[row]].tolist()) == few[row].nonzero().flatten().tolist()


def test_the_cost_is_that_of_the_dense_layer() -> None:
    layer = SpikeLinear(256, 256)
    assert cost(layer, torch.zeros(64, 256)).macs == 64 * 256 * 256


def test_it_exports_as_a_linear_layer() -> None:
    layer, x = SpikeLinear(512, 512), torch.zeros(16, 512)
    program = torch.export.export(layer, (x,))
    torch.testing.assert_close(program.module()(x), layer(x))
