from __future__ import annotations

from pathlib import Path

import pytest

from hasten.clock import MonotonicClock
from hasten.measure import bandwidth
from hasten.measure.bandwidth import Ceilings, measure_ceilings
from hasten.measure.cache import cache_folder

SMALL = {"size": 2**20, "width": 64, "limit": 0.01}


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bandwidth, "busy", lambda: False)


def test_a_busy_machine_keeps_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bandwidth, "busy", lambda: True)
    measure_ceilings(**SMALL)  # type: ignore[arg-type]
    assert not (cache_folder() / "ceilings").exists()


class _Counting(MonotonicClock):
    calls = 0

    def now(self) -> float:
        self.calls += 1
        return super().now()


def test_measured_once_and_then_read() -> None:
    clock = _Counting()
    first = measure_ceilings(clock=clock, **SMALL)  # type: ignore[arg-type]
    taken = clock.calls
    assert taken > 0
    assert measure_ceilings(clock=clock, **SMALL) == first  # type: ignore[arg-type]
    assert clock.calls == taken
    measure_ceilings(clock=clock, refresh=True, **SMALL)  # type: ignore[arg-type]
    assert clock.calls > taken
    assert first.read > 0
    assert first.copy > 0
    assert first.rate("no such format") == first.rates["float32"]


@pytest.mark.parametrize("garbage", ["", "{", "[]", '{"device": "cpu"}', '{"rates": {}}'])
def test_a_broken_cache_file_is_measured_over(garbage: str) -> None:
    good = measure_ceilings(**SMALL)  # type: ignore[arg-type]
    (file,) = (cache_folder() / "ceilings").iterdir()
    file.write_text(garbage)
    again = measure_ceilings(**SMALL)  # type: ignore[arg-type]
    assert again.machine == good.machine
    assert Ceilings.from_json(again.to_json()) == again
    assert file.read_text() != garbage


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HASTEN_CACHE", str(tmp_path / "file"))
    assert measure_ceilings(**SMALL).read > 0  # type: ignore[arg-type]


def test_a_format_without_kernel_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    rate = bandwidth._matrix_rate
    monkeypatch.setattr(bandwidth, "_matrix_rate", lambda name, *a: None if name == "int8" else rate(name, *a))
    assert "int8" not in measure_ceilings(**SMALL).rates  # type: ignore[arg-type]
