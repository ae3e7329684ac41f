from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from hasten.measure import Machine
from hasten.measure.device import detect


def test_load_does_not_change_the_fingerprint() -> None:
    machine = Machine.detect()
    assert replace(machine, load=99.0, system="other").hash == machine.hash
    assert replace(machine, threads=machine.threads + 1).hash != machine.hash
    assert json.loads(json.dumps(machine.to_json()))["hash"] == machine.hash
    assert machine.cpu in str(machine)


def test_facts_are_plausible() -> None:
    machine = Machine.detect()
    assert machine.cores >= 1
    assert 2**26 < machine.memory < 2**50
    if Path("/proc/cpuinfo").exists():
        flags = Path("/proc/cpuinfo").read_text().split()
        assert all(flag in flags for flag in machine.isa)


def test_the_host_is_a_device() -> None:
    host = detect()[0]
    assert host.name == "cpu"
    assert "float32" in host.dtypes
