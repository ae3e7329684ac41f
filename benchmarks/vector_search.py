"""The vector index beside hnswlib, faiss, usearch and diskannpy: recall, queries per second, memory, in one run.

    python benchmarks/vector_search.py prepare --set float                 # data, and every contender's index, once
    python benchmarks/vector_search.py run --set float --json out.json     # everything that is timed, on an idle
    machine

Every contender is a process of its own, in the environment that ``--peers`` (hnswlib, faiss, usearch) and
``--diskann`` name. Each chooses its cheapest knob with recall@10 of at least 0.96 on the same queries, then they take
turns on one thread with warm caches. Memory is what a process holds beyond its mapped files. ``build`` times our own
build, on two threads within a stated memory.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from harness import HERE, Absent, Contender, Field, Row, median, options, report

from hasten.measure.stats import paired_ratio, percentile

SETS = {"float": (200_000, 96, "float32"), "uint8": (1_000_000, 128, "uint8"), "tiny": (5_000, 32, "float32")}
RECALL = 0.96
SMALL = {"float": "8MiB", "tiny": "1MiB"}
"""what "hasten, 8 MiB" may hold: no more than faiss's mapped IVF-Flat does on the 200,000 × 96"""
SINGLES = 3
"""rounds in which every query is asked alone"""
OURS = [
    [m, b]
    for b in (12, 16, 20, 24, 32, 40, 48, 64, 96, 128)
    for m in (4, 6, 8, 9, 10, 11, 12, 14, 16, 20, 24, 32, 48)
    if m <= b
]
EFS = [10, 12, 14, 16, 20, 24, 32, 40, 48, 64, 96, 128, 192, 256, 384]
PROBES = [4, 8, 12, 16, 20, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512]
PEERS = {  # name: (kind, knobs, environment)
    "hasten": ("hasten", OURS, "own"),
    "hasten, 8 MiB": ("hasten", OURS, "own"),
    "hnswlib": ("hnswlib", EFS, "peers"),
    "faiss HNSW": ("faiss-hnsw", EFS, "peers"),
    "faiss IVF-Flat": ("faiss-ivf", PROBES, "peers"),
    "faiss IVF-Flat, mapped": ("faiss-ivf-mapped", PROBES, "peers"),
    "usearch": ("usearch", EFS, "peers"),
    "diskannpy, memory": ("diskann", EFS, "diskann"),
}


class Peer(Contender):
    """A worker of ``vector_peers.py`` in an environment of its own."""

    def __init__(self, python: str, kind: str, given: dict[str, Any]) -> None:
        self.name = kind
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the process
        try:
            self._process = subprocess.Popen(
                [python, str(HERE / "vector_peers.py"), kind, json.dumps(given)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._log,
                text=True,
            )
        except OSError as error:
            raise Absent(f"{python} cannot be started ({error.strerror})") from error
        try:
            self.info = self._read()
        except Absent:
            self.close()
            raise


def data(folder: Path, name: str, seed: int = 7) -> None:
    """Base, queries and true neighbours, once."""
    from hasten.retrieve.index.synthetic import clustered

    if (folder / "truth.npy").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    n, d, kind = SETS[name]
    base, queries = clustered(n, d, 1000, seed=seed, dtype=np.dtype(kind))
    np.save(folder / "base.npy", base)
    np.save(folder / "queries.npy", queries)
    asked = queries.astype(np.float32)
    best_d, best_i = np.full((1000, 10), np.inf, np.float32), np.full((1000, 10), -1)
    for begin in range(0, n, 50_000):
        rows = base[begin : begin + 50_000].astype(np.float32)
        distance = (rows**2).sum(1) - 2 * asked @ rows.T + (asked**2).sum(1)[:, None]
        part = np.argpartition(distance, 10, axis=1)[:, :10]
        joined = np.concatenate([best_d, np.take_along_axis(distance, part, 1)], 1)
        names = np.concatenate([best_i, part + begin], 1)
        order = np.argsort(joined, 1)[:, :10]
        best_d, best_i = np.take_along_axis(joined, order, 1), np.take_along_axis(names, order, 1)
    np.save(folder / "truth.npy", best_i)


def worker(arguments: Any, name: str, **more: Any) -> Peer:
    """Start a contender."""
    kind, _, place = PEERS[name]
    python = {"own": sys.executable, "peers": arguments.peers, "diskann": arguments.diskann}[place]
    given = {"data": str(arguments.folder / arguments.set), **more}
    if kind == "hasten":
        given |= {"memory": arguments.memory, "head_ratio": arguments.head_ratio}
        given |= {"hold": SMALL[arguments.set]} if name == "hasten, 8 MiB" else {}
    return Peer(python, kind, given)


def prepare(arguments: Any) -> None:
    """Data and indices."""
    data(arguments.folder / arguments.set, arguments.set)
    for name in arguments.only or PEERS:
        if name in ("faiss IVF-Flat, mapped", "hasten, 8 MiB"):
            continue  # the same files
        try:
            peer = worker(arguments, name)
            print(name, json.dumps(peer.ask("build")), flush=True)
            peer.close()
        except Absent as reason:
            print(name, "absent:", reason, flush=True)


def run(arguments: Any) -> None:
    """Everything that is timed."""
    field = Field()
    knobs: dict[str, Any] = {}
    recalls: dict[str, float] = {}
    memory: dict[str, float] = {}
    curves: dict[str, Any] = {}
    for name in arguments.only or PEERS:
        if name == "hasten, 8 MiB" and arguments.set not in SMALL:
            continue
        try:
            peer = worker(arguments, name)
            memory[name] = peer.ask("load")["memory"]
            chosen = peer.ask("cheapest", knobs=PEERS[name][1], recall=RECALL)
        except Absent as reason:
            field.absent[name] = str(reason)
            continue
        curves[name] = chosen["curve"]
        if chosen["knob"] is None:
            field.absent[name] = f"no knob reaches {RECALL}; best {chosen['recall']:.3f}"
            peer.close()
            continue
        field.present[name], knobs[name], recalls[name] = peer, chosen["knob"], chosen["recall"]
    times: dict[str, list[float]] = {n: [] for n in field.present}
    for turn in range(arguments.rounds):
        for name in list(field.present) if turn % 2 == 0 else list(field.present)[::-1]:
            times[name].append(float(field.present[name].ask("batch", knob=knobs[name])))
    singles: dict[str, list[float]] = {n: [] for n in field.present}
    for _ in range(SINGLES):
        for name, peer in field.present.items():
            singles[name] += peer.ask("single", knob=knobs[name])
    if "hasten" in field.present:
        usual = percentile(singles["hasten"], 50).value
        idle = [t for _ in range(SINGLES) for t in field.present["hasten"].ask("idle", seconds=usual)]
        singles["an empty loop as long as our p50"] = idle
    rows: list[Row] = []
    count = len(np.load(arguments.folder / arguments.set / "queries.npy"))
    details: dict[str, Any] = {}
    if "hasten" in field.present:
        details = field.present["hasten"].ask("details", knob=knobs["hasten"])
        rows += compare(field, times, singles, knobs, recalls, memory, details, count)
        if arguments.cold:
            rows.append(cold(arguments, knobs["hasten"]))
    field.close()
    report(
        f"vector search, {arguments.set} {SETS[arguments.set]}",
        rows,
        arguments.json,
        knobs=knobs,
        recalls=recalls,
        memory=memory,
        curves=curves,
        details=details,
        absent=field.absent,
        single={n: {"p50": percentile(s, 50).value, "p99": percentile(s, 99).value} for n, s in singles.items()},
        qps={n: count / median(t) for n, t in times.items() if t},
    )


def compare(
    field: Field,
    times: dict[str, list[float]],
    singles: dict[str, list[float]],
    knobs: dict[str, Any],
    recalls: dict[str, float],
    memory: dict[str, float],
    details: dict[str, Any],
    count: int,
) -> list[Row]:
    """The rows of the table."""
    rows = []
    bars = {"hnswlib": (0.4, 0.8), "faiss IVF-Flat, mapped": (1.3, None)}
    for name in PEERS:
        if name.startswith("hasten"):
            continue
        least, aim = bars.get(name, (None, None))
        what = f"QPS at recall ≥ {RECALL}, one thread"
        if name not in field.present:
            rows.append(Row(what, name, unit="/s", at_least=least, aim=aim, note=field.absent.get(name, "not run")))
            continue
        ratio = paired_ratio(times[name], times["hasten"])
        note = f"{name} {knobs[name]} recall {recalls[name]:.4f}, {memory[name] / 2**20:.0f} MiB; "
        note += f"ours {knobs['hasten']} recall "
        note += f"{recalls['hasten']:.4f}, {details['parts']['total'] / 2**20:.1f} MiB"
        rates = [count / median(times[n]) for n in ("hasten", name)]
        rows.append(
            Row(what, name, rates[0], rates[1], "/s", ratio.value, ratio.low, ratio.high, least, aim, note=note)
        )
        p50 = [percentile(singles[n], 50).value * 1e6 for n in ("hasten", name)]
        rows.append(Row("p50 of a single query, peer over ours", name, p50[0], p50[1], "µs", p50[1] / p50[0]))
    if "hnswlib" in memory:
        ours, theirs = details["parts"]["total"], memory["hnswlib"]
        what = "memory: heads, graph, directory"
        rows.append(
            Row(
                what,
                "hnswlib",
                ours / 2**20,
                theirs / 2**20,
                "",
                ours / theirs,
                None,
                None,
                0.25,
                limit=True,
                note="MiB",
            )
        )
        held = memory["hasten"]
        rows.append(
            Row(
                "memory: all that our process took to open and search",
                "hnswlib",
                held / 2**20,
                theirs / 2**20,
                "",
                held / theirs,
                note="MiB",
            )
        )
    rows += small(field, times, knobs, recalls, memory, count)
    for name, seconds in singles.items():  # the peers' say how much of it is the machine's
        slow = percentile(seconds, 99).value / percentile(seconds, 50).value
        bar = 3.0 if name == "hasten" else None
        rows.append(Row(f"p99 over p50 of single queries: {name}", score=slow, at_least=bar, limit=True))
    usual = np.median(np.array(singles["hasten"]).reshape(SINGLES, count), axis=0)  # of each query: its own share
    own = percentile(list(usual), 99).value / percentile(list(usual), 50).value
    rows.append(Row(f"the same of each query's median of {SINGLES} rounds: hasten", score=own))
    told = {k: details[k] for k in ("lists", "reads", "bytes", "distances")}
    for name, value in told.items():
        rows.append(Row(f"{name} per query", ours=value, score=None, note="for information"))
    return rows


def small(
    field: Field,
    times: dict[str, list[float]],
    knobs: dict[str, Any],
    recalls: dict[str, float],
    memory: dict[str, float],
    count: int,
) -> list[Row]:
    """Ours within a small memory beside faiss's mapped IVF-Flat: what is held, and the rate."""
    ours, name = "hasten, 8 MiB", "faiss IVF-Flat, mapped"
    if ours not in field.present or name not in field.present:
        return []
    parts = field.present[ours].ask("details", knob=knobs[ours])["parts"]["total"]
    ratio = paired_ratio(times[name], times[ours])
    rates = [count / median(times[n]) for n in (ours, name)]
    note = f"ours {knobs[ours]} recall {recalls[ours]:.4f}; heads, graph, directory {parts / 2**20:.2f} MiB; "
    note += f"whole process {memory[ours] / 2**20:.1f} against {memory[name] / 2**20:.1f} MiB"
    return [
        Row("QPS within 8 MiB", name, rates[0], rates[1], "/s", ratio.value, ratio.low, ratio.high, 1.3, note=note),
        Row(
            "memory within 8 MiB: heads, graph, directory",
            "",
            parts / 2**20,
            note="MiB",
            score=parts / 2**23,
            at_least=1.0,
            limit=True,
        ),
    ]


def cold(arguments: Any, knob: Any) -> Row:
    """The same queries past the page cache."""
    try:
        peer = worker(arguments, "hasten", io="direct")
        peer.ask("load")
        times = peer.ask("single", knob=knob)
        peer.close()
    except Absent as reason:
        return Row("cold: p50 of a single query with O_DIRECT", note=str(reason))
    p50, p99 = percentile(times, 50).value * 1e6, percentile(times, 99).value * 1e6
    return Row(
        "cold: p50 of a single query with O_DIRECT",
        ours=p50,
        unit="µs",
        note=f"p99 {p99:.0f} µs; the disk's own speed decides",
    )


def timed_build(arguments: Any) -> None:
    """Our build from a memory map, on two threads, within ``--memory``."""
    import shutil

    from hasten.budget import parse_quantity

    data(arguments.folder / arguments.set, arguments.set)
    shutil.rmtree(arguments.folder / arguments.set / "hasten.spann", ignore_errors=True)
    peer = worker(arguments, "hasten", threads=2)
    told = peer.ask("build")
    peer.close()
    allowed = parse_quantity(arguments.memory, "bytes")
    n, d, kind = SETS[arguments.set]
    rows = [
        Row(
            f"build of {n:,} × {d} {kind}, two threads",
            ours=told["seconds"],
            unit="s",
            score=told["seconds"],
            at_least=90.0,
            limit=True,
        ),
        Row(
            "peak memory of the build over the stated one",
            ours=told["above"] / 2**20,
            theirs=allowed / 2**20,
            score=told["above"] / allowed,
            at_least=1.3,
            limit=True,
            note="MiB",
        ),
        Row(
            "spread of the list lengths before the cut (std / mean)",
            score=told["built"]["list_spread"],
            at_least=0.5,
            limit=True,
        ),
    ]
    report(f"vector index, build of {arguments.set}", rows, arguments.json, told=told)


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("step", choices=("prepare", "build", "run"))
    parser.add_argument("--set", choices=tuple(SETS), default="float")
    parser.add_argument("--folder", type=Path, default=Path("build/benchmarks/vectors"), help="data and indices")
    parser.add_argument("--peers", default=sys.executable, help="python with hnswlib, faiss-cpu and usearch")
    parser.add_argument("--diskann", default=sys.executable, help="python with diskannpy (which needs numpy 1.25)")
    parser.add_argument("--only", nargs="*", choices=tuple(PEERS), help="these contenders")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--memory", default="512MiB", help="what our build may take")
    parser.add_argument("--head-ratio", type=float, default=0.16)
    parser.add_argument("--cold", action="store_true", help="also search past the page cache")
    arguments = parser.parse_args()
    {"prepare": prepare, "build": timed_build, "run": run}[arguments.step](arguments)


if __name__ == "__main__":
    main()
