"""``hasten stream``: spoken digits in a sound file, heard chunk by chunk as a live stream would be."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["stream"]


def stream(
    file: Annotated[Path, typer.Argument(help="WAV file; any sample rate, channels are averaged.")],
    data: Annotated[
        Path | None, typer.Option("--data", help="Folder of public data; ../shared/data where it exists.")
    ] = None,
    chunk: Annotated[str, typer.Option("--chunk", help="Length of a chunk, such as 20ms.")] = "20ms",
    epochs: Annotated[int, typer.Option("--epochs", help="Epochs, where the recogniser must be trained first.")] = 40,
    seed: Annotated[int, typer.Option("--seed", help="Seed of that training.")] = 0,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Recognise spoken digits with a spiking network; says when each was decided and what a chunk costs."""
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
