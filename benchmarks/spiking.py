"""Spiking networks against snnTorch and SpikingJelly, one timestep against five, and spoken digits live, in one run.

The network is 700-512-512-20 leaky neurons over 100 steps, batch 64: training (forward, backward, Adam) and
inference, with sparse and with dense input spikes; peak memory; and the Fashion-MNIST networks of the study
``iir-snn``. Peers run in their own environment (``--peers PYTHON``); contenders are processes that take turns. Bars: at
least 2x snnTorch and 1.2x SpikingJelly (multi-step, torch), memory not above theirs, one step within a point of five at
4x its speed or more.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from harness import Absent, Contender, Field, Row, median, options, report

from hasten.measure.stats import paired_ratio

HERE = Path(__file__).parent
OURS, LATE = "hasten", "hasten, late reset"
PEERS = {"snntorch": (LATE, 2.0), "spikingjelly": (OURS, 1.2)}
"""peer -> which of ours has its reset, and the bar"""


class Spiking(Contender):
    """A worker of ``spiking_worker.py`` in a Python of its own."""

    def __init__(self, name: str, python: str, kind: str, **settings: Any) -> None:
        self.name = name
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the process
        threads = str(settings["threads"])
        environment = {**os.environ, "OMP_NUM_THREADS": threads, "NUMBA_NUM_THREADS": threads}
        self._process = subprocess.Popen(
            [python, str(HERE / "spiking_worker.py"), kind, json.dumps(settings)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True, env=environment,
        )  # fmt: skip
        try:
            self.info: dict[str, Any] = self._read()
        except Absent:
            self.close()
            raise


def start(field: Field, python: str, rate: float, threads: int, names: list[str]) -> None:
    """All contenders for one rate of input spikes."""
    for name in names:
        kind = {LATE: "hasten-late"}.get(name, name)
        mine = name in (OURS, LATE)
        try:
            field.present[name] = Spiking(
                name, sys.executable if mine else python, kind, threads=threads, steps=100, batch=64, rate=rate
            )
        except (Absent, OSError) as reason:
            field.absent[name] = str(reason)


def speed(python: str, rounds: int, threads: int, details: dict[str, Any]) -> list[Row]:
    """Time of training and inference, per rate of input spikes."""
    rows = []
    for rate in (0.03, 0.3):
        field = Field()
        start(field, python, rate, threads, [OURS, LATE, *PEERS])
        try:
            details[f"facts at {rate:g}"] = {n: c.ask("facts") for n, c in field.present.items()}
            names = list(field.present)
            for what in ("train", "infer"):
                times = field.in_turns(names, what, rounds, repeats=1 if what == "train" else 3)
                for peer, (ours, bar) in PEERS.items():
                    label = f"{what}, {100 * rate:g} % input spikes"
                    rows.append(field.compare(label, times, ours, peer, 64.0, "samples/s", bar))
            details[f"idle share at {rate:g}"] = field.idle_share
        finally:
            field.close()
    return rows


def memory(python: str, threads: int) -> list[Row]:
    """Peak of a fresh process above where it stood before the first run, three processes each."""
    peaks: dict[tuple[str, str], list[float]] = {}
    absent: dict[str, str] = {}
    for _ in range(3):
        for name in (OURS, *PEERS):
            for what in ("train", "infer"):
                field = Field()
                start(field, python, 0.03, threads, [name])
                absent |= field.absent
                for contender in field.present.values():
                    peaks.setdefault((name, what), []).append(float(contender.ask("memory", what=what)))
                field.close()
    rows = []
    for what in ("train", "infer"):
        for peer in PEERS:
            label = f"memory, {what}"
            if (peer, what) not in peaks:
                rows.append(Row(label, peer, note=absent.get(peer, "not run")))
                continue
            ours, theirs = median(peaks[OURS, what]) / 2**20, median(peaks[peer, what]) / 2**20
            rows.append(Row(label, peer, ours, theirs, "MiB", theirs / ours, at_least=1.0))
    return rows


def one_step(data: Path | None, rounds: int, seeds: int) -> list[Row]:
    """The networks of the study, from its cache or trained now: accuracy on test images, time of a batch of 64."""
    import torch

    from hasten.measure.latency import Protocol, compare
    from hasten.spiking.fit import accuracy
    from hasten.studies import Scale
    from hasten.studies import _spiking as part
    from hasten.studies.iir_snn import networks

    found = part.fashion(Scale(data=data))
    label = "one step of five, Fashion-MNIST"
    if found is None:
        return [Row(label, "its parent", note="vision/fashion_mnist.npz is not in --data")]
    x, y, xt, yt = found
    shape: dict[str, Any] = {"channels": [16, 32, 32, 64], "pools": [0, 2, 3], "size": 28}
    settings = {"shape": shape, "epochs": 6, "first": 6, "later": [2, 2, 2, 8]}
    scores: dict[str, list[float]] = {"five": [], "one": []}
    for seed in range(seeds):
        made = part.cached(
            Scale(), "iir-stages", part.train_stages, {**settings, "seed": seed}, {"x": x, "y": y}, (0, 1)
        )
        _, parent, one = networks(shape, made, x)
        scores["five"].append(accuracy(parent, xt, yt))
        scores["one"].append(accuracy(one, xt, yt))
    batch = xt[:64]

    def call(model: Any) -> Any:
        def run() -> None:
            with torch.inference_mode():
                model(batch)

        return run

    rules = Protocol(min_samples=10 * rounds, min_time=2.0)
    timed = compare({"five": call(parent), "one": call(one)}, rules)
    times = {n: s.times for n, s in timed.samples.items()}
    ratio = paired_ratio(times["five"], times["one"])
    rates = [64 / timed.samples[n].median for n in ("one", "five")]
    lost = [100 * (a - b) for a, b in zip(scores["five"], scores["one"], strict=True)]
    return [
        Row(f"{label}: speed", "its parent", *rates, "images/s", ratio.value, ratio.low, ratio.high, 4.0),
        Row(
            f"{label}: points lost", "its parent", 100 * sum(scores["one"]) / seeds,
            100 * sum(scores["five"]) / seeds, "%",
            sum(lost) / seeds, min(lost), max(lost), 1.0, limit=True, 
            note=f"mean of {seeds} seeds; the range is that of the seeds",
        ),
    ]  # fmt: skip


def spoken(data: Path | None) -> list[Row]:
    """Recordings that no training has heard, half a second of silence between them, in chunks of 20 ms.

    Twice: the recogniser as users get it on takes 0 to 4, which were looked at while it was made, and one that was
    trained without takes 30 to 34 on these, which nobody looked at.
    """
    path = (data or Path()) / "speech" / "fsdd_8k.npz"
    if not path.exists():
        return [Row("spoken digits, live", note="speech/fsdd_8k.npz is not in --data")]
    return [row for last in (False, True) for row in live(path, last)]


def live(path: Path, last: bool) -> list[Row]:
    """One recogniser on the five takes of each word that its training did not hear."""
    import numpy as np
    import torch

    from hasten.clock import MonotonicClock
    from hasten.spiking import load_recogniser

    label = "spoken digits, live, untouched takes" if last else "spoken digits, live"
    recogniser, _ = load_recogniser(path, last=last)
    rate, clock = recogniser.ear.sample_rate, MonotonicClock()
    with np.load(path) as z:
        audio, offsets, digits, take = z["audio"], z["offsets"], z["label"], z["take"]
    pieces, spans, at = [], [], 0
    for index in np.flatnonzero(take > take.max() - 5 if last else take < 5):
        sound = audio[offsets[index] : offsets[index + 1]].astype(np.float32) / 32768
        spans.append((at / rate, (at + len(sound)) / rate, int(digits[index])))
        pieces += [sound, np.zeros(rate // 2, np.float32)]
        at += len(sound) + rate // 2
    words, costs = [], []
    for chunk in torch.from_numpy(np.concatenate(pieces)).split(rate // 50):
        began = clock.now()
        words += recogniser.push(chunk)
        costs.append(clock.now() - began)
    words += recogniser.flush()
    heard = [[w for w in words if a - 0.05 <= w.begin < b] for a, b, _ in spans]
    right = [w for found, (_, _, digit) in zip(heard, spans, strict=True) for w in found[:1] if w.digit == digit]
    delays, costs = sorted(w.latency for w in words), sorted(costs)
    count = sum(bool(found) for found in heard)
    note = f"{len(spans)} recordings of takes {'30 to 34' if last else '0 to 4'}, {len(words)} words decided"
    return [
        Row(f"{label}: heard", ours=100 * count / len(spans), unit="%", note=note),
        Row(f"{label}: right of all", ours=100 * len(right) / len(spans), unit="%"),
        Row(f"{label}: sound until the decision, median", ours=1e3 * delays[len(delays) // 2], unit="ms"),
        Row(f"{label}: the same, 99 %", ours=1e3 * delays[int(0.99 * len(delays))], unit="ms"),
        Row(f"{label}: computing per 20 ms, median", ours=1e3 * costs[len(costs) // 2], unit="ms"),
        Row(f"{label}: the same, 99 %", ours=1e3 * costs[int(0.99 * len(costs))], unit="ms"),
    ]


def main() -> None:
    """Command line."""
    parser = options(__doc__)
    parser.add_argument("--peers", default=sys.executable, help="Python with snntorch and spikingjelly")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--seeds", type=int, default=3, help="networks of the study to train or take from the cache")
    parser.add_argument("--only", choices=("speed", "memory", "steps", "stream"), help="one part of it")
    arguments = parser.parse_args()
    details: dict[str, Any] = {}
    rows: list[Row] = []
    if arguments.only in (None, "speed"):
        rows += speed(arguments.peers, arguments.rounds, arguments.threads, details)
    if arguments.only in (None, "memory"):
        rows += memory(arguments.peers, arguments.threads)
    if arguments.only in (None, "steps"):
        with contextlib.suppress(ImportError):
            import torch

            torch.set_num_threads(arguments.threads)
        rows += one_step(arguments.data, arguments.rounds, arguments.seeds)
    if arguments.only in (None, "stream"):
        rows += spoken(arguments.data)
    report("spiking networks", rows, arguments.json, **details)


if __name__ == "__main__":
    main()
