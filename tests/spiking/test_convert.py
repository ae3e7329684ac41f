"""Conversion: exact where it can be, refused where it cannot."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hasten.errors import ConfigurationError, UnsupportedModelError
from hasten.spiking import LIF, QuantisedClip, quantised, to_spiking

pytestmark = pytest.mark.usefixtures("one_thread")


def ann(bias: bool = False, norm: bool = False) -> nn.Sequential:
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Conv2d(1, 4, 3, padding=1, bias=bias)]
    layers += [nn.BatchNorm2d(4)] if norm else []
    layers += [
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(64, 16, bias=bias),
        nn.ReLU(),
        nn.Linear(16, 3, bias=bias),
    ]
    model = nn.Sequential(*layers)
    if norm:
        model.train()
        for _ in range(3):
            model(torch.rand(16, 1, 8, 8))
    return model.eval()


def test_levels_are_levels_and_their_gradient_goes_straight_through() -> None:
    clip = QuantisedClip(4, 2.0)
    x = torch.tensor([-1.0, 0.2, 0.3, 1.1, 5.0], requires_grad=True)
    y = clip(x)
    assert y.tolist() == [0.0, 0.0, 0.5, 1.0, 2.0]
    y.sum().backward()
    assert x.grad.tolist() == [0.0, 1.0, 1.0, 1.0, 0.0]
    # outside: d y / d ceiling is the level (0 or 1); inside: level minus share
    assert clip.ceiling.grad.item() == pytest.approx((0 - 0.1) + (0.25 - 0.15) + (0.5 - 0.55) + 1.0)


@pytest.mark.parametrize(("bias", "norm"), [(False, False), (True, False), (True, True)])
def test_the_first_layer_of_quantised_activations_converts_exactly(bias: bool, norm: bool) -> None:
    """With L levels and L steps the mean spike count times the threshold is the activation."""
    levels = 8
    net = quantised(ann(bias, norm), torch.rand(32, 1, 8, 8), levels).eval()
    snn = to_spiking(net, torch.rand(8, 1, 8, 8), levels, bias="keep")
    x = torch.rand(4, 1, 8, 8)
    with torch.no_grad():
        cut = next(i for i, m in enumerate(net) if isinstance(m, QuantisedClip)) + 1
        activation = net[:cut](x)
        spikes = next(layer for layer in snn.layers if isinstance(layer, LIF))
        current = snn.layers[0](x).expand(levels, 4, 4, 8, 8)
        counted = spikes(current).mean(0) * spikes.threshold
        same = (counted - activation).abs() < 1e-5
    assert same.float().mean() > 0.99  # a potential that lies on the threshold may go either way


def test_the_whole_network_comes_close_and_longer_is_closer() -> None:
    net = quantised(ann(True), torch.rand(64, 1, 8, 8), 8).eval()
    snn, x = to_spiking(net, torch.rand(8, 1, 8, 8), 8, bias="keep"), torch.rand(64, 1, 8, 8)
    with torch.no_grad():
        wanted = net(x)
        errors = [(snn.with_timesteps(t)(x) - wanted).norm() / wanted.norm() for t in (2, 8, 128)]
    assert errors[0] > errors[2]
    assert errors[1] < 0.2
    assert errors[2] < 0.1


def test_thresholds_are_percentiles_of_what_arrives() -> None:
    model, x = ann(), torch.rand(32, 1, 8, 8)
    snn = to_spiking(model, x, 5, 90.0)
    first = next(layer for layer in snn.layers if isinstance(layer, LIF))
    with torch.no_grad():
        assert (model[0](x) > first.threshold).float().mean() == pytest.approx(0.1, abs=0.005)
    assert first.decay == 1.0
    assert first.threshold.requires_grad


def test_batch_norm_folds_and_the_model_is_untouched() -> None:
    model = ann(norm=True)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    snn = to_spiking(model, torch.rand(8, 1, 8, 8), 3, bias="keep")
    x = torch.rand(2, 1, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(snn.layers[0](x), model[1](model[0](x)))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (nn.Sequential(nn.Linear(4, 4, bias=False), nn.GELU()), "'1' \\(GELU\\)"),
        (nn.Sequential(nn.Linear(4, 4), nn.ReLU()), "'0' has a bias"),
        (nn.Sequential(nn.Linear(4, 4, bias=False)), "no ReLU"),
        (nn.Sequential(nn.BatchNorm1d(4), nn.ReLU()), "batch norm '0'"),
        (nn.Bilinear(2, 2, 2), "Bilinear"),
    ],
)
def test_what_cannot_spike_is_named(model: nn.Module, words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        to_spiking(model, torch.rand(4, 4))
    assert isinstance(caught.value, UnsupportedModelError)


def test_thresholds_need_a_percentile_and_samples() -> None:
    with pytest.raises(ConfigurationError, match="percentile 200"):
        to_spiking(ann(), torch.rand(8, 1, 8, 8), 4, percentile=200.0)
    with pytest.raises(ConfigurationError, match="no calibration samples"):
        to_spiking(ann(), torch.rand(0, 1, 8, 8), 4)
