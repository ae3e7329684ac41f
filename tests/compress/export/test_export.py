"""Files for other runtimes: same outputs, codes where a format of ONNX holds them, nothing left after a failure."""

from pathlib import Path

import pytest
import torch
from torch import nn

from hasten.compress import Int8Network, WeightPrecision
from hasten.compress.export import export_onnx, export_program
from hasten.compress.export.rounding import RowRounding, StaticRounding, float8_of
from hasten.compress.quantize import (
    FP8_E4M3,
    FP8_E5M2,
    Int,
    MiniFloat,
    MovingAverage,
    PerChannel,
    PerTensor,
    PerToken,
    Quantize,
)
from hasten.compress.quantize.mixed import MixedQuantize
from hasten.errors import ConfigurationError, ModelError

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.hidden = nn.Linear(8 * 16, 64)
        self.head = nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.norm(self.conv(x)))
        return self.head(torch.relu(self.hidden(x.flatten(1))))


@pytest.fixture(scope="module")
def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


@pytest.fixture(scope="module")
def x() -> torch.Tensor:
    return torch.randn(4, 3, 4, 4, generator=torch.Generator().manual_seed(1))


STATIC = Quantize(Int(8, PerChannel(0)), Int(8, PerTensor(), symmetric=False), real="never")
SCHEMES = {
    "W8A8": (Quantize.scheme("W8A8", real="never"), {"conv": "int8", "hidden": "int8", "head": "int8"}),
    "W4A16": (Quantize.scheme("W4A16", real="never"), {"hidden": "int4", "head": "int4"}),
    "W3A16": (Quantize.scheme("W3A16", real="never"), {"hidden": "int4", "head": "int4"}),
    "FP8": (Quantize.scheme("FP8", real="never"), dict.fromkeys(("conv", "hidden", "head"), "float8e4m3fn")),
    "NF4": (Quantize.scheme("NF4", real="never"), {}),
    "static": (STATIC, {"conv": "int8", "hidden": "int8", "head": "int8"}),
}


@pytest.mark.parametrize("name", SCHEMES)
def test_weights_are_codes_in_the_file(name: str, net: Net, x: torch.Tensor, tmp_path: Path) -> None:
    technique, held = SCHEMES[name]
    small = technique(net, [x])
    done = export_onnx(small, x, tmp_path / "net.onnx")
    assert {layer.partition(".")[0]: how.rpartition(" ")[2] for layer, how in done.layers} == held
    assert done.difference <= done.tolerance
    kinds = [n.op_type for n in onnx.load(done.path).graph.node]
    assert kinds.count("DequantizeLinear") == len(held) + kinds.count("QuantizeLinear")
    assert kinds.count("QuantizeLinear") == (3 if name == "static" else 0)
    assert len(done.notes) == (1 if len(held) < 3 else 0) + (1 if name in ("W8A8", "FP8") else 0)


def test_a_mixed_plan_with_rounded_inputs(net: Net, x: torch.Tensor, tmp_path: Path) -> None:
    plan = MixedQuantize(
        (("conv.weight", Int(8, PerChannel(0))), ("hidden.weight", Int(4, PerChannel(0)))),
        (("hidden", Int(6, observer=MovingAverage(0.1))),),
    )
    done = export_onnx(plan(net, [x]), x, tmp_path / "mixed.onnx")
    assert dict(done.layers) == {"conv.weight": "int8 channel as int8", "hidden.layer.weight": "int4 channel as int4"}


def test_what_tune_builds(net: Net, x: torch.Tensor, tmp_path: Path) -> None:
    small = WeightPrecision("int8")(net)
    done = export_onnx(small, x, tmp_path / "tuned.onnx")
    assert done.difference <= done.tolerance
    whole = Int8Network()(net, [x])
    assert export_onnx(whole, x, tmp_path / "bytes.onnx", tolerance=0.02).bytes > 0


def test_another_batch(net: Net, x: torch.Tensor, tmp_path: Path) -> None:
    import onnxruntime

    done = export_onnx(STATIC(net, [x]), x, tmp_path / "net.onnx", names=["image"])
    session = onnxruntime.InferenceSession(str(done.path))
    assert session.run(None, {"image": torch.zeros(7, 3, 4, 4).numpy()})[0].shape == (7, 10)


@pytest.mark.parametrize("name", ["W8A8", "W4A16", "NF4"])
def test_a_program_is_read_back(name: str, net: Net, x: torch.Tensor, tmp_path: Path) -> None:
    done = export_program(SCHEMES[name][0](net, [x]), x, tmp_path / "net.pt2")
    assert done.difference == 0
    assert [p.name for p in tmp_path.iterdir()] == ["net.pt2"]


class Odd(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x if float(x.sum()) > 0 else -x


def test_nothing_is_left_after_a_failure(net: Net, x: torch.Tensor, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="nothing was written"):
        export_program(Odd(), x, tmp_path / "a.pt2")
    with pytest.raises(ModelError, match="nothing was written"):
        export_onnx(Odd(), x, tmp_path / "a.onnx")
    with pytest.raises(ModelError, match=r"differs from the model by .* allowed is 0"):
        export_onnx(net, x, tmp_path / "a.onnx", tolerance=0.0)
    with pytest.raises(ConfigurationError, match="tensor or a tuple of tensors"):
        export_onnx(net, {"x": x}, tmp_path / "a.onnx")
    assert list(tmp_path.iterdir()) == []


def test_the_operation_rounds_as_the_format_does() -> None:
    x = torch.randn(50, 8, generator=torch.Generator().manual_seed(2)) * 3
    for fmt in (Int(8), Int(4), Int(8, symmetric=False), Int(5, symmetric=False)):
        scale, zero = fmt.find(x[:10])
        assert torch.equal(StaticRounding(fmt, scale, zero)(x), fmt.fake(x, scale, zero))
    rows = Int(8, PerToken(), dynamic=True)
    torch.testing.assert_close(RowRounding(rows, image=False)(x), rows.fake(x), rtol=0.02, atol=0.05)
    assert torch.equal(RowRounding(rows, image=False)(torch.zeros(2, 3)), torch.zeros(2, 3))
    assert float8_of(FP8_E4M3) is torch.float8_e4m3fn
    assert float8_of(FP8_E5M2) is torch.float8_e5m2
    assert float8_of(MiniFloat(3, 4)) is None
