"""``hasten stream``: spoken digits in a sound file, or alerts of a sky survey, taken in as a live stream would be."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["stream"]


def stream(
    file: Annotated[
        Path, typer.Argument(help="WAV file (any sample rate, channels are averaged), or alerts as CSV or CSV.gz.")
    ],
    model: Annotated[
        Path | None, typer.Option("--model", help="Alerts: folder of a packed classifier; without, one is made once.")
    ] = None,
    batch: Annotated[int, typer.Option("--batch", help="Alerts: how many are classified together at most.")] = 1,
    limit: Annotated[int, typer.Option("--limit", help="Alerts: stop after so many; 0 takes all.")] = 0,
    data: Annotated[
        Path | None, typer.Option("--data", help="Folder of public data; ../shared/data where it exists.")
    ] = None,
    chunk: Annotated[str, typer.Option("--chunk", help="Length of a chunk, such as 20ms.")] = "20ms",
    epochs: Annotated[int, typer.Option("--epochs", help="Epochs, where the recogniser must be trained first.")] = 40,
    seed: Annotated[int, typer.Option("--seed", help="Seed of that training.")] = 0,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Recognise spoken digits as they are heard, or classify astronomical alerts as they arrive.

    Sound: a spiking network says when each digit was decided and what a chunk costs. Alerts: after each the object's
    class, then alerts per second and the percentiles of their latency.
    """
    if file.suffix.lower() != ".wav":
        _alerts(file, model, batch, limit, json)
        return
    import dataclasses
    from json import dumps

    from rich.console import Console

    from hasten.budget import format_quantity, parse_quantity
    from hasten.cli.progress import stages
    from hasten.clock import MonotonicClock
    from hasten.errors import DataError
    from hasten.measure.stats import summarise
    from hasten.spiking.recogniser import load_recogniser
    from hasten.spiking.sound import Resampler, read_wav
    from hasten.studies import find_data

    console = Console(stderr=json)
    seconds = parse_quantity(chunk, "time")
    rate, chunks = read_wav(file, seconds)
    folder = find_data(data)
    if folder is None or not (folder / "speech" / "fsdd_8k.npz").exists():
        raise DataError(f"no spoken digits to learn from in {folder}; give --data DIR with speech/fsdd_8k.npz")
    with stages(console) as told:
        recogniser, figures = load_recogniser(
            folder / "speech" / "fsdd_8k.npz", epochs=epochs, seed=seed, progress=told
        )
    resampler, clock = Resampler(rate, recogniser.ear.sample_rate), MonotonicClock()
    words, costs = [], []

    def tell(found: list) -> None:  # type: ignore[type-arg]
        for word in found:
            words.append({**dataclasses.asdict(word), "latency": word.latency})
            if not json:
                console.print(
                    f"[bold]{word.digit}[/]  at {word.begin:.2f} s, decided after "
                    f"{format_quantity(word.latency, 'time')} ({100 * word.confidence:.0f} %)"
                )

    for samples in chunks:
        began = clock.now()
        found = recogniser.push(resampler.push(samples))
        costs.append(clock.now() - began)
        tell(found)
    tell(recogniser.push(resampler.flush()) + recogniser.flush())
    summary = summarise(costs) if costs else None
    if json:
        document = {
            "file": str(file), "words": words, "chunk": seconds, "chunks": len(costs), "figures": figures,
            "state_bytes": recogniser.state_bytes,
            "compute": summary.to_json() if summary is not None else None,
        }  # fmt: skip
        print(dumps(document))
    elif summary is not None:
        console.print(
            f"{len(costs)} chunks of {format_quantity(seconds, 'time')}: "
            f"p50 {format_quantity(summary.at(50), 'time')}, "
            f"p99 {format_quantity(summary.at(99), 'time')} of computing each; state {recogniser.state_bytes} bytes; "
            f"the recogniser's accuracy on recordings kept apart is {100 * figures['accuracy']:.1f} %"
        )


def _alerts(file: Path, folder: Path | None, batch: int, limit: int, json: bool) -> None:
    """Alerts in order of time, each classified at once (or with up to ``batch`` others)."""
    from collections import Counter
    from itertools import islice
    from json import dumps

    from rich.console import Console

    from hasten.budget import format_quantity
    from hasten.cli.progress import stages
    from hasten.clock import MonotonicClock
    from hasten.errors import ConfigurationError, DataError
    from hasten.events.alerts import Classification, read_alerts
    from hasten.events.classifier import cached_classifier, classifier_of
    from hasten.events.observations import LSST, ZTF
    from hasten.measure.stats import summarise

    if batch < 1 or limit < 0:
        raise ConfigurationError(
            f"--batch {batch} and --limit {limit}: give a batch of 1 or more, and a limit of 0 or more"
        )
    console, clock = Console(stderr=json), MonotonicClock()
    alerts = list(islice(read_alerts(file), limit or None))
    if not alerts:
        raise DataError(f"{str(file)!r} holds no alert; give a file with at least one observation")
    if folder is None:
        bands = ZTF if {a.band for a in alerts} <= {"g", "r", "i"} else LSST
        with stages(console) as told:
            folder = cached_classifier(bands, told)
    began = clock.now()
    stream = classifier_of(folder, batch=batch, on_error="skip", clock=clock)
    loaded = clock.now() - began
    last: dict[str, Classification] = {}
    began = clock.now()
    for start in range(0, len(alerts), batch):
        for found in stream.push(alerts[start : start + batch]):
            last[found.object_id] = found
    for found in stream.flush():
        last[found.object_id] = found
    seconds = clock.now() - began
    summary = summarise(list(stream.delays), (50, 90, 99)) if stream.delays else None
    rate = stream.answered / seconds if seconds > 0 else 0.0
    counts = Counter(c.label for c in last.values())
    if json:
        objects = {
            n: {"class": c.label, "probability": max(c.probabilities), "points": c.points} for n, c in last.items()
        }
        document = {
            "file": str(file), "alerts": len(alerts), "skipped": stream.skipped, "classified": stream.answered,
            "alerts_per_second": rate, "load": loaded, "objects": objects, "batch": batch,
            "latency": summary.to_json() if summary is not None else None,
        }  # fmt: skip
        print(dumps(document))
        return
    for name, found in list(last.items())[:20]:
        console.print(
            f"[bold]{name}[/]  {found.label} ({100 * max(found.probabilities):.0f} %) after {found.points} points"
        )
    if len(last) > 20:
        console.print(f"… and {len(last) - 20} objects more")
    console.print(", ".join(f"{count} {label}" for label, count in counts.most_common()))
    if summary is not None:
        console.print(
            f"{stream.answered} answers to {len(alerts)} alerts ({stream.skipped} skipped), {rate:.0f} alerts per "
            f"second; latency p50 {format_quantity(summary.at(50), 'time')}, p99 "
            f"{format_quantity(summary.at(99), 'time')}; model ready in {format_quantity(loaded, 'time')}"
        )
