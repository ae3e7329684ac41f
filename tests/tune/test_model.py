from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import hasten.tune
from hasten.clock import ManualClock
from hasten.compress import FusedModule, PackedLinear, Recipe, TruncatedSvd, kernels
from hasten.errors import ConfigurationError
from hasten.measure import Protocol
from hasten.nn.product.instructions import has_bytes
from hasten.tune import Knob, Space
from hasten.tune import model as tuning
from hasten.tune.space import recipe_space, with_choices

SECONDS = {"fp32": 4e-3, "bf16": 3e-3, "bf16-packed": 2.5e-3, "int8-weight": 5e-3, "int8-dynamic": 1e-3}
SECONDS |= {"bf16-panels": 3.5e-3, "int8-panels": 6e-3, "int4-panels": 9e-3}
SECONDS |= {f"int4-g{g}": 1.5e-3 for g in kernels.GROUP_SIZES}
SPACE = Space(
    (
        Knob("format", ("unchanged", "bf16", "int8", "int4")),
        Knob("group", (32,), lambda p: p["format"] == "int4"),
        Knob("keep", ("none",), lambda p: p["format"] in ("int8", "int4")),
    )
)
QUICK = Protocol(warmup=1, warmup_time=0, min_samples=5, min_time=0)


class _Timed(nn.Sequential):
    """A network whose linear layers take the seconds of the table on the test's clock."""

    clock: ManualClock

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self:
            name = layer.kernel_name if isinstance(layer, PackedLinear) else "fp32"
            if isinstance(layer, (nn.Linear, PackedLinear)):
                self.clock.advance(SECONDS[name])
            x = layer(x)
        return x


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels take what ``SECONDS`` says, whatever else the machine does."""

    def decreed(shape: tuple[int, int], tokens: int, names: list[str], **_: Any) -> dict[str, float]:
        return {n: SECONDS[n] for n in names if kernels.kernel(n).supports(*shape)}

    monkeypatch.setattr(kernels, "measure_kernels", decreed)


@pytest.fixture
def clock(table: None) -> ManualClock:
    return ManualClock()


def _model(clock: ManualClock) -> _Timed:
    torch.manual_seed(0)
    model = _Timed(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64))
    _Timed.clock = clock
    return model


DATA = [torch.randn(4, 64, generator=torch.Generator().manual_seed(i)) for i in range(3)]


def _tune(clock: ManualClock, budget: str, **more: Any) -> Any:
    return tuning.tune(_model(clock), DATA, budget, space=SPACE, protocol=QUICK, clock=clock, time_limit=None, **more)


def test_a_tight_budget_takes_the_fast_one(clock: ManualClock) -> None:
    result = _tune(clock, "p99<2.5ms, quality>90%")
    assert result.best.name == "int8"
    assert result.best.values["latency@p99"] == pytest.approx(2e-3)
    assert isinstance(result.model[0], PackedLinear)
    assert result.best.detail["confirmed"] is True
    assert "int8 is faster than unchanged: 4.00×" in result.verdict()
    assert result.baseline.values["latency@p99"] == pytest.approx(8e-3)
    again, _ = Recipe.from_yaml(result.recipe.to_yaml()).apply(_model(clock))
    assert torch.equal(again(DATA[0]), result.model(DATA[0]))


def test_a_loose_budget_keeps_the_quality(clock: ManualClock) -> None:
    result = _tune(clock, "p99<7ms")
    assert result.best.name == "bf16"  # more quality than int8 and inside the budget
    assert _tune(clock, "p99<100ms").recipe.techniques == ()


def test_a_search_cut_short_says_how_far_it_came(clock: ManualClock) -> None:
    result = tuning.tune(_model(clock), DATA, "p99<100ms", space=SPACE, protocol=QUICK, clock=clock, time_limit=1e-3)
    assert result.verdict().endswith("(1 of 4 candidates were tried)")
    assert "no recipe was tried in that time" in result.verdict()


def test_an_impossible_budget_is_said(clock: ManualClock, tmp_path: Path) -> None:
    result = _tune(clock, "p99<0.1ms")
    assert result.best is None
    assert "no candidate meets p99 ≤ 100 µs; closest is int8" in result.verdict()
    assert type(result.model[0]) is nn.Linear
    result.report(tmp_path / "r.html")
    json.dumps(result.to_json(), allow_nan=False)


def test_a_size_is_rejected_before_it_costs_time(clock: ManualClock) -> None:
    result = _tune(clock, "size<20KiB")
    refused = [c.name for c in result.frontier.candidates if not c.measured]
    assert refused == ["unchanged", "bf16"] or sorted(refused) == ["bf16", "unchanged"]
    assert result.best.values["size"] <= 20 * 1024
    assert result.baseline.measured  # the unchanged model is measured all the same, to compare with


def test_quality_is_the_callers_and_relative_to_the_unchanged(clock: ManualClock) -> None:
    def quality(model: nn.Module) -> float:
        return 50.0 if any(isinstance(m, PackedLinear) for m in model.modules()) else 200.0

    result = _tune(clock, "p99<5.5ms, quality>30%", quality=quality)
    assert result.best.values["quality"] == 0.25 if result.best else True
    assert "quality is 25 %, the budget asks for 30 %" in result.verdict()
    with pytest.raises(ConfigurationError, match="larger when better"):
        _tune(clock, "p99<1s", quality=lambda m: -1.0)


def test_the_model_is_left_as_it_was(clock: ManualClock) -> None:
    model = _model(clock).train()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    tuning.tune(model, DATA, "p99<7ms", space=SPACE, protocol=QUICK, clock=clock)
    assert all(m.training for m in model.modules())
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


def test_a_candidate_that_does_not_hold_up_is_dropped(clock: ManualClock, monkeypatch: pytest.MonkeyPatch) -> None:
    compare = tuning._Bench.compare

    def moody(self: Any, others: dict[str, nn.Module], *rules: Any) -> Any:
        if "int8" in others:  # the confirming run: suddenly slow
            clock_of = _Timed.clock
            slow = lambda module, args: clock_of.advance(1.0)  # noqa: E731
            others["int8"].register_forward_pre_hook(slow)
        return compare(self, others, *rules)

    monkeypatch.setattr(tuning._Bench, "compare", moody)
    result = _tune(clock, "p99<3.5ms")
    assert result.best.name == "int4"
    dropped = next(c for c in result.frontier.candidates if c.name == "int8")
    assert dropped.detail["confirmed"] is False
    assert dropped.violations


def test_a_stored_study_goes_on_and_belongs_to_its_model(clock: ManualClock, tmp_path: Path) -> None:
    path = tmp_path / "study.db"
    first = _tune(clock, "p99<2.5ms", storage=path)
    began = clock.now()
    second = _tune(clock, "p99<2.5ms", storage=path)
    assert second.best.name == first.best.name
    assert clock.now() - began < 0.4  # the confirming run alone
    other = _model(clock)
    with torch.no_grad():
        other[0].weight.add_(1)
    with pytest.raises(ConfigurationError, match="has another model"):
        tuning.tune(other, DATA, "p99<2.5ms", space=SPACE, protocol=QUICK, clock=clock, storage=path)


def test_report_shows_the_frontier(clock: ManualClock, tmp_path: Path) -> None:
    result = _tune(clock, "p99<2.5ms")
    result.report(tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert page.count("<svg") == 3  # frontier, layers, distribution
    assert set(result.sensitivity) == {"0", "2"}
    assert all(0 < v < 0.05 for v in result.sensitivity.values())
    assert "4.00× as fast at 4 rows" in page  # why the layer has that kernel
    assert "int8 meets" in page
    assert "weight-precision" in page


def test_bad_requests(clock: ManualClock) -> None:
    with pytest.raises(ConfigurationError, match="at least one example"):
        tuning.tune(_model(clock), [], "p99<1s")


@pytest.mark.slow
def test_for_real_on_this_machine() -> None:
    """The whole path with the real clock and the real kernels; nothing about speed is asserted."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64))
    result = hasten.tune(model, DATA[:1], "p99<10s", protocol=QUICK, time_limit=5.0)  # type: ignore[operator]
    assert result.best is not None
    assert result.best.values["quality"] > 0.9
    assert {c.knobs["format"] for c in result.frontier.candidates} >= {"unchanged"}


@pytest.mark.skipif(not has_bytes(), reason="needs registers of 512 bits")
def test_a_network_in_one_call_is_a_candidate() -> None:
    space = Space(
        (Knob("format", ("unchanged", "fused")), Knob("products", ("fp32",), lambda p: p["format"] == "fused"))
    )
    torch.manual_seed(0)
    layers = [m for _ in range(30) for m in (nn.Linear(16, 16), nn.LayerNorm(16), nn.GELU())]  # nearly all is calling
    model, data = nn.Sequential(*layers).eval(), [torch.randn(1, 16), torch.randn(7, 16)]
    result = tuning.tune(model, data, "quality>99.9%", space=space, protocol=QUICK, time_limit=None)
    found = result.frontier.candidates[1]  # whole networks come first
    assert found.name == "fused fp32"
    assert found.measured
    assert found.values["quality"] > 0.9999
    if result.recipe.techniques:  # which is faster is the machine's
        assert isinstance(result.model, FusedModule)
        again, _ = Recipe.from_yaml(result.recipe.to_yaml()).apply(model, data)
        assert torch.equal(again(data[1]), result.model(data[1]))


def test_recipes_compose_and_memory_and_energy_are_bounded(table: None) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 256)).eval()
    space = Space((Knob("format", ("unchanged", "bf16")), Knob("remove", (0.0, 0.5), lambda p: p["format"] == "bf16")))
    quick = Protocol(min_samples=3, min_time=0.0, max_time=1.0, warmup_time=0.0)
    result = tuning.tune(
        model, [torch.randn(4, 256)], "memory<100MiB, energy<5J, quality>10%", space=space, protocol=quick, power=10.0,
        time_limit=None,
    )  # fmt: skip
    candidates = {c.name: c for c in result.frontier.candidates}
    assert len(candidates) == 3
    both = next(c for c in candidates.values() if c.knobs.get("remove"))
    assert both.measured, both
    assert both.values["size"] < 0.6 * candidates["unchanged"].values["size"]
    assert both.values["memory"] >= both.values["size"]
    assert set(both.detail["plan"]["steps"][0]) == {"0", "2"}
    if tuning.energies.detect_meter() is None:
        assert both.values["energy"] == pytest.approx(10 * both.values["latency@p50"])
        with pytest.raises(ConfigurationError, match="power"):
            tuning.tune(model, [torch.randn(4, 256)], "energy<5J", space=space, protocol=quick, time_limit=5.0)


def test_a_residual_network_with_the_same_call():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10)
    ).eval()
    quick = Protocol(min_samples=3, min_time=0.0, max_time=1.0, warmup_time=0.0)
    space = Space((Knob("format", ("unchanged", "int8-network")),))
    result = tuning.tune(
        model, [torch.randn(1, 3, 16, 16)], "quality>50%", space=space, protocol=quick, time_limit=None
    )
    whole = next(c for c in result.frontier.candidates if c.name.startswith("int8-network"))
    assert whole.measured
    assert whole.values["quality"] > 0.9


def test_recipes_of_the_user_join_the_space(tmp_path: Path):
    from hasten.compress import MagnitudePruning, Quantize
    from hasten.compress.quantize import Gptq

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)).eval()
    data, others = [torch.randn(8, 64)], [torch.randn(200, 64)]
    rounded = Recipe((Quantize.scheme("W4A16", steps=(Gptq(),), real="never"),))
    both = Recipe((MagnitudePruning(0.5), Quantize.scheme("W8A16", real="never")))
    quick = Protocol(min_samples=3, min_time=0.0, max_time=1.0, warmup_time=0.0)
    space = Space((Knob("format", ("unchanged",)),))

    def search(**knobs: Any) -> dict[str, Any]:
        result = tuning.tune(model, data, "quality>1%", space=space, protocol=quick, time_limit=None, **knobs)
        return {c.name: c for c in result.frontier.candidates}

    found = search(recipes=[rounded, both], calibration=others)
    assert set(found) == {"unchanged", rounded.label, both.label}
    assert all(c.measured for c in found.values())
    assert found[rounded.label].values["quality"] > 0.8
    blind = search(recipes=[rounded])[rounded.label]
    assert not blind.measured
    assert "calibration" in blind.violations[0]
    with pytest.raises(ConfigurationError, match="give each once"):
        search(recipes=[both, both])
    with pytest.raises(ConfigurationError, match="not the empty one"):
        search(recipes=[Recipe()])


def test_recipes_of_the_user_are_tried_before_the_space() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)).eval()
    mine = Recipe((TruncatedSvd(ratio=0.5),))
    chosen = with_choices(recipe_space(model), "format", (mine.label,))
    assert [p["format"] for p in tuning._first(chosen, (mine.label,))][:2] == ["unchanged", mine.label]


def test_a_latency_is_predicted_from_the_table_and_saves_the_measurement(clock: ManualClock) -> None:
    result = _tune(clock, "p99<3.5ms, quality>50%")
    found = {c.name: c for c in result.frontier.candidates}
    assert result.best.name == "int8" or result.best.name.startswith("int4")
    assert not found["bf16"].measured  # 2 x 2.5 ms, more than 20 % above the bound
    assert found["bf16"].predicted["latency@p99"] == pytest.approx(5e-3)
    assert "5 ms" in found["bf16"].violations[0]
    assert found["int8"].measured
