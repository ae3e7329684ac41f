"""Plans within a budget: bytes, seconds, the sort, and what cannot be reached."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from hasten.clock import ManualClock
from hasten.compress.quantize.allocate import BitPlan, MixedPrecision
from hasten.compress.quantize.augmented import AugmentedHessian
from hasten.compress.quantize.granularity import PerChannel
from hasten.compress.quantize.integer import Int
from hasten.compress.quantize.layer_latency import layer_latency
from hasten.compress.quantize.selection import RowGroups
from hasten.compress.quantize.sensitivity import HessianSpectrum, Spectrum
from hasten.errors import BudgetError, ConfigurationError


def parts() -> tuple[nn.Module, Spectrum]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 4))
    sens = HessianSpectrum(portions=2, fraction=0.5)(model, lambda m, x: m(x).square().mean(), [torch.randn(32, 8)])
    return model, sens


def test_the_plan_is_the_best_within_the_budget() -> None:
    model, sens = parts()
    method = MixedPrecision(bits=(2, 4, 8), budget=300.0, weight=Int(4, PerChannel(0)))
    plan = method.solve(model, sens)
    weights = [model[0].weight.detach(), model[2].weight.detach(), model[4].weight.detach()]
    best = min(
        (sum(r.omega * float((Int(b, PerChannel(0)).fake(w) - w).square().sum())
             for r, b, w in zip(sens.layers, bits, weights, strict=True)), bits)
        for bits in itertools.product((2, 4, 8), repeat=3)
        if sum(Int(b, PerChannel(0)).stored_bits(tuple(w.shape)) / 8 for b, w in zip(bits, weights, strict=True)) <= 300
    )  # fmt: skip
    assert tuple(plan.bits(n) for n in ("0", "2", "4")) == best[1]
    assert plan.loss == pytest.approx(best[0], rel=1e-4)
    assert plan.bytes <= 300
    assert plan.bytes_before == 4 * sum(w.numel() for w in weights)
    assert "predicted loss" in str(plan)
    assert set(plan.layers) == {"0", "2", "4"}
    with pytest.raises(ConfigurationError, match="no layer '7'"):
        plan.bits("7")


def test_a_budget_that_cannot_be_met_names_the_least() -> None:
    model, sens = parts()
    with pytest.raises(ConfigurationError, match=r"least reachable 1\d\d B"):
        MixedPrecision(bits=(2, 4), budget="50B").solve(model, sens)
    with pytest.raises(BudgetError):
        MixedPrecision(budget="many")
    with pytest.raises(ConfigurationError, match="latency="):
        MixedPrecision(budget="5ms").solve(model, sens)
    for wrong in (
        {"bits": ()},
        {"bits": (2, 2)},
        {"budget": 0.0},
        {"rule": "guess"},
        {"bits": (2, 3, 4), "rule": "sort"},
    ):
        with pytest.raises(ConfigurationError):
            MixedPrecision(**wrong)  # type: ignore[arg-type]


def test_groups_follow_heads_and_bits_may_be_sixteen() -> None:
    model, sens = parts()
    plan = MixedPrecision(bits=(2, 16), budget=10_000.0, groups=8, heads=4).solve(model, sens)
    assert plan.layers == {}
    assert plan.bits("2") == 16
    tight = MixedPrecision(bits=(2, 16), budget=350.0, groups=8, heads=4).solve(model, sens)
    assert any(f.granularity == RowGroups(2, 4) for f in tight.layers.values())


def test_the_sort_and_a_handed_order() -> None:
    model, sens = parts()
    order = {"0": 1.0, "2": 2.0, "4": 100.0}
    plan = MixedPrecision(bits=(2, 4), budget=160.0, rule="sort").solve(model, sens, order=order)
    assert plan.bits("4") == 4
    assert plan.bits("2") == plan.bits("0") == 2


def test_seconds_as_budget_and_measured_scores() -> None:
    model, _ = parts()
    x = torch.randn(32, 8)
    scores = AugmentedHessian(probes=4, bits=(8, 4), pairs="all")(model, lambda m, b: m(b).square().mean(), [x])
    seconds = {16: 3e-3, 8: 2e-3, 4: 1e-3}
    plan = MixedPrecision(bits=(16, 8, 4), budget="6ms").solve(model, scores, latency=lambda layer, b: seconds[b])
    assert plan.latency == pytest.approx(6e-3)
    with pytest.raises(ConfigurationError, match="no scores at 2 bits"):
        MixedPrecision(bits=(2, 4), budget=1000.0).solve(model, scores)
    other = nn.Sequential(nn.Conv2d(1, 1, 1))
    with pytest.raises(ConfigurationError, match="no parameter '2.weight'"):
        MixedPrecision(bits=(8, 4), budget=1000.0).solve(other, scores)


def test_latency_of_layers_comes_from_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def table(shape: tuple[int, int], rows: int, names: list[str], **_: object) -> dict[str, float]:
        asked.append((shape, rows))
        speed = {"fp32": 4.0, "bf16": 3.0}
        return {n: speed.get(n, 2.0 if "int8" in n else 5.0) for n in names}

    monkeypatch.setattr("hasten.compress.quantize.layer_latency.measure_kernels", table)
    model = nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 32))
    latency = layer_latency(model, lambda m, x: m(x), torch.zeros(3, 5, 64), clock=ManualClock(), float32=True)
    assert latency("0", 16) == 4.0
    assert latency("0", 8) == 2.0
    assert latency("0", 4) == 4.0, "a slower kernel is not taken"
    assert latency("nowhere", 8) == 0.0
    assert asked[0] == ((32, 64), 15)
    assert isinstance(BitPlan((), 0.0, 0.0, 0.0).layers, dict)
