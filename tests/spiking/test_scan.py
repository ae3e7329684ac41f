"""The fused kernels against the plain steps: spikes, states and every gradient."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hasten.errors import ConfigurationError
from hasten.spiking.neuron import (
    AdaptiveParameters,
    AdaptiveState,
    AlphaParameters,
    AlphaState,
    LIFParameters,
    SynapticParameters,
    SynapticState,
    adaptive_step,
    alpha_step,
    leak_step,
    lif_step,
    synaptic_step,
)  # fmt: skip
from hasten.spiking.scan import adaptive_scan, alpha_scan, gate, leak_scan, lif_scan, loop, synaptic_scan
from hasten.spiking.surrogate import SURROGATES, Surrogate, spike

pytestmark = pytest.mark.usefixtures("one_thread")
SHAPE = (7, 3, 5)  # time, batch, neurons


def tensors(seed: int, *shapes: tuple[int, ...], scale: float = 1.0) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [(scale * torch.randn(s, generator=g, dtype=torch.float64)).requires_grad_() for s in shapes]


def gradients(outputs: list[torch.Tensor], inputs: list[torch.Tensor], seed: int = 9) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    loss = sum((o * torch.randn(o.shape, generator=g, dtype=o.dtype)).sum() for o in outputs)
    return list(torch.autograd.grad(loss, inputs, allow_unused=True))


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    """True where all are equal up to the last digits of float64; else the difference is raised."""
    for one, other in zip(a, b, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-10)
    return True


@pytest.mark.parametrize("reset", ["zero", "subtract", "late"])
@pytest.mark.parametrize("detach", [True, False])
@pytest.mark.parametrize("shape", ["scalar", "channel"])
def test_leaky_neurons_match_their_steps(reset: str, detach: bool, shape: str) -> None:
    x, start = tensors(1, SHAPE, SHAPE[1:])
    size = () if shape == "scalar" else (5,)
    decay = torch.full(size, 0.8, dtype=torch.float64, requires_grad=True)
    threshold = torch.full(size, 0.7, dtype=torch.float64, requires_grad=True)
    p = LIFParameters(decay, threshold, reset, Surrogate("arctan"), detach)
    ours = lif_scan(x, start, p)
    twin = loop(lambda now, v: lif_step(now, v, p), x, start)
    assert torch.equal(ours[0], twin[0])
    assert torch.equal(ours[1], twin[1])
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(lif_scan(x, start, p), twin, strict=True))
    assert 0.05 < ours[0].mean() < 0.9
    inputs = [x, start, decay, threshold]
    assert same(gradients(list(ours), inputs), gradients(list(twin), inputs))


@pytest.mark.parametrize("name", sorted(SURROGATES))
def test_every_surrogate_is_the_same_in_both(name: str) -> None:
    (x,) = tensors(2, SHAPE)
    p = LIFParameters(0.9, 0.5, "subtract", Surrogate(name))
    twin = loop(lambda now, v: lif_step(now, v, p), x, torch.zeros(SHAPE[1:], dtype=torch.float64))
    assert same(gradients([lif_scan(x, None, p)[0]], [x]), gradients([twin[0]], [x]))


def test_leak_matches_its_steps() -> None:
    x, start = tensors(3, SHAPE, SHAPE[1:])
    decay = torch.full((5,), 0.8, dtype=torch.float64, requires_grad=True)
    ours, twin = leak_scan(x, start, decay), loop(lambda now, v: leak_step(now, v, decay), x, start)
    assert same([ours[0]], [twin[0]])
    assert same(gradients(list(ours), [x, start, decay]), gradients(list(twin), [x, start, decay]))


def test_leak_passes_gradcheck() -> None:
    x, start = tensors(4, (4, 2, 3), (2, 3))
    decay = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *a: leak_scan(*a)[0], (x, start, decay))


@pytest.mark.parametrize("reset", ["zero", "subtract"])
@pytest.mark.parametrize("detach", [True, False])
def test_adaptive_neurons_match_their_steps(reset: str, detach: bool) -> None:
    x, v, b = tensors(5, SHAPE, SHAPE[1:], SHAPE[1:])
    decay, threshold, recovery, jump = (
        torch.full((5,), f, dtype=torch.float64, requires_grad=True) for f in (0.8, 0.6, 0.9, 0.3)
    )
    p = AdaptiveParameters(recovery, jump, LIFParameters(decay, threshold, reset, detach=detach))
    state = AdaptiveState(v, b)
    ours, twin = adaptive_scan(x, state, p), loop(lambda now, s: adaptive_step(now, s, p), x, state)
    assert torch.equal(ours[0], twin[0])
    inputs = [x, v, b, decay, threshold, recovery, jump]
    assert same([ours[0], *ours[1]], [twin[0], *twin[1]])
    assert same(gradients([ours[0], *ours[1]], inputs), gradients([twin[0], *twin[1]], inputs))


def test_synaptic_and_alpha_neurons_match_their_steps() -> None:
    (x, zero) = tensors(6, SHAPE, SHAPE[1:])
    zero = torch.zeros_like(zero)
    sp, ap = SynapticParameters(0.7), AlphaParameters(0.7)
    ours, _ = synaptic_scan(x, None, sp)
    twin, _ = loop(lambda now, s: synaptic_step(now, s, sp), x, SynapticState(zero, zero))
    assert same([ours, *gradients([ours], [x])], [twin, *gradients([twin], [x])])
    ours, _ = alpha_scan(x, None, ap)
    twin, _ = loop(lambda now, s: alpha_step(now, s, ap), x, AlphaState(zero, zero, zero))
    assert same([ours, *gradients([ours], [x])], [twin, *gradients([twin], [x])])


@settings(max_examples=30, deadline=None)
@given(
    steps=st.integers(1, 9), neurons=st.integers(1, 1100), cut=st.integers(0, 9), seed=st.integers(0, 99),
    reset=st.sampled_from(["zero", "subtract", "late"]),
)  # fmt: skip
def test_any_cut_of_the_time_gives_the_same_spikes(steps: int, neurons: int, cut: int, seed: int, reset: str) -> None:
    x = torch.randn(steps, 1, neurons, generator=torch.Generator().manual_seed(seed))
    p = LIFParameters(0.9, 0.8, reset)  # type: ignore[arg-type]
    whole, last = lif_scan(x, None, p)
    cut = min(cut, steps)
    state = None
    parts = []
    for piece in (x[:cut], x[cut:]):
        if len(piece):
            spikes, state = lif_scan(piece, state, p)
            parts.append(spikes)
    assert torch.equal(torch.cat(parts), whole)
    assert torch.equal(state, last)
    twin, _ = loop(lambda now, v: lif_step(now, v, p), x, torch.zeros(1, neurons))
    assert torch.equal(whole, twin)


def test_half_precision_is_widened_and_bad_states_are_refused() -> None:
    x = torch.rand(4, 2, 3).bfloat16()
    spikes, state = lif_scan(x, None, LIFParameters())
    assert (spikes.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(spikes.float(), lif_scan(x.float(), None, LIFParameters())[0])
    with pytest.raises(ConfigurationError, match="does not fit"):
        lif_scan(torch.ones(4, 2, 3), torch.zeros(2, 4), LIFParameters())


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("name", sorted(SURROGATES))
def test_the_gate_is_its_plain_form(name: str, signed: bool) -> None:
    g = torch.Generator().manual_seed(0)
    x, up = (torch.randn(5, 7, 40, generator=g, dtype=torch.float64) for _ in range(2))
    results = []
    for shape in (lambda z: gate(z, 1.2, Surrogate(name), signed), plain_gate(name, signed)):
        z = x.clone().requires_grad_()
        y = shape(z)
        (y * up).sum().backward()
        results.append((y.detach(), z.grad))
    assert torch.equal(results[0][0], results[1][0])
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-9, atol=1e-12)


def plain_gate(name: str, signed: bool):  # type: ignore[no-untyped-def]
    def run(z: torch.Tensor) -> torch.Tensor:
        u = z / (z.square().mean(-1, keepdim=True) + 1e-3).sqrt()
        bump = Surrogate(name)
        return spike(u, 1.2, bump) - (spike(-u, 1.2, bump) if signed else 0.0)

    return run
