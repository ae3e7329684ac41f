"""The language model with astrocytes: two forms, one result."""

from __future__ import annotations

import pytest
import torch

from hasten.errors import ConfigurationError
from hasten.spiking import AstroConfig, AstroLM, AstroStream
from hasten.spiking import astrocyte as subject
from hasten.testing import ModelKit, StreamKit

pytestmark = pytest.mark.usefixtures("one_thread")
CONFIG = AstroConfig(vocab=20, width=32, layers=2, head_size=8, feed_forward=48)


def model(**changes: object) -> AstroLM:
    torch.manual_seed(0)
    return AstroLM(AstroConfig(**{**vars(CONFIG), **changes})).eval()


def tokens(time: int = 150, batch: int = 2) -> torch.Tensor:
    return torch.randint(0, 20, (batch, time), generator=torch.Generator().manual_seed(0))


def slow_recall(q, k, v, tau, trace):  # type: ignore[no-untyped-def]
    out = []
    for t in range(q.shape[2]):
        trace = torch.exp(-1 / tau).unsqueeze(-1) * trace + k[:, :, t].unsqueeze(-1) * v[:, :, t].unsqueeze(-2)
        out.append((q[:, :, t].unsqueeze(-2) @ trace).squeeze(-2))
    return torch.stack(out, 2), trace


@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_chunks_are_the_recurrence(chunk: int) -> None:
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, 130, 4, generator=g, dtype=torch.float64) for _ in range(3))
    tau = 1.05 + 30 * torch.rand(3, 4, generator=g, dtype=torch.float64)
    start = torch.randn(2, 3, 4, 4, generator=g, dtype=torch.float64)
    for ours, twin in zip(subject.recall(q, k, v, tau, start, chunk), slow_recall(q, k, v, tau, start), strict=True):
        torch.testing.assert_close(ours, twin, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("astrocyte", [True, False])
def test_step_by_step_is_parallel_in_double(astrocyte: bool) -> None:
    net, ids = model(astrocyte=astrocyte).double(), tokens()
    parallel = net(ids)
    state, steps = net.init_state(2), []
    for t in range(ids.shape[1]):
        logits, state = net.step(ids[:, t], state)
        steps.append(logits)
    assert (torch.stack(steps, 1) - parallel).abs().max() < 1e-9
    assert (net(ids, 7) - parallel).abs().max() < 1e-9


def test_step_by_step_is_parallel_in_single() -> None:
    net, ids = model(), tokens(80)
    state, steps = net.init_state(2), []
    for t in range(80):
        logits, state = net.step(ids[:, t], state)
        steps.append(logits)
    assert (torch.stack(steps, 1) - net(ids)).abs().max() < 1e-4


def test_gradients_of_any_chunk_agree() -> None:
    net, ids = model().double(), tokens(70)
    results = []
    for chunk in (70, 9):
        net.zero_grad()
        net(ids, chunk).square().sum().backward()
        results.append([p.grad.clone() for p in net.parameters()])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)


def test_the_state_has_the_stated_bytes_and_does_not_grow() -> None:
    net = model()
    state = net.init_state()
    for token in tokens(30, 1)[0]:
        _, state = net.step(token.reshape(1), state)
    held = sum(part.numel() * part.element_size() for block in state for part in block)
    assert held == CONFIG.state_bytes == 2 * (4 * 64 + 2 * 32) * 4


class TestStream(StreamKit):
    def stream(self) -> AstroStream:
        return model().stream()

    def input(self) -> torch.Tensor:
        return tokens(40, 1)[0]

    def same(self, a: list, b: list) -> bool:  # type: ignore[type-arg]
        return len(a) == len(b) and all((x - y).abs().max() < 1e-4 for x, y in zip(a, b, strict=True))


class TestModel(ModelKit):
    def model(self) -> AstroLM:
        return model()

    def example(self) -> torch.Tensor:
        return tokens(20)


def test_spikes_are_spikes() -> None:
    rates = model().spike_rates(tokens())
    assert set(rates) == {"neuron", "key", "value", "feed-forward"}
    assert all(0 < r < 1 for r in rates.values())
    assert max(rates.values()) < 0.3  # what is normally distributed fires at 23 %


def test_traces_generation_and_the_ablation() -> None:
    net = model()
    trace = net.astrocyte_trace(tokens(12, 1)[0])
    assert trace.shape == (2, 4, 12)
    first, second = (net.generate([1, 2, 3], 8, seed=5) for _ in range(2))
    assert first == second
    assert len(first) == 8
    assert net.generate([1], 4, temperature=0.0) == net.generate([1], 4, temperature=0.0, seed=9)
    plain = AstroLM(net.neurons_only())
    sizes = [sum(p.numel() for p in m.parameters()) for m in (net, plain)]
    assert abs(sizes[1] / sizes[0] - 1) < 0.1
    assert plain.config.astrocyte is False
    with pytest.raises(ConfigurationError, match="no astrocytes"):
        plain.astrocyte_trace(tokens(3, 1)[0])


def test_learning_lowers_the_loss() -> None:
    net, ids = model().train(), tokens(40, 8)
    optimiser = torch.optim.Adam(net.parameters(), 3e-3)
    losses = []
    for _ in range(25):
        loss = net.loss(ids)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


def test_bad_inputs_are_refused() -> None:
    with pytest.raises(ValueError, match="head_size 12 does not divide the width 32"):
        AstroConfig(width=32, head_size=12)
    with pytest.raises(ValueError, match="shapes"):
        model().step(torch.tensor([1]), model(width=64).init_state())
    with pytest.raises(ConfigurationError, match="at least one token"):
        model().generate([], 3)
    with pytest.raises(ConfigurationError, match="tokens from 0 to 300"):
        model()(torch.tensor([[0, 300]]))
