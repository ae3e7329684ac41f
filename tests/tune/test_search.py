from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from hasten.clock import ManualClock
from hasten.errors import ConfigurationError, DataError
from hasten.tune import Axis, Knob, Outcome, Search, Space
from hasten.tune.space import Point

SPACE = Space((Knob("width", (1, 2, 3, 4)), Knob("deep", (False, True))))
AXES = (Axis("latency@p99"), Axis("quality", maximise=True))
SOURCE = Path(__file__).parents[2] / "src"


def _values(point: Point) -> dict[str, float]:
    return {"latency@p99": point["width"] * (2.0 if point["deep"] else 1.0), "quality": point["width"] / 4}


def _too_slow(values: Mapping[str, float]) -> list[str]:
    return ["too slow"] if values.get("latency@p99", 0.0) > 4.5 else []


def _search(seen: list[Point], **more: Any) -> Search:
    def measure(point: Point) -> Outcome:
        seen.append(dict(point))
        return Outcome(_values(point))

    return Search(SPACE, measure, AXES, violations=_too_slow, **more)


def test_every_point_once() -> None:
    seen: list[Point] = []
    candidates = _search(seen).run()
    assert len(seen) == len(candidates) == 8
    assert sorted(map(str, seen)) == sorted(map(str, SPACE.points()))
    assert sum(c.feasible for c in candidates) == 6


def test_what_is_predicted_to_break_the_budget_is_not_measured() -> None:
    seen: list[Point] = []
    candidates = _search(seen, predict=_values, margin=0.2).run()
    # 6 > 4.5 / 0.8 is rejected, 8 too; exactly those two
    assert [c.name for c in candidates if not c.measured] == [
        c.name for c in candidates if _values(c.knobs)["latency@p99"] * 0.8 > 4.5
    ]
    assert len(seen) == 6
    refused = next(c for c in candidates if not c.measured)
    assert refused.violations == ("too slow",)
    assert not refused.feasible


def test_a_point_that_cannot_be_built_is_noted_and_the_search_goes_on() -> None:
    def measure(point: Point) -> Outcome:
        if point["width"] == 3:
            raise ConfigurationError("no kernel of width 3")
        return Outcome(_values(point))

    candidates = Search(SPACE, measure, AXES).run()
    assert len(candidates) == 8
    assert sum(c.detail.get("error") == "no kernel of width 3" for c in candidates) == 2


def test_points_that_are_not_allowed_are_never_tried() -> None:
    space = Space(SPACE.knobs, allowed=lambda p: not (p["deep"] and p["width"] > 2))
    found = Search(space, lambda p: Outcome(_values(p)), AXES).run()
    assert sorted(map(str, (c.knobs for c in found))) == sorted(map(str, space.points()))
    assert len(found) == 6


def test_limits() -> None:
    seen: list[Point] = []
    assert len(_search(seen).run(max_measured=3)) == 3
    clock = ManualClock()
    search = Search(SPACE, lambda p: (clock.advance(10.0), Outcome(_values(p)))[1], AXES)
    assert len(search.run(time_limit=25.0, clock=clock)) == 3
    assert len(search.run(time_limit=0.0, clock=clock)) == 1  # never empty-handed


def test_the_first_points_come_first() -> None:
    seen: list[Point] = []
    first = ({"width": 3, "deep": True}, {"width": 1, "deep": False})
    _search(seen, first=first).run()
    assert tuple(seen[:2]) == first


def test_a_second_run_measures_nothing_again(tmp_path: Path) -> None:
    seen: list[Point] = []
    search = _search(seen, storage=tmp_path / "a" / "study.db")
    before = search.run(max_measured=3)
    after = search.run()
    assert after[:3] == before
    assert len(seen) == 8


def test_another_search_in_the_same_study_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "study.db"
    _search([], storage=path, facts={"budget": "p99<1s"}).run(max_measured=1)
    with pytest.raises(ConfigurationError, match="has another budget"):
        _search([], storage=path, facts={"budget": "p99<2s"}).run()
    assert len(_search([], storage=path, name="other", facts={"budget": "p99<2s"}).run()) == 8


_PROGRAM = """
import os, signal, sys
sys.path.insert(0, {source!r})
from pathlib import Path
from hasten.tune import Axis, Knob, Outcome, Search, Space
log = Path({log!r})
def measure(point):
    with log.open("a") as file:
        file.write(f"{{point['n']}}\\n")
    if {kill} and len(log.read_text().split()) == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    return Outcome({{"time": float(point["n"]), "quality": 1.0}})
space = Space((Knob("n", tuple(range(10))),))
found = Search(space, measure, (Axis("time"), Axis("quality", maximise=True)), storage=Path({db!r})).run()
print(len(found), sum(c.measured for c in found))
"""


@pytest.mark.slow
def test_killed_in_the_middle_it_goes_on_where_it_was(tmp_path: Path) -> None:
    db, log = tmp_path / "study.db", tmp_path / "log"
    log.touch()

    def run(kill: bool) -> subprocess.CompletedProcess[str]:
        program = _PROGRAM.format(source=str(SOURCE), db=str(db), log=str(log), kill=kill)
        return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)

    assert run(True).returncode == -signal.SIGKILL
    assert len(log.read_text().split()) == 4
    second = run(False)
    assert second.stdout.split() == ["10", "10"], second.stderr
    tried = log.read_text().split()
    assert len(tried) == 11  # only the point that was running is measured twice
    assert tried[4] == tried[3]
    assert sorted(set(tried), key=int) == [str(n) for n in range(10)]


@pytest.mark.parametrize("damage", ["text", "truncated", "scrambled"])
def test_a_corrupt_file_is_told_and_left_alone(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "study.db"
    _search([], storage=path).run(max_measured=2)
    content = path.read_bytes()
    if damage == "text":
        content = b"this is not a database" * 100
    elif damage == "truncated":
        content = content[: len(content) // 3]
    else:
        content = content[:4096] + bytes(255 - b for b in content[4096:])
    path.write_bytes(content)
    with pytest.raises(DataError, match="study") as caught:
        _search([], storage=path).run()
    assert "\n" not in str(caught.value)
    assert path.read_bytes() == content


def test_an_empty_file_is_a_new_study(tmp_path: Path) -> None:
    path = tmp_path / "study.db"
    path.touch()
    assert len(_search([], storage=path).run()) == 8


_FULL = """
import resource, sys
sys.path.insert(0, {source!r})
from pathlib import Path
from hasten.errors import DataError
from hasten.tune import Axis, Knob, Outcome, Search, Space
path = Path({db!r})
measured = []
def measure(point):
    measured.append(point["n"])
    if len(measured) == 5:
        limit = path.stat().st_size
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    return Outcome({{"time": 1.0, "quality": 1.0}}, {{"big": "x" * 200000}})
space = Space((Knob("n", tuple(range(10))),))
try:
    Search(space, measure, (Axis("time"), Axis("quality", maximise=True)), storage=path).run()
except DataError as error:
    print(error)
    sys.exit(7)
"""


@pytest.mark.slow
def test_a_full_disk_is_one_line_and_nothing_is_lost(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # threads are part of the machine, and an earlier test may have left torch with another number of them
    monkeypatch.setenv("OMP_NUM_THREADS", str(torch.get_num_threads()))
    db = tmp_path / "study.db"
    program = _FULL.format(source=str(SOURCE), db=str(db))
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert ran.returncode == 7, ran.stderr[-2000:]
    assert ran.stdout.count("\n") == 1
    assert "trials told so far are kept" in ran.stdout
    assert "Traceback" not in ran.stderr
    with sqlite3.connect(db) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    seen: list[int] = []

    def measure(point: Point) -> Outcome:
        seen.append(point["n"])
        return Outcome({"time": 1.0, "quality": 1.0})

    axes = (Axis("time"), Axis("quality", maximise=True))
    found = Search(Space((Knob("n", tuple(range(10))),)), measure, axes, storage=db).run()
    assert len(found) == 10
    assert len(seen) == 6  # four were told before the disk was full


def test_a_place_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="name another place"):
        _search([], storage=tmp_path / "file" / "study.db").run()
    if os.geteuid() != 0:
        (tmp_path / "closed").mkdir(mode=0o500)
        with pytest.raises(DataError, match="cannot be used"):
            _search([], storage=tmp_path / "closed" / "study.db").run()
