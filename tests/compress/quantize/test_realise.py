"""Codes laid out for kernels: no rounding, and the table decides."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from hasten.compress import kernels
from hasten.compress.quantize import Int, PerChannel, PerGroup, PerToken, Quantize
from hasten.compress.quantize import realise as real
from hasten.compress.quantize.realise import KernelLinear

pytestmark = pytest.mark.usefixtures("one_thread")


def times(monkeypatch: pytest.MonkeyPatch, **table: float) -> None:
    monkeypatch.setattr(
        kernels,
        "measure_kernels",
        lambda shape, tokens, names, **k: {n: table.get(n.replace("-", "_"), 1.0) for n in names},
    )


@pytest.mark.parametrize("name", ["int8-weight", "int8-dynamic", "int4-g32"])
def test_the_kernel_stores_the_codes_themselves(name: str) -> None:
    torch.manual_seed(0)
    fmt = Int(4, PerGroup(1, 32)) if "4" in name else Int(8, PerChannel(0))
    weight = torch.randn(48, 64)
    # Not what rounding to nearest gives, so that rounding again would show.
    quantized = fmt.quantize(weight * 0.7, *fmt.find(weight))
    layer = KernelLinear(quantized, None, name)
    back = layer.quantized()
    assert torch.equal(back.codes, quantized.codes)
    assert torch.equal(back.scales, quantized.scales)
    x = torch.randn(5, 64)
    assert float((layer(x) - x @ quantized.dequantize().t()).norm() / layer(x).norm()) < 2e-2


def test_panels_are_the_inverse_of_their_unpacking() -> None:
    from hasten.nn.product import int4, int8

    torch.manual_seed(0)
    weight = torch.randn(80, 64)
    bytes_ = Int(8, PerChannel(0)).quantize(weight * 0.7, *Int(8, PerChannel(0)).find(weight))
    packed = real._lay_out(bytes_, "int8-panels")
    assert torch.equal(torch.from_numpy(int8.unpack(*(t.numpy() for t in packed.tensors), 80, 64)), bytes_.dequantize())
    halves = Int(4, PerGroup(1, 32)).quantize(weight)
    packed = real._lay_out(halves, "int4-panels")
    assert torch.equal(torch.from_numpy(int4.unpack(packed.tensors[0].numpy(), 80, 64)), halves.dequantize())
    assert torch.equal(real._scales_of(packed, "int4-panels"), halves.scales)


def test_only_what_is_faster_runs_a_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Linear(64, 64))
    times(monkeypatch, fp32=1.0, int8_dynamic=0.5, int8_panels=3.0)
    report: Any = Quantize.scheme("W8A8")(model).report
    assert report.layers[0].action.endswith("on int8")
    assert report.layers[0].speedup == 2.0
    assert "1 run real kernels" in report.notes[0]
    times(monkeypatch, fp32=1.0, int8_dynamic=2.0, int8_panels=3.0)
    report = Quantize.scheme("W8A8")(model).report
    assert "on int8" not in report.layers[0].action
    assert report.layers[0].reason == "simulated: int8 would take 2.00× the time of fp32 at 1 rows"


def test_a_plan_is_followed_without_measuring(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "measure_kernels", None)  # calling it would fail
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 32))
    technique = Quantize.scheme("W8A8")
    name = "int8 channel, inputs int8 token"
    report: Any = technique.apply(model, {"0": f"{name} on int8", "1": name}).report
    assert [r.action for r in report.layers] == [f"{name} on int8", name]


def test_kernels_for_formats() -> None:
    shape = (64, 64)
    token = Int(8, PerToken(), dynamic=True)
    assert real.candidates(Int(8, PerChannel(0)), None, shape) == ["int8-weight"]
    assert "int8" in real.candidates(Int(8, PerChannel(0)), Int(8, symmetric=False), shape)
    assert real.candidates(Int(4, PerGroup(1, 32)), None, shape) == ["int4-g32"]
    assert real.candidates(Int(8), token, shape) == []
    assert real.candidates(Int(4, PerGroup(1, 48)), None, (64, 96)) == []
    assert real.candidates(Int(8, PerChannel(0)), Int(4), shape) == []
