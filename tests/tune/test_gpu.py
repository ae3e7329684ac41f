"""Tuning a module where it lies: on a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import hasten.tune
from hasten.compress import Int8Network, kernels
from hasten.compress.fused import FusedNetwork
from hasten.compress.quantize.layer_latency import layer_latency
from hasten.measure import Protocol
from hasten.tune import Knob, Space, recipe_space
from hasten.tune.space import recipe_of

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
QUICK = Protocol(warmup=1, warmup_time=0, min_samples=5, min_time=0, max_time=0.2)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HASTEN_CACHE", str(tmp_path))


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(256, 512), nn.GELU(), nn.Linear(512, 256)).cuda()


def test_the_space_is_that_of_the_device() -> None:
    model = network()
    formats = next(k.choices for k in recipe_space(model).knobs if k.name == "format")
    assert {"unchanged", "bf16", "int8", "int4"} <= set(formats)
    assert ("fp8" in formats) == any(k.precision == "fp8" for k in kernels.available("cuda"))
    techniques = [t for p in recipe_space(model).points() for t in recipe_of(p, model).techniques]
    assert not any(isinstance(t, (FusedNetwork, Int8Network)) for t in techniques), "these run on the CPU"


def test_a_model_is_tuned_where_it_lies() -> None:
    pytest.importorskip("optuna")
    model, x = network(), torch.randn(16, 256, device="cuda")
    space = Space((Knob("format", ("unchanged", "bf16", "int8")), Knob("keep", ("none",))))
    result = hasten.tune(  # type: ignore[operator]
        model, [x], "p50<10s, memory<1GiB, quality>50%", space=space, protocol=QUICK, time_limit=30.0
    )
    assert result.best is not None
    assert {c.knobs["format"] for c in result.frontier.candidates if c.measured} >= {"unchanged"}
    assert result.model(x).device.type == "cuda"
    assert all(p.device.type == "cuda" for p in model.parameters())


def test_layers_are_timed_on_their_device() -> None:
    model = network()
    table = layer_latency(model, lambda m, x: m(x), torch.randn(16, 256, device="cuda"))
    assert 0 < table("0", 8) < 1e-3
    assert table("0", 8) <= table("0", 16)
