"""A replaced layer is called: torch's encoder layers, which read weights past their parts, are kept from doing so."""

import pytest
import torch
from torch import Tensor, nn

from hasten.compress import WeightPrecision
from hasten.compress.acm import ACM
from hasten.compress.lowrank.truncated import TruncatedSvd
from hasten.compress.quantize import Int, MovingAverage, PerChannel, Quantize
from hasten.compress.quantize.mixed import MixedQuantize
from hasten.compress.replace import replace_module, spelled_out
from hasten.errors import ConfigurationError
from hasten.tune.layers import sensitivities


class Encoder(nn.Module):
    """Two of torch's layers and a head."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, activation="gelu", norm_first=True)
        self.body = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(32, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).mean(1))


@pytest.fixture(scope="module")
def model() -> Encoder:
    torch.manual_seed(0)
    return Encoder().eval()


X = torch.randn(4, 6, 32, generator=torch.Generator().manual_seed(1))
TECHNIQUES = {
    "W8A8": Quantize.scheme("W8A8", real="never"),
    "W4A16": Quantize.scheme("W4A16"),
    "svd": TruncatedSvd(0.5),
    "mixed": MixedQuantize(
        (("body.layers.0.linear1.weight", Int(8, PerChannel(0))),),
        (("body.layers.0.linear1", Int(4, observer=MovingAverage(0.1))),),
    ),
    "bf16": WeightPrecision("bf16", only_faster=False),
}


def answer(model: nn.Module, fast: bool) -> Tensor:
    torch.backends.mha.set_fastpath_enabled(fast)
    try:
        with torch.inference_mode():
            return model(X)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


@pytest.mark.parametrize("name", TECHNIQUES)
def test_the_fast_path_does_not_pass_replaced_layers_over(name: str, model: Encoder) -> None:
    small = TECHNIQUES[name](model, [X]).eval()
    assert any("linear1" in layer for layer in small.report.touched)
    torch.testing.assert_close(answer(small, True), answer(small, False), atol=2e-3, rtol=1e-3)
    assert model.body.layers[0].activation_relu_or_gelu == 2  # the input keeps its own
    if name in ("W8A8", "mixed"):  # exactly: the rounding of inputs is no small matter of order
        torch.testing.assert_close(answer(small, True), answer(small, False), atol=1e-6, rtol=1e-6)
        assert not torch.allclose(answer(small, True), answer(model, True), atol=1e-4)


def test_only_the_layers_around_a_path_are_spelled_out(model: Encoder) -> None:
    import copy

    clone = copy.deepcopy(model)
    calls: list[int] = []

    class Counted(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            calls.append(len(x))
            return super().forward(x)

    layer = Counted(32, 64)
    layer.load_state_dict(clone.body.layers[1].linear1.state_dict())
    assert replace_module(clone, "body.layers.1.linear1", layer) is clone
    assert [one.activation_relu_or_gelu for one in clone.body.layers] == [2, 0]
    torch.testing.assert_close(answer(clone, True), answer(model, True), atol=1e-5, rtol=1e-5)
    assert calls == [4]
    assert replace_module(clone, "", layer) is layer
    assert spelled_out(clone, "head") is clone


def test_sensitivities_of_such_a_model(model: Encoder) -> None:
    small = WeightPrecision("bf16", layers=("body.layers.*.linear1",), only_faster=False)(model)
    found = sensitivities(model, small, lambda one: float(answer(one, True).isfinite().float().mean()))
    assert found == {"body.layers.0.linear1": 0.0, "body.layers.1.linear1": 0.0}


def test_a_span_around_a_function_is_refused(model: Encoder) -> None:
    acm = ACM(targets=("body.layers.*.linear1>linear2",), epochs=1, gate_epochs=1, tune_epochs=0)
    with pytest.raises(ConfigurationError, match=r"layers\.0\.linear1 to .*linear2 is not all that happens there"):
        acm(model, [X])
