"""Steps against numbers that were worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from hasten.errors import ConfigurationError
from hasten.spiking import neuron as subject
from hasten.spiking.neuron import LIFParameters


def run(x: list[float], **options: object) -> tuple[list[float], list[float]]:
    state, spikes, states = torch.zeros(1), [], []
    for value in x:
        s, state = subject.lif_step(torch.tensor([value]), state, LIFParameters(**options))  # type: ignore[arg-type]
        spikes.append(s.item())
        states.append(round(state.item(), 6))
    return spikes, states


def test_resets_by_hand() -> None:
    x = [0.8, 0.8, 0.1]
    assert run(x, decay=0.5, reset="zero") == ([0, 1, 0], [0.8, 0.0, 0.1])
    assert run(x, decay=0.5, reset="subtract") == ([0, 1, 0], [0.8, 0.2, 0.2])
    assert run(x, decay=0.5, reset="late") == ([0, 1, 0], [0.8, 1.2, -0.3])


def test_a_spike_needs_more_than_the_threshold() -> None:
    assert run([1.0], decay=1.0)[0] == [0.0]
    assert run([1.0 + 1e-6], decay=1.0)[0] == [1.0]


def test_if_ignores_the_decay_and_plif_is_lif_with_a_gain() -> None:
    x, v = torch.tensor([0.3]), torch.tensor([0.4])
    assert subject.if_step(x, v, LIFParameters(0.1))[1].item() == pytest.approx(0.7)
    _, state = subject.plif_step(x, v, torch.zeros(1), LIFParameters())
    assert state.item() == pytest.approx(0.35)


def test_time_constants_are_seconds() -> None:
    assert subject.decay_of(0.02, 0.001) == pytest.approx(math.exp(-0.05))
    assert subject.decay_of(0.02, 0.001, "euler") == pytest.approx(0.95)
    with pytest.raises(ConfigurationError, match="seconds"):
        subject.decay_of(-1.0, 0.001)
    with pytest.raises(ConfigurationError, match="longer than tau"):
        subject.decay_of(0.001, 0.01, "euler")


def test_the_alpha_response_rises_and_falls_with_a_peak_near_one() -> None:
    p = subject.AlphaParameters(0.95, LIFParameters(0.0, 1e9))
    zero = torch.zeros(1)
    state, seen = subject.AlphaState(zero, zero, zero), []
    for t in range(120):
        _, state = subject.alpha_step(torch.ones(1) if t == 0 else zero, state, p)
        seen.append(state.current.item())
    peak = max(range(120), key=seen.__getitem__)
    assert 15 <= peak <= 22  # 1 / (1 - 0.95) steps
    assert max(seen) == pytest.approx(1.0, abs=0.05)
    assert seen[-1] < 0.1


def test_an_adaptive_neuron_fires_less_and_less() -> None:
    p = subject.AdaptiveParameters(0.99, 0.5, LIFParameters(0.0, 0.5))
    state, spikes = subject.AdaptiveState(torch.zeros(1), torch.zeros(1)), []
    for _ in range(60):
        s, state = subject.adaptive_step(torch.ones(1), state, p)
        spikes.append(s.item())
    assert sum(spikes[:10]) > sum(spikes[50:])


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: LIFParameters(decay=1.5), "between 0 and 1"),
        (lambda: LIFParameters(threshold=0.0), "positive"),
        (lambda: LIFParameters(reset="soft"), "zero, subtract or late"),  # type: ignore[arg-type]
        (lambda: subject.AlphaParameters(1.0), "in \\(0, 1\\)"),
        (lambda: subject.AdaptiveParameters(jump=0.0), "does not adapt"),
        (lambda: subject.AdaptiveParameters(membrane=LIFParameters(reset="late")), "resets at once"),
    ],
)
def test_bad_parameters_are_refused(make, words: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ConfigurationError, match=words):
        make()
