"""Byte networks: the loop gives the bits of plain operations, whatever the network; what cannot be lowered is named."""

import copy
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from hasten.compress import Plan, Recipe
from hasten.compress.int8 import Int8Network
from hasten.compress.quantize import Percentile
from hasten.errors import ConfigurationError
from hasten.nn.product.instructions import has_bytes
from hasten.testing import TechniqueKit

pytestmark = pytest.mark.skipif(not has_bytes(), reason="this processor has no vpdpbusd")
ANYWAY = Int8Network(only_faster=False)


class Residual(nn.Module):
    """A block with a shortcut of one of three kinds."""

    def __init__(self, inner, outer, stride, kind):
        super().__init__()
        self.first = nn.Conv2d(inner, outer, 3, stride, 1, bias=False)
        self.norm = nn.BatchNorm2d(outer)
        self.second = nn.Conv2d(outer, outer, 3, 1, 1)
        self.side = nn.Conv2d(inner, outer, 1, stride) if kind == "convolution" else None
        self.stride, self.more = stride, outer - inner

    def forward(self, x):
        y = self.second(functional.relu(self.norm(self.first(x))))
        if self.side is not None:
            x = self.side(x)
        elif self.stride != 1 or self.more:
            x = functional.pad(
                x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.more // 2, self.more - self.more // 2)
            )
        return functional.relu(y + x)


def network(widths, strides, kinds, head, kernel=3):
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, widths[0], kernel, 1, kernel // 2), nn.BatchNorm2d(widths[0]), nn.ReLU6()]
    for inner, outer, stride, kind in zip(widths, widths[1:], strides, kinds, strict=False):
        layers.append(Residual(inner, max(inner, outer) if kind == "pad" else outer, stride, kind))
        if kind == "pad" and outer < inner:
            layers.append(nn.Conv2d(inner, outer, 1))
    last = widths[-1]
    if head == "mean":
        layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(last, 10)]
    elif head == "pool":
        layers += [nn.MaxPool2d(2), nn.Conv2d(last, 5, 1)]
    else:
        layers += [nn.Conv2d(last, last, 3, 1, 1, groups=last), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    net = nn.Sequential(*layers)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    return net.eval()


@settings(max_examples=15, deadline=None)
@given(
    widths=st.lists(st.sampled_from([4, 6, 16, 20, 33, 64, 80]), min_size=1, max_size=3),
    strides=st.lists(st.sampled_from([1, 2]), min_size=2, max_size=2),
    kinds=st.lists(st.sampled_from(["pad", "convolution"]), min_size=2, max_size=2),
    head=st.sampled_from(["mean", "pool", "depthwise"]),
    kernel=st.sampled_from([1, 3, 5]),
    size=st.sampled_from([(8, 8), (12, 10), (9, 17)]),
    batch=st.integers(1, 3),
)
def test_the_loop_gives_the_bits_of_plain_operations(widths, strides, kinds, head, kernel, size, batch):
    model = network(widths, strides, kinds, head, kernel)
    x = torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(1))
    small = ANYWAY(model, [x, 0.5 * x])
    assert len(small.report.touched) == sum(isinstance(m, (nn.Conv2d, nn.Linear)) for m in model.modules())
    with torch.inference_mode():
        assert torch.equal(small(x), small.simulate(x))
        assert torch.equal(small(x[:1]), small(x)[:1])
        expected = model(x)
        assert small(x).shape == expected.shape
        assert (small(x) - expected).norm() < 0.2 * expected.norm() + 1e-3


class TestTechnique(TechniqueKit):
    technique = ANYWAY
    keeps = {"sqnr": 20.0}

    def model(self):
        return network([16, 32], [2, 1], ["pad", "pad"], "mean")

    def example(self):
        return torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))

    def test_same_input_same_result(self, parts):
        model, example, new = parts
        again, _ = Recipe((self.technique,), Plan.of([new.report])).apply(model, [example])
        assert torch.equal(new(example), again(example))


def test_a_flattened_map_feeds_a_linear_layer_and_ranges_may_be_clipped():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 7, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(63, 30), nn.ReLU(),
                          nn.Linear(30, 4)).eval()  # fmt: skip
    x = torch.randn(5, 1, 8, 8)
    small = Int8Network(Percentile(99.0), only_faster=False)(model, [x])
    with torch.inference_mode():
        assert torch.equal(small(x), small.simulate(x))
    assert small.report.measured["sqnr"] > 15
    assert small.report.bytes_after < 0.3 * small.report.bytes_before
    assert torch.equal(copy.deepcopy(small)(x), small(x))


class Odd(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.conv, self.how = nn.Conv2d(3, 4, 3), how

    def forward(self, x):
        return self.how(self.conv(x))


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (Odd(torch.tanh), "tanh"),
        (Odd(lambda x: x if x.sum() > 0 else -x), "traced"),
        (Odd(lambda x: (x, x)), "more than one tensor"),
        (nn.Sequential(nn.Conv2d(3, 6, 3), nn.Conv2d(6, 4, 3, groups=2)), "2 groups"),
        (nn.Sequential(nn.Conv2d(3, 4, 3, dilation=2)), "dilated"),
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.MaxPool2d(3, 1, 1)), "negative"),
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.AvgPool2d(2)), "averages windows"),
        (nn.ReLU(), "clamps"),
    ],
)
def test_what_cannot_be_lowered_is_named_and_left_as_it_is(model, said):
    x = torch.randn(2, 3, 8, 8)
    kept = ANYWAY(model.eval(), [x])
    assert not kept.report.touched
    assert said in kept.report.notes[0]
    if "traced" not in said and "tensor" not in said:
        assert torch.equal(kept(x), model(x))


def test_mistakes_are_one_line():
    model = network([4], [], [], "mean")
    with pytest.raises(ConfigurationError, match="calibration images"):
        ANYWAY(model)
    with pytest.raises(ConfigurationError, match="one image shape"):
        ANYWAY(model, [torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 9, 8)])
    small = ANYWAY(model, [torch.randn(1, 3, 8, 8)])
    with pytest.raises(ConfigurationError, match="lowered for"):
        small(torch.zeros(1, 3, 9, 9))


def test_a_network_that_would_be_slower_is_kept(monkeypatch):
    model, x = network([4], [], [], "mean"), torch.randn(1, 3, 8, 8)

    def slower(calls, rules, clock=None):
        times = {"float": 1.0, "bytes": 1.5}
        samples = {n: SimpleNamespace(summary=SimpleNamespace(minimum=t)) for n, t in times.items()}
        return SimpleNamespace(samples=samples)

    monkeypatch.setattr("hasten.compress.int8.technique.compare", slower)
    kept = Int8Network()(model, [x])
    assert not kept.report.touched
    assert "1.50×" in kept.report.notes[0]
    planned, _ = Recipe((Int8Network(),), Plan.of([kept.report])).apply(model, [x])
    assert planned.report.skipped["0"] == "as planned"
    assert torch.equal(planned(x), model(x))
