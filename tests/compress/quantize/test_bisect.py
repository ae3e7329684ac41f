"""The search: counted, bounded, above its floor, and honest where nothing may be quantised."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hasten.compress.quantize.augmented import AugmentedHessian, UnitScores
from hasten.compress.quantize.bisect import BisectPrecision
from hasten.compress.quantize.mixed import RoundedInput
from hasten.errors import ConfigurationError, DataError
from hasten.train.fit import fit


@pytest.fixture(scope="module")
def trained() -> tuple[nn.Module, Any, Any, UnitScores]:
    torch.manual_seed(0)
    x = torch.randn(900, 10)
    y = (x[:, :5].square().sum(1) > x[:, 5:].square().sum(1)).long()
    layers: list[nn.Module] = []
    for _ in range(5):
        layers += [nn.Linear(10 if not layers else 32, 32), nn.Tanh()]
    model = nn.Sequential(*layers, nn.Linear(32, 2))
    fit(model, [(x[:500], y[:500])], loss, epochs=120, rate=1e-2)
    model.eval()
    scores = AugmentedHessian(probes=8, bits=(8, 3))(model, loss, [(x[:200], y[:200])])
    return model, (x[500:700], y[500:700]), (x[700:], y[700:]), scores


def loss(model: nn.Module, batch: Any) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def likelihood(model: nn.Module, batch: Any) -> float:
    with torch.no_grad():
        return math.exp(-float(loss(model, batch)))


@pytest.mark.parametrize("floor", [0.9, 0.99])
def test_the_floor_is_kept_and_evaluations_are_few(trained: Any, floor: float, tmp_path: Path) -> None:
    model, validation, _, scores = trained
    calls = []

    def metric(m: nn.Module, batch: Any) -> float:
        calls.append(1)
        return likelihood(m, batch)

    found = BisectPrecision(scores, metric, floor=floor, bits=(8, 3))(model, validation)
    assert found.metric >= floor * found.baseline
    assert likelihood(found.model, validation) == pytest.approx(found.metric, rel=1e-5)
    assert found.evaluations == len(calls) - 1
    assert found.evaluations <= 2 * (math.ceil(math.log2(len(scores.units) + 1)) + 3)
    assert set(found.widths.values()) <= {16, 8, 3}
    assert found.plan.bytes < sum(2.0 * p.numel() for n, p in model.named_parameters() if "weight" in n)
    assert len(found.frontier.tried) == len(calls)
    best = found.frontier.best
    assert all(a.bytes >= b.bytes and a.metric >= b.metric for a, b in zip(best, best[1:], strict=False))
    found.frontier.plot(tmp_path / "frontier.html")
    assert "<svg" in (tmp_path / "frontier.html").read_text()
    assert not any(isinstance(m, RoundedInput) for m in model.modules())
    torch.export.export(found.model, (validation[0],))


def test_a_floor_that_nothing_reaches_gives_the_model_back(trained: Any) -> None:
    model, validation, _, scores = trained

    def strict(m: nn.Module, batch: Any) -> float:
        return 1.0 if torch.equal(m(batch[0]), model(batch[0])) else 0.5

    found = BisectPrecision(scores, strict, floor=1.0, bits=(8, 3))(model, validation)
    assert found.model is model
    assert "no unit may be quantised" in found.notes[-1]
    assert set(found.widths.values()) == {16}


def test_what_lies_beyond_the_bisection_is_tried(trained: Any) -> None:
    model, validation, _, scores = trained

    def dips(m: nn.Module, batch: Any) -> float:  # fails with three units, passes with five
        count = sum(w != 0 for w in scores.simulated._active.values())
        return 0.1 if count in (3, 4) else 1.0

    found = BisectPrecision(scores, dips, floor=0.9, bits=(8,))(model, validation)
    assert sum(w == 8 for w in found.widths.values()) in (5, 6)


def test_units_that_gain_no_time_and_pinned_ones_stay(trained: Any) -> None:
    model, validation, _, scores = trained
    seconds = {"0": {16: 1.0, 8: 1.0, 3: 1.0}}
    usual = {16: 2.0, 8: 1.0, 3: 0.5}

    def timed(layer: str, bits: int) -> float:
        return seconds.get(layer, usual)[bits]

    found = BisectPrecision(scores, likelihood, floor=0.5, bits=(8, 3), latency=timed, pinned=("10",))(
        model, validation
    )
    assert found.widths["0"] == 16
    assert found.widths["10"] == 16
    assert any(n.startswith("0 stays") for n in found.notes)
    assert found.plan.latency == pytest.approx(sum(timed(p, w) for p, w in found.widths.items()))


def test_bad_input_is_one_line(trained: Any) -> None:
    model, validation, _, scores = trained
    for wrong in ({"floor": 1.5}, {"bits": (8, 2)}, {"bits": (3, 8)}, {"pinned": ("x",)}):
        with pytest.raises(ConfigurationError):
            BisectPrecision(scores, likelihood, **{"bits": (8, 3), **wrong})
    with pytest.raises(DataError, match="empty"):
        BisectPrecision(scores, likelihood, bits=(8, 3))(model, [])
    for value in (float("nan"), "high", -1.0):
        with pytest.raises(ConfigurationError, match="metric"):
            BisectPrecision(scores, lambda m, b, v=value: v, bits=(8, 3))(model, validation)
