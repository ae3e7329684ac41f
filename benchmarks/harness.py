"""Contenders in processes of their own, driven in turns, and the table of what came out.

Each contender is a worker that waits at a pipe. One command at a time is under way anywhere, and the order turns round
each time (A B, B A, …), so drift of the machine hits everybody alike. A worker that waits must not use a core: what the
idle ones burnt is measured and reported. A ratio is that of the medians, with a paired bootstrap interval.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.progress import track
from rich.table import Table

from hasten.clock import MonotonicClock
from hasten.files import write_text
from hasten.measure.machine import Machine
from hasten.measure.stats import paired_ratio

HERE = Path(__file__).parent
MODEL = Path("build/benchmarks/random-245m")
"""where random_model.py writes by default"""

_progress = Console(stderr=True)


class Absent(Exception):
    """A contender that cannot take part; the text says why."""


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    what: str
    peer: str = "–"
    ours: float | None = None
    theirs: float | None = None
    unit: str = ""
    score: float | None = None
    """what is held against the bars: a ratio, a share, or a value with a limit"""
    low: float | None = None
    """lower end of the score's 95 % interval"""
    high: float | None = None
    at_least: float | None = None
    aim: float | None = None
    limit: bool = False
    """the score must stay below the bars"""
    note: str = ""
    """why there is no score, or what to know about it"""

    @property
    def verdict(self) -> str:
        """aim reached, reached, missed, for information, or why there is no figure."""
        if self.score is None:
            return self.note or "no figure"
        if self.at_least is None and self.aim is None:
            return "for information"
        for bar, word in ((self.aim, "aim reached"), (self.at_least, "reached")):
            if bar is not None and (self.score < bar if self.limit else self.score >= bar):
                return word
        return "MISSED" if self.at_least is not None else "aim missed"


class Contender:
    """A worker process; see ``contenders.py``. Raises :class:`Absent` from any call where it cannot take part."""

    def __init__(self, name: str, kind: str, **options: Any) -> None:
        self.name = name
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the process
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / "contenders.py"), kind, json.dumps(options)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )
        try:
            self.info: dict[str, Any] = self._read()
        except Absent:
            self.close()
            raise

    def ask(self, command: str, **arguments: Any) -> Any:
        """Run one command in the worker and wait for its result."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([command, arguments]) + "\n")
        self._process.stdin.flush()
        return self._read()

    def _read(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            self._log.seek(0)
            last = self._log.read().decode(errors="replace").strip().splitlines()[-1:] or ["it wrote nothing"]
            raise Absent(f"ended with status {self._process.returncode}: {last[0][:200]}")
        reply = json.loads(line)
        if "absent" in reply:
            raise Absent(reply["absent"])
        return reply["result"]

    def cpu_time(self) -> float:
        """Seconds of processor time that the worker has used."""
        times = psutil.Process(self._process.pid).cpu_times()
        return float(times.user + times.system)

    def close(self) -> None:
        """End the worker."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()


class Field:
    """All contenders of one benchmark, by name; those that cannot take part are kept with the reason."""

    def __init__(self) -> None:
        self.present: dict[str, Contender] = {}
        self.absent: dict[str, str] = {}
        self.idle_share = 0.0
        """largest share of a core that the waiting workers used together during a turn"""
        self._clock = MonotonicClock()

    def add(self, name: str, kind: str, **options: Any) -> None:
        """Start a contender."""
        try:
            self.present[name] = Contender(name, kind, **options)
        except Absent as reason:
            self.absent[name] = str(reason)

    def drop(self, name: str, reason: str) -> None:
        """Take a contender out."""
        self.present.pop(name).close()
        self.absent[name] = reason

    def in_turns(
        self, names: Sequence[str], command: str, rounds: int, warm_up: int = 1, settle: float = 0.05, **arguments: Any
    ) -> dict[str, list[float]]:
        """Seconds of ``command`` for each present contender of ``names``, ``rounds`` each."""
        names = [n for n in names if n in self.present]
        out: dict[str, list[float]] = {n: [] for n in names}
        title = " ".join([command, *map(str, arguments.values())])
        for turn in track(range(rounds + warm_up), title, console=_progress):
            for name in names if turn % 2 == 0 else names[::-1]:
                if name not in self.present:
                    continue
                self._clock.sleep(settle)  # threads of the last one spin for some milliseconds before they sleep
                others = [c for n, c in self.present.items() if n != name]
                before, begin = sum(c.cpu_time() for c in others), self._clock.now()
                try:
                    seconds = float(self.present[name].ask(command, **arguments))
                except Absent as reason:
                    self.drop(name, str(reason))
                    del out[name]
                    continue
                spent = self._clock.now() - begin
                if spent > 0.25:  # processor time is counted in ticks of 10 ms
                    self.idle_share = max(self.idle_share, (sum(c.cpu_time() for c in others) - before) / spent)
                if turn >= warm_up:
                    out[name].append(seconds)
        return out

    def close(self) -> None:
        """End all."""
        for contender in self.present.values():
            contender.close()

    def compare(
        self,
        what: str,
        times: dict[str, list[float]],
        ours: str,
        peer: str,
        amount: float,
        unit: str,
        at_least: float | None = None,
        aim: float | None = None,
    ) -> Row:
        """A row that compares rates (``amount`` per time); above one we are faster."""
        for name in (ours, peer):
            if name not in times or not times[name]:
                return Row(what, peer, unit=unit, at_least=at_least, aim=aim, note=self.absent.get(name, "not run"))
        ratio = paired_ratio(times[peer], times[ours])
        rates = [amount / median(times[n]) for n in (ours, peer)]
        return Row(what, peer, rates[0], rates[1], unit, ratio.value, ratio.low, ratio.high, at_least, aim)


def median(values: Sequence[float]) -> float:
    """The middle value."""
    ordered = sorted(values)
    half = len(ordered) // 2
    return ordered[half] if len(ordered) % 2 else (ordered[half - 1] + ordered[half]) / 2


def options(description: str | None) -> argparse.ArgumentParser:
    """The options that every benchmark has."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the result here as well")
    parser.add_argument("--threads", type=int, default=2, help="threads of each contender (default 2)")
    return parser


def report(name: str, rows: Sequence[Row], path: Path | None, **details: Any) -> None:
    """Print the table and write the JSON document."""
    machine = Machine.detect()
    console = Console()
    if not console.is_terminal:  # a log has no width
        console = Console(width=150)
    table = Table(title=name, caption=str(machine), caption_justify="left")
    for heading in ("what", "against"):
        table.add_column(heading)
    for heading in ("ours", "peer", "score (95 %)", "at least", "aim"):
        table.add_column(heading, justify="right")
    table.add_column("verdict")
    for row in rows:
        bar, suffix = ("< " if row.limit else ""), (f" {row.unit}" if row.limit else "")
        score = "" if row.score is None else f"{row.score:.3g}{suffix}"
        if row.low is not None and row.high is not None and row.score is not None:
            score += f" ({row.low:.3g}–{row.high:.3g})"
        values = ["" if v is None else f"{v:.4g} {row.unit}" for v in (row.ours, row.theirs)]
        bars = ["" if b is None else f"{bar}{b:g}{suffix}" for b in (row.at_least, row.aim)]
        table.add_row(row.what, row.peer, *values, score, *bars, row.verdict)
    console.print(table)
    for row in rows:
        if row.note and row.score is not None:
            console.print(f"{row.what}: {row.note}")
    if machine.load is not None and machine.load > 1.0:
        console.print(f"[yellow]load average {machine.load:.2f}: other work may have disturbed this run[/]")
    if path is not None:
        lines = [{**asdict(row), "verdict": row.verdict} for row in rows]
        document = {"benchmark": name, "machine": machine.to_json(), "rows": lines, **details}
        write_text(path, json.dumps(document, indent=2, ensure_ascii=False) + "\n")
