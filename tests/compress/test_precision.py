from __future__ import annotations

import pytest
import torch
from torch import nn

from hasten.compress import PackedLinear, WeightPrecision, kernels
from hasten.errors import ConfigurationError
from hasten.measure.counting import cost
from hasten.testing.technique_kit import TechniqueKit


class TestBf16(TechniqueKit):
    technique = WeightPrecision("bf16", only_faster=False)
    keeps = {"sqnr": 40.0}


class TestInt8(TechniqueKit):
    technique = WeightPrecision("int8", only_faster=False, skip=("hea*",))
    keeps = {"sqnr": 33.0}


class TestInt4(TechniqueKit):
    technique = WeightPrecision("int4", group_size=64, only_faster=False, tokens=3)
    keeps = {"sqnr": 18.0}


class TestNothingMatches(TechniqueKit):
    technique = WeightPrecision("int8", layers=("no.such.*",))
    touches = False


@pytest.fixture
def times(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """Kernel times by decree instead of by measurement."""
    table = {"fp32": 4.0, "bf16": 3.0, "bf16-packed": 2.0, "int8-weight": 5.0, "int8-dynamic": 1.0, "int4-g32": 8.0}
    table |= {"bf16-panels": 3.5, "int8-panels": 6.0, "int4-panels": 9.0}

    def decreed(shape, tokens, names, **_):  # type: ignore[no-untyped-def]
        return {n: table[n] for n in names if kernels.kernel(n).supports(*shape)}

    monkeypatch.setattr(kernels, "measure_kernels", decreed)
    return table


@pytest.mark.usefixtures("times")
def test_the_fastest_kernel_of_the_format_is_taken() -> None:
    report = WeightPrecision("int8")(nn.Linear(64, 32)).report
    (layer,) = report.layers  # type: ignore[union-attr]
    assert layer.action == "int8-dynamic"
    assert layer.speedup == 4.0
    assert layer.bytes_before == 4 * 64 * 32
    assert layer.bytes_after == 64 * 32 + 4 * 32


@pytest.mark.usefixtures("times")
def test_a_layer_that_would_become_slower_stays_and_says_so() -> None:
    new = WeightPrecision("int4")(nn.Linear(64, 32))
    (layer,) = new.report.layers  # type: ignore[union-attr]
    assert type(new) is nn.Linear
    assert layer.action == "kept"
    assert "int4-g32 would take 2.00× the time of fp32" in layer.reason
    forced = WeightPrecision("int4", only_faster=False)(nn.Linear(64, 32))
    assert isinstance(forced, PackedLinear)


def test_shared_weights_and_odd_sizes_stay() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(32, 64)
            self.head = nn.Linear(64, 32, bias=False)
            self.head.weight = self.embed.weight
            self.odd = nn.Linear(7, 5)

    skipped = WeightPrecision("int8", only_faster=False)(Tied()).report.skipped  # type: ignore[union-attr]
    assert skipped["head"] == "its weight is shared with another layer"  # type: ignore[index]
    assert skipped["odd"] == "no int8 kernel takes a weight of 5 x 7"  # type: ignore[index]


def test_subclasses_of_linear_are_left_alone() -> None:
    model = nn.MultiheadAttention(32, 4)  # its projection is a special subclass that is never called
    report = WeightPrecision("int8", only_faster=False)(model).report
    assert report.layers == ()  # type: ignore[union-attr]


def test_packed_layers_count_their_bytes_and_work() -> None:
    layer = PackedLinear.of(nn.Linear(64, 32), "int8-dynamic")
    counted = cost(layer, torch.zeros(5, 64))
    assert counted.macs == 5 * 64 * 32
    assert counted.weight_bytes == 64 * 32 + 4 * 32 + 4 * 32


def test_bad_knobs() -> None:
    with pytest.raises(ConfigurationError, match="format 'int3'"):
        WeightPrecision("int3")
    with pytest.raises(ConfigurationError, match="group of 7"):
        WeightPrecision("int4", group_size=7)
    with pytest.raises(ConfigurationError, match="at least one row"):
        WeightPrecision(tokens=0)
