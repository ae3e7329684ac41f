"""Joules, and where the number comes from: a meter where the machine has one, else a model with a name.

Meters: RAPL counters of the processor package (Linux powercap) and NVML for NVIDIA GPUs. Models:
``model:45nm-Horowitz2014`` charges each multiply-add and each byte of DRAM traffic with the energies of Horowitz,
"Computing's energy problem (and what we can do about it)", ISSCC 2014; ``model:cpu-tdp`` charges a stated power for "
"the measured time. Every
:class:`Energy` carries its source, and figures of different sources are not to be compared.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from hasten.clock import Clock, MonotonicClock
from hasten.errors import ConfigurationError

__all__ = ["Energy", "Meter", "NvmlMeter", "RaplMeter", "detect_meter", "horowitz", "measure_energy", "tdp"]

_POWERCAP = Path("/sys/class/powercap")

# Joules at 45 nm and 0.9 V. bf16 is not in the table and is charged as fp16; int4 as int8.
_MULTIPLY_ADD = {"float32": 3.7e-12 + 0.9e-12, "float16": 1.1e-12 + 0.4e-12, "int8": 0.2e-12 + 0.03e-12}
_SAME = {"bfloat16": "float16", "int4": "int8", "float64": "float32"}
_DRAM_BYTE = 1.3e-9 / 8
"""the lower end of 1.3 to 2.6 nJ per 64 bit"""


@dataclass(frozen=True)
class Energy:
    """Joules of one call."""

    joules: float
    """joules"""
    source: str
    """``rapl``, ``nvml``, or the name of a model"""

    @property
    def measured(self) -> bool:
        """Whether a meter read it."""
        return not self.source.startswith("model:")

    def to_json(self) -> dict[str, Any]:
        """joules and source."""
        return {"joules": self.joules, "source": self.source, "measured": self.measured}


class Meter(Protocol):
    """A counter of joules."""

    @property
    def source(self) -> str:
        """Its name in a report."""
        ...

    def read(self) -> float:
        """Joules since some moment in the past; only differences mean anything."""
        ...


class RaplMeter:
    """Energy counters of the processor packages, wrap-around handled. Not thread-safe."""

    source = "rapl"

    def __init__(self, root: Path = _POWERCAP) -> None:
        self._zones = [z for z in sorted(root.glob("intel-rapl:*")) if z.name.count(":") == 1]
        if not self._zones:
            raise ConfigurationError(f"no package energy counter under {root}; use a model such as model:cpu-tdp")
        self._ranges = [int((z / "max_energy_range_uj").read_text()) for z in self._zones]
        self._last = self._raw()
        self._total = 0.0

    def _raw(self) -> list[int]:
        return [int((z / "energy_uj").read_text()) for z in self._zones]

    def read(self) -> float:
        """Joules since the meter was made; read it at least once per wrap (about a minute at full power)."""
        raw = self._raw()
        for index, (now, before) in enumerate(zip(raw, self._last, strict=True)):
            step = now - before
            self._total += (step if step >= 0 else step + self._ranges[index]) * 1e-6
        self._last = raw
        return self._total


class NvmlMeter:
    """Energy counter of one NVIDIA GPU, through the package pynvml."""

    source = "nvml"

    def __init__(self, index: int = 0) -> None:
        import pynvml  # type: ignore[import-not-found,unused-ignore]

        pynvml.nvmlInit()
        self._library: Any = pynvml
        self._handle = pynvml.nvmlDeviceGetHandleByIndex(index)
        self.read()

    def read(self) -> float:
        """Joules since the driver was loaded."""
        return float(self._library.nvmlDeviceGetTotalEnergyConsumption(self._handle)) * 1e-3


def detect_meter(device: str = "cpu", root: Path = _POWERCAP) -> Meter | None:
    """The meter of ``device``, or None where there is none that may be read."""
    try:
        if device.startswith("cuda"):
            return NvmlMeter(int(device.partition(":")[2] or 0))
        return RaplMeter(root)
    except Exception:  # a missing package, driver, counter or permission: all mean that there is no meter
        return None


def horowitz(macs: float, traffic: float, dtype: str = "float32") -> Energy:
    """Energy of ``macs`` multiply-adds in ``dtype`` and ``traffic`` bytes from DRAM, 45 nm.

    >>> horowitz(macs=1e9, traffic=0).joules
    0.0046
    """
    name = _SAME.get(dtype, dtype)
    if name not in _MULTIPLY_ADD:
        raise ConfigurationError(f"no energy is known for {dtype!r}; known are {', '.join([*_MULTIPLY_ADD, *_SAME])}")
    return Energy(macs * _MULTIPLY_ADD[name] + traffic * _DRAM_BYTE, "model:45nm-Horowitz2014")


def tdp(seconds: float, watts: float) -> Energy:
    """Energy of ``seconds`` at a stated power; an upper bound for a processor that is not overclocked."""
    if watts <= 0:
        raise ConfigurationError(f"a power of {watts} W is not positive; state the processor's thermal design power")
    return Energy(seconds * watts, "model:cpu-tdp")


def measure_energy(
    run: Callable[[], object],
    meter: Meter,
    *,
    clock: Clock | None = None,
    min_time: float = 1.0,
) -> Energy:
    """Joules per call of ``run``, repeated for at least ``min_time`` seconds (counters tick every millisecond or so).

    The machine's idle power is included, as it is in any wall reading.
    """
    clock = clock or MonotonicClock()
    began, before, calls = clock.now(), meter.read(), 0
    while calls == 0 or clock.now() - began < min_time:
        run()
        calls += 1
        meter_now = meter.read()
    return Energy((meter_now - before) / calls, meter.source)
