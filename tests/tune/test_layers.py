"""What each layer costs alone."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hasten.compress import FusedNetwork, Quantize, WeightPrecision
from hasten.compress.quantize import Int, PerTensor, SmoothQuant
from hasten.nn.product.instructions import has_bytes
from hasten.tune.layers import replaced, sensitivities
from hasten.tune.model import fidelity


def _model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)).eval()


def test_each_layer_is_put_in_alone_and_the_model_stays() -> None:
    model, data = _model(), [torch.randn(16, 64)]
    with torch.no_grad():
        model[3].weight[0, 0] = 50.0  # an outlier: one range for the tensor loses the rest
    small = Quantize(Int(4, PerTensor()), real="never")(model)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    found = sensitivities(model, small, lambda m: fidelity(model, m, data))
    assert list(found) == ["1", "3"]
    alone = nn.Sequential(model[0], model[1], model[2], small[3])
    assert found["3"] == 1 - fidelity(model, alone, data)
    assert all(v > 0 for v in found.values())
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert all(type(m) is not type(small[1]) for m in model)


def test_layers_that_do_not_stand_alone_have_no_figures() -> None:
    model, data = _model(), [torch.randn(16, 64)]
    smoothed = Quantize(Int(4, PerTensor()), steps=(SmoothQuant(),), real="never")(model, data)
    assert replaced(model, smoothed) == []  # the normalisation holds the factors
    assert sensitivities(model, smoothed, lambda m: 1.0) == {}
    assert sensitivities(model, None, lambda m: 1.0) == {}
    assert replaced(model, nn.Sequential(nn.Linear(64, 64))) == []


def test_time_saved_by_the_table_of_kernels(monkeypatch) -> None:
    from hasten.compress import kernels

    def decreed(shape, tokens, names, **_):
        return {n: {"fp32": 5.0, "int8-weight": 3.0}.get(n, 4.0) for n in names}

    monkeypatch.setattr(kernels, "measure_kernels", decreed)
    assert WeightPrecision("int8").saved_time(_model()) == 4.0
    assert WeightPrecision("int8", skip=("1",)).saved_time(_model()) == 2.0
    assert WeightPrecision("int8").saved_time(nn.Sequential(nn.Linear(7, 3))) == 0.0


@pytest.mark.skipif(not has_bytes(), reason="needs registers of 512 bits")
def test_a_network_in_another_form_is_judged_by_its_weights() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)).eval(), torch.randn(4, 8)
    fused = FusedNetwork("int8", only_faster=False)(model, [x])
    plain = fused.plain()  # type: ignore[operator]

    def kept(one: nn.Module) -> float:
        new = [torch.equal(one[i].weight, plain[i].weight) for i in (0, 2)]  # type: ignore[index]
        return 1.0 - 0.25 * new[0] - 0.5 * new[1]

    assert sensitivities(model, fused, kept) == {"0": 0.25, "2": 0.5}
    assert sensitivities(model, FusedNetwork(only_faster=False)(model, [x]), kept) == {}  # nothing is rounded
