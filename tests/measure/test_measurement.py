from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

import hasten.measure
from hasten.clock import ManualClock
from hasten.errors import BudgetError, ConfigurationError
from hasten.measure import Ceilings, Protocol

ROOFS = Ceilings("cpu", 1e9, 1e9, {"float32": 1e10, "bfloat16": 2e10})
QUICK = Protocol(warmup=1, warmup_time=0, min_samples=10, min_time=0)


class _Slow(nn.Module):
    """Takes 2 ms of the test's clock."""

    def __init__(self, clock: ManualClock) -> None:
        super().__init__()
        self.clock = clock
        self.inner = nn.Sequential(nn.Linear(4, 4), nn.Dropout())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.clock.advance(0.002)
        return self.inner(x)


def test_the_package_is_the_verb(tmp_path: Path) -> None:
    clock = ManualClock()
    model = _Slow(clock)
    model.inner[1].eval()
    m = hasten.measure(  # type: ignore[operator]
        model,
        torch.zeros(1, 4),
        "p99<1ms, p50<3ms, size<1KiB, quality>99%",
        protocol=QUICK,
        ceilings=ROOFS,
        clock=clock,
    )
    assert m.values()["latency@p99"] == pytest.approx(0.002)
    assert m.values()["throughput"] == pytest.approx(500)
    assert m.values()["size"] == 80
    assert m.violations == ["latency@p99 is 2 ms, the budget allows 1 ms"]
    assert m.verdict().startswith("outside the budget")
    assert "quality was not measured" in m.verdict()
    assert m.point.attainment == pytest.approx((80 + 32) / 1e9 / 0.002)
    assert model.training  # left as it was, module by module
    assert not model.inner[1].training
    document = json.loads(json.dumps(m.to_json(), allow_nan=False))
    assert document["energy"]["source"].startswith("model:") or document["energy"]["measured"]
    path = tmp_path / "report.html"
    m.report(path)
    page = path.read_text()
    assert "_Slow" in page
    assert "outside the budget" in page
    assert "://" not in page


def test_a_stated_power_names_the_energy(monkeypatch: pytest.MonkeyPatch) -> None:
    from hasten.measure import energy

    monkeypatch.setattr(energy, "detect_meter", lambda device: None)
    clock = ManualClock()
    m = hasten.measure.measure(_Slow(clock), torch.zeros(1, 4), power=10, protocol=QUICK, ceilings=ROOFS, clock=clock)
    assert m.energy.source == "model:cpu-tdp"
    assert m.energy.joules == pytest.approx(0.02)


def test_any_callable_and_dict_examples() -> None:
    m = hasten.measure.measure(
        lambda a, b: a @ b,
        {"a": torch.zeros(2, 3), "b": torch.zeros(3, 4)},
        protocol=QUICK,
        ceilings=ROOFS,
    )
    assert m.cost.macs == 24
    assert m.verdict() == "no budget was given"


def test_bad_input_is_one_line() -> None:
    layer = nn.Linear(2, 2)
    with pytest.raises(BudgetError):
        hasten.measure.measure(layer, torch.zeros(1, 2), "p99>1ms", ceilings=ROOFS)
    with pytest.raises(ConfigurationError, match="device 'tpu' is not here"):
        hasten.measure.measure(layer, torch.zeros(1, 2), device="tpu", ceilings=ROOFS)


def test_a_model_that_lies_elsewhere_is_refused_in_a_line() -> None:
    with pytest.raises(ConfigurationError, match="the model lies on meta and would be measured on cpu; say device="):
        hasten.measure(nn.Linear(4, 4, device="meta"), torch.zeros(1, 4))  # type: ignore[operator]
    split = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4, device="meta"))
    with pytest.raises(ConfigurationError, match=r"on several devices \(cpu, meta\); move all of it to one"):
        hasten.measure(split, torch.zeros(1, 4))  # type: ignore[operator]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_model_on_a_gpu() -> None:
    model, x = nn.Linear(2048, 2048).cuda(), torch.zeros(64, 2048, device="cuda")
    roofs = Ceilings("cuda", 1e12, 1e12, {"float32": 1e13})
    m = hasten.measure(model, x, protocol=QUICK, ceilings=roofs, device="cuda")  # type: ignore[operator]
    assert m.cost.macs == 64 * 2048 * 2048
    rows = 64 * 2048 * 4
    assert m.cost.weight_bytes + rows <= m.memory < m.cost.weight_bytes + 64 * 2**20
    with pytest.raises(ConfigurationError, match="lies on cuda:0 and would be measured on cpu"):
        hasten.measure(model, x)  # type: ignore[operator]
