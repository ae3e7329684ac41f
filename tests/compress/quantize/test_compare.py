from __future__ import annotations

import math

import pytest
import torch
from quantize_models import cnn, images
from torch import nn

from hasten.compress.quantize import Int, PerChannel, Quantize, compare
from hasten.errors import ConfigurationError, DataError


def test_metrics_by_hand() -> None:
    model, other = nn.Linear(3, 4, bias=False), nn.Linear(3, 4, bias=False)
    x = torch.randn(5, 3)
    result = compare(model, other, [x[:2], x[2:]], ("cosine", "sqnr", "kl", "top1"))
    a, b = model(x).double().detach(), other(x).double().detach()
    assert result.end["cosine"] == pytest.approx(float((a * b).sum() / a.norm() / b.norm()))
    assert result.end["sqnr"] == pytest.approx(float(20 * torch.log10(a.norm() / (a - b).norm())))
    kl = (a.softmax(-1) * (a.log_softmax(-1) - b.log_softmax(-1))).sum(-1).mean()
    assert result.end["kl"] == pytest.approx(float(kl))
    assert result.end["top1"] == pytest.approx(float((a.argmax(-1) == b.argmax(-1)).double().mean()))
    assert result.batches == 2


def test_a_model_is_itself() -> None:
    model = cnn()
    result = compare(model, model, [images()], ("cosine", "sqnr", "kl"), layers=("0", "11"))
    assert result.end == {"cosine": pytest.approx(1.0), "sqnr": math.inf, "kl": 0.0}
    assert list(result.layers) == ["0", "11"]


def test_folded_layers_are_compared_behind_their_normalisation() -> None:
    model, x = cnn(), images()
    result = compare(model, Quantize(Int(8, PerChannel(0)))(model), [x])
    assert list(result.layers) == ["0", "3", "7", "11"]
    assert all(row["sqnr"] > 25 for row in result.layers.values())
    assert "output" in str(result)
    assert all(m.training is False for m in model.modules())


def test_bad_requests() -> None:
    with pytest.raises(ConfigurationError, match="metric bleu"):
        compare(cnn(), cnn(), [images()], ("bleu",))
    with pytest.raises(DataError, match="no batch"):
        compare(cnn(), cnn(), [])
