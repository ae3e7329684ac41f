from __future__ import annotations

from pathlib import Path

import pytest

from hasten.clock import ManualClock
from hasten.errors import ConfigurationError
from hasten.measure.energy import RaplMeter, detect_meter, horowitz, measure_energy, tdp


def _zone(root: Path, name: str, joules: float) -> Path:
    zone = root / name
    zone.mkdir(exist_ok=True)
    (zone / "energy_uj").write_text(str(int(joules * 1e6)))
    (zone / "max_energy_range_uj").write_text(str(int(100e6)))
    return zone


def test_rapl_adds_packages_and_survives_the_wrap(tmp_path: Path) -> None:
    _zone(tmp_path, "intel-rapl:0", 99.0)
    _zone(tmp_path, "intel-rapl:1", 5.0)
    _zone(tmp_path, "intel-rapl:0:0", 50.0)  # a part of package 0, not to be counted twice
    meter = RaplMeter(tmp_path)
    assert meter.read() == 0.0
    _zone(tmp_path, "intel-rapl:0", 2.0)  # wrapped at 100 J
    _zone(tmp_path, "intel-rapl:1", 6.5)
    assert meter.read() == pytest.approx(3.0 + 1.5)


def test_no_meter_is_no_error(tmp_path: Path) -> None:
    assert detect_meter("cpu", tmp_path) is None
    with pytest.raises(ConfigurationError, match="use a model"):
        RaplMeter(tmp_path)


def test_energy_per_call() -> None:
    clock = ManualClock()

    class Meter:
        source = "rapl"

        def read(self) -> float:
            return 20.0 * clock.now()  # 20 watts

    energy = measure_energy(lambda: clock.advance(0.25), Meter(), clock=clock, min_time=1.0)
    assert energy.joules == pytest.approx(5.0)
    assert energy.measured


def test_models_are_named_and_exact() -> None:
    energy = horowitz(macs=1e9, traffic=1e6, dtype="bfloat16")
    assert energy.joules == pytest.approx(1e9 * 1.5e-12 + 1e6 * 1.3e-9 / 8)
    assert energy.source == "model:45nm-Horowitz2014"
    assert not energy.measured
    assert tdp(2.0, 15.0).joules == 30.0
    with pytest.raises(ConfigurationError, match="no energy is known"):
        horowitz(1, 1, "complex64")
    with pytest.raises(ConfigurationError, match="not positive"):
        tdp(1.0, 0.0)
