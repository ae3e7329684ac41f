from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from hasten.measure.counting import cost

size = st.integers(1, 9)


@settings(max_examples=25, deadline=None)
@given(size, size, size, st.booleans())
def test_linear(rows: int, inputs: int, outputs: int, bias: bool) -> None:
    counted = cost(nn.Linear(inputs, outputs, bias=bias), torch.zeros(rows, inputs))
    assert counted.macs == rows * inputs * outputs
    assert counted.parameters == inputs * outputs + bias * outputs
    assert counted.weight_bytes == 4 * counted.parameters
    assert counted.traffic == counted.weight_bytes + 4 * rows * (inputs + outputs)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 3), st.integers(1, 4), st.sampled_from([1, 3]), st.integers(1, 2), st.integers(1, 2))
def test_convolution(groups: int, width: int, kernel: int, stride: int, batch: int) -> None:
    layer = nn.Conv2d(groups * width, groups * 2, kernel, stride=stride, padding=1, groups=groups)
    x = torch.zeros(batch, groups * width, 8, 10)
    out = layer(x)
    assert cost(layer, x).macs == out.numel() * width * kernel * kernel


@pytest.mark.parametrize("is_causal", [False, True])
def test_attention(is_causal: bool) -> None:
    q, k, v = torch.zeros(2, 3, 5, 8), torch.zeros(2, 3, 7, 8), torch.zeros(2, 3, 7, 8)
    counted = cost(lambda q, k, v: nn.functional.scaled_dot_product_attention(q, k, v, is_causal=is_causal), (q, k, v))
    assert counted.macs == 2 * 3 * 5 * 7 * 16


def test_recurrent_cells_are_seen_inside() -> None:
    counted = cost(nn.LSTM(4, 8, batch_first=True), torch.zeros(2, 5, 4))
    assert counted.macs == 2 * 5 * 4 * 8 * (4 + 8)


def test_the_transformer_fast_path_does_not_hide_work() -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
    time, width = 6, 16
    expected = time * width * (4 * width + 2 * 32) + 2 * time * time * width
    assert cost(layer, torch.zeros(1, time, width)).macs == expected
    assert torch.backends.mha.get_fastpath_enabled()


def test_modules_add_up_and_shared_weights_count_once() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(10, 4)
            self.head = nn.Linear(4, 10, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(torch.relu(self.embed(x)) @ torch.eye(4))

    counted = cost(Tied(), torch.zeros(2, 3, dtype=torch.int64))
    assert counted.parameters == 40
    assert counted.weight_bytes == 160
    by_name = {m.name: m for m in counted.modules}
    assert by_name["head"].macs == 6 * 4 * 10
    assert by_name[""].macs == 6 * 4 * 4  # the functional product belongs to the module that runs it
    assert counted.operations["relu"] == 24
    assert sum(m.macs for m in counted.modules) == counted.macs


def test_calls_traffic_and_mode() -> None:
    layer = nn.Linear(4, 4, bias=False)
    model = nn.Sequential(layer, layer)
    model.train()
    counted = cost(model, torch.zeros(3, 4))
    assert model.training
    row = next(m for m in counted.modules if m.name == "0")
    assert row.calls == 2
    assert row.macs == 2 * 3 * 16
    assert row.traffic == 64 + 2 * (48 + 48)
    assert not layer._forward_hooks
    assert not layer._forward_pre_hooks


def test_packed_kernels_count() -> None:
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise") or not torch.backends.mkldnn.is_available():
        pytest.skip("this torch has no oneDNN")
    x, w = torch.zeros(3, 64, dtype=torch.bfloat16), torch.zeros(32, 64, dtype=torch.bfloat16)
    packed = torch.ops.mkldnn._reorder_linear_weight(w, 3)
    counted = cost(lambda x: torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], ""), x)
    assert counted.macs == 3 * 64 * 32
    assert counted.uncounted == ()


def test_foreign_operators_are_named() -> None:
    @torch.library.custom_op("hastentest::twice", mutates_args=())
    def twice(x: torch.Tensor) -> torch.Tensor:
        return x * 2

    assert cost(lambda x: twice(x), torch.zeros(3)).uncounted == ("hastentest::twice",)


def test_errors_leave_no_hooks() -> None:
    layer = nn.Linear(2, 2)
    with pytest.raises(RuntimeError):
        cost(layer, torch.zeros(3, 5))
    assert not layer._forward_hooks
